"""Examples as batches of a model's inputs: tokenized, near in length, padded to the longest of the batch."""

__all__ = ["EncodedBatch", "answer_spans", "encode"]

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modcompile.errors import UsageError
from modcompile.tasks.example import Example, Question, Rated

# B examples  S tokens
IGNORED = -100

# Where each token of the passage stands in it, first and last character + 1; None for other tokens.
Spans = list[tuple[int, int] | None]


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """Some examples.

    Attributes:
        inputs: Of the model, by name, int64 [B, S]; for rated pairs [2 B, S], a pair's texts one after the other.
        target: Classes, int64 [B]; or ratings, float32 [B]; or the first and the last token of an answer, int64 [B, 2]:
            the first of all where there is no answer, -100 where it was cut off.
        indices: Which examples.
        spans: Of questions, where the tokens stand.
    """

    inputs: dict[str, Tensor]
    target: Tensor
    indices: list[int]
    spans: list[Spans] = dataclasses.field(default_factory=list)

    def to(self, device: torch.device | str) -> "EncodedBatch":
        """On another device."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return dataclasses.replace(self, inputs=inputs, target=self.target.to(device))


def encode(examples: Sequence[Example], tokenizer: Any, *, batch: int, rows: int, labels: Sequence[str] = (),
           multiple: int = 8) -> list[EncodedBatch]:
    """Batches from the shortest examples to the longest, so that little is padding.

    Args:
        examples: Of one kind.
        tokenizer: A fast tokenizer of transformers, or anything called alike.
        batch: B; the last batch may be smaller.
        rows: The most tokens of a text or a pair; what is longer is cut: of questions the passage, of other pairs the
            longer text.
        labels: The classes of labelled texts, in the order of their numbers.
        multiple: S is rounded up to a multiple of this, where ``rows`` lets it.

    Raises:
        UsageError: No examples, a label that is not among the classes, or a question too long for its passage.
    """
    if not examples:
        raise UsageError("there is nothing to encode", expected="examples", found="none", where="encode")
    made = _questions if isinstance(examples[0], Question) else _rated if isinstance(examples[0], Rated) else _labelled
    tokens, targets, spans = made(examples, tokenizer, rows, labels)
    each = len(tokens["input_ids"]) // len(examples)
    lengths = [max(map(len, tokens["input_ids"][each * i:each * (i + 1)])) for i in range(len(examples))]
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    fill = {"input_ids": tokenizer.pad_token_id or 0}
    batches = []
    for start in range(0, len(order), batch):
        indices = order[start:start + batch]
        size = min(rows, -(-lengths[indices[-1]] // multiple) * multiple)
        places = [each * i + part for i in indices for part in range(each)]
        inputs = {name: torch.tensor([_padded(values[place], size, fill.get(name, 0)) for place in places])
                  for name, values in tokens.items()}
        target = torch.tensor([targets[i] for i in indices])
        batches.append(EncodedBatch(inputs, target, indices, [spans[i] for i in indices] if spans else []))
    return batches


# Of each kind: what the tokenizer makes, a list for each text; the targets; of questions, the spans.
_Made = tuple[dict[str, list], list[Any], list[Spans]]


def _labelled(examples: Sequence[Any], tokenizer: Any, rows: int, labels: Sequence[str]) -> _Made:
    numbers = {label: number for number, label in enumerate(labels)}
    unknown = sorted({example.label for example in examples} - numbers.keys())
    if unknown:
        raise UsageError("there is no such class", expected=", ".join(labels), found=", ".join(unknown), where="encode")
    pairs = [example.pair for example in examples]
    if len(alone := {pair is None for pair in pairs}) > 1:
        raise UsageError("some texts are pairs and others are not", expected="a second text in all or in none",
                         found=f"{pairs.count(None)} of {len(pairs)} without", where="encode")
    texts = [[example.text for example in examples], *([] if alone == {True} else [pairs])]
    return (dict(tokenizer(*texts, truncation=True, max_length=rows)),
            [numbers[example.label] for example in examples], [])


def _rated(examples: Sequence[Any], tokenizer: Any, rows: int, _: Sequence[str]) -> _Made:
    texts = [text for example in examples for text in (example.text, example.pair)]
    return dict(tokenizer(texts, truncation=True, max_length=rows)), [float(example.score) for example in examples], []


def _questions(examples: Sequence[Any], tokenizer: Any, rows: int, _: Sequence[str]) -> _Made:
    try:
        found = tokenizer([example.text for example in examples], [example.passage for example in examples],
                          truncation="only_second", max_length=rows, return_offsets_mapping=True)
    except Exception as error:
        # What the tokenizers library raises has no class of its own.
        raise UsageError("a question leaves no room for its passage", expected=f"questions shorter than {rows} tokens",
                         found=error, where="encode", fix="more rows") from error
    spans = [[span if part == 1 else None for span, part in zip(offsets, found.sequence_ids(i), strict=True)]
             for i, offsets in enumerate(found["offset_mapping"])]
    tokens = {name: values for name, values in found.items() if name != "offset_mapping"}
    return tokens, [_place(example, where) for example, where in zip(examples, spans, strict=True)], spans


def _padded(values: list[int], size: int, fill: int) -> list[int]:
    return [*values, *[fill] * (size - len(values))]


def _place(question: Question, spans: Spans) -> tuple[int, int]:
    """The first and the last token of the first answer."""
    if not question.answers:
        return 0, 0
    start = question.answers[0].start
    end = start + len(question.answers[0].text)
    inside = [(token, span[1]) for token, span in enumerate(spans) if span and span[0] < end and span[1] > start]
    whole = bool(inside) and inside[-1][1] >= end
    return (inside[0][0], inside[-1][0]) if whole else (IGNORED, IGNORED)


def answer_spans(logits: Tensor, batch: EncodedBatch, questions: Sequence[Question], longest: int = 16) -> list[str]:
    """The answers that logits of first and last tokens [B, S, 2] give: of all spans of a passage the best.

    Args:
        logits: The model's output for the batch.
        batch: As encoded.
        questions: All that were encoded.
        longest: Of an answer, in tokens.

    Returns:
        A text for each question of the batch; "" where no answer, the first token of all, is better than the best.
    """
    scores = logits.float()
    inside = torch.tensor([[i < len(spans) and spans[i] is not None for i in range(scores.shape[1])]
                           for spans in batch.spans], device=scores.device)  # [B, S]
    first, last = scores.masked_fill(~inside[:, :, None], -torch.inf).unbind(-1)  # [B, S] each
    pairs = first[:, :, None] + last[:, None]  # [B, S, S], first token and last
    allowed = torch.ones_like(pairs, dtype=torch.bool).triu().tril(longest - 1)
    best, places = pairs.masked_fill(~allowed, -torch.inf).flatten(1).max(1)
    found = (best > scores[:, 0].sum(-1)).tolist()
    made = []
    for row, (spans, index, place) in enumerate(zip(batch.spans, batch.indices, places.tolist(), strict=True)):
        begin, end = (spans[token] if found[row] else None for token in divmod(place, scores.shape[1]))
        made.append(questions[index].passage[begin[0]:end[1]] if begin and end else "")
    return made
