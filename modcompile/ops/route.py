"""``route``: which K rows of each sequence enter a block."""

__all__ = ["ONNX_BODIES", "fits", "route"]

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from modcompile.errors import UsageError

# B batch  S rows  K capacity

_LIBRARY = torch.library.Library("modcompile", "FRAGMENT")
_LIBRARY.define(
    "route(Tensor logits, Tensor? valid, SymInt capacity) -> (Tensor positions, Tensor filled)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def route(logits: Tensor, valid: Tensor | None, capacity: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    """Chooses the K best rows of each sequence, ascending.

    The order is total, so every runtime chooses the same rows: valid rows before invalid ones, then the higher
    logit (NaN counts as -inf, -0.0 equals 0.0), then the lower position. Not differentiable: a router learns
    through the gate of ``merge_rows``. This is the top-k of Raposo et al. 2024 (arXiv 2404.02258), equation 1.

    Args:
        logits: Router scores, ``[B, S]`` float32.
        valid: False at padding, ``[B, S]`` bool; None when every row is valid.
        capacity: K, in 1..S; may be symbolic under ``torch.export``.

    Returns:
        ``positions``, ``[B, K]`` int64, ascending and unique in a row, and ``filled``, ``[B, K]`` bool, false where
        the slot holds an invalid row.

    Raises:
        UsageError: A rank, dtype or shape is not the above, or K is not in 1..S.

    Example:
        >>> route(torch.tensor([[0.1, 2.0, 0.1, 1.0]]), None, 3)[0]
        tensor([[0, 1, 3]])
    """
    return torch.ops.modcompile.route.default(logits, valid, capacity)


def fits(tensor: Tensor, shape: tuple[int | torch.SymInt | None, ...]) -> bool:
    """Whether ``tensor`` has this shape, as far as it is known.

    Args:
        tensor: Any tensor.
        shape: The size of each dimension, or None where any will do. Symbolic sizes on either side are not compared,
            for that would write a guard into the captured graph.
    """
    return tensor.dim() == len(shape) and all(
        found == expected
        for found, expected in zip(tensor.shape, shape, strict=True)
        if isinstance(found, int) and isinstance(expected, int)
    )


def _check(logits: Tensor, valid: Tensor | None, capacity: int | torch.SymInt) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise UsageError(
            "route takes logits of rank 2 in float32",
            expected="logits[B, S] torch.float32",
            found=f"logits{list(logits.shape)} {logits.dtype}",
            where="route, argument logits",
            fix="compute the router's logits outside autocast, in float32, one per row",
        )
    rows = logits.shape[1]
    # As in fits: only sizes that are known are compared.
    if isinstance(capacity, int) and isinstance(rows, int) and not 1 <= capacity <= rows:
        raise UsageError(
            "route cannot choose that many rows",
            expected=f"1 <= K <= S = {rows}",
            found=f"K = {capacity}",
            where="route, argument capacity",
            fix="take K = ceil(capacity_ratio * S) with a ratio in (0, 1]",
        )
    if valid is None:
        return
    if valid.dtype != torch.bool or not fits(valid, tuple(logits.shape)):
        raise UsageError(
            "route takes a padding mask of the logits' shape in bool",
            expected=f"valid{list(logits.shape)} torch.bool",
            found=f"valid{list(valid.shape)} {valid.dtype}",
            where="route, argument valid",
            fix="pass attention_mask.bool(), or None when every row is valid",
        )


def _reference(logits: Tensor, valid: Tensor | None, capacity: int) -> tuple[Tensor, Tensor]:
    _check(logits, valid, capacity)
    score = logits.masked_fill(logits.isnan(), -torch.inf)
    order = score.sort(dim=1, descending=True, stable=True).indices  # [B, S]
    if valid is None:
        positions = order[:, :capacity].sort(dim=1).values  # [B, K]
        return positions, torch.ones_like(positions, dtype=torch.bool)
    # The second stable sort moves invalid rows to the end and keeps the order by score within both parts.
    last = (~valid).gather(1, order).to(torch.uint8).sort(dim=1, stable=True).indices
    positions = order.gather(1, last)[:, :capacity].sort(dim=1).values  # [B, K]
    return positions, valid.gather(1, positions)


def _fake(logits: Tensor, valid: Tensor | None, capacity: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    _check(logits, valid, capacity)
    shape = (logits.shape[0], capacity)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.bool)


# Ties are the rule, not the exception (a new router has weight 0), and not every runtime's TopK says how it breaks
# them. So the bodies ask TopK only for values: the K-th best is a threshold, and a second TopK over distinct keys
# (class * S - position, exact in float32 while 5 * S < 2^24) takes all rows above it, then the first ones equal to it.
# This also needs no TopK over K = S rows to order a masked row: TensorRT's TopK takes K <= 3840. TopK sees float32
# alone (ONNX Runtime's CPU kernel has no float16) and never a NaN; the mask is gathered as float, not as bool.
# In Cast, 1 is float32 and 7 is int64.
_CONSTANTS = """
    minus_infinity = Constant <value = float {-inf}> ()
    zero = Constant <value = float {0.0}> ()
    first = Constant <value = int64 {0}> ()
    step = Constant <value = int64 {1}> ()
    one = Constant <value = int64[1] {1}> ()
    last = Constant <value = int64[1] {-1}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    k = Reshape (capacity, one)
    is_nan = IsNaN (logits)
    score = Where (is_nan, minus_infinity, logits)
"""

_CLASS_BY_SCORE = """
    above = Greater (score, threshold)
    at_least = GreaterOrEqual (score, threshold)
    above_float = Cast <to = 1> (above)
    at_least_float = Cast <to = 1> (at_least)
    class_by_score = Add (above_float, at_least_float)
"""

_POSITIONS_BY_CLASS = """
    shape = Shape (logits)
    rows = Gather (shape, step)
    rows_float = Cast <to = 1> (rows)
    position = Range (first, rows, step)
    position_float = Cast <to = 1> (position)
    scaled = Mul (class, rows_float)
    key = Sub (scaled, position_float)
    chosen_key, chosen = TopK <axis = 1> (key, k)
    chosen_float = Cast <to = 1> (chosen)
    ascending, ascending_index = TopK <axis = 1, largest = 0> (chosen_float, k)
    positions = Cast <to = 7> (ascending)
"""

_ONNX_ROUTE = f"""
Route (logits, capacity) => (positions, filled)
{{{_CONSTANTS}
    best, best_index = TopK <axis = 1> (score, k)
    threshold = Slice (best, last, end, one)
{_CLASS_BY_SCORE}
    class = Identity (class_by_score)
{_POSITIONS_BY_CLASS}
    filled = GreaterOrEqual (ascending, zero)
}}
"""

# Valid rows have classes 3 to 5, invalid ones 0 to 2. The K-th best valid row is their threshold (-inf where fewer
# than K are valid, which takes them all); among invalid rows it is the one that fills the last spare slot.
_ONNX_MASKED_ROUTE = f"""
MaskedRoute (logits, valid, capacity) => (positions, filled)
{{{_CONSTANTS}
    one_float = Constant <value = float {{1.0}}> ()
    three = Constant <value = float {{3.0}}> ()
    valid_score = Where (valid, score, minus_infinity)
    invalid_score = Where (valid, minus_infinity, score)
    best_valid, best_valid_index = TopK <axis = 1> (valid_score, k)
    best_invalid, best_invalid_index = TopK <axis = 1> (invalid_score, k)
    valid_threshold = Slice (best_valid, last, end, one)

    valid_float = Cast <to = 1> (valid)
    valid_rows = ReduceSum <keepdims = 1> (valid_float, one)
    k_float = Cast <to = 1> (k)
    spare = Sub (k_float, valid_rows)
    last_spare = Sub (spare, one_float)
    last_spare_or_zero = Max (last_spare, zero)
    last_spare_index = Cast <to = 7> (last_spare_or_zero)
    invalid_threshold = GatherElements <axis = 1> (best_invalid, last_spare_index)
    threshold = Where (valid, valid_threshold, invalid_threshold)
{_CLASS_BY_SCORE}
    class_by_valid = Mul (valid_float, three)
    class = Add (class_by_score, class_by_valid)
{_POSITIONS_BY_CLASS}
    chosen_valid = GatherElements <axis = 1> (valid_float, positions)
    filled = Greater (chosen_valid, zero)
}}
"""

# Two op types because a function body cannot ask whether an optional input is there.
ONNX_BODIES = (_ONNX_ROUTE, _ONNX_MASKED_ROUTE)


def _on_cuda(logits: Tensor, valid: Tensor | None, capacity: int) -> tuple[Tensor, Tensor]:
    _check(logits, valid, capacity)
    if logits.shape[0] == 0:
        return _fake(logits, valid, capacity)
    from modcompile.ops import route_triton

    with torch.cuda.device_of(logits):
        return route_triton.launch(logits, valid, capacity)


def _functionalize(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """What ``torch.library.triton_op`` does for its ops: compilers see the kernel, ``torch.export`` keeps one node."""
    logits, valid, capacity = args
    if logits.device.type != "cuda" or not torch._functorch.config.decompose_custom_triton_ops:
        return mode.__torch_dispatch__(op, types, args, kwargs)
    from modcompile.ops import route_triton

    _check(logits, valid, capacity)
    with mode:
        return route_triton.launch(logits, valid, capacity, traced=True)


# A kernel for one device is registered under that device's key and then wins over this one.
_LIBRARY.impl("route", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("modcompile::route", _fake, lib=_LIBRARY)
# Triton comes with PyTorch's builds for CUDA on Linux; elsewhere the reference runs on CUDA too.
if importlib.util.find_spec("triton") is not None:
    _LIBRARY.impl("route", _on_cuda, "CUDA")
    torch.library.register_torch_dispatch("modcompile::route", FunctionalTensorMode, _functionalize, lib=_LIBRARY)
