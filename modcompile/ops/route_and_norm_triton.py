"""``route_and_norm`` on CUDA: a Triton kernel that finds a sequence's chosen rows and writes them and their norm.

A program makes TILE slots of one sequence. The threshold it finds for itself, as ``route_kernel`` does: reading the
logits of a sequence again costs a program nothing that it would not wait for anyway, while a kernel of its own costs a
launch, and the norm's programs would wait for it.

Imported by ``modcompile.ops.route_and_norm``, where Triton is installed, when a tensor on CUDA comes along.
"""

__all__ = ["launch", "route_and_norm_kernel"]

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from modcompile.errors import UsageError
from modcompile.ops.route_triton import LONGEST_HELD, _close_in, _keys, _reach, _slots, _threshold, _trials

# B batch  S rows  K capacity  D width

# Slots of a program. So many that there is a program for each multiprocessor, or nearly, but no more values than 128
# for each of its threads. Of 8 x 1024 rows of 1,024 float16, an H200 norms 128 a sequence in 5.7 us with 8 slots each,
# in 6.2 with 4 and 6.8 with 16; 512 a sequence in 11.4 us with 8, in 9.5 with 16.
_PROGRAMS, _MOST_SLOTS, _MOST_VALUES, _WARPS = 128, 16, 16384, 4


@triton.jit
def route_and_norm_kernel(
    logits,
    valid,
    x,
    weight,
    bias,
    positions,
    filled,
    gathered,
    normed,
    rows,
    capacity,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_CENTERED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Makes TILE slots of a sequence: ``modcompile.ops.route_and_norm`` says what comes out.

    Args:
        logits: ``[B, S]`` float32.
        valid: ``[B, S]`` bool; not looked at without HAS_VALID.
        x: ``[B, S, WIDTH]``.
        weight: ``[WIDTH]``; not looked at without HAS_WEIGHT.
        bias: ``[WIDTH]``; not looked at without HAS_BIAS.
        positions: ``[B, K]`` int64, out.
        filled: ``[B, K]`` bool, out.
        gathered: ``[B, K, WIDTH]``, out: the chosen rows.
        normed: ``[B, K, WIDTH]``, out: their norm.
        rows: S.
        capacity: K.
        EPS: What is added to the mean square.
        WIDTH: Values in a row of x.
        IS_CENTERED: Whether a row's mean is subtracted first: layer norm, not RMS norm.
        HAS_VALID: Whether there is a mask.
        HAS_WEIGHT: Whether the norm is multiplied.
        HAS_BIAS: Whether something is added to it.
        BLOCK: A power of two, and no less than S.
        COLUMNS: A power of two, and no less than WIDTH.
        TILE: A power of two.
    """
    batch_row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < rows
    padding_enters = False
    ok = inside
    above = tl.zeros((), tl.int32)
    if HAS_VALID:
        ok = tl.load(valid + batch_row * rows + lanes, mask=inside, other=0) != 0
        all_valid = tl.sum(ok.to(tl.int32))
        padding_enters = all_valid < capacity
        above = tl.where(padding_enters, all_valid, 0)
    keys = _keys(tl.load(logits + batch_row * rows + lanes, mask=inside, other=0.0), ok, inside, padding_enters,
                 HAS_VALID)

    low = tl.zeros((), tl.uint32)
    reached = tl.zeros((), tl.int32) + rows
    high = tl.full((), 0xFFFFFFFF, tl.uint32)
    is_first = True
    while (high - low > 1) & (reached != capacity):
        trial1, trial2, trial3, trial4, trial5, trial6, trial7 = _trials(is_first, low, high)
        is_first = False
        count13, count24, count57, count6 = _reach(keys, trial1, trial2, trial3, trial4, trial5, trial6, trial7)
        low, reached, high, above = _close_in(
            count13, count24, count57, count6, trial1, trial2, trial3, trial4, trial5, trial6, trial7, capacity, low,
            reached, high, above, True)
    least, wanted = _threshold(low, reached, above, capacity)
    chosen, slot, _ = _slots(keys, least, wanted, 0, 0)

    # Through memory each slot of the tile learns which row is behind it: a thread that holds a row does not know where
    # that row's norm will be computed.
    is_here = chosen & (slot // TILE == tl.program_id(1))
    tl.store(positions + batch_row * capacity + slot, lanes.to(tl.int64), mask=is_here)
    tl.store(filled + batch_row * capacity + slot, (keys == 0xFFFFFFFF) | (padding_enters == 0), mask=is_here)
    tl.debug_barrier()
    tile = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_slot = tile < capacity
    position = tl.load(positions + batch_row * capacity + tile, mask=is_slot, other=0)

    columns = tl.arange(0, COLUMNS)
    own = columns < WIDTH
    within = is_slot[:, None] & own[None, :]
    values = tl.load(x + ((batch_row * rows + position) * WIDTH)[:, None] + columns[None, :], mask=within, other=0.0)
    out = ((batch_row * capacity + tile) * WIDTH)[:, None] + columns[None, :]
    tl.store(gathered + out, values, mask=within)
    values = values.to(tl.float32)
    if IS_CENTERED:
        values = tl.where(own[None, :], values - (tl.sum(values, 1) / WIDTH)[:, None], 0.0)
    values *= tl.rsqrt(tl.sum(values * values, 1) / WIDTH + EPS)[:, None]
    if HAS_WEIGHT:
        values *= tl.load(weight + columns, mask=own, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        values += tl.load(bias + columns, mask=own, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + out, values, mask=within)


def _in_memory(tensor: Tensor) -> Tensor:
    # As a view: what Inductor has not written yet it would else write for each argument of the kernel anew, and compute
    # again for whatever else reads it, which for all rows is as much as the kernel itself takes.
    tensor = tensor.contiguous()
    return tensor.as_strided(tensor.shape, tensor.stride())


def launch(logits: Tensor, valid: Tensor | None, capacity: int, x: Tensor, weight: Tensor | None, bias: Tensor | None,
           eps: float, *, is_centered: bool, traced: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocates the outputs of ``route_and_norm`` and launches the kernel.

    Args:
        logits: ``[B, S]`` float32 on CUDA.
        valid: ``[B, S]`` bool or None.
        capacity: K.
        x: ``[B, S, D]``.
        weight: ``[D]`` or None.
        bias: ``[D]`` or None.
        eps: What is added to the mean square.
        is_centered: Whether this is layer norm; else RMS norm.
        traced: Whether a compiler traces this and should see the kernel.

    Returns:
        ``positions``, ``[B, K]`` int64, ``filled``, ``[B, K]`` bool, and ``chosen`` and ``normed``, ``[B, K, D]``.

    Raises:
        UsageError: S is more than a program holds.
    """
    batch, rows, width = x.shape
    if rows > LONGEST_HELD:
        raise UsageError("route_and_norm holds a sequence's keys in one program", expected=f"S <= {LONGEST_HELD}",
                         found=f"S = {rows}", where="route_and_norm, argument logits", fix="call route, then the norm")
    positions = logits.new_empty((batch, capacity), dtype=torch.int64)
    filled = logits.new_empty((batch, capacity), dtype=torch.bool)
    chosen, normed = (x.new_empty((batch, capacity, width)) for _ in range(2))
    logits, x = (_in_memory(tensor) if traced else tensor.contiguous() for tensor in (logits, x))
    columns = triton.next_power_of_2(width)
    tile = triton.next_power_of_2(triton.cdiv(batch * capacity, _PROGRAMS))
    tile = max(1, min(tile, _MOST_SLOTS, _MOST_VALUES // columns))
    kernel = wrap_triton(route_and_norm_kernel) if traced else route_and_norm_kernel
    kernel[(batch, triton.cdiv(capacity, tile))](
        logits,
        logits if valid is None else valid.contiguous(),
        x,
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        positions,
        filled,
        chosen,
        normed,
        rows,
        capacity,
        EPS=eps,
        WIDTH=width,
        IS_CENTERED=is_centered,
        HAS_VALID=valid is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        BLOCK=max(triton.next_power_of_2(rows), 128),
        COLUMNS=columns,
        TILE=tile,
        num_warps=_WARPS,
    )
    return positions, filled, chosen, normed
