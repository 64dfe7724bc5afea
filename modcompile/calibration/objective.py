"""What a change of the model costs, as a number: the loss of the next token, or how far the outputs move."""

__all__ = ["NextToken", "Objective", "OutputChange", "choose_objective"]

import dataclasses
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from modcompile.calibration.batches import Batch
from modcompile.errors import UsageError
from modcompile.model import GraphModel
from modcompile.sample_inputs import index_limits

# B batch  S rows  V vocabulary

Outputs = tuple[Tensor, ...]


class Objective(Protocol):
    """How outputs are judged."""

    name: ClassVar[str]

    def reference(self, outputs: Outputs) -> Outputs | None:
        """What ``measure`` needs of the dense model's outputs."""

    def measure(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> tuple[Tensor, int]:
        """The loss summed over what it is the mean of, and the number of summands."""

    def draw(self, outputs: Outputs, batch: Batch, generator: torch.Generator) -> Tensor:
        """A random scalar whose gradient g, for a small change u of the model, has E[(g . u)^2] = the change's cost."""


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross entropy of the next token, in nats; what is drawn are labels from the model's own distribution.

    For these E[(g . u)^2] is u's Fisher norm, to second order twice the KL divergence that u causes.

    Attributes:
        logits: Which output is [B, S, V]; ``words``: which input is [B, S].
    """

    name: ClassVar[str] = "next-token"
    logits: int
    words: int

    def reference(self, outputs: Outputs) -> Outputs | None:
        """Nothing: the text is the reference."""
        return None

    def measure(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> tuple[Tensor, int]:
        """The sum over predicted tokens, and their number."""
        logits, words = outputs[self.logits][:, :-1], batch.inputs[self.words][:, 1:]
        if batch.valid is not None:
            both = batch.valid[:, 1:] & batch.valid[:, :-1]
            logits, words = logits[both], words[both]
        return F.cross_entropy(logits.flatten(0, -2).float(), words.flatten(), reduction="sum"), words.numel()

    def draw(self, outputs: Outputs, batch: Batch, generator: torch.Generator) -> Tensor:
        """The cross entropy of labels that the model itself might have given."""
        logits = batch.rows(outputs[self.logits]).float()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        return F.cross_entropy(logits, labels, reduction="sum")


@dataclasses.dataclass(frozen=True)
class OutputChange:
    """The squared change of the outputs as a share of their square; what is drawn are random directions.

    Rows of padding do not count. Several outputs count alike.

    Attributes:
        outputs: Which outputs are of floats.
    """

    name: ClassVar[str] = "outputs"
    outputs: tuple[int, ...]

    def reference(self, outputs: Outputs) -> Outputs | None:
        """The dense model's outputs."""
        return outputs

    def measure(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> tuple[Tensor, int]:
        """The change of one batch."""
        assert reference is not None
        pairs = [(self._rows(outputs[i], batch), self._rows(reference[i], batch)) for i in self.outputs]
        shares = [(made - dense).square().sum() / dense.square().sum().clamp(min=torch.finfo(dense.dtype).tiny)
                  for made, dense in pairs]
        return torch.stack(shares).mean(), 1

    def draw(self, outputs: Outputs, batch: Batch, generator: torch.Generator) -> Tensor:
        """The outputs' product with normal random numbers, as shares of their norm."""
        parts = [self._rows(outputs[i], batch) for i in self.outputs]
        noise = [torch.randn(part.shape, generator=generator, device=part.device) for part in parts]
        return torch.stack([(part * along).sum() / part.detach().norm().clamp(min=torch.finfo(part.dtype).tiny)
                            for part, along in zip(parts, noise, strict=True)]).sum()

    @staticmethod
    def _rows(output: Tensor, batch: Batch) -> Tensor:
        shape = None if batch.valid is None else batch.valid.shape
        return (batch.rows(output) if output.shape[:2] == shape else output).float()


def choose_objective(dense: GraphModel, batch: Batch, kind: Literal["auto", "next-token", "outputs"]) -> Objective:
    """The objective that fits a model.

    "auto" takes the next token where words [B, S], such as ``input_ids``, are looked up in a table of V rows, and an
    output [B, S, V] does not look ahead, as a call with another last word tells.

    Raises:
        UsageError: The next token is asked for, and the model has no such logits; or outputs, and none is of floats.
    """
    shown = f"{dense.interface.summary()} -> {', '.join(map(str, dense.outputs))}"
    limits = index_limits(dense)
    pairs = [(logits, words) for words, given in enumerate(dense.inputs) for logits, made in enumerate(dense.outputs)
             if given.name in limits and made.shape == (*given.shape, limits[given.name]) and "float" in made.dtype]
    if len(pairs) == 1 and kind != "outputs" and (kind == "next-token" or _looks_back(dense, batch, *pairs[0])):
        return NextToken(*pairs[0])
    if kind == "next-token":
        raise UsageError("the model predicts no next token", expected="words [B, S] and logits of them [B, S, V]",
                         found=shown, where="objective", fix='objective="outputs"')
    floats = tuple(i for i, spec in enumerate(dense.outputs) if "float" in spec.dtype)
    if not floats:
        raise UsageError("no output can be compared", expected="one of floats", found=shown, where="objective")
    return OutputChange(floats)


def _looks_back(dense: GraphModel, batch: Batch, logits: int, words: int) -> bool:
    """Whether the logits of earlier rows stay the same when the last valid word of each sequence is another."""
    before = batch.inputs[words]
    place = torch.arange(before.shape[1], device=before.device).expand_as(before)
    last = (place if batch.valid is None else place.where(batch.valid, -1)).amax(1, keepdim=True)  # [B, 1]
    after = before.where(place != last, (before == 0).to(before.dtype))
    earlier = place < last if batch.valid is None else batch.valid & (place < last)
    with torch.no_grad():
        first, second = (dense.run_graph([words_now if i == words else tensor for i, tensor in enumerate(batch.inputs)])
                         [logits][earlier] for words_now in (before, after))
    return torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max()) if first.numel() else 0)
