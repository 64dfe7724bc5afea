"""The norm of chosen rows joins the op that chooses them, where sizes are known; every other norm stays."""

import operator

import pytest
import torch
from modcompile.passes.route_and_norm import RouteAndNorm
from tiny import assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten
from tolerances import TOLERANCES

# B batch  S rows  K capacity  D width

aten, mod = torch.ops.aten, torch.ops.modcompile
ROUTE, JOINED, GATHER = (f"modcompile.{name}.default" for name in ("route", "route_and_norm", "gather_rows"))
WIDTH, CAPACITY = 8, 9
INPUTS = {"x": (2, 63, WIDTH), "logits": (2, 63), "valid": (2, 63)}
TENSORS = {"scale": torch.linspace(0.5, 2, WIDTH), "shift": torch.linspace(-1, 1, WIDTH)}


def joined(build, inputs=None):
    def make():
        return graph_of(inputs or INPUTS, build, tensors=TENSORS, dtypes={"valid": "bool"})

    return rewritten(RouteAndNorm(), make)[:2]


def given():
    return randn(2, 63, WIDTH), randn(2, 63, seed=1), randn(2, 63, seed=2) > -0.5


def layer_norm(call, rows):
    return call(aten.layer_norm.default, rows, [WIDTH], call.tensor("scale"), call.tensor("shift"), 1e-3)


def without_bias(call, rows):
    return call(aten.layer_norm.default, rows, [WIDTH], call.tensor("scale"))


def without_parameters(call, rows):
    return call(aten.layer_norm.default, rows, [WIDTH])


def rms_norm(call, rows):
    return call(aten.rms_norm.default, rows, [WIDTH], call.tensor("scale"), 1e-6)


def block(norm, masked=True, keep=True):
    """A router's choice, as a block begins with it; with ``keep``, all that was made of it is handed out."""
    def build(call, x, logits, valid):
        route = call(mod.route.default, logits, valid if masked else None, CAPACITY)
        positions, filled = (call(operator.getitem, route, index) for index in (0, 1))
        rows = call(mod.gather_rows.default, x, positions)
        return (norm(call, rows), rows, positions, filled) if keep else norm(call, rows)
    return build


def test_golden():
    before, after = joined(block(layer_norm))
    check_rewrite("route_and_norm", before, after)


@pytest.mark.parametrize("norm", [layer_norm, without_bias, without_parameters, rms_norm])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_numbers(norm, masked, keep):
    before, after = joined(block(norm, masked, keep))
    calls = nodes_of(after)
    assert calls.count(JOINED) == 1 and ROUTE not in calls
    assert not any(name.endswith("norm.default") for name in calls if name != JOINED)
    assert GATHER not in calls
    assert_same(before, after, *given(), tolerance=TOLERANCES["eager"][torch.float32])


def put(call, x, rows, positions):
    """Writes what was made of the chosen rows over them."""
    batch = call(aten.unsqueeze.default, call(aten.arange.default, 2), 1)
    return call(aten.index_put.default, x, [batch, positions], call(aten.mul.Tensor, rows, 3.0))


def test_rows_that_are_written_over_are_a_second_value():
    """What else is made of the rows, and rows of other values, are left alone."""
    def build(call, x, logits, valid):
        x = call(aten.neg.default, x)
        normed, rows, positions, _ = block(layer_norm)(call, x, logits, valid)
        other = call(aten.abs.default, x)
        return (put(call, x, call(aten.add.Tensor, normed, rows), positions), put(call, other, rows, positions),
                call(mod.gather_rows.default, other, positions))

    before, after = joined(build)
    (kernel,) = after.graph.find_nodes(op="call_function", target=mod.route_and_norm.default)
    held = kernel.args[3]
    first, kept = after.graph.find_nodes(op="call_function", target=aten.index_put.default)
    assert held.target is aten.mul.Tensor and held.args[1] == 1.0 and set(held.users) == {kernel, first}
    assert kept.args[0].target is aten.abs.default and nodes_of(after).count(GATHER) == 1
    assert_same(before, after, *given(), tolerance=TOLERANCES["eager"][torch.float32])


def test_one_of_two_norms():
    def build(call, x, logits, valid):
        route = call(mod.route.default, logits, valid, CAPACITY)
        rows = call(mod.gather_rows.default, x, call(operator.getitem, route, 0))
        return layer_norm(call, rows), rms_norm(call, rows)

    before, after = joined(build)
    assert nodes_of(after).count(JOINED) == 1 and "aten.rms_norm.default" in nodes_of(after)
    assert_same(before, after, *given(), tolerance=TOLERANCES["eager"][torch.float32])


def test_parameters_that_were_used_before():
    def build(call, x, logits, valid):
        scale = call.tensor("scale")
        x = call(aten.rms_norm.default, x, [WIDTH], scale, 1e-6)
        rows = call(mod.gather_rows.default, x, call(operator.getitem, call(mod.route.default, logits, valid, 9), 0))
        return call(aten.rms_norm.default, rows, [WIDTH], scale, 1e-6)

    before, after = joined(build)
    assert JOINED in nodes_of(after)
    assert_same(before, after, *given(), tolerance=TOLERANCES["eager"][torch.float32])


def rows_made_later(call, x, logits, valid):
    """Of a value that there is not yet when rows are chosen."""
    positions = call(operator.getitem, call(mod.route.default, logits, valid, CAPACITY), 0)
    later = call(mod.gather_rows.default, call(aten.neg.default, x), positions)
    return layer_norm(call, later)


def more_dims(call, rows):
    return call(aten.layer_norm.default, rows, [CAPACITY, WIDTH])


def computed_weight(call, rows):
    return call(aten.layer_norm.default, rows, [WIDTH], call(aten.mul.Tensor, call.tensor("scale"), 2))


def epsilon_of_the_dtype(call, rows):
    return call(aten.rms_norm.default, rows, [WIDTH], call.tensor("scale"))


def after_a_product(call, rows):
    return layer_norm(call, call(aten.mul.Tensor, rows, 2.0))


@pytest.mark.parametrize("build", [rows_made_later, block(more_dims), block(computed_weight),
                                   block(epsilon_of_the_dtype), block(after_a_product)])
def test_other_norms_stay(build):
    before, after = joined(build)
    assert nodes_of(after) == nodes_of(before)


@pytest.mark.parametrize("shape", [("batch", 63), (2, "rows"), (2, 2049)])
def test_unknown_sizes_and_long_sequences_stay(shape):
    inputs = {"x": (*shape, WIDTH), "logits": shape, "valid": shape}
    before, after = joined(block(layer_norm), inputs)
    assert nodes_of(after) == nodes_of(before)


def test_rows_of_more_dims_stay():
    def build(call, x, logits, valid):
        rows = call(mod.gather_rows.default, x, call(operator.getitem, call(mod.route.default, logits, valid, 9), 0))
        return call(aten.layer_norm.default, rows, [WIDTH])

    before, after = joined(build, {**INPUTS, "x": (2, 63, 3, WIDTH)})
    assert nodes_of(after) == nodes_of(before)
