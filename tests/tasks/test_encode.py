"""Batches of a model's inputs: their order, padding, targets, and the way back from logits to an answer."""

import pytest
import torch

pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from modcompile.errors import UsageError
from modcompile.tasks import Answer, Labelled, Question, Rated, answer_spans, encode

WORDS = "one two three four five six seven eight nine ten which after".split()
PASSAGE = "one, two three four. five six"
PAD, CLS, SEP = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])},
                                      unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
                                   model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def test_near_lengths_share_a_batch_and_padding_is_masked(tokenizer):
    texts = [Labelled(" ".join(WORDS[:n]), "odd" if n % 2 else "even") for n in (9, 1, 5, 2, 10)]
    first, second, last = encode(texts, tokenizer, batch=2, rows=10, labels=["odd", "even"], multiple=4)
    assert [batch.indices for batch in (first, second, last)] == [[1, 3], [2, 0], [4]]
    assert [batch.inputs["input_ids"].shape for batch in (first, second, last)] == [(2, 4), (2, 10), (1, 10)]
    assert first.target.tolist() == [0, 1]
    assert first.inputs["input_ids"].tolist() == [[CLS, 4, SEP, PAD], [CLS, 4, 5, SEP]]
    assert first.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    # Of ten words, eight have room.
    assert last.inputs["input_ids"].tolist() == [[CLS, *range(4, 12), SEP]]


def test_pairs_and_ratings(tokenizer):
    (batch,) = encode([Labelled("one", "a", "two three"), Labelled("one", "a", "two")], tokenizer, batch=2, rows=16,
                      labels=["a"])
    assert batch.indices == [1, 0]
    assert batch.inputs["input_ids"].tolist() == [[CLS, 4, SEP, 5, SEP, PAD, PAD, PAD],
                                                  [CLS, 4, SEP, 5, 6, SEP, PAD, PAD]]
    assert batch.inputs["token_type_ids"][1].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    (batch,) = encode([Rated("one", "two three", 0.25), Rated("four", "five", 1)], tokenizer, batch=2, rows=16,
                      multiple=1)
    # A pair's texts follow each other, each by itself.
    assert batch.inputs["input_ids"].tolist() == [[CLS, 7, SEP, PAD], [CLS, 8, SEP, PAD], [CLS, 4, SEP, PAD],
                                                  [CLS, 5, 6, SEP]]
    assert batch.target.tolist() == [1, 0.25]


@pytest.mark.parametrize(
    ("answers", "rows", "expected", "read"),
    [
        ((Answer("two three", 5),), 32, [6, 7], "two three"),
        ((Answer("ree f", 11),), 32, [7, 8], "three four"),
        ((Answer("one", 0), Answer("six", 26)), 32, [4, 4], "one"),
        ((), 32, [0, 0], ""),
        ((Answer("five six", 21),), 11, [-100, -100], None),
        # Its first word has room, its last has not.
        ((Answer("four. five", 15),), 10, [-100, -100], None),
    ],
)
def test_where_an_answer_is(tokenizer, answers, rows, expected, read):
    question = Question("which after", PASSAGE, answers)
    assert all(PASSAGE[answer.start:].startswith(answer.text) for answer in answers)
    (batch,) = encode([question], tokenizer, batch=1, rows=rows)
    assert batch.target.tolist() == [expected]
    if read is not None:
        logits = torch.zeros(1, batch.inputs["input_ids"].shape[1], 2)
        logits[0, expected[0], 0] = logits[0, expected[1], 1] = 5
        assert answer_spans(logits, batch, [question]) == [read]


def test_answers_are_spans_of_the_passage(tokenizer):
    question = Question("which after", PASSAGE, (Answer("two", 5),))
    (batch,) = encode([question], tokenizer, batch=1, rows=32)
    logits = torch.zeros(1, batch.inputs["input_ids"].shape[1], 2)
    # The question's own words and padding are no answers, nor is what ends before it begins.
    logits[0, 1:3], logits[0, -1] = 50, 50
    logits[0, 8, 0], logits[0, 5, 1], logits[0, 9, 1] = 4, 4, 1
    assert answer_spans(logits, batch, [question]) == ["four."]
    logits[0, 0] = 3
    assert answer_spans(logits, batch, [question]) == [""]
    assert answer_spans(logits - 3, batch, [question]) == [""]
    logits[0, 0] = 0
    logits[0, 4, 0], logits[0, 10, 1] = 20, 20
    assert answer_spans(logits, batch, [question]) == ["one, two three four. five"]
    assert answer_spans(logits, batch, [question], longest=2) != ["one, two three four. five"]


@pytest.mark.parametrize(
    ("examples", "options", "problem"),
    [
        ([], {}, "there is nothing to encode"),
        ([Labelled("one", "other")], {"labels": ["a", "b"]}, "there is no such class"),
        ([Question("one " * 20, PASSAGE, ())], {}, "a question leaves no room for its passage"),
        ([Labelled("one", "a", "two"), Labelled("one", "a")], {"labels": ["a"]}, "some texts are pairs"),
    ],
)
def test_what_cannot_be_encoded(tokenizer, examples, options, problem):
    with pytest.raises(UsageError, match=problem) as raised:
        encode(examples, tokenizer, batch=2, rows=8, **options)
    assert raised.value.details["where"] == "encode"
