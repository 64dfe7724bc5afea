"""What tracing leaves behind goes, and whatever moves, casts or copies something stays."""

import operator

import pytest
import torch
from modcompile.passes.remove_noops import RemoveNoops
from tiny import Mlp, Stack, assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten, run_graph
from torch import nn

from modcompile.capture import capture
from modcompile.config import MoDConfig
from modcompile.convert import convert

aten = torch.ops.aten
X = {"x": ("batch", "sequence", 8)}
END = 9223372036854775807


def cleaned(build, inputs=X, **options):
    return rewritten(RemoveNoops(), lambda: graph_of(inputs, build, **options))[:2]


def traced(call, x):
    call(aten._assert_tensor_metadata.default, x, None, None, torch.float32)
    same = call(aten.slice.Tensor, call(aten.to.dtype, x, torch.float32), 1, 0, END)
    rows = call(aten.sym_size.int, x, 1)
    heads = call(aten.view.default, same, [-1, rows, 2, 4])
    return call(aten.add.Tensor, call(aten.contiguous.default, heads), 1)


def test_golden():
    before, after = cleaned(traced)
    check_rewrite("remove_noops", before, after)
    assert_same(before, after, randn(3, 63, 8))


def test_case_1_assertions_go():
    def build(call, x):
        rows = call(aten.sym_size.int, x, 1)
        call(aten.sym_constrain_range_for_size.default, rows)
        call(aten.sym_constrain_range.default, rows, min=1, max=99)
        call(aten._assert_scalar.default, True, "a size is positive")
        call(aten._assert_async.msg, call(aten.any.default, call(aten.gt.Scalar, x, -99)), "not empty")
        return call(aten.relu.default, x)

    _, after = cleaned(build)
    assert nodes_of(after) == ["aten.relu.default"]


@pytest.mark.parametrize("shaped", [
    lambda call, x, like: call(aten.reshape_as.default, call(aten.relu.default, x), like),
    lambda call, x, like: call(aten.view_as.default, call(aten.relu.default, x), like),
    lambda call, x, like: call(aten.expand_as.default, call(aten.sum.dim_IntList, x, [-1], True), x),
])
def test_case_4_what_is_shaped_like_another_value_takes_its_sizes(shaped):
    inputs = {"x": ("batch", "sequence", 8), "like": ("batch", "sequence", 2, 4)}
    before, after = cleaned(shaped, inputs)
    assert nodes_of(after)[-1] in ("aten.reshape.default", "aten.expand.default")
    assert_same(before, after, randn(3, 63, 8), randn(3, 63, 2, 4))


def test_case_5_values_of_no_elements_are_left_out():
    def build(call, x):
        one = call(aten.cat.default, [call.tensor("empty"), x], 1)
        return call(aten.cat.default, [one, call(aten.neg.default, x), call(aten.slice.Tensor, x, 1, 0, 0)], 1)

    before, after = cleaned(build, tensors={"empty": torch.zeros(0)})
    assert nodes_of(after) == ["aten.neg.default", "aten.cat.default"]
    assert_same(before, after, randn(3, 63, 8))


def test_a_cache_that_is_empty_is_no_side_input():
    """As transformers' caches begin: a tensor without a size, that keys are joined to."""
    class Cached(Mlp):
        def forward(self, x):
            return super().forward(torch.cat([torch.tensor([]), x], 1))

    model, x = Stack(Cached(), Cached()), randn(3, 63, 8)
    mod = convert(model, (randn(2, 5, 8),), MoDConfig(blocks="all", capacity_ratio=1.0))
    assert torch.equal(mod(x), model(x))


@pytest.mark.parametrize("cast", [
    lambda call, x: call(aten.to.dtype, x, torch.float32),
    lambda call, x: call(aten.to.dtype_layout, x, dtype=torch.float32),
    lambda call, x: call(aten.to.device, x, torch.device("cpu"), torch.float32),
    lambda call, x: call(aten.to.other, x, call(aten.relu.default, x)),
    lambda call, x: call(aten._to_copy.default, x, dtype=torch.float32),
])
def test_case_2_a_cast_to_the_dtype_that_it_has_goes(cast):
    before, after = cleaned(lambda call, x: call(aten.neg.default, cast(call, x)))
    assert nodes_of(after) == ["aten.neg.default"]
    assert_same(before, after, randn(3, 63, 8))


@pytest.mark.parametrize("identity", [
    lambda call, x: call(aten.slice.Tensor, x, 1, 0, END),
    lambda call, x: call(aten.slice.Tensor, x, 2, 0, 8, 1),
    lambda call, x: call(aten.expand.default, x, [-1, -1, 8]),
    lambda call, x: call(aten.reshape.default, x, [-1, call(aten.sym_size.int, x, 1), 8]),
    lambda call, x: call(aten.view.default, x, [-1, call(aten.sym_size.int, x, 1), 8]),
    lambda call, x: call(aten.alias.default, x),
    lambda call, x: call(aten.contiguous.default, x),
    lambda call, x: call(aten.lift_fresh_copy.default, x),
])
def test_case_3_an_identity_goes(identity):
    before, after = cleaned(lambda call, x: call(aten.neg.default, identity(call, x)))
    assert nodes_of(after) == ["aten.neg.default"]
    assert_same(before, after, randn(3, 63, 8))


def test_case_4_a_view_becomes_a_reshape():
    _, after = cleaned(lambda call, x: call(aten.view.default, x, [-1, 8]))
    assert nodes_of(after) == ["aten.reshape.default"]
    # No view of these rows exists: their strides are those of another order.
    rows = randn(63, 3, 8).transpose(0, 1)
    assert torch.equal(run_graph(after, rows)[0], rows.reshape(-1, 8))


@pytest.mark.parametrize("step", [
    lambda call, x: call(aten.to.dtype, x, torch.float64),
    lambda call, x: call(aten.to.dtype, x, torch.float32, copy=True),
    lambda call, x: call(aten.slice.Tensor, x, 1, 1, END),
    lambda call, x: call(aten.slice.Tensor, x, 1, 0, END, 2),
    lambda call, x: call(aten.expand.default, x, [2, -1, -1, -1]),
    lambda call, x: call(aten.reshape.default, x, [-1, 2, 4]),
    lambda call, x: call(aten.transpose.int, x, 0, 0),
])
def test_what_changes_something_stays(step):
    before, after = cleaned(lambda call, x: call(aten.neg.default, step(call, x)))
    assert nodes_of(after) == nodes_of(before)
    assert_same(before, after, randn(3, 63, 8))


def test_rows_that_swap_places_with_the_batch_are_no_identity():
    """A square input has one shape either way: the symbols tell."""
    def build(call, x):
        return call(aten.reshape.default, x, [call(aten.sym_size.int, x, 1), call(aten.sym_size.int, x, 0)])

    before, after = cleaned(build, {"x": ("batch", "sequence")})
    assert nodes_of(after) == nodes_of(before)


# Copies of memory that is written to


def copy_is_written(call, x):
    y = call(aten.contiguous.default, call(aten.transpose.int, x, 0, 1))
    call(aten.fill_.Scalar, call(aten.select.int, y, 1, 0), 0.0)
    return call(aten.add.Tensor, x, 1), y


def source_is_written(call, x):
    h = call(aten.mul.Tensor, x, 2)
    y = call(aten._to_copy.default, h)
    call(aten.fill_.Scalar, call(aten.select.int, h, 1, 0), 0.0)
    return y, h


def part_is_written(call, x):
    parts = call(aten.split.Tensor, call(aten.alias.default, call(aten.lift_fresh_copy.default, x)), 4, 2)
    part = call(operator.getitem, parts, 1)
    call(aten.zero_.default, part)
    return call(aten.add.Tensor, x, 1), part


@pytest.mark.parametrize(("build", "copy"), [
    (copy_is_written, "aten.contiguous.default"), (source_is_written, "aten._to_copy.default"),
    (part_is_written, "aten.lift_fresh_copy.default")])
def test_a_copy_of_memory_that_is_written_to_stays(build, copy):
    before, after = cleaned(build)
    assert copy in nodes_of(after)
    assert_same(before, after, randn(3, 63, 8))


def test_a_copy_of_other_memory_goes():
    def build(call, x):
        h = call(aten.mul.Tensor, x, 2)
        call(aten.fill_.Scalar, call(aten.select.int, h, 1, 0), 0.0)
        return call(aten.neg.default, call(aten.contiguous.default, x)), h

    before, after = cleaned(build)
    assert "aten.contiguous.default" not in nodes_of(after)
    assert_same(before, after, randn(3, 63, 8))


def test_a_captured_constant_does_not_remember_writes():
    class Counts(nn.Module):
        def forward(self, x):
            table = torch.tensor([1.0, 2.0])
            table[0] += 1
            return x * table[0]

    graph = capture(Counts(), (randn(2, 5, 8),))
    x = randn(3, 63, 8)
    with torch.no_grad():
        assert all(torch.equal(graph(x), 2 * x) for _ in range(3))
