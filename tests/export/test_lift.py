"""A flat graph as an exported program: each tensor an input, once, and decomposed node by node."""

import operator

import pytest
import torch
from tiny import graph_of, randn, run_graph
from tolerances import EXACT, TOLERANCES, deviation
from torch import nn
from torch.export.graph_signature import InputKind

from modcompile.capture import capture
from modcompile.export.flatten import flatten
from modcompile.export.lift import lift
from modcompile.program import format_graph

aten = torch.ops.aten
EAGER = TOLERANCES["eager"][torch.float32]
X = {"x": ("batch", "sequence", 8), "y": ("batch", "sequence", 8)}


class Tied(nn.Module):
    """Two names for one weight, a buffer and a constant."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(17, 8), nn.Linear(8, 17)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, ids):
        return self.head(self.table(ids) * self.scale + torch.tensor([1.0] * 8))


@pytest.fixture(scope="module")
def flat():
    def build(call, x, logits):
        count = call(operator.floordiv, call(operator.add, call(aten.sym_size.int, x, 1), 7), 8)
        routed = call(torch.ops.modcompile.route.default, logits, None, count)
        positions, filled = (call(operator.getitem, routed, i) for i in (0, 1))
        rows = call(aten.linear.default, call(torch.ops.modcompile.gather_rows.default, x, positions),
                    call.tensor("weight"))
        gate = call(aten.where.ScalarOther, filled, call(aten.gather.default, logits, 1, positions), 0.0)
        return call(torch.ops.modcompile.merge_rows.default, x, rows, positions, gate)

    inputs = {"x": ("batch", "sequence", 8), "logits": ("batch", "sequence")}
    return graph_of(inputs, build, {"weight": nn.Parameter(randn(8, 8))})


def targets(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def test_it_runs_like_the_graph(flat):
    program = lift(flat, opaque=False)
    given = randn(3, 63, 8), randn(3, 63, seed=1)
    with torch.no_grad():
        assert deviation(program.module(check_guards=False)(*given)[0], run_graph(flat, *given)[0]) == EXACT


def test_the_graph_is_left_as_it_is(flat):
    text = format_graph(flat)
    lift(flat)
    assert format_graph(flat) == text


def test_each_tensor_is_an_input_once_under_its_first_name():
    model = Tied().eval()
    flat = flatten(capture(model, (torch.arange(10).view(2, 5),)))
    program = lift(flat)
    specs = program.graph_signature.input_specs
    held = {spec.target: spec.kind for spec in specs if spec.target}
    names = [str(node.target) for node in flat.graph.find_nodes(op="get_attr")]
    first = next(name for name in names if name.endswith("weight"))
    assert held.pop(first) is InputKind.PARAMETER and held.pop("head.bias") is InputKind.PARAMETER
    assert held and set(held.values()) == {InputKind.CONSTANT_TENSOR} and "scale" in held
    # A program's own inputs come last.
    assert [spec.kind for spec in specs][-1] is InputKind.USER_INPUT and specs[-1].arg.name == "ids"
    assert [spec.kind for spec in specs].count(InputKind.USER_INPUT) == 1
    assert program.state_dict[first] is model.table.weight
    ids = torch.randint(17, (3, 63))
    with torch.no_grad():
        assert deviation(program.module(check_guards=False)(ids)[0], model(ids)) <= EAGER


@pytest.mark.parametrize("opaque", [False, True])
def test_the_translator_sees_ops_that_do_not_decompose(flat, opaque):
    names = {str(target) for target in targets(lift(flat, opaque=opaque)) if "rows" in str(target)}
    namespace = "modcompile_export" if opaque else "modcompile"
    assert names == {f"{namespace}.gather_rows.default", f"{namespace}.merge_rows.default"}


def test_an_input_that_is_returned():
    flat = graph_of(X, lambda call, x, y: (x, call(aten.relu.default, y)))
    program = lift(flat)
    x, y = randn(3, 63, 8), randn(3, 63, 8, seed=1)
    results = program.module(check_guards=False)(x, y)
    assert torch.equal(results[0], x) and torch.equal(results[1], y.relu())


# Decompositions


def decomposed(build, *ops):
    """The ops of a program after the decomposition of some, which keeps its numbers."""
    flat = graph_of(X, build)
    program = lift(flat).run_decompositions(torch._decomp.get_decompositions(ops))
    program.graph.lint()
    x, y = randn(3, 63, 8), randn(3, 63, 8, seed=1).abs() + 0.5
    actual = program.graph_module(x, y)
    for one, other in zip(actual, run_graph(flat, x, y), strict=True):
        assert deviation(one, other) <= EAGER
    return targets(program)


def test_only_what_the_table_names_is_decomposed():
    def build(call, x, y):
        return call(aten.addcmul.default, call(aten.gelu.default, x), x, y), call(aten.silu.default, y)

    made = decomposed(build, aten.addcmul)
    assert aten.gelu.default in made and aten.silu.default in made
    assert aten.addcmul.default not in made and aten.mul.Tensor in made


def test_operands_that_look_alike_are_not_one():
    """Values of one shape share a recorded value, once flattened."""
    flat = graph_of(X, lambda call, x, y: call(aten.addcdiv.default, x, x, y, value=3.0))
    first, second = flat.graph.find_nodes(op="placeholder")
    second.meta["val"] = first.meta["val"]
    program = lift(flat).run_decompositions(torch._decomp.get_decompositions([aten.addcdiv]))
    x, y = randn(3, 63, 8), randn(3, 63, 8, seed=1).abs() + 0.5
    assert deviation(program.graph_module(x, y)[0], x + 3 * x / y) <= EAGER


def test_a_node_of_several_values():
    def build(call, x, y):
        parts = call(aten.native_layer_norm.default, call(aten.mul.Tensor, x, y), [8], None, None, 1e-5)
        return call(operator.getitem, parts, 0), call(operator.getitem, parts, 2)

    made = decomposed(build, aten.native_layer_norm)
    assert aten.native_layer_norm.default not in made and aten.rsqrt.default in made


def test_what_a_decomposition_makes_is_its_nodes_module():
    flat = graph_of(X, lambda call, x, y: call(aten.addcmul.default, x, x, y))
    (node,) = flat.graph.find_nodes(op="call_function", target=aten.addcmul.default)
    node.meta["nn_module_stack"] = {"a": ("layers.0", ""), "b": ("layers.0.mlp", "")}
    program = lift(flat).run_decompositions(torch._decomp.get_decompositions([aten.addcmul]))
    assert {next(iter(node.meta["nn_module_stack"])) for node in program.graph.nodes if node.op == "call_function"} == {
        "layers.0.mlp"}


def test_writes_in_place_are_functionalized_and_views_hold_for_any_strides():
    def build(call, x, y):
        h = call(aten.mul.Tensor, x, 2)
        call(aten.fill_.Scalar, call(aten.select.int, h, 1, 0), 0.0)
        return call(aten.flatten.using_ints, h, 0, 1)

    made = decomposed(build)
    assert not any(target._schema.is_mutable for target in made if isinstance(target, torch._ops.OpOverload))
    assert aten.view.default not in made
