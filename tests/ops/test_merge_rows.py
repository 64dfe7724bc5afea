import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch.export import Dim

from modcompile.errors import UsageError
from modcompile.ops import gather_rows, merge_rows, route

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CORNERS = [0.0, -0.0, 1.0, -3.0, float("nan"), float("inf"), float("-inf"), 1e-7, 6e4]


def bits(tensor):
    """What equals bit for bit; NaN is one value, for a copy may not keep its payload's sign."""
    return tensor.masked_fill(tensor.isnan(), torch.nan).contiguous().view(torch.uint8).tolist()


def random_case(dtype=torch.float32, batch=2, rows=9, capacity=4, dim=5, seed=5):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(batch, rows, dim, generator=generator), torch.randn(batch, capacity, dim, generator=generator)
    positions = torch.rand(batch, rows, generator=generator).topk(capacity).indices.sort().values
    return x.to(dtype), y.to(dtype), positions, torch.randn(batch, capacity, generator=generator).to(dtype)


def truth(x, y, positions, gate):
    """Row by row in float64, and exact where the contract is."""
    gate = gate.to(x.dtype).double()
    merged = x.double().clone()
    for b, chosen in enumerate(positions.tolist()):
        for slot, row in enumerate(chosen):
            weight = gate[b, slot]
            if weight != 0:
                before, after = x[b, row].double(), y[b, slot].double()
                merged[b, row] = after if weight == 1 else before + weight * (after - before)
    return merged


def bound(x, y, gate):
    """Three roundings of numbers no larger than this, each of half a unit in the last place."""
    largest = (1 + gate.abs().max().item()) * (x.abs().max().item() + y.abs().max().item())
    return 1.5 * torch.finfo(x.dtype).eps * largest


def test_no_zeros_are_written_for_the_rows_that_it_keeps(monkeypatch):
    x = torch.randn(2, 5, 3, requires_grad=True)
    positions = torch.tensor([[0, 3], [1, 2]])
    merged = torch.ops.modcompile.merge_rows(x, torch.randn(2, 2, 3), positions, torch.rand(2, 2, requires_grad=True))
    written = []
    module = sys.modules["modcompile.ops.gather_rows"]
    monkeypatch.setattr(module, "overwrite", lambda *tensors: written.append(tensors))
    merged.sum().backward()
    assert not written and x.grad is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_lerp_of_the_chosen_rows(device, dtype):
    for seed in range(20):
        x, y, positions, gate = random_case(dtype, rows=63, seed=seed)
        merged = merge_rows(*(argument.to(device) for argument in (x, y, positions, gate)))
        assert merged.dtype == dtype
        assert (merged.cpu().double() - truth(x, y, positions, gate)).abs().max() <= bound(x, y, gate)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_closed_and_open_gates_are_exact_whatever_the_rows_hold(device, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    corner = st.sampled_from(CORNERS)
    x = torch.tensor(data.draw(st.lists(corner, min_size=24, max_size=24))).to(dtype).view(2, 6, 2)
    y = torch.tensor(data.draw(st.lists(corner, min_size=12, max_size=12))).to(dtype).view(2, 3, 2)
    gate = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, -0.0, 1.0]), min_size=6, max_size=6))).view(2, 3)
    positions = torch.tensor([[0, 2, 5], [1, 2, 3]])
    expected = x.clone()
    for b, slot in zip(*gate.nonzero(as_tuple=True), strict=True):
        expected[b, positions[b, slot]] = y[b, slot]
    merged = merge_rows(*(argument.to(device) for argument in (x, y, positions, gate)))
    assert bits(merged.cpu()) == bits(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_pass_by_are_copied_bit_for_bit(dtype):
    x, y, positions, gate = random_case(dtype)
    x[0, 0], x[0, 1], x[1, 8] = torch.nan, -0.0, -torch.inf
    merged = merge_rows(x, y, positions, gate)
    others = torch.ones(x.shape[:2], dtype=torch.bool).scatter(1, positions, False)
    assert bits(merged[others]) == bits(x[others])


def test_arguments_are_left_alone():
    case = random_case()
    before = [argument.clone() for argument in case]
    merge_rows(*case)
    assert all(torch.equal(one, other) for one, other in zip(case, before, strict=True))


def test_gradients():
    x, y, positions, gate = random_case(torch.float64)
    # The lerp is smooth through both ends, so finite differences hold for closed and open gates too.
    gate[0, 0], gate[0, 1], gate[1, 2] = 0, 1, 0
    leaves = [tensor.requires_grad_() for tensor in (x, y, gate)]

    def merge(x, y, gate):
        return merge_rows(x, y, positions, gate)

    assert torch.autograd.gradcheck(merge, leaves)
    assert torch.autograd.gradgradcheck(merge, leaves)


@pytest.mark.parametrize("wanted", range(3))
def test_gradient_of_one_argument_alone(wanted):
    x, y, positions, gate = random_case(torch.float64)
    leaves = [x, y, gate]
    leaves[wanted].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y, gate: merge_rows(x, y, positions, gate), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_gradient_of_a_closed_or_open_gate_is_the_true_one(dtype, value):
    x, y, positions, _ = random_case(dtype)
    gate = torch.full(positions.shape, value, requires_grad=True)
    grad = torch.randn_like(x)
    merge_rows(x, y, positions, gate).backward(grad)
    expected = (gather_rows(grad, positions).double() * (y.double() - gather_rows(x, positions).double())).sum(-1)
    assert gate.grad.dtype == torch.float32
    assert gate.grad.abs().min() > 0
    torch.testing.assert_close(gate.grad, expected.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_gradients_behind_a_closed_gate_are_finite_where_y_is_not(dtype, poison):
    x, y, positions, gate = random_case(dtype)
    gate[0, 1] = gate[1, 3] = 0
    y[0, 1] = poison
    y[1, 3, 2] = poison
    clean = y.nan_to_num(0, 0, 0)
    clean[~y.isfinite()] = gather_rows(x, positions)[~y.isfinite()]
    grad = torch.randn_like(x)

    def gradients(y):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, y, gate)]
        merge_rows(leaves[0], leaves[1], positions, leaves[2]).backward(grad)
        return [leaf.grad for leaf in leaves]

    # A row equal to x contributes nothing: the poisoned entries must look like that, the others unchanged.
    for found, expected in zip(gradients(y), gradients(clean), strict=True):
        assert found.isfinite().all()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_gate_is_rounded_to_the_dtype_of_x(dtype):
    x, y, positions, _ = random_case(dtype)
    gate = torch.tensor([[0.3, 1e-9, 0.9999999, -2.7], [1 / 3, 0.0, 1.0, 5.0]], requires_grad=True)
    merged = merge_rows(x, y, positions, gate)
    assert merged.dtype == dtype
    assert torch.equal(merged, merge_rows(x, y, positions, gate.to(dtype)))
    merged.sum().backward()
    assert gate.grad.dtype == torch.float32


def test_opcheck():
    x, y, positions, gate = random_case()
    arguments = (x.requires_grad_(), y.requires_grad_(), positions, gate.requires_grad_())
    torch.library.opcheck(torch.ops.modcompile.merge_rows.default, arguments)


class Merge(torch.nn.Module):
    def forward(self, x, y, positions, gate):
        return merge_rows(x, y, positions, gate)


def test_export_keeps_one_node_with_symbolic_sizes():
    batch, rows, capacity = Dim("batch"), Dim("sequence"), Dim("capacity")
    slots = {0: batch, 1: capacity}
    program = torch.export.export(
        Merge(), random_case(), dynamic_shapes=({0: batch, 1: rows}, slots, slots, slots), strict=False
    )
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.modcompile.merge_rows.default]
    for sizes in ((3, 9, 3), (5, 63, 8)):
        case = random_case(torch.float32, *sizes)
        assert torch.equal(program.module()(*case), merge_rows(*case))


class Routed(torch.nn.Module):
    """A routed block: the three ops around a linear map."""

    def __init__(self):
        super().__init__()
        self.router = torch.nn.Linear(8, 1)
        self.block = torch.nn.Linear(8, 8)

    def forward(self, x, valid):
        logits = self.router(x)[..., 0]  # [B, S]
        positions, filled = route(logits, valid, (x.shape[1] + 7) // 8)
        rows = gather_rows(x, positions)  # [B, K, D]
        gate = gather_rows(logits, positions) * filled  # [B, K]
        return merge_rows(x, rows + self.block(rows).tanh(), positions, gate)


def gradients_of(call, module, x, valid):
    x = x.clone().requires_grad_()
    output = call(x, valid)
    return output, *torch.autograd.grad(output.square().sum(), [x, *module.parameters()])


def test_a_routed_block_trains_the_same_through_inductor():
    torch.manual_seed(5)
    module = Routed()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for sizes in ((2, 33), (3, 63)):
        x, valid = torch.randn(*sizes, 8), torch.rand(sizes) < 0.7
        found, expected = (gradients_of(call, module, x, valid) for call in (compiled, module))
        assert expected[2].abs().max() > 0
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compile_equals_eager_in_half_precision(dtype):
    compiled = torch.compile(Merge(), backend="aot_eager", fullgraph=True, dynamic=True)
    for sizes in ((2, 9, 3), (3, 63, 8)):
        case = random_case(dtype, *sizes)
        leaves = [tensor.requires_grad_() for tensor in case if tensor.is_floating_point()]
        outputs = [call(*case) for call in (compiled, merge_rows)]
        assert torch.equal(*outputs)
        for found, expected in zip(
            *(torch.autograd.grad(output.square().sum(), leaves) for output in outputs), strict=True
        ):
            assert torch.equal(found, expected)


def specs(element, gate_element):
    inputs = (
        ("x", element, ("B", "S", 5)),
        ("y", element, ("B", "K", 5)),
        ("positions", TensorProto.INT64, ("B", "K")),
        ("gate", gate_element, ("B", "K")),
    )
    return inputs, (("merged", element, ("B", "S", 5)),)


@pytest.mark.parametrize("inlined", [False, True], ids=["functions", "inlined"])
@pytest.mark.parametrize("opset", [17, 18, 21, 23])
@pytest.mark.parametrize(
    ("dtype", "gate_dtype"),
    [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)],
)
def test_onnx_body_agrees(ort_run, opset, inlined, dtype, gate_dtype):
    element = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}
    run = ort_run("MergeRows", *specs(element[dtype], element[gate_dtype]), opset, inlined)
    x, y, positions, gate = random_case(dtype)
    gate = gate.to(gate_dtype)
    (merged,) = run(*(argument.numpy() for argument in (x, y, positions, gate)))
    assert np.abs(merged - truth(x, y, positions, gate).numpy()).max() <= bound(x, y, gate)

    gate = torch.tensor([[0, 1, 1, 0], [-0.0, 1, 0, 1]]).to(gate_dtype)
    x[0], x[1, 0], x[1, 5] = -0.0, torch.nan, torch.inf
    y[0, 0], y[0, 1], y[1, 0], y[1, 2], y[1, 3] = torch.nan, torch.inf, -torch.inf, torch.inf, -0.0
    (merged,) = run(*(argument.numpy() for argument in (x, y, positions, gate)))
    # ONNX Runtime's Where drops the sign of a zero it chooses; rows that pass by keep theirs.
    assert np.array_equal(merged, merge_rows(x, y, positions, gate).numpy(), equal_nan=True)
    others = torch.ones(x.shape[:2], dtype=torch.bool).scatter(1, positions, False)
    assert bits(torch.tensor(merged)[others]) == bits(x[others])


def test_onnx_body_in_bfloat16(one_op_model):
    # ONNX Runtime's CPU provider has no bfloat16 arithmetic, so the reference evaluator runs this one.
    x, y, positions, gate = random_case(torch.bfloat16)
    gate[0, 0], gate[1, 1] = 0, 1
    inputs, outputs = specs(TensorProto.BFLOAT16, TensorProto.BFLOAT16)
    evaluator = ReferenceEvaluator(one_op_model("MergeRows", inputs, outputs, 18, True))
    arrays = [tensor.float().numpy().astype(ml_dtypes.bfloat16) for tensor in (x, y, gate)]
    (merged,) = evaluator.run(None, dict(x=arrays[0], y=arrays[1], positions=positions.numpy(), gate=arrays[2]))
    difference = torch.tensor(merged.astype(np.float64)) - truth(x, y, positions, gate)
    assert difference.abs().max() <= bound(x, y, gate)


X, Y, P, G = torch.zeros(2, 4, 3), torch.zeros(2, 1, 3), torch.zeros(2, 1).long(), torch.zeros(2, 1)


@pytest.mark.parametrize(
    ("arguments", "expected", "found", "where"),
    [
        ((X[..., 0], Y, P, G), "x[B, S, D]", "x[2, 4] torch.float32", "argument x"),
        ((X[..., None], Y, P, G), "x[B, S, D]", "x[2, 4, 3, 1]", "argument x"),
        ((X.long(), Y, P, G), "floating", "torch.int64", "argument x"),
        ((X, Y, P.int(), G), "positions[2, K] torch.int64", "torch.int32", "argument positions"),
        ((X, Y, P[0], G), "positions[2, K]", "positions[1]", "argument positions"),
        ((X, Y[..., :2], P, G), "y[2, 1, 3] torch.float32", "y[2, 1, 2]", "argument y"),
        ((X, X, P, G), "y[2, 1, 3]", "y[2, 4, 3]", "argument y"),
        ((X, Y.half(), P, G), "torch.float32", "y[2, 1, 3] torch.float16", "argument y"),
        ((X, Y, P, G[..., None]), "gate[2, 1]", "gate[2, 1, 1]", "argument gate"),
        ((X, Y, P, G.bool()), "floating", "torch.bool", "argument gate"),
    ],
)
def test_errors_say_what_was_expected_and_found(arguments, expected, found, where):
    with pytest.raises(UsageError) as raised:
        merge_rows(*arguments)
    details = raised.value.details
    assert expected in details["expected"] and found in details["found"]
    assert where in details["where"] and details["fix"]
