"""``merge_rows``: the block's rows, weighted by their gate, back in their places."""

__all__ = ["ONNX_BODIES", "merge_rows"]

from typing import Any

import torch
from torch import Tensor

from modcompile.errors import UsageError
from modcompile.ops.gather_rows import check_positions, overwrite
from modcompile.ops.route import fits

# B batch  S rows  K capacity  D model dim

_LIBRARY = torch.library.Library("modcompile", "FRAGMENT")
_LIBRARY.define(
    "merge_rows(Tensor x, Tensor y, Tensor positions, Tensor gate) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def merge_rows(x: Tensor, y: Tensor, positions: Tensor, gate: Tensor) -> Tensor:
    """Writes ``lerp(x_row, y_row, gate)`` at ``positions``; every other row is x, bit for bit.

    A gate of 1 gives y exactly. A gate of 0 gives x exactly, even where y is NaN or infinite, and its own gradient is
    still ``sum(grad * (y - x))`` over the finite entries, so a closed gate can open again. With ``y = x + f(x)`` this
    is ``x + gate * f(x)`` of Raposo et al. 2024 (arXiv 2404.02258), equation 1.

    The numbers are computed in the dtype of x, to which the gate is rounded first; the gate's gradient is computed in
    the wider of the two.

    Args:
        x: The residual stream, ``[B, S, D]``, floating.
        y: The block's output on the chosen rows, ``[B, K, D]`` in the dtype of x.
        positions: ``[B, K]`` int64 in 0..S-1, unique in a row, as ``route`` gives them.
        gate: ``[B, K]``, any floating dtype; 0 for a slot that is not filled.

    Returns:
        ``[B, S, D]`` in the dtype of x.

    Raises:
        UsageError: A rank, dtype or shape is not the above.

    Example:
        >>> x, y = torch.zeros(1, 3, 1), torch.full((1, 2, 1), 8.0)
        >>> merge_rows(x, y, torch.tensor([[0, 2]]), torch.tensor([[1.0, 0.5]])).flatten()
        tensor([8., 0., 4.])
    """
    return torch.ops.modcompile.merge_rows.default(x, y, positions, gate)


def _check(x: Tensor, y: Tensor, positions: Tensor, gate: Tensor) -> None:
    if x.dim() != 3 or not x.dtype.is_floating_point:
        raise UsageError(
            "merge_rows takes a residual stream of rank 3",
            expected="x[B, S, D] in a floating dtype",
            found=f"x{list(x.shape)} {x.dtype}",
            where="merge_rows, argument x",
            fix="flatten what follows the row dimension: x.flatten(2)",
        )
    check_positions("merge_rows", x, positions)
    slots = (*positions.shape, x.shape[2])
    if y.dtype != x.dtype or not fits(y, slots):
        raise UsageError(
            "merge_rows takes one updated row for each position",
            expected=f"y{list(slots)} {x.dtype}",
            found=f"y{list(y.shape)} {y.dtype}",
            where="merge_rows, argument y",
            fix="the block must return the shape and dtype it was given: y.to(x.dtype)",
        )
    if not gate.dtype.is_floating_point or not fits(gate, slots[:2]):
        raise UsageError(
            "merge_rows takes one gate for each position",
            expected=f"gate{list(slots[:2])} in a floating dtype",
            found=f"gate{list(gate.shape)} {gate.dtype}",
            where="merge_rows, argument gate",
            fix="gather the gates at positions and drop trailing dimensions of size 1",
        )


class _Merge(torch.autograd.Function):
    """The merge, given ``rows = gather_rows(x, positions)``.

    Its own gradient, because what autograd derives from an exact choice between x, y and their mix leaves a gate of
    exactly 0 or 1 without any. ``rows`` is an argument so that only K rows of x are saved; x gets their gradient.
    """

    @staticmethod
    def forward(x: Tensor, rows: Tensor, y: Tensor, positions: Tensor, gate: Tensor) -> Tensor:
        weight = gate.to(x.dtype)[..., None]  # [B, K, 1]
        mixed = rows + weight * (y - rows)
        # An infinite difference, or rounding, keeps the formula from the two ends it should reach.
        mixed = torch.where(weight == 1, y, mixed)
        mixed = torch.where(weight == 0, rows, mixed)
        return overwrite(x, positions, mixed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, rows, y, positions, gate = inputs
        ctx.save_for_backward(rows, y, positions, gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, y, positions, gate = ctx.saved_tensors
        weight = gate.to(grad.dtype)[..., None]  # [B, K, 1]
        grad_rows = torch.ops.modcompile.gather_rows.default(grad, positions)  # [B, K, D]
        grad_x = overwrite(grad, positions, grad_rows * (1 - weight)) if ctx.needs_input_grad[0] else None
        grad_y = grad_rows * weight if ctx.needs_input_grad[2] else None
        grad_gate = None
        if ctx.needs_input_grad[4]:
            wide = torch.promote_types(gate.dtype, y.dtype)
            update = y.to(wide) - rows.to(wide)
            # What a closed gate keeps out (attention over padding alone may be NaN) must not come back through here.
            update = torch.where((weight == 0) & ~update.isfinite(), torch.zeros_like(update), update)
            grad_gate = (grad_rows.to(wide) * update).sum(-1).to(gate.dtype)  # [B, K]
        return grad_x, None, grad_y, None, grad_gate


def _reference(x: Tensor, y: Tensor, positions: Tensor, gate: Tensor) -> Tensor:
    _check(x, y, positions, gate)
    rows = torch.ops.modcompile.gather_rows.default(x, positions)  # [B, K, D]
    return (_Merge.apply if torch.is_grad_enabled() else _Merge.forward)(x, rows, y, positions, gate)


# An overwriting ScatterND: positions are unique, and TensorRT's parser rejects reduction="add". The two ends are
# compared in float32, which every runtime can compare; CastLike has already rounded the gate to the dtype of x.
_ONNX_MERGE_ROWS = """
MergeRows (x, y, positions, gate) => (merged)
{
    zero = Constant <value = float {0.0}> ()
    one = Constant <value = float {1.0}> ()
    first = Constant <value = int64 {0}> ()
    step = Constant <value = int64 {1}> ()
    last = Constant <value = int64[1] {-1}> ()
    slot_axes = Constant <value = int64[2] {1, 2}> ()

    position_index = Unsqueeze (positions, last)
    rows = GatherND <batch_dims = 1> (x, position_index)
    gate_like_x = CastLike (gate, x)
    weight = Unsqueeze (gate_like_x, last)
    difference = Sub (y, rows)
    update = Mul (weight, difference)
    between = Add (rows, update)
    weight_float = Cast <to = 1> (weight)
    is_open = Equal (weight_float, one)
    is_closed = Equal (weight_float, zero)
    open_or_between = Where (is_open, y, between)
    mixed = Where (is_closed, rows, open_or_between)

    shape = Shape (position_index)
    batch_size = Gather (shape, first)
    batch = Range (first, batch_size, step)
    batch_slot = Unsqueeze (batch, slot_axes)
    batch_index = Expand (batch_slot, shape)
    index = Concat <axis = -1> (batch_index, position_index)
    merged = ScatterND (x, index, mixed)
}
"""

ONNX_BODIES = (_ONNX_MERGE_ROWS,)

# Implicit, so that Inductor and AOTInductor see through it while torch.export keeps it as one node.
_LIBRARY.impl("merge_rows", _reference, "CompositeImplicitAutograd")
