"""What a model is calibrated on: texts that are none, tokenizers and batches that do not fit."""

import pytest
import torch
from tiny import WIDTH, Mlp, Stack, randn
from torch import nn

import modcompile as mc
from modcompile.calibration.batches import bind_batches, text_batches
from modcompile.errors import UsageError

# B batch  S rows


def letters(text, **_):
    """A tokenizer of letters."""
    return {"input_ids": [ord(letter) for letter in text]}


def test_a_text_becomes_sequences_from_all_over_it():
    text = "".join(chr(97 + i) * 4 for i in range(13)) + "zz"
    calls = text_batches(text, letters, ["input_ids", "attention_mask", "token_type_ids"], batch=2, rows=4, sequences=4)
    assert [call["input_ids"][:, 0].tolist() for call in calls] == [[ord("a"), ord("d")], [ord("g"), ord("j")]]
    assert all(call["input_ids"].shape == (2, 4) and (call["input_ids"].diff() == 0).all() for call in calls)
    assert all(call["attention_mask"].all() and not call["token_type_ids"].any() for call in calls)
    # A number that no batch divides is rounded down.
    assert len(text_batches(text, letters, ["input_ids"], batch=2, rows=4, sequences=99)) == 6


def test_a_sequence_has_the_special_tokens_of_a_text():
    def framed(text, add_special_tokens=True, **_):
        ids = [ord(letter) for letter in text]
        return {"input_ids": [1, *ids, 2, 3] if add_special_tokens else ids}

    (call,) = text_batches("abcde", framed, ["input_ids"], batch=2, rows=5)
    assert call["input_ids"].tolist() == [[1, 97, 98, 2, 3], [1, 99, 100, 2, 3]]
    with pytest.raises(UsageError, match="the sequences are too short"):
        text_batches("abcde", framed, ["input_ids"], batch=2, rows=3)


def test_a_text_that_is_too_short_says_how_much_is_needed():
    with pytest.raises(UsageError, match="the text is too short") as raised:
        text_batches("abcdefg", letters, ["input_ids"], batch=2, rows=4)
    assert (raised.value.details["expected"], raised.value.details["found"]) == (
        "8 tokens, for one batch of 2 x 4", "7 tokens")  # fmt: skip


@pytest.mark.parametrize("inputs", [["pixel_values"], ["input_ids", "decoder_input_ids"]])
def test_a_text_is_no_input_of_another_kind(inputs):
    with pytest.raises(UsageError, match="a text cannot be made into the inputs of this model"):
        text_batches("abcdefgh", letters, inputs, batch=2, rows=4)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.stack = nn.Embedding(11, WIDTH), Stack(Mlp(), Mlp())

    def forward(self, ids):
        return self.stack(self.table(ids))


def test_words_of_another_vocabulary_are_refused():
    graph = mc.capture(Words(), {"ids": torch.zeros(2, 5, dtype=torch.long)})
    calls = [{"ids": torch.zeros(2, 5, dtype=torch.long)}, {"ids": torch.full((2, 5), 11)}]
    with pytest.raises(UsageError, match="the tokens are not of this model's vocabulary") as raised:
        bind_batches(graph, calls, mc.MoDConfig())
    assert raised.value.details["where"] == "batches[1], input ids"
    assert (raised.value.details["expected"], raised.value.details["found"]) == ("0 to 10", "11 to 11")


def test_batches_are_dicts_tuples_or_tensors_and_know_their_padding():
    graph = mc.capture(Words(), (torch.zeros(2, 5, dtype=torch.long),))
    ids = torch.ones(2, 5, dtype=torch.long)
    for call in (ids, (ids,), {"ids": ids}):
        (batch,) = bind_batches(graph, [call], mc.MoDConfig())
        assert batch.inputs[0] is ids and batch.valid is None
    with pytest.raises(UsageError, match="rank"):
        bind_batches(graph, [ids[0]], mc.MoDConfig())


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = Stack(Mlp(), Mlp())

    def forward(self, hidden, mask):
        return self.stack(hidden) * mask[..., None]


@pytest.mark.parametrize("padding_mask", ["mask", "~mask"])
def test_padding_is_what_the_configuration_says(padding_mask):
    given = torch.tensor([[1, 0, 1], [0, 0, 1]])
    graph = mc.capture(Masked(), {"hidden": randn(2, 3, WIDTH), "mask": given})
    config = mc.MoDConfig(padding_mask=padding_mask)
    (batch,) = bind_batches(graph, [{"hidden": randn(2, 3, WIDTH), "mask": given}], config)
    assert torch.equal(batch.valid, given.bool() if padding_mask == "mask" else ~given.bool())
    with pytest.raises(UsageError, match="a batch is padding alone"):
        alone = torch.zeros(2, 3, dtype=torch.long) if padding_mask == "mask" else torch.ones(2, 3, dtype=torch.long)
        bind_batches(graph, [{"hidden": randn(2, 3, WIDTH), "mask": alone}], config)


def test_fewer_sequences_than_a_batch_are_one_call():
    (call,) = text_batches("ab" * 40, letters, ["input_ids"], batch=4, rows=8, sequences=1)
    assert call["input_ids"].shape == (1, 8)
