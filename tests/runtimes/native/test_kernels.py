"""The CUDA kernels against the references of ``modcompile.ops``, on the GPU and emulated on the CPU."""

import ctypes
import itertools
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modcompile
from modcompile.ops import gather_rows, merge_rows, route

# B batch  S rows  K capacity  D width

ROOT = Path(__file__).parents[3]
GUARD_BYTES = 256
POISON = 0xA5
INDEX_DTYPES = [torch.int64, torch.int32]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
gpu = pytest.mark.gpu
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Guarded:
    """A poisoned tensor between poisoned guards, ``offset`` bytes after an address that is a multiple of 256."""

    def __init__(self, shape, dtype, device, offset=0):
        count = torch.Size(shape).numel() * dtype.itemsize
        self.bytes = torch.full((GUARD_BYTES + offset + count + GUARD_BYTES,), POISON, dtype=torch.uint8, device=device)
        start = -self.bytes.data_ptr() % 256 + offset
        self.inside = slice(start, start + count)
        self.tensor = self.bytes[self.inside].view(dtype).view(shape)

    def holding(self, values):
        self.tensor.copy_(values)
        return self

    def result(self):
        """A copy on the CPU, once nothing outside was written."""
        everything = self.bytes.cpu()
        assert (everything[:self.inside.start] == POISON).all(), "written before the tensor"
        assert (everything[self.inside.stop:] == POISON).all(), "written after the tensor"
        return self.tensor.cpu()


def put(values, device, offset=0):
    """A copy of ``values`` on the device, at that alignment; None stays None."""
    return values if values is None else Guarded(values.shape, values.dtype, device, offset).holding(values).tensor


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.itemsize])


def all_logits(batch, rows):
    """Every kind of ties, order and corner, [B, S] each."""
    few = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.nan, torch.inf, -torch.inf, torch.finfo().min, 1e-45, 3.5])
    shape = (batch, rows)
    yield "normal", torch.randn(shape)
    yield "all equal", torch.ones(shape)
    yield "two values", torch.randint(2, shape).float()
    yield "zeros of both signs", torch.where(torch.rand(shape) < 0.5, 0.0, -0.0)
    yield "corners", few[torch.randint(len(few), shape)]
    yield "any bits", torch.randint(-2**31, 2**31, shape).to(torch.int32).view(torch.float32)
    # The last digits of the key decide, and some rows still tie.
    yield "close", (torch.randint(700, shape).to(torch.int32) + 0x3F800000).view(torch.float32)


def all_masks(batch, rows, capacity):
    yield "no mask", None
    yield "some", torch.rand(batch, rows) < 0.7
    yield "none valid", torch.zeros(batch, rows, dtype=torch.bool)
    yield "padding", torch.arange(rows) < torch.randint(rows + 1, (batch, 1))
    fewer = torch.rand(batch, rows).argsort(1) < torch.randint(capacity, (batch, 1))
    yield "fewer valid than capacity", fewer


def run_route(kernels, logits, valid, capacity, index_dtype):
    shape = (logits.shape[0], capacity)
    positions = Guarded(shape, index_dtype, kernels.device)
    filled = Guarded(shape, torch.bool, kernels.device)
    kernels.route(put(logits, kernels.device), put(valid, kernels.device), positions.tensor, filled.tensor)
    return positions.result().long(), bits(filled.result())


def assert_routed(found, logits, valid, capacity, what):
    positions, filled = route(logits, valid, capacity)
    assert torch.equal(found[0], positions), what
    assert torch.equal(found[1], bits(filled)), what  # a bool is 0 or 1, not any byte


@pytest.mark.parametrize(
    "rows", [1, 2, 31, 32, 33, 63, 1000, 1024, 1025, 2048, 4097, 8192, 8193, 16384, 16385, 65536])
def test_route(kernels, seed, rows):
    capacities = sorted({1, rows, min(rows, rows // 8 | 1), max(1, rows - 1)})
    cases = [
        (capacity, *logits, *mask)
        for capacity in capacities
        for logits, mask in itertools.product(all_logits(3, rows), all_masks(3, rows, capacity))
    ]
    if kernels.device == "cpu":  # where a case takes between a millisecond and half a second
        cases = random.Random(seed).sample(cases, min(len(cases), 30 if rows <= 2048 else 4))
    for case, index_dtype in zip(cases, itertools.cycle(INDEX_DTYPES), strict=False):
        capacity, kind, logits, mask, valid = case
        found = run_route(kernels, logits, valid, capacity, index_dtype)
        assert_routed(found, logits, valid, capacity, f"{rows} rows to {capacity}, {kind}, {mask}, {index_dtype}")


def test_route_takes_logits_that_begin_anywhere(kernels, seed):
    logits, valid = torch.randn(3, 63), torch.rand(3, 63) < 0.5
    positions, filled = (Guarded((3, 5), dtype, kernels.device) for dtype in (torch.int64, torch.bool))
    kernels.route(put(logits, kernels.device, 4), put(valid, kernels.device, 3), positions.tensor, filled.tensor)
    assert_routed((positions.result(), bits(filled.result())), logits, valid, 5, "misaligned")


def run_route_rows(kernels, x, weight, bias, valid, capacity, index_dtype, workspace, offsets=(0, 0)):
    device = kernels.device
    batch, rows = x.shape[:2]
    logits = Guarded((batch, rows), torch.float32, device)
    positions = Guarded((batch, capacity), index_dtype, device)
    filled = Guarded((batch, capacity), torch.bool, device)
    kernels.route_rows(put(x, device, offsets[0] * x.itemsize), put(weight, device, 4 * offsets[1]),
                       put(bias, device), put(valid, device), logits.tensor, positions.tensor, filled.tensor, workspace)
    return logits.result(), positions.result().long(), bits(filled.result())


def assert_logits(logits, x, weight, bias):
    """What float32 sums of that many terms can be off, in any order."""
    products = x.double() * weight.double()
    bound = (x.shape[-1] + 2) * 2.0**-24 * (products.abs().sum(-1) + bias.abs())
    assert ((logits - (products.sum(-1) + bias)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "rows", "width", "capacity", "offsets"),
    [(1, 1, 1, 1, (0, 0)), (3, 33, 7, 5, (0, 0)), (2, 63, 64, 63, (0, 0)), (2, 63, 64, 8, (1, 0)),
     (2, 63, 64, 8, (0, 1)), (5, 130, 200, 17, (0, 0)), (2, 1000, 16, 125, (0, 0)), (1, 2500, 8, 313, (0, 0)),
     (2, 9000, 8, 1125, (0, 0))])
def test_route_rows(kernels, seed, dtype, batch, rows, width, capacity, offsets):
    x, weight, bias = torch.randn(batch, rows, width).to(dtype), torch.randn(width), torch.randn(1)
    workspace = kernels.workspace(batch, rows)
    for valid, index_dtype in zip((None, torch.rand(batch, rows) < 0.7), INDEX_DTYPES, strict=True):
        runs = [
            run_route_rows(kernels, x, weight, bias, valid, capacity, index_dtype, workspace, offsets)
            for _ in range(2)
        ]
        logits = runs[0][0]
        assert_logits(logits, x, weight, bias)
        assert_routed(runs[0][1:], logits, valid, capacity, "the logits that it gave")
        assert all(torch.equal(*pair) for pair in zip(*runs, strict=True)), "another result the second time"
        assert not workspace.any(), "the workspace is not ready for the next launch"


def test_route_rows_of_a_new_router_and_of_nan(kernels, seed):
    x, bias = torch.randn(2, 100, 24), torch.ones(1)
    workspace = kernels.workspace(2, 100)
    logits, positions, _ = run_route_rows(kernels, x, torch.zeros(24), bias, None, 13, torch.int64, workspace)
    assert (logits == 1).all() and (positions == torch.arange(13)).all()
    x[:, 5] = torch.nan
    logits, *found = run_route_rows(kernels, x, torch.randn(24), bias, None, 100, torch.int64, workspace)
    assert logits[:, 5].isnan().all() and logits.isnan().sum() == 2
    assert_routed(found, logits, None, 100, "NaN")


def assert_normed(normed, exact, weight, bias, centered, dtype):
    """A norm of numbers as large as 100: the rounding of the result, and float32's of the mean."""
    expected = torch.nn.functional.layer_norm(exact, weight.shape, weight.double(), bias.double(), 1e-5) if centered \
        else torch.nn.functional.rms_norm(exact, weight.shape, weight.double(), 1e-5)
    off = torch.finfo(dtype).eps * expected.abs() + 1e-4 * weight.abs() + torch.finfo(dtype).tiny
    assert ((normed.double() - expected).abs() <= off).all()


def run_sum_norm_route_rows(kernels, residual, product, product_bias, norm_weight, norm_bias, epsilon, centered, weight,
                            bias, valid, capacity, index_dtype, offset=0):
    """summed, normed, logits, positions and filled, twice the same; ``offset`` in elements, of what has rows."""
    device, dtype, (batch, rows, _) = kernels.device, residual.dtype, residual.shape
    workspace = kernels.workspace(batch, rows)
    inputs = [put(residual, device, offset * dtype.itemsize),
              *(put(value, device) for value in (product, product_bias, norm_weight, norm_bias))]
    router = [put(value, device) for value in (weight, bias, valid)]
    runs = []
    for _ in range(2):
        made = [Guarded(residual.shape, dtype, device, offset * dtype.itemsize) for _ in range(2)]
        made += [Guarded((batch, rows), torch.float32, device),
                 *(Guarded((batch, capacity), kind, device) for kind in (index_dtype, torch.bool))]
        kernels.sum_norm_route_rows(*inputs, epsilon, centered, *router, *(value.tensor for value in made), workspace)
        runs.append([value.result() for value in made])
        assert not workspace.any(), "the workspace is not ready for the next launch"
    assert all(torch.equal(bits(first), bits(second)) for first, second in zip(*runs, strict=True)), "another result"
    return runs[0]


def assert_border(found, residual, product, product_bias, norm_weight, norm_bias, centered, weight, bias, valid,
                  capacity):
    """What stands between two blocks: each step of it is held against the outcome of the one before."""
    summed, normed, logits, positions, filled = found
    dtype = residual.dtype
    exact = residual.double() + product.double() + (0 if product_bias is None else product_bias.double())
    # In float32, rounded once: the second of its two sums may be off by that much before.
    off = torch.finfo(dtype).eps * exact.abs() + 4 * torch.finfo(torch.float32).eps * residual.abs() + 1e-6
    assert ((summed.double() - exact).abs() <= off).all()
    assert_normed(normed, summed.double(), norm_weight, norm_bias, centered, dtype)
    assert_logits(logits, summed, weight, bias)
    assert_routed((positions.long(), bits(filled)), logits, valid, capacity, "the logits that it gave")


@pytest.mark.parametrize("centered", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "rows", "width", "capacity", "offset"),
    [(1, 1, 1, 1, 0), (3, 33, 7, 5, 0), (2, 63, 64, 63, 0), (2, 63, 64, 8, 1), (2, 20, 1024, 3, 0), (1, 9, 2048, 9, 0),
     (1, 9, 2056, 1, 0), (1, 9, 2051, 1, 0), (1, 2500, 8, 313, 0)])
def test_sum_norm_route_rows(kernels, seed, dtype, batch, rows, width, capacity, offset, centered):
    residual = (torch.randn(batch, rows, width) + 30 * torch.randn(batch, rows, 1)).to(dtype)
    product, norm_weight = torch.randn(batch, rows, width).to(dtype), torch.randn(width).to(dtype)
    product_bias, norm_bias = (torch.randn(width).to(dtype) if centered else None for _ in range(2))
    case = (residual, product, product_bias, norm_weight, norm_bias)
    weight, bias = torch.randn(width), torch.randn(1)
    for valid, index_dtype in zip((None, torch.rand(batch, rows) < 0.7), INDEX_DTYPES, strict=True):
        found = run_sum_norm_route_rows(kernels, *case, 1e-5, centered, weight, bias, valid, capacity, index_dtype,
                                        offset)
        assert_border(found, *case, centered, weight, bias, valid, capacity)


# A word more, and a row takes twice the warps or twice the registers; the last is more than a team holds.
@pytest.mark.parametrize("words", [1, 31, 32, 33, 64, 65, 96, 128, 129, 255, 256, 257, 511, 512, 513, 1030])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_norm_route_rows_of_every_team(kernels, seed, dtype, words):
    width = words * 16 // dtype.itemsize
    for (batch, rows), centered in zip([(1, 1), (3, 7), (1, 50), (2, 17)], [True, True, True, False], strict=True):
        residual = (torch.randn(batch, rows, width) + 30 * torch.randn(batch, rows, 1)).to(dtype)
        product, (product_bias, norm_weight, norm_bias) = torch.randn_like(residual), torch.randn(3, width).to(dtype)
        case = (residual, product, product_bias, norm_weight, norm_bias if centered else None)
        weight, bias, capacity = torch.randn(width), torch.randn(1), rows // 3 + 1
        found = run_sum_norm_route_rows(kernels, *case, 1e-5, centered, weight, bias, None, capacity, torch.int64)
        assert_border(found, *case, centered, weight, bias, None, capacity)


@pytest.mark.parametrize("steps", [False, True], ids=["one mean", "a mean for each warp"])
@pytest.mark.parametrize("width", [96, 300, 301, 512, 1000, 2048, 2100])
def test_sum_norm_route_rows_far_from_zero(kernels, seed, width, steps):
    """Nothing would be left of a mean square less the square of the mean, nor of warps' squares without their means."""
    far, residual = 4000.0, 0.1 * torch.randn(2, 9, width)
    if steps:
        residual += (torch.arange(width) // 128) % 3  # 32 words of four
    residual += far
    zeros, ones = torch.zeros(width), torch.ones(width)
    summed, normed, *_ = run_sum_norm_route_rows(kernels, residual, torch.zeros_like(residual), None, ones, zeros, 0.0,
                                                 True, ones, torch.zeros(1), None, 3, torch.int64)
    assert torch.equal(summed, residual)
    exact = summed.double()
    deviation = exact - exact.mean(-1, keepdim=True)
    spread = deviation.square().mean(-1, keepdim=True).sqrt()
    # A mean of float32 is off by a few units in its last place.
    assert ((normed * spread - deviation).abs() <= 8 * 2.0**-24 * far + 1e-4 * deviation.abs()).all()


def test_sum_norm_route_rows_of_nan(kernels, seed):
    device, workspace = kernels.device, kernels.workspace(2, 100)
    residual, product = torch.randn(2, 100, 24), torch.randn(2, 100, 24)
    residual[:, 5] = torch.nan
    made = [torch.empty(2, 100, 24, device=device) for _ in range(2)]
    logits, positions = torch.empty(2, 100, device=device), torch.empty(2, 99, dtype=torch.int64, device=device)
    kernels.sum_norm_route_rows(
        *(put(value, device) for value in (residual, product, None, torch.ones(24), torch.zeros(24))), 1e-5, True,
        put(torch.randn(24), device), put(torch.ones(1), device), None, *made, logits, positions,
        torch.empty(2, 99, dtype=torch.bool, device=device), workspace)
    for value in (made[0][..., 0], made[1][..., 0], logits):
        assert value.cpu().isnan().nonzero().tolist() == [[0, 5], [1, 5]]
    assert (positions.cpu() != 5).all()


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("row_bytes", [1, 2, 3, 4, 6, 8, 12, 16, 34, 48, 1000, 4096, 16400])
def test_gather_rows(kernels, seed, row_bytes, index_dtype):
    for batch, rows, capacity in ((1, 1, 1), (3, 33, 5), (2, 63, 63)):
        x = torch.randint(256, (batch, rows, row_bytes), dtype=torch.uint8)
        positions, _ = route(torch.randn(batch, rows), None, capacity)
        for from_offset, to_offset in ((0, 0), (16, 8), (1, 0), (4, 2)):
            out = Guarded((batch, capacity, row_bytes), torch.uint8, kernels.device, to_offset)
            kernels.gather_rows(put(x, kernels.device, from_offset), put(positions.to(index_dtype), kernels.device),
                                out.tensor)
            assert torch.equal(out.result(), gather_rows(x, positions))


def test_gather_rows_gives_zeros_for_a_position_that_is_none(kernels, seed):
    x = torch.randn(2, 9, 40)
    positions = torch.tensor([[0, -1, 8], [9, 2**62, -(2**62)]])
    out = Guarded((2, 3, 40), torch.float32, kernels.device)
    kernels.gather_rows(put(x, kernels.device), put(positions, kernels.device), out.tensor)
    found = out.result()
    assert torch.equal(found[0, [0, 2]], x[0, [0, 8]])
    assert (found[0, 1] == 0).all() and (found[1] == 0).all()


@pytest.mark.parametrize("centered", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "capacity", "width", "offset"),
    [(1, 1, 1, 0), (33, 5, 7, 0), (63, 63, 64, 0), (63, 8, 64, 1), (9, 2, 2056, 0)])
def test_gather_norm_rows(kernels, seed, rows, capacity, width, offset, dtype, centered):
    # Rows far from zero: where the variance is taken as the mean square less the square of the mean, nothing is left.
    x = (torch.randn(3, rows, width) + 30 * torch.randn(3, rows, 1)).to(dtype)
    weight = torch.randn(width).to(dtype)
    bias = torch.randn(width).to(dtype) if centered else None
    positions, _ = route(torch.randn(3, rows), None, capacity)
    shape, device = (3, capacity, width), kernels.device
    out, normed = (Guarded(shape, dtype, device, at * dtype.itemsize) for at in (0, offset))
    for index_dtype in INDEX_DTYPES:
        kernels.gather_norm_rows(put(x, device), put(positions.to(index_dtype), device), put(weight, device),
                                 put(bias, device), 1e-5, centered, out.tensor, normed.tensor)
        gathered = gather_rows(x, positions)
        assert torch.equal(bits(out.result()), bits(gathered))
        assert_normed(normed.result(), gathered.double(), weight, bias, centered, dtype)


def test_gather_norm_rows_of_positions_that_are_none(kernels, seed):
    x, positions = torch.randn(1, 5, 16), torch.tensor([[2, -1, 5, 2**40]])
    weight, bias = torch.randn(16), torch.randn(16)
    out, normed = (Guarded((1, 4, 16), torch.float32, kernels.device) for _ in range(2))
    kernels.gather_norm_rows(*(put(value, kernels.device) for value in (x, positions, weight, bias)), 1e-5, True,
                             out.tensor, normed.tensor)
    assert torch.equal(out.result()[0, 0], x[0, 2]) and (out.result()[0, 1:] == 0).all()
    assert torch.equal(normed.result()[0, 1:], bias.expand(3, 16))


def merge_case(dtype, batch, rows, capacity, width):
    x, y = torch.randn(batch, rows, width).to(dtype), (4 * torch.randn(batch, capacity, width)).to(dtype)
    positions, _ = route(torch.randn(batch, rows), None, capacity)
    gate = torch.randn(batch, capacity).to(dtype)
    ends = torch.tensor([0.0, -0.0, 1.0]).to(dtype)
    gate = torch.where(torch.rand_like(gate.float()) < 0.5, ends[torch.randint(3, gate.shape)], gate)
    corners = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).min])
    for tensor in (x, y):
        where = torch.rand(tensor.shape) < 0.05
        tensor[where] = corners[torch.randint(len(corners), (int(where.sum()),))].to(dtype)
    return x, y, positions, gate


def run_merge(kernels, x, y, positions, gate, in_place, offsets=(0, 0, 0)):
    device = kernels.device
    if in_place:
        out = Guarded(x.shape, x.dtype, device, offsets[0]).holding(x)
        x_there = out.tensor
    else:
        out = Guarded(x.shape, x.dtype, device, offsets[2])
        x_there = put(x, device, offsets[0])
    kernels.merge_rows(x_there, put(y, device, offsets[1]), put(positions, device), put(gate, device), out.tensor)
    return out.result()


def assert_merged(found, x, y, positions, gate):
    """Bit for bit, but for the payload of a NaN that was computed."""
    expected = merge_rows(x, y, positions, gate)
    computed = torch.zeros(x.shape[:2], dtype=torch.bool)
    computed.scatter_(1, positions, (gate != 0) & (gate != 1))
    both_nan = computed[..., None] & found.isnan() & expected.isnan()
    assert ((bits(found) == bits(expected)) | both_nan).all()


@pytest.mark.parametrize("in_place", [False, True], ids=["streaming", "in place"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "rows", "capacity", "width"),
    [(1, 1, 1, 1), (3, 33, 5, 7), (2, 63, 63, 8), (2, 100, 1, 72), (3, 257, 70, 24), (1, 1100, 1050, 16),
     (2, 40, 9, 2056)])
def test_merge_rows(kernels, seed, batch, rows, capacity, width, dtype, in_place):
    for index_dtype in INDEX_DTYPES:
        x, y, positions, gate = merge_case(dtype, batch, rows, capacity, width)
        found = run_merge(kernels, x, y, positions.to(index_dtype), gate, in_place)
        assert_merged(found, x, y, positions, gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "rows", "capacity", "width"), [(1, 1, 1, 1), (3, 33, 5, 7), (2, 100, 9, 72)])
def test_merge_row_pairs(kernels, seed, batch, rows, capacity, width, dtype):
    device = kernels.device
    for in_place, offset in itertools.product(itertools.product([False, True], repeat=2), (0, dtype.itemsize)):
        x, y, positions, gate = merge_case(dtype, batch, rows, capacity, width)
        other_x, other_y, _, _ = merge_case(dtype, batch, rows, capacity, width)
        # An offset keeps both from being written 16 bytes at a time.
        outs = [Guarded(x.shape, dtype, device, at).holding(given) for given, at in ((x, 0), (other_x, offset))]
        befores = [out.tensor if same else put(given, device)
                   for out, same, given in zip(outs, in_place, (x, other_x), strict=True)]
        kernels.merge_row_pairs(befores[0], put(y, device), befores[1], put(other_y, device), put(positions, device),
                                put(gate, device), outs[0].tensor, outs[1].tensor)
        assert_merged(outs[0].result(), x, y, positions, gate)
        assert_merged(outs[1].result(), other_x, other_y, positions, gate)


@pytest.mark.parametrize("in_place", [False, True], ids=["streaming", "in place"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_rows_that_begin_anywhere(kernels, seed, dtype, in_place):
    one = dtype.itemsize
    for offsets in ((one, 0, 0), (0, one, 0), (0, 0, one), (16, 32, 48), (one, one, one)):
        x, y, positions, gate = merge_case(dtype, 2, 33, 5, 64)
        assert_merged(run_merge(kernels, x, y, positions, gate, in_place, offsets), x, y, positions, gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_in_place_leaves_rows_with_a_closed_gate_alone(kernels, seed, dtype):
    x, y = torch.randn(2, 9, 16).to(dtype), torch.full((2, 9, 16), torch.nan).to(dtype)
    gate = torch.tensor([0.0, -0.0, 0.0] * 3).to(dtype).expand(2, 9).contiguous()
    found = run_merge(kernels, x, y, torch.arange(9).expand(2, 9).contiguous(), gate, in_place=True)
    assert torch.equal(bits(found), bits(x))


@pytest.mark.parametrize("in_place", [False, True], ids=["streaming", "in place"])
def test_merge_rows_stays_inside_whatever_the_positions_are(kernels, seed, in_place):
    x, y, _, gate = merge_case(torch.float16, 3, 70, 40, 24)
    positions = torch.where(torch.rand(3, 40) < 0.5, torch.randint(-(2**62), 2**62, (3, 40)),
                            torch.randint(-5, 80, (3, 40)))
    found = run_merge(kernels, x, y, positions, gate, in_place)
    named = (positions[:, None, :] == torch.arange(70)[None, :, None]).any(-1)
    assert torch.equal(bits(found[~named]), bits(x[~named]))


def arguments_of(kernels):
    """Of each function, arguments that are right."""
    device = kernels.device
    x, y = torch.zeros(2, 9, 4, device=device), torch.zeros(2, 3, 4, device=device)
    logits, filled = torch.zeros(2, 9, device=device), torch.zeros(2, 3, dtype=torch.bool, device=device)
    positions, gate = torch.zeros(2, 3, dtype=torch.int64, device=device), torch.zeros(2, 3, device=device)
    weight, bias, workspace = torch.zeros(4, device=device), torch.zeros(1, device=device), kernels.workspace(2, 9)
    return {
        "modcompile_route": {
            "logits": logits, "valid": None, "positions": positions, "index_bytes": 8, "filled": filled,
            "batch": 2, "rows": 9, "capacity": 3},
        "modcompile_route_rows": {
            "x": x, "dtype": 0, "weight": weight, "bias": bias, "valid": None, "logits": logits,
            "positions": positions, "index_bytes": 8, "filled": filled, "batch": 2, "rows": 9, "width": 4,
            "capacity": 3, "workspace": workspace},
        "modcompile_sum_norm_route_rows": {
            "residual": x, "product": x, "product_bias": None, "dtype": 0, "norm_weight": weight, "norm_bias": None,
            "epsilon": ctypes.c_float(1e-5), "centered": 0, "weight": weight, "router_bias": bias, "valid": None,
            "summed": x.clone(), "normed": x.clone(), "logits": logits, "positions": positions, "index_bytes": 8,
            "filled": filled, "batch": 2, "rows": 9, "width": 4, "capacity": 3, "needed_workspace": workspace},
        "modcompile_gather_rows": {
            "x": x, "positions": positions, "index_bytes": 8, "out": y, "batch": 2, "rows": 9, "capacity": 3,
            "row_bytes": 16},
        "modcompile_gather_norm_rows": {
            "x": x, "dtype": 0, "positions": positions, "index_bytes": 8, "weight": weight, "bias": None,
            "epsilon": ctypes.c_float(1e-5), "centered": 0, "out": y, "normed": y.clone(), "batch": 2, "rows": 9,
            "capacity": 3, "width": 4},
        "modcompile_merge_row_pairs": {
            "x": x, "y": y, "other_x": x, "other_y": y, "positions": positions, "index_bytes": 8, "gate": gate,
            "out": x.clone(), "other_out": x.clone(), "dtype": 0, "batch": 2, "rows": 9, "capacity": 3, "width": 4},
        "modcompile_merge_rows": {
            "x": x, "y": y, "positions": positions, "index_bytes": 8, "gate": gate, "out": x.clone(), "dtype": 0,
            "batch": 2, "rows": 9, "capacity": 3, "width": 4, "workspace": None},
    }


WRONG = {"index_bytes": [2, 0], "dtype": [3, -1], "batch": [-1], "rows": [2, -9], "capacity": [0, 10, -3],
         "width": [0, -4], "row_bytes": [0, -16]}
MAY_BE_NULL = {"valid", "workspace", "bias"}


@pytest.mark.parametrize("name", ["modcompile_route", "modcompile_route_rows", "modcompile_sum_norm_route_rows",
                                  "modcompile_gather_rows", "modcompile_gather_norm_rows", "modcompile_merge_rows",
                                  "modcompile_merge_row_pairs"])
def test_arguments_that_cannot_be_are_refused(kernels, name):
    right = arguments_of(kernels)[name]

    def error(**changed):
        values = ({**right, **changed}).values()
        pointers = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
        return getattr(kernels.library, name)(*pointers, None)

    assert error() == 0
    assert error(batch=0) == 0
    for argument, value in right.items():
        wrong = WRONG.get(argument, [])
        if isinstance(value, torch.Tensor) and (argument not in MAY_BE_NULL or name == "modcompile_route_rows"):
            wrong = [None]
        for bad in wrong:
            assert error(**{argument: bad}) == 1, f"{argument} = {bad}"


def test_the_workspace_has_a_counter_for_each_batch_row(kernels):
    size = kernels.library.modcompile_route_rows_workspace
    assert size(7, 100) == 28 and size(0, 1) == 0 and size(-1, 5) == 0 and size(3, 0) == 0


def test_versions_agree(kernels):
    assert kernels.version() == modcompile.__version__
    assert f"VERSION {modcompile.__version__} " in (ROOT / "runtimes/native/CMakeLists.txt").read_text()


def test_every_float_has_its_place_among_the_keys(tmp_path):
    if subprocess.run(["g++", "--version"], capture_output=True).returncode != 0:
        pytest.skip("no g++")
    source, program = Path(__file__).with_name("order_key_check.cc"), tmp_path / "order_key_check"
    built = subprocess.run(["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-I",
                            ROOT / "runtimes/native/kernels", source, "-o", program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_benchmark_starts():
    done = subprocess.run([sys.executable, Path(__file__).with_name("bench_kernels.py"), "--help"], capture_output=True,
                          text=True, cwd=ROOT)
    assert done.returncode == 0 and "--only" in done.stdout, done.stderr


@gpu
def test_exports_are_the_header(gpu_kernels):
    header = (ROOT / "runtimes/native/kernels/modcompile_kernels.h").read_text()
    declared = set(re.findall(r"MODCOMPILE_API [\w *]*?(modcompile_\w+)\(", header))
    listed = subprocess.run(["nm", "-D", "--defined-only", gpu_kernels.library._name], capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("no nm")
    assert {line.split()[-1] for line in listed.stdout.splitlines()} == declared


@gpu
@pytest.mark.parametrize("rows", [1024, 4096, 20000])
def test_a_graph_replays_with_other_inputs(gpu_kernels, seed, rows):
    """All four in one CUDA graph: nothing allocates, waits or depends on what was captured."""
    kernels, device = gpu_kernels, "cuda"
    batch, capacity, width = 2, rows // 8 + 1, 40
    x, y, positions, gate = (put(value, device) for value in merge_case(torch.float16, batch, rows, capacity, width))
    weight, bias = torch.randn(width, device=device), torch.ones(1, device=device)
    valid = torch.rand(batch, rows, device=device) < 0.7
    logits, given = torch.empty(batch, rows, device=device), torch.randn(batch, rows, device=device)
    filled = torch.empty(batch, capacity, dtype=torch.bool, device=device)
    routed, routed_filled = torch.empty_like(positions), torch.empty_like(filled)
    gathered, merged, workspace = torch.empty_like(y), torch.empty_like(x), kernels.workspace(batch, rows)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.route(given, valid, routed, routed_filled)
        kernels.route_rows(x, weight, bias, valid, logits, positions, filled, workspace)
        kernels.gather_rows(x, positions, gathered)
        kernels.merge_rows(x, y, positions, gate, merged)
        kernels.merge_rows(x, y, positions, gate, x)
    for _ in range(3):
        before, y_before, _, gate_before = merge_case(torch.float16, batch, rows, capacity, width)
        before = before.nan_to_num(0, 1, -1)  # so that the logits can be compared
        x.copy_(before), y.copy_(y_before), gate.copy_(gate_before), given.normal_()
        valid.copy_(torch.rand(batch, rows) < 0.7)
        for output in (logits, gathered, merged, filled, positions, routed, routed_filled):
            bits(output.view(torch.uint8)).fill_(0xFF)
        graph.replay()
        assert_routed((routed.cpu(), bits(routed_filled.cpu())), given.cpu(), valid.cpu(), capacity, "route")
        assert torch.isfinite(logits).all()
        assert_routed((positions.cpu(), bits(filled.cpu())), logits.cpu(), valid.cpu(), capacity, "route_rows")
        assert torch.equal(bits(gathered.cpu()), bits(gather_rows(before, positions.cpu())))
        for found in (merged, x):
            assert_merged(found.cpu(), before, y_before, positions.cpu(), gate_before)
    assert not workspace.any()


@gpu
def test_more_elements_than_an_int32_counts(gpu_kernels, seed):
    """2^31 and a few elements of bfloat16, of which the last rows matter."""
    batch, rows, width, capacity = 1, 2**19 + 8, 4096, 4
    if torch.cuda.mem_get_info()[0] < 3 * batch * rows * width * 2:
        pytest.skip("needs 13 GB of GPU memory")
    x = torch.zeros(batch, rows, width, dtype=torch.bfloat16, device="cuda")
    x[:, -8:].normal_()
    positions = torch.tensor([[0, rows - 8, rows - 3, rows - 1]], device="cuda")
    out = torch.empty(batch, capacity, width, dtype=torch.bfloat16, device="cuda")
    gpu_kernels.gather_rows(x, positions, out)
    assert torch.equal(out, x[:, positions[0]])
    y, gate = torch.randn_like(out), torch.ones(1, capacity, dtype=torch.bfloat16, device="cuda")
    merged = torch.empty_like(x)
    gpu_kernels.merge_rows(x, y, positions, gate, merged)
    assert torch.equal(merged[:, positions[0]], y)
    assert torch.equal(merged[:, -7:-3], x[:, -7:-3])
    gpu_kernels.merge_rows(x, y, positions, gate, x)
    assert torch.equal(x, merged)
