import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from modcompile.errors import UsageError
from modcompile.ops import gather_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POSITIONS = ("positions", TensorProto.INT64, ("B", "K"))


def random_positions(batch, rows, capacity, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, rows, generator=generator).topk(capacity).indices.sort().values


def by_hand(x, positions):
    return torch.stack([torch.stack([x[b, row] for row in chosen]) for b, chosen in enumerate(positions.tolist())])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.lists(st.integers(1, 3), max_size=3), st.data())
def test_copies_rows_of_any_rank(batch, rows, trailing, data):
    x = torch.randn(batch, rows, *trailing)
    positions = random_positions(batch, rows, data.draw(st.integers(1, rows)), data.draw(st.integers(0, 99)))
    assert torch.equal(gather_rows(x, positions), by_hand(x, positions))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool])
def test_copies_any_dtype_bit_for_bit(device, dtype):
    x = (torch.randn(2, 63, 5) * 3).to(dtype)
    if dtype.is_floating_point:
        x[0, 7], x[0, 8], x[1, 9] = torch.nan, torch.inf, -0.0
    positions = torch.tensor([[0, 7, 8, 62], [1, 9, 10, 11]])
    found, expected = gather_rows(x.to(device), positions.to(device)).cpu(), by_hand(x, positions)
    assert found.dtype == dtype
    assert found.view(torch.uint8).tolist() == expected.view(torch.uint8).tolist()


def test_takes_views_that_are_not_contiguous():
    mask = torch.randn(3, 1, 7, 7).expand(3, 2, 7, 7)
    positions = random_positions(3, 7, 4)
    x = mask.movedim(3, 1)  # [B, S, H, S]
    assert torch.equal(gather_rows(x, positions), by_hand(x, positions))
    shared = torch.randn(1, 7, 5).expand(3, 7, 5)
    assert torch.equal(gather_rows(shared, positions), by_hand(shared, positions))


@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
def test_gradients(trailing):
    x = torch.randn(2, 7, *trailing, dtype=torch.float64, requires_grad=True)
    positions = random_positions(2, 7, 3)
    assert torch.autograd.gradcheck(gather_rows, (x, positions))
    assert torch.autograd.gradgradcheck(gather_rows, (x, positions))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_the_rows_back_in_their_places(dtype):
    x = torch.randn(2, 63, 5, dtype=dtype, requires_grad=True)
    positions = random_positions(2, 63, 5)
    weight = torch.randn(2, 5, 5, dtype=dtype)
    (gather_rows(x, positions) * weight).sum().backward()
    expected = torch.zeros_like(x)
    for b, chosen in enumerate(positions.tolist()):
        for slot, row in enumerate(chosen):
            expected[b, row] = weight[b, slot]
    assert torch.equal(x.grad, expected)


def test_opcheck():
    x = torch.randn(2, 7, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.modcompile.gather_rows.default, (x, random_positions(2, 7, 3)))


class Gather(torch.nn.Module):
    def forward(self, x, positions):
        return gather_rows(x, positions) * 2


def test_the_gradient_is_written_and_not_added():
    def gradient(x):
        return torch.autograd.grad(gather_rows(x, torch.tensor([[0, 2], [1, 6]])).sum(), x)

    graph = make_fx(gradient)(torch.randn(2, 7, 5, requires_grad=True)).graph
    ops = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert "aten.index_copy.default" in ops and not any("add" in op and "index" in op for op in ops), ops


@pytest.mark.parametrize("grad", [True, False])
def test_export_keeps_one_node_with_symbolic_sizes(grad):
    batch, rows, capacity = Dim("batch"), Dim("sequence"), Dim("capacity")
    with torch.set_grad_enabled(grad):
        program = torch.export.export(
            Gather(),
            (torch.randn(3, 7, 5), random_positions(3, 7, 4)),
            dynamic_shapes=({0: batch, 1: rows}, {0: batch, 1: capacity}),
            strict=False,
        )
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.modcompile.gather_rows.default, torch.ops.aten.mul.Tensor]
    for sizes in ((2, 9, 3), (5, 63, 8)):
        x, positions = torch.randn(*sizes[:2], 5), random_positions(*sizes)
        assert torch.equal(program.module()(x, positions), Gather()(x, positions))


def test_export_sees_through_it_when_asked_to_decompose():
    program = torch.export.export(Gather(), (torch.randn(3, 7, 5), random_positions(3, 7, 4))).run_decompositions()
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.aten.index_select.default in targets
    assert torch.ops.modcompile.gather_rows.default not in targets


@pytest.mark.parametrize("dtype", DTYPES)
def test_compile_equals_eager(dtype):
    compiled = torch.compile(Gather(), backend="aot_eager", fullgraph=True, dynamic=True)
    for sizes in ((2, 9, 3), (3, 63, 8)):
        x, positions = torch.randn(*sizes[:2], 5, dtype=dtype, requires_grad=True), random_positions(*sizes)
        outputs = [call(x, positions) for call in (compiled, Gather())]
        assert torch.equal(*outputs)
        gradients = [torch.autograd.grad(output.square().sum(), x)[0] for output in outputs]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("inlined", [False, True], ids=["functions", "inlined"])
@pytest.mark.parametrize("opset", [17, 18, 21, 23])
@pytest.mark.parametrize(
    ("element", "dtype"),
    [
        (TensorProto.FLOAT, torch.float32),
        (TensorProto.FLOAT16, torch.float16),
        (TensorProto.INT64, torch.int64),
        (TensorProto.BOOL, torch.bool),
    ],
)
def test_onnx_body_copies_rows_of_any_rank(ort_run, opset, inlined, element, dtype):
    positions = random_positions(2, 9, 4)
    for trailing in ((), (3,), (2, 3)):
        x = (torch.randn(2, 9, *trailing) * 3).to(dtype)
        inputs = (("x", element, ("B", "S", *trailing)), POSITIONS)
        outputs = (("rows", element, ("B", "K", *trailing)),)
        (found,) = ort_run("GatherRows", inputs, outputs, opset, inlined)(x.numpy(), positions.numpy())
        assert np.array_equal(found, by_hand(x, positions).numpy())


@pytest.mark.parametrize(
    ("arguments", "expected", "found", "where"),
    [
        ((torch.zeros(4), torch.zeros(1, 1).long()), "x[B, S, ...]", "x[4]", "argument x"),
        ((torch.zeros(2, 4), torch.zeros(1).long()), "positions[2, K] torch.int64", "positions[1]", "positions"),
        ((torch.zeros(2, 4), torch.zeros(2, 1).int()), "torch.int64", "torch.int32", "argument positions"),
        ((torch.zeros(2, 4), torch.zeros(3, 1).long()), "positions[2, K]", "positions[3, 1]", "argument positions"),
    ],
)
def test_errors_say_what_was_expected_and_found(arguments, expected, found, where):
    with pytest.raises(UsageError) as raised:
        gather_rows(*arguments)
    details = raised.value.details
    assert expected in details["expected"] and found in details["found"]
    assert where in details["where"] and details["fix"]
