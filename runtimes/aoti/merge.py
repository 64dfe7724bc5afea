"""``merge_rows`` as a GPU's compiler takes it: every row reads what it becomes, instead of chosen rows being written.

A scatter is a kernel of its own, between the one that makes x and the one that reads the merged rows. What is read can
be computed where it is used: Inductor makes the merge a part of the norm that comes next, as it does the oracle's
``cat``, and a routed block has one or two kernels fewer. The search is a handful of steps in memory that L1 holds.
"""

__all__ = ["merge_by_reading"]

import torch
from torch import Tensor

# B batch  S rows  K capacity  D model dim


def merge_by_reading(x: Tensor, y: Tensor, positions: Tensor, gate: Tensor) -> Tensor:
    """``modcompile.ops.merge_rows`` bit for bit, where positions ascend, as those of ``route`` do; it has no gradient.

    Args:
        x: ``[B, S, D]``, floating.
        y: ``[B, K, D]`` in the dtype of x.
        positions: ``[B, K]`` int64, ascending.
        gate: ``[B, K]``, floating.

    Returns:
        ``[B, S, D]`` in the dtype of x.

    Example:
        >>> x, y = torch.zeros(1, 3, 1), torch.full((1, 2, 1), 8.0)
        >>> merge_by_reading(x, y, torch.tensor([[0, 2]]), torch.tensor([[1.0, 0.5]])).flatten()
        tensor([8., 0., 4.])
    """
    batch, rows = x.shape[:2]
    capacity = positions.shape[1]
    row = torch.arange(rows, device=x.device).expand(batch, rows).contiguous()  # [B, S]
    # The first slot whose position is the row's or a later one.
    slot = torch.searchsorted(positions, row).clamp(max=capacity - 1)  # [B, S]
    is_chosen = positions.gather(1, slot) == row
    weight = torch.where(is_chosen, gate.gather(1, slot).to(x.dtype), 0)[..., None]  # [B, S, 1]
    first = torch.arange(batch, device=x.device)[:, None] * capacity
    y = y.flatten(0, 1).index_select(0, (slot + first).reshape(-1)).unflatten(0, (batch, rows))  # [B, S, D]
    # As in merge_rows, the two ends are exact.
    mixed = torch.where(weight == 1, y, x + weight * (y - x))
    return torch.where(weight == 0, x, mixed)
