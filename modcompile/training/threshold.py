"""Thresholds that follow the quantile of the logits at the capacity: a row that is above enters the block.

The third way to decide without looking ahead, which trains nothing: what top-k would choose on average over texts.
"""

__all__ = ["QuantileThresholds"]

import torch
from torch import nn

from modcompile.errors import UsageError
from modcompile.model import MoDModel
from modcompile.trace import RoutingTrace
from modcompile.training.losses import Valid, logits_of, valid_of

# Where all rows were taken: below every logit that is a number.
NO_THRESHOLD = torch.finfo(torch.float32).min


class QuantileThresholds(nn.Module):
    """An exponential moving average, for each routed block, of the quantile 1 - K/S of its valid rows' logits.

    Attributes:
        values: The thresholds, float32 [blocks], NaN before the first update, and ``NO_THRESHOLD`` where all rows were
            taken; part of the state dict.

    Args:
        mod: The routed model.
        decay: The weight of the past in each update, in [0, 1).
    """

    values: torch.Tensor

    def __init__(self, mod: MoDModel, decay: float = 0.99):
        super().__init__()
        if not 0 <= decay < 1:
            raise UsageError("the decay of an average is a share", expected="a number in [0, 1)", found=decay,
                             where="QuantileThresholds.decay")
        self.paths, self.decay = list(mod.routers), decay
        device = next(mod.parameters()).device
        self.register_buffer("values", torch.full((len(self.paths),), torch.nan, device=device))

    @torch.no_grad()
    def update(self, trace: RoutingTrace, valid: Valid = None) -> None:
        """Takes the logits of a call in.

        Args:
            trace: From a call under ``trace_routing``.
            valid: Which rows are no padding. A batch of which every valid row was taken, for its sequences are so
                short, tells nothing of a threshold.
        """
        for i, path in enumerate(self.paths):
            logits, taken, rows = logits_of(trace[path]), trace[path].taken(), valid_of(valid, path)
            slots = trace[path].positions
            is_full = slots is not None and slots.shape[1] == logits.shape[1]
            if rows is not None and rows.shape == logits.shape:
                logits, taken = logits[rows.bool()], taken[rows.bool()]
            # Halfway between two logits of the whole batch: so that as many are above as were taken.
            ordered, last = logits.flatten().sort(descending=True).values, int(taken.sum())
            if is_full:
                border = ordered.new_tensor(NO_THRESHOLD)
            elif last < len(ordered):
                border = ordered[max(last - 1, 0):last + 1].mean()
            else:
                continue
            old = self.values[i]
            known = (old > NO_THRESHOLD) & (border > NO_THRESHOLD)
            self.values[i] = torch.where(known, self.decay * old + (1 - self.decay) * border, border)

    def decide(self, trace: RoutingTrace) -> dict[str, torch.Tensor]:
        """Which rows of a traced call are above their block's threshold, bool [B, S] by block."""
        return {path: logits_of(trace[path]) > self.values[i] for i, path in enumerate(self.paths)}
