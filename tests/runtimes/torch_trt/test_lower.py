"""The three ops in ATen: the same positions, rows and bits as the reference. This takes no Torch-TensorRT."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modcompile.runtimes.torch_trt.builder import lower_model, lowering_passes
from modcompile.runtimes.torch_trt.lower import lower_ops
from modcompile.runtimes.trt.lower import TOPK_LIMIT
from tiny import Block, Stack, randn, randomise_routers
from tolerances import TOLERANCES, deviation
from torch import nn

import modcompile as mc
from modcompile.errors import UnsupportedGraphError, UsageError
from modcompile.ops import gather_rows, merge_rows, route

# B batch  S rows  K capacity  D model dim

# Few values, so that rows tie; each one a corner of float32.
CORNERS = [0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, torch.finfo(torch.float32).min, 1e-45, 3.5]
# Those of the ops that our lowering and torch's decompositions of it use which have a converter, at any dtype and shape
# that occurs here: py/torch_tensorrt/dynamo/conversion/aten_ops_converters.py and ops_evaluators.py of pytorch/TensorRT
# at v2.13.0. TopK takes a static K up to 3840.
CONVERTED = {
    "_to_copy.default", "add.Tensor", "arange.start_step", "clamp.default", "eq.Scalar", "expand.default",
    "gather.default", "ge.Scalar", "ge.Tensor", "getitem", "gt.Scalar", "gt.Tensor", "index_select.default",
    "mul.Tensor", "scatter.src", "slice.Tensor", "sub.Tensor", "sum.dim_IntList", "topk.default", "unsqueeze.default",
    "view.default", "where.self", "full.default",
}


class Call(nn.Module):
    """One call of an op."""

    def __init__(self, function, *constants):
        super().__init__()
        self.function, self.constants = function, constants

    def forward(self, *tensors):
        return self.function(*tensors, *self.constants)


def lowered(function, tensors, *constants):
    return lower_ops(torch.export.export(Call(function, *constants), tuple(tensors), strict=False))


@functools.cache
def lowered_route(batch, rows, capacity, masked):
    """The lowered program of one call of route."""
    tensors = [randn(batch, rows), *([torch.ones(batch, rows, dtype=torch.bool)] if masked else [])]
    call = (lambda logits, valid: route(logits, valid, capacity)) if masked else (
        lambda logits: route(logits, None, capacity))
    return lowered(call, tensors).module()


def assert_routes_alike(logits, valid, capacity):
    program = lowered_route(*logits.shape, capacity, valid is not None)
    outputs = program(logits) if valid is None else program(logits, valid)
    for found, expected in zip(outputs, route(logits, valid, capacity), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def random_corners(batch, rows):
    picks = torch.randint(len(CORNERS), (batch, rows), generator=torch.Generator().manual_seed(1))
    return torch.tensor(CORNERS)[picks]


def random_mask(batch, rows, seed):
    return torch.rand(batch, rows, generator=torch.Generator().manual_seed(seed)) < 0.4


@pytest.mark.parametrize("capacity", [1, 5, 62, 63])
@pytest.mark.parametrize("masked", [False, True])
def test_route_chooses_the_same_rows(masked, capacity):
    kinds = torch.cat([randn(2, 63), torch.full((2, 63), 0.5), random_corners(4, 63)])  # [8, S]
    if not masked:
        return assert_routes_alike(kinds, None, capacity)
    one = torch.arange(63).expand(8, 63) == 40
    # Random ones twice, nothing, everything, a single row: each with every kind of logits.
    masks = torch.cat([random_mask(16, 63, 2), torch.zeros_like(one), torch.ones_like(one), one])  # [40, S]
    assert_routes_alike(kinds.repeat(5, 1), masks, capacity)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_route_chooses_the_same_rows_of_any_logits(data):
    value = st.one_of(st.sampled_from(CORNERS), st.floats(width=32))
    logits = torch.tensor(data.draw(st.lists(value, min_size=9, max_size=9))).view(1, 9)
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=9, max_size=9))).view(1, 9)
    mask = data.draw(st.sampled_from([None, valid]))
    assert_routes_alike(logits, mask, data.draw(st.sampled_from([1, 4, 9])))


def test_positions_stay_exact_in_a_long_row():
    # 4096 rows: no more than 3840 may be chosen, but they lie anywhere.
    assert_routes_alike(randn(1, 4096).round(), random_mask(1, 4096, 3), 512)


def test_a_capacity_above_the_limit_of_topk_is_refused():
    with pytest.raises(UnsupportedGraphError, match=f"K <= {TOPK_LIMIT}") as refused:
        lowered_route(1, TOPK_LIMIT + 7, TOPK_LIMIT + 1, False)
    assert f"K = {TOPK_LIMIT + 1}" in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_come_back_bit_for_bit(dtype):
    x, y = randn(2, 7, 8).to(dtype), randn(2, 4, 8, seed=1).to(dtype)
    y[0, 0], y[1, 2] = math.nan, math.inf
    positions = torch.tensor([[0, 2, 5, 6], [1, 2, 3, 4]])
    # Closed before NaN and before infinity, open, and between.
    gate = torch.tensor([[0.0, 1.0, 0.3, -2.0], [1.0, 0.7, 0.0, 1.0]])
    found = lowered(merge_rows, [x, y, positions, gate]).module()(x, y, positions, gate)
    expected = merge_rows(x, y, positions, gate)
    assert found.dtype == dtype and expected.isfinite().all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("x", [randn(2, 7, 8), randn(2, 7) > 0, torch.arange(2 * 7 * 3 * 2).view(2, 7, 3, 2)],
                         ids=["hidden", "mask", "rank 4"])
def test_gathered_rows_are_the_rows(x):
    positions = torch.tensor([[0, 6], [2, 3]])
    assert torch.equal(lowered(gather_rows, [x, positions]).module()(x, positions), gather_rows(x, positions))


@pytest.mark.parametrize(("bias", "factors"), [
    (randn(6), {}), (randn(1), {}), (randn(5, 6), {}), (randn(6), {"alpha": 2.0}), (randn(6), {"beta": 0.5})])
def test_addmm_becomes_linear(bias, factors):
    x, weight = randn(5, 4, seed=1), randn(4, 6, seed=2)
    program = lowered(lambda *given: torch.addmm(*given, **factors), [bias, x, weight])
    ops = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.aten.linear.default in ops and torch.ops.aten.addmm.default not in ops
    assert deviation(program.module()(bias, x, weight), torch.addmm(bias, x, weight, **factors)) <= TOLERANCES[
        "eager"][torch.float32]


def test_every_op_of_the_lowering_has_a_converter():
    def routed(x, logits, valid):
        positions, filled = route(logits, valid, 3)
        rows = gather_rows(x, positions)
        other, _ = route(logits, None, 3)
        return merge_rows(x, rows + gather_rows(x, other), positions, torch.where(filled, 0.5, 0.0))

    tensors = [randn(2, 7, 8), randn(2, 7), randn(2, 7) > 0]
    program = lowered(routed, tensors).run_decompositions()
    ops = {str(node.target).removeprefix("aten.") if "aten" in str(node.target) else node.target.__name__
           for node in program.graph.nodes if node.op == "call_function"}
    # What Torch-TensorRT's own decompositions, or constant folding, take away.
    assert ops - CONVERTED <= {"full_like.default", "scalar_tensor.default", "rsub.Scalar"}


# Models


INPUTS = {"hidden": randn(2, 5, 8), "attention_mask": torch.ones(2, 5, dtype=torch.long)}


@pytest.fixture(scope="module")
def model():
    return randomise_routers(mc.convert(Stack(Block(), Block()), INPUTS, mc.MoDConfig(capacity_ratio=0.25)))


def test_a_lowered_model_is_the_model(model):
    inputs = [randn(2, 63, 8), (torch.arange(63) < torch.tensor([[63], [20]])).long()]
    flat, program, passes = lower_model(model, "fp32", {"hidden": (2, 63, 8)})
    assert [record["name"] for record in passes.ran] == [made.name for made in lowering_passes("fp32")]
    assert any(str(node.target).startswith("modcompile.") for node in flat.graph.nodes)
    assert not any("modcompile" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        found, expected = program.module()(*inputs), model.run_graph(inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_model_in_training_is_lowered_for_evaluation_and_stays_in_training(model):
    dropping = mc.convert(Stack(Block(dropout=0.5), Block(dropout=0.5)), INPUTS, mc.MoDConfig(capacity_ratio=0.25))
    dropping.train()
    inputs = [randn(2, 63, 8), torch.ones(2, 63, dtype=torch.long)]
    _, program, _ = lower_model(dropping, "fp32", {"hidden": (2, 63, 8)})
    assert dropping.training
    with torch.no_grad():
        expected = dropping.eval().run_graph(inputs)
        assert all(torch.equal(one, other) for one, other in zip(program.module()(*inputs), expected, strict=True))


def test_a_size_that_is_left_open_is_refused(model):
    with pytest.raises(UsageError, match="static shapes") as refused:
        lower_model(model)
    assert "hidden" in str(refused.value)


def test_a_precision_that_there_is_not_is_refused(model):
    with pytest.raises(UsageError, match="int8"):
        lower_model(model, "int8", {"hidden": (2, 63, 8)})
