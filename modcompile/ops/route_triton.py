"""``route`` on CUDA: a Triton kernel, for eager PyTorch and for the programs of Inductor and AOTInductor.

One program a batch row. It finds the K-th best key from the top, two bits a pass: it counts the rows that reach each of
the three trial keys, and stops as soon as one is reached by K. Then one running sum gives each chosen row its slot:
positions come out ascending without a sort. The CUDA kernel of ``runtimes/native/kernels/route.cu`` does the same with
a radix select, for which Triton has no shared memory to hand out; the keys are those of ``radix_select.h``.

Two bits, for a pass has a price of its own, a sum over the program's threads and, for a row that is not held, reading
it: one bit pays it twice as often, and three bits compare each key with seven trials to save a third of the passes.

Imported by ``modcompile.ops.route``, where Triton is installed, when a tensor on CUDA comes along.
"""

__all__ = ["launch", "route_kernel"]

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

# B batch  S rows  K capacity

# The longest row whose keys a program holds in registers: 16 for each of 512 threads. A longer one is read again, in
# blocks of this size, in every pass.
LONGEST_HELD = 8192


# Takes what was loaded, not pointers: PyTorch could not see through a call that only reads, and would copy the logits.
@triton.jit
def _keys(logits, ok, inside, padding_enters, HAS_VALID: tl.constexpr):
    # Keys order as logits do, NaN counts as -inf and -0.0 equals 0.0. 0 is out of the running, 0xFFFFFFFF is certain:
    # no logit has these two. Padding is out where K rows are valid; elsewhere every valid row is certain.
    bits = (tl.where(logits == logits, logits, float("-inf")) + 0.0).to(tl.int32, bitcast=True)
    # Positive floats order as their bits do, negative ones the other way round and below.
    key = (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)
    if HAS_VALID:
        key = tl.where(padding_enters, tl.where(ok, 0xFFFFFFFF, key), tl.where(ok, key, 0))
    return tl.where(inside, key, 0).to(tl.uint32)


@triton.jit
def _reach(keys, trial1, trial2, trial3):
    # How many of four keys, which one thread has read together, reach each trial: three counts in one number, for their
    # sum. The trials ascend.
    flags = tl.where(keys >= trial3, 0x10101, tl.where(keys >= trial2, 0x101, tl.where(keys >= trial1, 1, 0)))
    counts = tl.sum(tl.reshape(flags, (keys.shape[0] // 4, 4)), 1)
    return counts & 0xFF, (counts >> 8) & 0xFF, counts >> 16


@triton.jit
def _add(a1, a2, a3, b1, b2, b3):
    return a1 + b1, a2 + b2, a3 + b3


@triton.jit
def route_kernel(
    logits,
    valid,
    positions,
    filled,
    rows,
    capacity,
    BLOCK: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Routes one row of the batch a program: ``modcompile.ops.route`` says what comes out.

    Args:
        logits: ``[B, S]`` float32.
        valid: ``[B, S]`` bool; not looked at without HAS_VALID.
        positions: ``[B, K]`` int64, out.
        filled: ``[B, K]`` bool, out.
        rows: S.
        capacity: K.
        BLOCK: Rows that are looked at together, a power of two. Keys are read once and held where S is no more.
        HAS_VALID: Whether there is a mask.
    """
    batch_row = tl.program_id(0).to(tl.int64)
    logits += batch_row * rows
    valid += batch_row * rows
    positions += batch_row * capacity
    filled += batch_row * capacity
    lanes = tl.arange(0, BLOCK)

    padding_enters = False
    if HAS_VALID:
        valid_rows = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, rows, BLOCK):
            at = start + lanes
            valid_rows += (tl.load(valid + at, mask=at < rows, other=0) != 0).to(tl.int32)
        padding_enters = tl.sum(valid_rows) < capacity

    inside = lanes < rows
    ok = tl.load(valid + lanes, mask=inside, other=0) != 0 if HAS_VALID else inside
    keys = _keys(tl.load(logits + lanes, mask=inside, other=0.0), ok, inside, padding_enters, HAS_VALID)

    # The greatest threshold that K rows reach is the K-th best key. One that exactly K rows reach is as good.
    threshold = tl.zeros((), tl.uint32)
    reached = tl.zeros((), tl.int32) + rows
    above = tl.zeros((), tl.int32)  # rows that reach the least threshold that was too high
    step = tl.full((), 1 << 30, tl.uint32)
    while (step != 0) & (reached != capacity):
        trial1, trial2, trial3 = threshold + step, threshold + 2 * step, threshold + 3 * step
        # Threads count for themselves until the row ends, so that no block waits for the one before.
        count1 = tl.zeros((BLOCK // 4,), tl.int32)
        count2 = tl.zeros((BLOCK // 4,), tl.int32)
        count3 = tl.zeros((BLOCK // 4,), tl.int32)
        for start in range(0, rows, BLOCK):
            if rows > BLOCK:
                at = start + lanes
                inside = at < rows
                ok = tl.load(valid + at, mask=inside, other=0) != 0 if HAS_VALID else inside
                keys = _keys(tl.load(logits + at, mask=inside, other=0.0), ok, inside, padding_enters, HAS_VALID)
            block1, block2, block3 = _reach(keys, trial1, trial2, trial3)
            count1 += block1
            count2 += block2
            count3 += block3
        reach1, reach2, reach3 = tl.reduce((count1, count2, count3), 0, _add)
        # The highest trial that K rows reach is the new threshold, the one after it is too high.
        if reach3 >= capacity:
            threshold, reached = trial3, reach3
        elif reach2 >= capacity:
            threshold, reached, above = trial2, reach2, reach3
        elif reach1 >= capacity:
            threshold, reached, above = trial1, reach1, reach2
        else:
            above = reach1
        step = step >> 2

    # Rows that reach `least` are chosen, and of those that tie just below it the first `wanted`.
    least = tl.maximum(tl.where(reached == capacity, threshold, threshold + 1), 1)
    wanted = tl.where(reached == capacity, 0, capacity - above)
    # One running sum of two counts: chosen rows in the upper 16 bits, ties in the lower. A block has 2^13 rows at most.
    chosen_seen = tl.zeros((), tl.int32)
    ties_seen = tl.zeros((), tl.int32)
    for start in range(0, rows, BLOCK):
        at = start + lanes
        if rows > BLOCK:
            inside = at < rows
            ok = tl.load(valid + at, mask=inside, other=0) != 0 if HAS_VALID else inside
            keys = _keys(tl.load(logits + at, mask=inside, other=0.0), ok, inside, padding_enters, HAS_VALID)
        ties = keys == least - 1
        counts = ((keys >= least).to(tl.int32) << 16) | ties.to(tl.int32)
        before = tl.cumsum(counts, 0) - counts
        ties_before = ties_seen + (before & 0xFFFF)
        chosen = (keys >= least) | (ties & (ties_before < wanted))
        slot = chosen_seen + (before >> 16) + tl.minimum(ties_before, wanted)
        tl.store(positions + slot, at.to(tl.int64), mask=chosen)
        if HAS_VALID:
            tl.store(filled + slot, (keys == 0xFFFFFFFF) | (padding_enters == 0), mask=chosen)
        else:
            tl.store(filled + slot, chosen, mask=chosen)
        if rows > BLOCK:
            total = tl.sum(counts)
            chosen_seen += total >> 16
            ties_seen += total & 0xFFFF


def launch(
    logits: Tensor, valid: Tensor | None, capacity: int | torch.SymInt, *, traced: bool = False
) -> tuple[Tensor, Tensor]:
    """Allocates the outputs of ``route`` and launches the kernel.

    Args:
        logits: ``[B, S]`` float32 on CUDA.
        valid: ``[B, S]`` bool or None.
        capacity: K.
        traced: Whether a compiler traces this and should see the kernel. Without one that takes a millisecond.

    Returns:
        ``positions``, ``[B, K]`` int64, and ``filled``, ``[B, K]`` bool.
    """
    batch, rows = logits.shape
    positions = logits.new_empty((batch, capacity), dtype=torch.int64)
    filled = logits.new_empty((batch, capacity), dtype=torch.bool)
    # A size that is symbolic can be anything.
    block = min(max(triton.next_power_of_2(rows), 128), LONGEST_HELD) if isinstance(rows, int) else LONGEST_HELD
    logits = logits.contiguous()
    kernel = wrap_triton(route_kernel) if traced else route_kernel
    kernel[(batch,)](
        logits,
        logits if valid is None else valid.contiguous(),
        positions,
        filled,
        rows,
        capacity,
        BLOCK=block,
        HAS_VALID=valid is not None,
        num_warps=min(max(block // 256, 1), 16),
    )
    return positions, filled
