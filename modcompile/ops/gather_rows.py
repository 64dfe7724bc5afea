"""``gather_rows``: the chosen rows of a tensor, packed."""

__all__ = ["ONNX_BODIES", "check_positions", "flat_positions", "gather_rows", "overwrite"]

from typing import Any

import torch
from torch import Tensor

from modcompile.errors import UsageError
from modcompile.ops.route import fits

# B batch  S rows  K capacity

_LIBRARY = torch.library.Library("modcompile", "FRAGMENT")
_LIBRARY.define("gather_rows(Tensor x, Tensor positions) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def gather_rows(x: Tensor, positions: Tensor) -> Tensor:
    """Packs the rows of ``x`` at ``positions``.

    Args:
        x: ``[B, S, ...]`` of any dtype.
        positions: ``[B, K]`` int64 in 0..S-1, unique in a row, as ``route`` gives them.

    Returns:
        ``[B, K, ...]``, row copies of ``x``.

    Raises:
        UsageError: A rank, dtype or batch size is not the above.

    Example:
        >>> gather_rows(torch.tensor([[10, 11, 12]]), torch.tensor([[0, 2]]))
        tensor([[10, 12]])
    """
    return torch.ops.modcompile.gather_rows.default(x, positions)


def flat_positions(positions: Tensor, rows: int) -> Tensor:
    """Positions in ``x.flatten(0, 1)``.

    Args:
        positions: ``[B, K]`` int64.
        rows: S, an int or symbolic.

    Returns:
        ``[B * K]`` int64.
    """
    start = torch.arange(positions.shape[0], device=positions.device) * rows  # [B]
    return (positions + start[:, None]).reshape(-1)


def overwrite(x: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """A copy of ``x``, ``[B, S, ...]``, with ``rows``, ``[B, K, ...]``, at ``positions``, which are unique in a row."""
    flat = x.flatten(0, 1).index_copy(0, flat_positions(positions, x.shape[1]), rows.flatten(0, 1))
    return flat.unflatten(0, x.shape[:2])


def check_positions(op: str, x: Tensor, positions: Tensor) -> None:
    """Raises UsageError unless ``positions`` is ``[B, K]`` int64 for the B of ``x``."""
    batch = x.shape[0]
    if positions.dtype != torch.int64 or not fits(positions, (batch, None)):
        raise UsageError(
            f"{op} takes one list of positions for each sequence of the batch",
            expected=f"positions[{batch}, K] torch.int64",
            found=f"positions{list(positions.shape)} {positions.dtype}",
            where=f"{op}, argument positions",
            fix="pass the positions that route returned for this batch",
        )


class _Gather(torch.autograd.Function):
    """The gather, whose gradient is written to its rows and not added to them: positions are unique.

    What autograd derives adds, which in half precision Inductor leaves to a kernel that sorts the positions first.
    """

    @staticmethod
    def forward(x: Tensor, positions: Tensor) -> Tensor:
        # Rows of the flattened tensor are copied whole; a gather along dim 1 would read an index per element.
        rows = x.flatten(0, 1).index_select(0, flat_positions(positions, x.shape[1]))  # [B * K, ...]
        return rows.unflatten(0, positions.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, positions = inputs
        # Rows whose gradient goes another way, as merge_rows' own do, have none: no zeros are written for them.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(positions)
        ctx.rows = x.shape[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        (positions,) = ctx.saved_tensors
        zeros = grad.new_zeros(positions.shape[0], ctx.rows, *grad.shape[2:])
        return overwrite(zeros, positions, grad), None


def _reference(x: Tensor, positions: Tensor) -> Tensor:
    if x.dim() < 2:
        raise UsageError(
            "gather_rows takes rows along dim 1",
            expected="x[B, S, ...]",
            found=f"x{list(x.shape)}",
            where="gather_rows, argument x",
            fix="add the missing batch or row dimension",
        )
    check_positions("gather_rows", x, positions)
    # Without gradients the function's own bookkeeping would take longer than the gather.
    return (_Gather.apply if torch.is_grad_enabled() else _Gather.forward)(x, positions)


_ONNX_GATHER_ROWS = """
GatherRows (x, positions) => (rows)
{
    last = Constant <value = int64[1] {-1}> ()
    index = Unsqueeze (positions, last)
    rows = GatherND <batch_dims = 1> (x, index)
}
"""

ONNX_BODIES = (_ONNX_GATHER_ROWS,)

# Implicit, so that autograd, Inductor and AOTInductor see through it while torch.export keeps it as one node.
_LIBRARY.impl("gather_rows", _reference, "CompositeImplicitAutograd")
