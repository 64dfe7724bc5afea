import math

import numpy as np
import onnx.reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx.reference.op_run import OpRun
from torch.export import Dim

from modcompile.errors import UsageError
from modcompile.ops import route

OPSETS = [17, 18, 21, 23]
LOGITS = ("logits", TensorProto.FLOAT, ("B", "S"))
VALID = ("valid", TensorProto.BOOL, ("B", "S"))
CAPACITY = ("capacity", TensorProto.INT64, ())
INPUTS = {"Route": (LOGITS, CAPACITY), "MaskedRoute": (LOGITS, VALID, CAPACITY)}
OUTPUTS = (("positions", TensorProto.INT64, ("B", "K")), ("filled", TensorProto.BOOL, ("B", "K")))

LOWEST = float(np.finfo(np.float32).min)
# Few values, so that rows tie; each one a corner of float32.
CORNERS = [0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, LOWEST, 1e-45, 3.5]


def oracle(logits, valid, capacity):
    """The contract in plain Python."""
    positions, filled = [], []
    for scores, ok in zip(logits.tolist(), valid.tolist(), strict=True):
        rank = [(not ok[row], math.inf if math.isnan(score) else -score, row) for row, score in enumerate(scores)]
        best = sorted(row for _, _, row in sorted(rank)[:capacity])
        positions.append(best)
        filled.append([ok[row] for row in best])
    return positions, filled


@st.composite
def cases(draw):
    batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 17))
    value = draw(st.sampled_from([st.sampled_from(CORNERS), st.floats(width=32), st.just(1.0)]))
    logits = draw(st.lists(value, min_size=batch * rows, max_size=batch * rows))
    all_valid = draw(st.booleans())
    valid = [True] * (batch * rows) if all_valid else draw(
        st.lists(st.booleans(), min_size=batch * rows, max_size=batch * rows)
    )
    return (
        np.array(logits, np.float32).reshape(batch, rows),
        np.array(valid, bool).reshape(batch, rows),
        draw(st.integers(1, rows)),
    )


def row(*values):
    return np.array([values], np.float32)


def fixed_cases():
    generator = np.random.default_rng(5)
    logits = generator.standard_normal((3, 63)).astype(np.float32)
    padding = np.arange(63) < np.array([[63], [40], [2]])
    yield "odd sizes", logits, padding, 5
    yield "more capacity than valid rows", logits, padding, 41
    yield "every row", logits, padding, 63
    yield "one row", logits, padding, 1
    yield "a new router ties everywhere", np.ones((2, 1025), np.float32), generator.random((2, 1025)) < 0.8, 129
    yield "no row is valid", logits, np.zeros((3, 63), bool), 7
    yield "no number at all", np.full((2, 33), np.nan, np.float32), generator.random((2, 33)) < 0.5, 20
    yield "a single row", np.array([[np.nan]], np.float32), np.array([[False]]), 1
    # Valid rows of the lowest ranks against padding of the highest.
    yield "valid -inf before padding", row(9, -np.inf, 8, np.nan, 7), row(0, 1, 0, 1, 0) > 0, 3
    yield "valid lowest before valid -inf", row(-np.inf, LOWEST, 9), row(1, 1, 0) > 0, 1
    yield "zeros of both signs", row(-0.0, 0.0, -0.0, 0.0), row(1, 1, 1, 1) > 0, 2
    # Long enough for the sorts that GPUs keep for long rows.
    signs = np.where(generator.random((2, 9001)) < 0.5, -0.0, 0.0).astype(np.float32)
    yield "many zeros of both signs", signs, generator.random((2, 9001)) < 0.8, 1000
    yield "both infinities", row(-np.inf, np.inf, 0, np.inf, -np.inf), row(1, 1, 1, 1, 1) > 0, 4


FIXED = [pytest.param(*case, id=name) for name, *case in fixed_cases()]


def assert_agrees(run, logits, valid, capacity):
    """Compares ``run(logits, valid or None, capacity)`` with the oracle, with and without the mask."""
    for mask in (valid, None):
        positions, filled = run(logits, mask, capacity)
        assert positions.dtype == np.int64 and filled.dtype == bool
        everything = np.ones_like(valid) if mask is None else mask
        assert (positions.tolist(), filled.tolist()) == oracle(logits, everything, capacity)


def in_torch(device):
    def run(logits, valid, capacity):
        mask = None if valid is None else torch.tensor(valid, device=device)
        positions, filled = route(torch.tensor(logits, device=device), mask, capacity)
        return positions.cpu().numpy(), filled.cpu().numpy()

    return run


def in_onnx(run_op):
    """``run_op(op_type)`` gives a call on arrays; the mask decides the op type."""
    def run(logits, valid, capacity):
        k = np.array(capacity, np.int64)
        return run_op("Route")(logits, k) if valid is None else run_op("MaskedRoute")(logits, valid, k)

    return run


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_reference_agrees_with_the_oracle(device, case):
    assert_agrees(in_torch(device), *case)


@pytest.mark.parametrize(("logits", "valid", "capacity"), FIXED)
def test_reference_on_fixed_cases(device, logits, valid, capacity):
    assert_agrees(in_torch(device), logits, valid, capacity)


@pytest.mark.parametrize("inlined", [False, True], ids=["functions", "inlined"])
@pytest.mark.parametrize("opset", OPSETS)
def test_onnx_body_agrees_with_the_oracle(ort_run, opset, inlined):
    run = in_onnx(lambda op_type: ort_run(op_type, INPUTS[op_type], OUTPUTS, opset, inlined))
    for _, *case in fixed_cases():
        assert_agrees(run, *case)

    @settings(max_examples=50, deadline=None)
    @given(cases())
    def check(case):
        assert_agrees(run, *case)

    check()


class GatherElements(OpRun):
    """onnx's own takes one element a row when the shape is [B, K] and the axis is 1."""

    op_domain = ""

    def _run(self, data, indices, axis=None):
        return (np.take_along_axis(data, indices, axis),)


class TopK(OpRun):
    """A TopK as free as TensorRT's: among equal values the higher index comes first."""

    op_domain = ""

    def _run(self, x, k, axis=None, largest=None, sorted=None):
        flipped = x[:, ::-1] if largest == 0 else -x[:, ::-1]
        index = x.shape[1] - 1 - flipped.argsort(axis=1, kind="stable")[:, : int(k[0])]
        return np.take_along_axis(x, index, 1), index


@pytest.mark.parametrize(
    "operators", [[GatherElements], [GatherElements, TopK]], ids=["lower tie first", "higher tie first"]
)
def test_onnx_body_agrees_in_the_reference_evaluator(one_op_model, operators):
    def call(op_type):
        model = one_op_model(op_type, INPUTS[op_type], OUTPUTS, 18, True)
        evaluator = onnx.reference.ReferenceEvaluator(model, new_ops=operators)
        names = [name for name, *_ in INPUTS[op_type]]
        return lambda *arrays: evaluator.run(None, dict(zip(names, arrays, strict=True)))

    run = in_onnx({op_type: call(op_type) for op_type in INPUTS}.__getitem__)
    for _, *case in fixed_cases():
        assert_agrees(run, *case)


def test_onnx_body_refuses_more_rows_than_there_are(ort_run):
    run = ort_run("Route", INPUTS["Route"], OUTPUTS, 18, False)
    with pytest.raises(Exception, match="TopK"):
        run(np.zeros((1, 4), np.float32), np.array(5, np.int64))


def test_opcheck():
    logits = torch.randn(2, 7, requires_grad=True)
    torch.library.opcheck(torch.ops.modcompile.route.default, (logits, None, 3))
    torch.library.opcheck(torch.ops.modcompile.route.default, (logits, torch.rand(2, 7) < 0.6, 3))


def test_is_not_differentiable():
    positions, filled = route(torch.randn(2, 7, requires_grad=True), None, 3)
    assert not positions.requires_grad and not filled.requires_grad


class OneInEight(torch.nn.Module):
    def forward(self, logits, valid):
        return route(logits, valid, (logits.shape[1] + 7) // 8)


def test_export_keeps_one_node_with_symbolic_sizes():
    sizes = {0: Dim("batch"), 1: Dim("sequence", min=9)}
    example = torch.randn(2, 33), torch.rand(2, 33) < 0.5
    program = torch.export.export(OneInEight(), example, dynamic_shapes=(sizes, sizes), strict=False)
    (node,) = [node for node in program.graph.nodes if node.target == torch.ops.modcompile.route.default]
    batch, rows = node.args[0].meta["val"].shape
    positions, filled = node.meta["val"]
    for output, dtype in ((positions, torch.int64), (filled, torch.bool)):
        assert output.dtype == dtype
        assert output.shape[0] == batch and output.shape[1].node.expr == ((rows + 7) // 8).node.expr
    logits, valid = torch.randn(5, 63), torch.rand(5, 63) < 0.5
    for found, expected in zip(program.module()(logits, valid), route(logits, valid, 8), strict=True):
        assert torch.equal(found, expected)


def test_export_with_a_capacity_known_only_at_run_time():
    class FromInput(torch.nn.Module):
        def forward(self, logits, capacity):
            k = capacity.item()
            torch._check(k >= 1)
            torch._check(k <= logits.shape[1])
            return route(logits, None, k)

    program = torch.export.export(FromInput(), (torch.randn(2, 9), torch.tensor(4)), strict=False)
    logits = torch.randn(2, 9)
    for capacity in (1, 7, 9):
        assert torch.equal(program.module()(logits, torch.tensor(capacity))[0], route(logits, None, capacity)[0])


def test_compile_equals_eager():
    compiled = torch.compile(OneInEight(), backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (33, 63):
        logits, valid = torch.randn(2, rows), torch.rand(2, rows) < 0.5
        for found, expected in zip(compiled(logits, valid), OneInEight()(logits, valid), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("arguments", "expected", "found", "where"),
    [
        ((torch.zeros(2, 4), None, 5), "1 <= K <= S = 4", "K = 5", "argument capacity"),
        ((torch.zeros(2, 4), None, 0), "1 <= K <= S = 4", "K = 0", "argument capacity"),
        ((torch.zeros(4), None, 1), "logits[B, S] torch.float32", "logits[4] torch.float32", "argument logits"),
        ((torch.zeros(2, 4, 1), None, 1), "logits[B, S]", "logits[2, 4, 1]", "argument logits"),
        ((torch.zeros(2, 4).half(), None, 1), "torch.float32", "logits[2, 4] torch.float16", "argument logits"),
        ((torch.zeros(2, 4).double(), None, 1), "torch.float32", "torch.float64", "argument logits"),
        ((torch.zeros(2, 4), torch.ones(2, 4), 1), "valid[2, 4] torch.bool", "torch.float32", "argument valid"),
        ((torch.zeros(2, 4), torch.ones(2, 3) > 0, 1), "valid[2, 4]", "valid[2, 3] torch.bool", "argument valid"),
        ((torch.zeros(2, 4), torch.ones(4) > 0, 1), "valid[2, 4]", "valid[4] torch.bool", "argument valid"),
    ],
)
def test_errors_say_what_was_expected_and_found(arguments, expected, found, where):
    with pytest.raises(UsageError) as raised:
        route(*arguments)
    details = raised.value.details
    assert expected in details["expected"] and found in details["found"]
    assert where in details["where"] and details["fix"]


def test_errors_at_capture_too():
    meta = torch.zeros(2, 4, device="meta")
    with pytest.raises(UsageError, match="K = 5"):
        route(meta, None, 5)


def test_masked_positions_are_unique_even_where_padding_fills_the_slots():
    positions, filled = route(torch.full((2, 9), torch.nan), torch.zeros(2, 9, dtype=torch.bool), 6)
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5]] * 2 and not filled.any()
