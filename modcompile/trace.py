"""Watches which rows go through which block."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from modcompile.model import MoDModel

__all__ = ["BlockTrace", "RoutingTrace", "trace_routing"]


@dataclasses.dataclass
class BlockTrace:
    """One routed block's choice in the latest call. B batch, S rows, K capacity (for the sequence axis, 1, B and K).

    Attributes:
        logits: float32 [B, S].
        positions: int64 [B, K], ascending; ``filled``: bool [B, K], false for a slot with no valid row behind it.
        gate: float32 [B, K], 0 where not filled.
        output: The hidden state after the block, [B, S, D].
        seen: What the router scored: the hidden state before the block, [B, S, D]; for the sequence axis [B, D].
        decision: Of a ``causal_model`` that predictors decide: their logits, float32 [B, S].
    """

    logits: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    filled: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    output: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    decision: torch.Tensor | None = None

    def taken(self) -> torch.Tensor:
        """Which rows went through the block, bool [B, S]."""
        assert self.logits is not None and self.positions is not None and self.filled is not None
        return torch.zeros_like(self.logits, dtype=torch.bool).scatter(1, self.positions, self.filled)


class RoutingTrace(dict[str, BlockTrace]):
    """The choice of every routed block in the latest call, by block path. Tensors keep their gradients' history."""

    def observe(self, path: str, role: str, value: torch.Tensor) -> None:
        """Records one value."""
        block = self.setdefault(path, BlockTrace())
        setattr(block, role, value)
        if role == "positions":
            # Without a padding mask every slot is filled, and the graph has no value that says so.
            block.filled = torch.ones_like(value, dtype=torch.bool)


@contextlib.contextmanager
def trace_routing(model: MoDModel) -> Iterator[RoutingTrace]:
    """Records positions, logits and gates of every routed block while the context is open.

    Example:
        >>> from modcompile import MoDConfig, convert
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> mod = convert(torch.nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 8),), MoDConfig(capacity_ratio=0.5))
        >>> with trace_routing(mod) as trace:
        ...     _ = mod(torch.randn(1, 6, 8))
        >>> trace["layers.1"].positions
        tensor([[0, 1, 2]])
    """
    trace = RoutingTrace()
    model._observers.append(trace.observe)
    try:
        yield trace
    finally:
        model._observers.remove(trace.observe)
