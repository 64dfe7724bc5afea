"""``route`` on CUDA: a Triton kernel, for eager PyTorch and for the programs of Inductor and AOTInductor.

One program a batch row. It finds the K-th best key from both sides: a pass counts the rows that reach each of seven
trial keys between two bounds, of which K rows reach the lower and fewer the upper, and the bounds close in; it stops as
soon as exactly K rows reach one. Then one running sum gives each chosen row its slot: positions come out ascending
without a sort. The CUDA kernel of ``runtimes/native/kernels/route.cu`` does the same with a radix select, for which
Triton has no shared memory to hand out; the keys are those of ``radix_select.h``.

A pass has a price of its own, a sum over the program's threads and, for a row that is not held, reading it. Seven
trials divide what lies between the bounds by eight. The first seven are powers of four, between which most routers'
logits lie: keys order all floats there are, and the middle of those is of no use. Four passes do for 1,024 normal
logits, where halving needs seventeen.

Imported by ``modcompile.ops.route``, where Triton is installed, when a tensor on CUDA comes along.
"""

__all__ = ["launch", "route_kernel"]

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

# B batch  S rows  K capacity

# The longest row whose keys a program holds in registers: 32 for each of 256 threads. A longer one is read again, in
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
def _trial(is_first, power: tl.constexpr, low, step, i: tl.constexpr, high):
    # No sum is too large: K rows reach `low`, which therefore is no more than the key of +inf.
    return tl.where(is_first, power, tl.minimum(low + i * step, high)).to(tl.uint32)


@triton.jit
def _trials(is_first, low, high):
    # Seven keys between two bounds; at first those of -4, -1, -1/4, 0, 1/4, 1 and 4.
    step = tl.maximum((high - low) >> 3, 1).to(tl.uint32)
    return (_trial(is_first, 0x3F7FFFFF, low, step, 1, high), _trial(is_first, 0x407FFFFF, low, step, 2, high),
            _trial(is_first, 0x417FFFFF, low, step, 3, high), _trial(is_first, 0x80000000, low, step, 4, high),
            _trial(is_first, 0xBE800000, low, step, 5, high), _trial(is_first, 0xBF800000, low, step, 6, high),
            _trial(is_first, 0xC0800000, low, step, 7, high))


@triton.jit
def _reach(keys, trial1, trial2, trial3, trial4, trial5, trial6, trial7):
    # How many of eight keys, which one thread has read together, reach each trial, as pairs in the two halves of a
    # number: 1 and 3, 2 and 4, 5 and 7, and 6 alone. The trials ascend.
    lower = tl.where(keys >= trial2, 0x101, tl.where(keys >= trial1, 1, 0))
    lower = tl.where(keys >= trial4, 0x1010101, tl.where(keys >= trial3, 0x10101, lower))
    upper = tl.where(keys >= trial7, 0x10101, tl.where(keys >= trial6, 0x101, tl.where(keys >= trial5, 1, 0)))
    lower = tl.sum(tl.reshape(lower, (keys.shape[0] // 8, 8)), 1)
    upper = tl.sum(tl.reshape(upper, (keys.shape[0] // 8, 8)), 1)
    return lower & 0xFF00FF, (lower >> 8) & 0xFF00FF, upper & 0xFF00FF, (upper >> 8) & 0xFF


@triton.jit
def _add4(a1, a2, a3, a4, b1, b2, b3, b4):
    return a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def _add7(a1, a2, a3, a4, a5, a6, a7, b1, b2, b3, b4, b5, b6, b7):
    return a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def _narrow(trial, reach, capacity, low, reached, high, above):
    # The bounds with what is known of a trial between them.
    is_enough = reach >= capacity
    return (tl.where(is_enough, trial, low), tl.where(is_enough, reach, reached),
            tl.where(is_enough, high, trial), tl.where(is_enough, above, reach))


@triton.jit
def _close_in(count13, count24, count57, count6, trial1, trial2, trial3, trial4, trial5, trial6, trial7, capacity, low,
              reached, high, above, IS_SHORT: tl.constexpr):
    # The two neighbours among trials and bounds between which the K-th best key lies, of what each thread has counted.
    if IS_SHORT:
        count13, count24, count57, reach6 = tl.reduce((count13, count24, count57, count6), 0, _add4)
        reach1, reach2, reach3 = count13 & 0xFFFF, count24 & 0xFFFF, count13 >> 16
        reach4, reach5, reach7 = count24 >> 16, count57 & 0xFFFF, count57 >> 16
    else:
        reach1, reach2, reach3, reach4, reach5, reach6, reach7 = tl.reduce(
            (count13 & 0xFFFF, count24 & 0xFFFF, count13 >> 16, count24 >> 16, count57 & 0xFFFF, count6, count57 >> 16),
            0, _add7)
    # Three questions find them.
    upper = reach4 >= capacity
    middle, reach_middle = tl.where(upper, trial6, trial2), tl.where(upper, reach6, reach2)
    above_middle = reach_middle >= capacity
    last = tl.where(upper, tl.where(above_middle, trial7, trial5), tl.where(above_middle, trial3, trial1))
    reach_last = tl.where(upper, tl.where(above_middle, reach7, reach5), tl.where(above_middle, reach3, reach1))
    low, reached, high, above = _narrow(trial4, reach4, capacity, low, reached, high, above)
    low, reached, high, above = _narrow(middle, reach_middle, capacity, low, reached, high, above)
    return _narrow(last, reach_last, capacity, low, reached, high, above)


@triton.jit
def _threshold(low, reached, above, capacity):
    # Rows whose keys reach the first number are chosen, and of those that tie just below it as many as the second says.
    is_exact = reached == capacity
    return tl.maximum(tl.where(is_exact, low, low + 1), 1), tl.where(is_exact, 0, capacity - above)


@triton.jit
def _slots(keys, least, wanted, chosen_seen, ties_seen):
    # Which rows of a block are chosen, into which slots, and how many of both kinds there are. One running sum of two
    # counts: chosen rows in the upper 16 bits, ties in the lower. A block has 2^13 rows at most.
    ties = keys == least - 1
    counts = ((keys >= least).to(tl.int32) << 16) | ties.to(tl.int32)
    before = tl.cumsum(counts, 0) - counts
    ties_before = ties_seen + (before & 0xFFFF)
    chosen = (keys >= least) | (ties & (ties_before < wanted))
    return chosen, chosen_seen + (before >> 16) + tl.minimum(ties_before, wanted), counts


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
    IS_SHORT: tl.constexpr,
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
        IS_SHORT: Whether S is less than 2^15: two counts then fit into one number.
    """
    batch_row = tl.program_id(0).to(tl.int64)
    logits += batch_row * rows
    valid += batch_row * rows
    positions += batch_row * capacity
    filled += batch_row * capacity
    lanes = tl.arange(0, BLOCK)

    padding_enters = False
    above = tl.zeros((), tl.int32)  # rows that reach `high`, below: those that are certain, or none
    if HAS_VALID:
        valid_rows = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, rows, BLOCK):
            at = start + lanes
            valid_rows += (tl.load(valid + at, mask=at < rows, other=0) != 0).to(tl.int32)
        all_valid = tl.sum(valid_rows)
        padding_enters = all_valid < capacity
        above = tl.where(padding_enters, all_valid, 0)

    inside = lanes < rows
    ok = tl.load(valid + lanes, mask=inside, other=0) != 0 if HAS_VALID else inside
    keys = _keys(tl.load(logits + lanes, mask=inside, other=0.0), ok, inside, padding_enters, HAS_VALID)

    # The greatest key that K rows reach is the K-th best one. A threshold that exactly K rows reach is as good.
    low = tl.zeros((), tl.uint32)
    reached = tl.zeros((), tl.int32) + rows  # rows that reach `low`
    high = tl.full((), 0xFFFFFFFF, tl.uint32)
    is_first = True
    while (high - low > 1) & (reached != capacity):
        trial1, trial2, trial3, trial4, trial5, trial6, trial7 = _trials(is_first, low, high)
        is_first = False
        # Threads count for themselves until the row ends, so that no block waits for the one before.
        count13 = tl.zeros((BLOCK // 8,), tl.int32)
        count24 = tl.zeros((BLOCK // 8,), tl.int32)
        count57 = tl.zeros((BLOCK // 8,), tl.int32)
        count6 = tl.zeros((BLOCK // 8,), tl.int32)
        for start in range(0, rows, BLOCK):
            if rows > BLOCK:
                at = start + lanes
                inside = at < rows
                ok = tl.load(valid + at, mask=inside, other=0) != 0 if HAS_VALID else inside
                keys = _keys(tl.load(logits + at, mask=inside, other=0.0), ok, inside, padding_enters, HAS_VALID)
            block13, block24, block57, block6 = _reach(keys, trial1, trial2, trial3, trial4, trial5, trial6, trial7)
            count13 += block13
            count24 += block24
            count57 += block57
            count6 += block6
        low, reached, high, above = _close_in(
            count13, count24, count57, count6, trial1, trial2, trial3, trial4, trial5, trial6, trial7, capacity, low,
            reached, high, above, IS_SHORT)

    least, wanted = _threshold(low, reached, above, capacity)
    chosen_seen = tl.zeros((), tl.int32)
    ties_seen = tl.zeros((), tl.int32)
    for start in range(0, rows, BLOCK):
        at = start + lanes
        if rows > BLOCK:
            inside = at < rows
            ok = tl.load(valid + at, mask=inside, other=0) != 0 if HAS_VALID else inside
            keys = _keys(tl.load(logits + at, mask=inside, other=0.0), ok, inside, padding_enters, HAS_VALID)
        chosen, slot, counts = _slots(keys, least, wanted, chosen_seen, ties_seen)
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
        IS_SHORT=isinstance(rows, int) and rows < 2**15,
        num_warps=8 if block >= 4096 else min(max(block // 256, 1), 4),
    )
    return positions, filled
