"""The router's own loss: binary cross-entropy of its logits against the top-k (Raposo et al. 2024, section 3.5).

Top-k over a sequence looks ahead. A router that is also trained to say by the sign of its logit whether a row is among
the K decides without it: a row enters where sigmoid(logit) > 0.5.
"""

__all__ = ["Valid", "check_finite", "logits_of", "mean_valid", "membership_loss", "routing_accuracy", "routing_losses",
           "valid_of"]

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from modcompile.errors import ModcompileError, UsageError
from modcompile.trace import BlockTrace, RoutingTrace

# B batch  S rows  D model dim (for the sequence axis, 1 and B stand for B and S)

# Bool [B, S] of tokens, false at padding. Or by block, where they have not all the same rows, as in an encoder and its
# decoder: the rows of a block that is not named are all valid, as are all without any.
Valid = torch.Tensor | Mapping[str, torch.Tensor] | None


def routing_losses(trace: RoutingTrace, valid: Valid = None) -> dict[str, torch.Tensor]:
    """Each routed block's binary cross-entropy of logits [B, S] against "is among the K", a mean over valid rows.

    Args:
        trace: From a call under ``trace_routing``.
        valid: Which rows are no padding, see ``Valid``.

    Example:
        >>> import modcompile as mc
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> mod = mc.convert(torch.nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 8),))
        >>> with mc.trace_routing(mod) as trace:
        ...     out = mod(torch.randn(2, 16, 8))
        >>> loss = out.square().mean() + 0.01 * sum(routing_losses(trace).values())
        >>> loss.backward()
    """
    return {path: membership_loss(logits_of(block), block.taken(), valid_of(valid, path))
            for path, block in trace.items()}


def routing_accuracy(trace: RoutingTrace, valid: Valid = None) -> dict[str, torch.Tensor]:
    """The share of valid rows for which the sign of the logit says whether the row is among the K, by block."""
    return {path: mean_valid(((logits_of(block) > 0) == block.taken()).float(), valid_of(valid, path))
            for path, block in trace.items()}


def membership_loss(logits: torch.Tensor, taken: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Binary cross-entropy of logits [B, S] against ``taken`` [B, S], a mean over valid rows."""
    return mean_valid(F.binary_cross_entropy_with_logits(logits, taken.to(logits.dtype), reduction="none"), valid)


def logits_of(block: BlockTrace) -> torch.Tensor:
    """A block's logits [B, S], which a trace has after every call."""
    assert block.logits is not None
    return block.logits


def valid_of(valid: Valid, path: str) -> torch.Tensor | None:
    """The rows of one block that are no padding."""
    return valid if valid is None or isinstance(valid, torch.Tensor) else valid.get(path)


def mean_valid(values: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """The mean over valid rows of values [B, S], or for the sequence axis [1, B] under a mask [B, S].

    Raises:
        UsageError: The mask is of other rows.
    """
    if valid is None:
        return values.mean()
    mask = valid.bool()
    if mask.shape != values.shape:
        # A sequence is valid if any of its tokens is.
        mask = mask.any(1).unsqueeze(0)
    if mask.shape != values.shape:
        raise UsageError("the padding mask is not of these rows", expected=f"bool {list(values.shape)}",
                         found=f"{valid.dtype} {list(valid.shape)}", where="valid",
                         fix="give masks by block: those of an encoder are not its decoder's")
    return values.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


# It reads the losses: a graph that is compiled ends before it.
@torch.compiler.disable
def check_finite(losses: Mapping[str, torch.Tensor], step: int,
                 trace: RoutingTrace | Callable[[], RoutingTrace] | None = None) -> None:
    """Stops a training whose loss is NaN or infinite, before the step is taken.

    It waits for the device: call it as often as that is worth.

    Args:
        losses: By name.
        step: For the message.
        trace: Of the call that the losses come from, or what makes one; the first block with a value that is not finite
            is named.

    Raises:
        ModcompileError: A loss is not finite.
    """
    finite = torch.stack([loss.detach().isfinite().all() for loss in losses.values()]).tolist()
    if all(finite):
        return
    bad = {name: loss.detach().tolist() for (name, loss), ok in zip(losses.items(), finite, strict=True) if not ok}
    raise ModcompileError("a loss is not finite", expected="a number",
                          found=", ".join(f"{name} {value}" for name, value in bad.items()),
                          where=f"step {step}, {_first_bad((trace() if callable(trace) else trace) or {})}",
                          fix="lower the learning rate, clip gradients, or go on from an earlier checkpoint")


def _first_bad(trace: Mapping[str, BlockTrace]) -> str:
    for path, block in trace.items():
        for role, place in (("seen", "before block"), ("logits", "the router of block"), ("gate", "the gate of block"),
                            ("output", "block")):
            value = getattr(block, role)
            if value is not None and not value.detach().isfinite().all():
                return f"{place} {path}"
    return "after the last routed block" if trace else "the loss"
