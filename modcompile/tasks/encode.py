"""Examples as batches of a model's inputs: tokenized, near in length, padded to the longest of the batch."""

__all__ = ["EncodedBatch", "answer_spans", "encode"]

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modcompile.errors import UsageError
from modcompile.tasks.example import Example, Labelled, Question, Rated

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
    numbers = {label: number for number, label in enumerate(labels)}
    for example in examples:
        if isinstance(example, Labelled) and example.label not in numbers:
            raise UsageError("there is no such class", expected=", ".join(labels), found=example.label, where="encode")
    each = 2 if isinstance(examples[0], Rated) else 1
    tokens = _tokenized(examples, tokenizer, rows)
    lengths = [max(map(len, tokens["input_ids"][each * i:each * (i + 1)])) for i in range(len(examples))]
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    names = [name for name in tokens if name not in ("offset_mapping", "passage")]
    fill = {"input_ids": tokenizer.pad_token_id or 0}
    made = []
    for start in range(0, len(order), batch):
        indices = order[start:start + batch]
        size = min(rows, -(-lengths[indices[-1]] // multiple) * multiple)
        places = [each * i + part for i in indices for part in range(each)]
        inputs = {name: torch.tensor([_padded(tokens[name][place], size, fill.get(name, 0)) for place in places])
                  for name in names}
        spans = [tokens["passage"][i] for i in indices] if "passage" in tokens else []
        made.append(EncodedBatch(inputs, _target([examples[i] for i in indices], numbers, spans), indices, spans))
    return made


def _tokenized(examples: Sequence[Example], tokenizer: Any, rows: int) -> dict[str, list]:
    texts = [example.text for example in examples]
    if isinstance(examples[0], Rated):
        both = [text for example in examples for text in (example.text, example.pair)]
        return dict(tokenizer(both, truncation=True, max_length=rows))
    if isinstance(examples[0], Labelled):
        pairs = [example.pair for example in examples]
        return dict(tokenizer(texts, *([] if None in pairs else [pairs]), truncation=True, max_length=rows))
    try:
        found = tokenizer(texts, [example.passage for example in examples], truncation="only_second", max_length=rows,
                          return_offsets_mapping=True)
    except Exception as error:
        # What the tokenizers library raises has no class of its own.
        raise UsageError("a question leaves no room for its passage", expected=f"questions shorter than {rows} tokens",
                         found=error, where="encode", fix="more rows") from error
    passage = [[span if part == 1 else None for span, part in zip(spans, found.sequence_ids(i), strict=True)]
               for i, spans in enumerate(found["offset_mapping"])]
    return {**found, "passage": passage}


def _padded(values: list[int], size: int, fill: int) -> list[int]:
    return [*values, *[fill] * (size - len(values))]


def _target(examples: Sequence[Example], numbers: dict[str, int], spans: list[Spans]) -> Tensor:
    if isinstance(examples[0], Labelled):
        return torch.tensor([numbers[example.label] for example in examples])
    if isinstance(examples[0], Rated):
        return torch.tensor([example.score for example in examples])
    return torch.tensor([_place(example, where) for example, where in zip(examples, spans, strict=True)])


def _place(question: Question, spans: Spans) -> tuple[int, int]:
    """The first and the last token of the first answer."""
    if not question.answers:
        return 0, 0
    start = question.answers[0].start
    end = start + len(question.answers[0].text)
    inside = [token for token, span in enumerate(spans) if span and span[0] < end and span[1] > start]
    whole = bool(inside) and spans[inside[-1]][1] >= end  # type: ignore[index]
    return (inside[0], inside[-1]) if whole else (IGNORED, IGNORED)


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
    made = []
    for scores, spans, index in zip(logits.float().cpu(), batch.spans, batch.indices, strict=True):
        inside = torch.tensor([span is not None for span in spans])
        first, last = scores[:len(spans)].masked_fill(~inside[:, None], -torch.inf).unbind(-1)  # [S] each
        pairs = first[:, None] + last[None]  # [S, S]
        allowed = torch.ones_like(pairs, dtype=torch.bool).triu().tril(longest - 1)
        best, place = pairs.masked_fill(~allowed, -torch.inf).flatten().max(0)
        begin, end = spans[place // len(spans)], spans[place % len(spans)]
        found = begin is not None and end is not None and best > scores[0].sum()
        made.append(questions[index].passage[begin[0]:end[1]] if found else "")  # type: ignore[index]
    return made
