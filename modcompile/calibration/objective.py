"""What a change of the model costs, as a number: of the distribution it predicts, of a text, or of its outputs.

Which of them fits is told by the kind of the outputs, never by the model's name.
"""

__all__ = ["Divergence", "NextToken", "Objective", "ObjectiveKind", "OutputChange", "choose_objective"]

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from modcompile.calibration.batches import Batch
from modcompile.errors import UsageError
from modcompile.model import GraphModel
from modcompile.sample_inputs import index_limits

# B batch  S rows  V vocabulary

Outputs = tuple[Tensor, ...]
ObjectiveKind = Literal["auto", "divergence", "next-token", "outputs"]


class Objective(Protocol):
    """How outputs are judged."""

    name: ClassVar[str]

    def reference(self, outputs: Outputs, batch: Batch) -> Outputs:
        """What ``measure`` needs of the dense model's outputs for a batch, worked out once."""

    def measure(self, outputs: Outputs, batch: Batch, reference: Outputs) -> tuple[Tensor, int]:
        """The loss summed over what it is the mean of, and the number of summands."""

    def draw(self, outputs: Outputs, batch: Batch, generator: torch.Generator) -> Tensor:
        """A random scalar whose gradient g, for a small change u of the model, has E[(g . u)^2] = the change's cost."""


def _draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The cross entropy of labels that the model itself might have given for logits [N, V].

    Here E[(g . u)^2] is u's Fisher norm, to second order twice the KL divergence that u causes.
    """
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
    return F.cross_entropy(logits, labels, reduction="sum")


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The KL divergence of what the model predicts from what the dense model did, in nats per valid row.

    In expectation over text that the dense model finds likely it is what the text's loss grows by, without the noise of
    which words the text happens to have: a few thousand rows tell blocks apart.

    Attributes:
        logits: Which output is [B, S, V]; ``padded``: whether the padding mask is of its rows.
    """

    name: ClassVar[str] = "divergence"
    logits: int
    padded: bool = True

    def reference(self, outputs: Outputs, batch: Batch) -> Outputs:
        """The logarithms of what the dense model predicts for the valid rows, [N, V]."""
        return (self._predicted(outputs, batch),)

    def measure(self, outputs: Outputs, batch: Batch, reference: Outputs) -> tuple[Tensor, int]:
        """The sum over valid rows, and their number."""
        made = self._predicted(outputs, batch)
        return F.kl_div(made, reference[0], reduction="sum", log_target=True), len(made)

    def _predicted(self, outputs: Outputs, batch: Batch) -> Tensor:
        return batch.rows(outputs[self.logits], self.padded).float().log_softmax(-1)

    def draw(self, outputs: Outputs, batch: Batch, generator: torch.Generator) -> Tensor:
        """Labels from the model's own distribution."""
        return _draw_labels(batch.rows(outputs[self.logits], self.padded).float(), generator)


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross entropy of the text's next token, in nats.

    Attributes:
        logits: Which output is [B, S, V]; ``words``: which input is [B, S]; ``padded``: whether the padding mask is of
            these rows.
    """

    name: ClassVar[str] = "next-token"
    logits: int
    words: int
    padded: bool = True

    def reference(self, outputs: Outputs, batch: Batch) -> Outputs:
        """Nothing: the text is the reference."""
        return ()

    def measure(self, outputs: Outputs, batch: Batch, reference: Outputs) -> tuple[Tensor, int]:
        """The sum over predicted tokens, and their number."""
        logits, words = outputs[self.logits][:, :-1], batch.inputs[self.words][:, 1:]
        if batch.valid is not None and self.padded:
            both = batch.valid[:, 1:] & batch.valid[:, :-1]
            logits, words = logits[both], words[both]
        return F.cross_entropy(logits.flatten(0, -2).float(), words.flatten(), reduction="sum"), words.numel()

    def draw(self, outputs: Outputs, batch: Batch, generator: torch.Generator) -> Tensor:
        """Labels from the model's own distribution: one text has tokens that were easy by luck."""
        return _draw_labels(batch.rows(outputs[self.logits], self.padded).float(), generator)


@dataclasses.dataclass(frozen=True)
class OutputChange:
    """The squared change of the outputs as a share of their square; what is drawn are random directions.

    Rows of padding do not count. Several outputs count alike.

    Attributes:
        outputs: Which outputs are of floats; ``padded``: for each, whether the padding mask is of its rows.
    """

    name: ClassVar[str] = "outputs"
    outputs: tuple[int, ...]
    padded: tuple[bool, ...]

    def reference(self, outputs: Outputs, batch: Batch) -> Outputs:
        """The dense model's outputs, their valid rows."""
        return self._rows(outputs, batch)

    def measure(self, outputs: Outputs, batch: Batch, reference: Outputs) -> tuple[Tensor, int]:
        """The change of one batch."""
        shares = [(made - dense).square().sum() / dense.square().sum().clamp(min=torch.finfo(dense.dtype).tiny)
                  for made, dense in zip(self._rows(outputs, batch), reference, strict=True)]
        return torch.stack(shares).mean(), 1

    def draw(self, outputs: Outputs, batch: Batch, generator: torch.Generator) -> Tensor:
        """The outputs' product with normal random numbers, as shares of their norm."""
        parts = self._rows(outputs, batch)
        noise = [torch.randn(part.shape, generator=generator, device=part.device) for part in parts]
        return torch.stack([(part * along).sum() / part.detach().norm().clamp(min=torch.finfo(part.dtype).tiny)
                            for part, along in zip(parts, noise, strict=True)]).sum()

    def _rows(self, outputs: Outputs, batch: Batch) -> Outputs:
        return tuple((batch.rows(outputs[i]) if padded else outputs[i]).float()
                     for i, padded in zip(self.outputs, self.padded, strict=True))


def choose_objective(dense: GraphModel, kind: ObjectiveKind, dims: Sequence[int | str] | None = None) -> Objective:
    """The objective that fits a model.

    "auto" takes the divergence where words [B, S], such as ``input_ids``, are looked up in a table of V rows and an
    output is [B, S, V]: it predicts words. Else it takes the change of the outputs.

    Args:
        dense: The model.
        kind: What is asked for.
        dims: The padding mask's, see ``convert.padded_dims``.

    Raises:
        UsageError: There is no such kind; a prediction of words is asked for, and the model has no such logits; or
            outputs, and none is of floats.
    """
    if kind not in get_args(ObjectiveKind):
        raise UsageError("there is no such objective", expected=", ".join(get_args(ObjectiveKind)), found=kind,
                         where="objective")
    padded = [dims is not None and spec.shape[:2] == dims for spec in dense.outputs]
    shown = f"{dense.interface.summary()} -> {', '.join(map(str, dense.outputs))}"
    limits = index_limits(dense)
    pairs = [(logits, words) for words, given in enumerate(dense.inputs) for logits, made in enumerate(dense.outputs)
             if given.name in limits and made.shape == (*given.shape, limits[given.name]) and "float" in made.dtype]
    if len(pairs) == 1 and kind != "outputs":
        ((logits, words),) = pairs
        return NextToken(logits, words, padded[logits]) if kind == "next-token" else Divergence(logits, padded[logits])
    if kind in ("divergence", "next-token"):
        raise UsageError("the model predicts no words", expected="words [B, S] and logits of them [B, S, V]",
                         found=shown, where="objective", fix='objective="outputs"')
    floats = tuple(i for i, spec in enumerate(dense.outputs) if "float" in spec.dtype)
    if not floats:
        raise UsageError("no output can be compared", expected="one of floats", found=shown, where="objective")
    return OutputChange(floats, tuple(padded[i] for i in floats))
