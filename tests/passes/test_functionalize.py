"""Writes in place become new values, unless another name of the memory, or the next call, would see the write."""

import copy

import pytest
import torch
from modcompile.passes.functionalize import Functionalize
from tiny import Mlp, Stack, check_golden, graph_of, nodes_of, run_again, run_graph
from torch import nn
from torch.nn import functional

from modcompile.blocks import find_blocks
from modcompile.capture import capture
from modcompile.pass_manager import PassManager
from modcompile.program import format_graph

aten = torch.ops.aten
X = {"x": ("batch", "sequence", 8)}


def functionalized(build, inputs=X, **options):
    """The graph before, the graph after, and the reasons for what stayed."""
    before = graph_of(inputs, build, **options)
    # Built anew, not copied: values of a copied graph share their recorded shapes.
    after = graph_of(inputs, build, **options)
    manager = PassManager([Functionalize()])
    manager(after)
    return before, after, [skip.reason for skip in manager.skips["functionalize"]]


def assert_same(before, after, *shapes):
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in shapes or [(3, 63, 8)]]
    expected = run_graph(before, *copy.deepcopy(inputs))
    for actual, value in zip(run_graph(after, *inputs), expected, strict=True):
        assert torch.equal(actual, value)


def residual(call, x):
    h = call(aten.relu.default, x)
    y = call(aten.add_.Tensor, x, h)
    # Reads x by its old name: case 1.
    return call(aten.mul.Tensor, x, 2), y


def test_golden():
    before, after, _ = functionalized(residual)
    check_golden("functionalize", f"before\n{format_graph(before)}\nafter\n{format_graph(after)}")


def test_later_readers_read_the_result():
    before, after, skips = functionalized(residual)
    assert nodes_of(after) == ["aten.relu.default", "aten.add.Tensor", "aten.mul.Tensor"] and not skips
    assert_same(before, after)
    run_again(Functionalize(), after)


def test_a_chain_of_writes_to_one_name():
    def build(call, x):
        h = call(aten.mul.Tensor, x, 3)
        for write in ((aten.add_.Tensor, 1), (aten.masked_fill_.Scalar, call(aten.gt.Scalar, x, 0), 0.5)):
            call(write[0], h, *write[1:])
        call(aten.clamp_.default, h, -1.0)
        call(aten.relu_.default, h)
        return h

    before, after, skips = functionalized(build)
    assert not skips and not any(name.partition(".")[2].startswith("_") or "_." in name for name in nodes_of(after))
    assert_same(before, after)


def test_the_dtype_of_what_was_written_to_is_kept():
    def build(call, x):
        h = call(aten.to.dtype, call(aten.mul.Tensor, x, 3), torch.float16)
        call(aten.add_.Tensor, h, x)
        return call(aten.mul.Tensor, h, 2)

    before, after, _ = functionalized(build)
    assert nodes_of(after)[-3:] == ["aten.add.Tensor", "aten.to.dtype", "aten.mul.Tensor"]
    assert after.graph.output_node().args[0][0].meta["val"].dtype == torch.float16
    assert_same(before, after)


def test_a_view_in_place_becomes_the_view():
    def build(call, x):
        h = call(aten.mul.Tensor, x, 3)
        call(aten.unsqueeze_.default, h, 1)
        call(aten.add_.Tensor, h, 1)
        return call(aten.transpose.int, h, 1, 2)

    before, after, skips = functionalized(build)
    assert not skips and "aten.unsqueeze.default" in nodes_of(after) and "aten.add.Tensor" in nodes_of(after)
    assert_same(before, after)
    run_again(Functionalize(), after)


def view_is_read(call, x):
    h = call(aten.mul.Tensor, x, 3)
    row = call(aten.select.int, h, 1, 0)
    call(aten.add_.Tensor, h, 1)
    return call(aten.mul.Tensor, row, 2), h


def base_is_read(call, x):
    h = call(aten.mul.Tensor, x, 3)
    call(aten.add_.Tensor, call(aten.select.int, h, 1, 0), 1)
    return h


def identity_is_read(call, x):
    h = call(aten.mul.Tensor, x, 3)
    # Outside of training dropout returns the very tensor that it is given.
    call(aten.add_.Tensor, call(aten.dropout.default, h, 0.1, False), 1)
    return h


def no_such_form(call, x):
    h = call(aten.mul.Tensor, x, 3)
    return call(aten.add.out, x, 1, out=h)


@pytest.mark.parametrize(("build", "reason"), [
    (view_is_read, "add__tensor writes to mul_tensor, whose memory is read as select_int afterwards"),
    (base_is_read, "add__tensor writes to select_int, whose memory is read as mul_tensor afterwards"),
    (identity_is_read, "add__tensor writes to dropout_default, whose memory is read as mul_tensor afterwards"),
    (no_such_form, "aten.add.out has no form out of place"),
])
def test_what_others_would_see_stays(build, reason):
    before, after, skips = functionalized(build)
    assert skips == [reason] and nodes_of(after) == nodes_of(before)
    assert_same(before, after)
    run_again(Functionalize(), after)


def test_a_view_that_is_read_before_does_no_harm():
    def build(call, x):
        h = call(aten.mul.Tensor, x, 3)
        row = call(aten.mul.Tensor, call(aten.select.int, h, 1, 0), 2)
        call(aten.add_.Tensor, h, 1)
        return row, h

    before, after, skips = functionalized(build)
    assert not skips and "aten.add.Tensor" in nodes_of(after)
    assert_same(before, after)


def test_state_is_written():
    def build(call, x):
        count = call.tensor("count")
        call(aten.add_.Tensor, count, 1)
        return call(aten.mul.Tensor, x, count)

    _, after, skips = functionalized(build, tensors={"count": torch.zeros(())})
    assert skips == ["add__tensor writes to count, which the next call sees"]
    x = torch.ones(1, 2, 8)
    assert [run_graph(after, x)[0].max().item() for _ in range(3)] == [1, 2, 3]


def test_an_unread_write_is_not_dead_code():
    def build(call, x):
        h = call(aten.mul.Tensor, x, 3)
        call(aten.zero_.default, call(aten.select.int, h, 1, 0))
        return h

    before, after, _ = functionalized(build)
    assert_same(before, after)


def test_the_callers_tensor_is_left_alone():
    _, after, _ = functionalized(residual)
    x = torch.ones(1, 2, 8)
    run_graph(after, x)
    assert torch.equal(x, torch.ones(1, 2, 8))


class InPlaceBlock(Mlp):
    def forward(self, hidden):
        inner = self.up(self.norm(hidden))
        functional.relu(inner, inplace=True)
        hidden += self.down(inner)
        return hidden


def test_a_block_that_adds_in_place_can_be_routed():
    model = Stack(*(InPlaceBlock() for _ in range(3)))
    dense = Stack(*(Mlp() for _ in range(3)))
    graph = capture(model, (torch.randn(2, 5, 8),))
    assert {"name": "functionalize", "options": {}, "modified": True} in graph.passes
    assert [block.reason for block in find_blocks(graph)] == [None] * 3
    x = torch.randn(3, 63, 8)
    with torch.no_grad():
        assert torch.equal(graph(x), dense(x))


def test_a_block_that_writes_to_a_part_says_so():
    class PartBlock(Mlp):
        def forward(self, hidden):
            hidden = super().forward(hidden)
            hidden[:, 0] = 0.0
            return hidden

    model = Stack(PartBlock(), PartBlock())
    graph = capture(model, (torch.randn(2, 5, 8),))
    assert [block.reason for block in find_blocks(graph)] == [
        f"fill_{number} = aten.fill_.Tensor writes to select{number} in place, and this is read elsewhere, or has no "
        "other form; make a new value instead (torch.cat, torch.where)" for number in ("", "_1")]
    x = torch.randn(3, 63, 8)
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))


def test_an_and_of_masks_is_no_write():
    class Masked(Mlp):
        def forward(self, hidden):
            keep = (hidden > -9) & (hidden < 9)
            return super().forward(hidden) * keep

    report = find_blocks(Stack(Masked(), Masked()), (torch.randn(2, 5, 8),))
    assert [block.reason for block in report] == [None, None]


def test_batch_norm_keeps_counting():
    """Its statistics are state: a captured model in evaluation mode reads and never writes them."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    graph = capture(model, (torch.randn(3, 8),))
    assert {"name": "functionalize", "options": {}, "modified": False} in graph.passes


def filled(call, x, parts=((0, 3), (3, 2**63 - 1)), read=False, like=(3, 5), width=None):
    """Copies into parts of new memory: case 6."""
    sizes = [call(aten.sym_size.int, x, 0), call(aten.sym_size.int, x, 1), width or sum(like)]
    new = call(aten.new_empty.default, x, sizes)
    early = call(aten.relu.default, new) if read else None
    for (start, end), size in zip(parts, like, strict=True):
        call(aten.copy_.default, call(aten.slice.Tensor, new, 2, start, end), call(aten.slice.Tensor, x, 2, 0, size))
    return (call(aten.mul.Tensor, new, 2), early) if read else call(aten.mul.Tensor, new, 2)


@pytest.mark.parametrize(("parts", "like"), [
    (((0, 3), (3, 2**63 - 1)), (3, 5)), (((5, 8), (None, 5)), (3, 5)), (((0, 4),), (4,))])
def test_parts_of_new_memory_are_joined(parts, like):
    before, after, skips = functionalized(lambda call, x: filled(call, x, parts, like=like))
    assert not skips and "aten.cat.default" in nodes_of(after)
    assert not [name for name in nodes_of(after) if "copy_" in name or "empty" in name]
    assert_same(before, after)


@pytest.mark.parametrize("build", [
    # A gap, an overlap, and a read of what is not there yet.
    lambda call, x: filled(call, x, ((0, 3), (4, 8)), like=(3, 4), width=8),
    lambda call, x: filled(call, x, ((0, 3), (2, 8)), like=(3, 6), width=8),
    lambda call, x: filled(call, x, read=True),
])
def test_other_parts_stay(build):
    _, after, _ = functionalized(build)
    assert "aten.cat.default" not in nodes_of(after) and "aten.copy_.default" in nodes_of(after)
