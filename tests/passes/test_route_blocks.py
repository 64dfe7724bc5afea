"""A routed block sees the rows that its router picks, with their side inputs, and only these rows change."""

import operator
from fractions import Fraction

import pytest
import torch
from modcompile.passes.route_blocks import RouteBlocks, emit_capacity, gather_side, side_dims
from tiny import (
    Attention,
    Stack,
    check_rewrite,
    graph_of,
    nodes_of,
    outlined,
    randn,
    rewritten,
    run_graph,
    sub_graph_of,
)
from tolerances import EXACT, TOLERANCES, deviation

from modcompile.errors import PassContractError
from modcompile.pass_manager import PassManager
from modcompile.routers import Router

# B batch  S rows  K capacity  D model dim  R rows inside the block

aten, mod = torch.ops.aten, torch.ops.modcompile
EAGER = TOLERANCES["eager"][torch.float32]
INPUTS = {"hidden": ("batch", "rows", 8), "weights": ("batch", 1, "rows", "rows"), "table": (1, "rows", 8)}
RATIO = "5/63"


def mix(call, hidden, weights, table):
    """Rows that see each other through weights, and have a place each: all kinds of side inputs."""
    mixed = call(aten.bmm.default, call(aten.squeeze.dim, weights, 1), hidden)  # [B, R, D]
    return call(aten.add.Tensor, call(aten.add.Tensor, hidden, mixed), table)


def with_router(graph_module, path="block", seed=9):
    """Adds a router of random weights."""
    router = Router(8)
    with torch.no_grad():
        router.weight.copy_(randn(1, 8, seed=seed) * 8**-0.5)
        router.bias.copy_(randn(1, seed=seed))
    graph_module.add_submodule(f"router.{path}", router)
    return graph_module


def routed(**options):
    stage = RouteBlocks(("block",), (options.pop("ratio", RATIO),), **options)
    return rewritten(stage, lambda: with_router(sub_graph_of(INPUTS, mix)))[:2]


def arguments(batch=3, rows=63):
    return randn(batch, rows, 8), randn(batch, 1, rows, rows, seed=1) / rows, randn(1, rows, 8, seed=2)


def best(logits, count):
    """The positions of the highest logits of one sequence, ascending."""
    return logits.argsort(descending=True, stable=True)[:count].sort().values


GATES = {"raw": lambda r: r, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "straight-through": torch.ones_like}


def test_golden():
    before, after = routed(gate="sigmoid")
    check_rewrite("route_blocks", before, after)


@pytest.mark.parametrize("gate", GATES)
def test_case_1_tokens(gate):
    _, after = routed(gate=gate)
    hidden, weights, table = arguments()
    with torch.no_grad():
        logits = after.get_submodule("router.block")(hidden)
        expected = hidden.clone()
        for b in range(3):
            p = best(logits[b], 5)
            y = hidden[b, p] + weights[b, 0][p][:, p] @ hidden[b, p] + table[0, p]
            expected[b, p] += GATES[gate](logits[b, p])[:, None] * (y - hidden[b, p])
    (actual,) = run_graph(after, hidden, weights, table)
    assert deviation(actual, expected) <= EAGER
    assert (actual != hidden).any(-1).sum(1).tolist() == [5, 5, 5]


def test_at_full_capacity_it_is_the_dense_graph():
    before, after = routed(ratio="1", gate="straight-through")
    for shape in ((3, 63), (1, 1), (1, 63), (2, 5)):
        given = arguments(*shape)
        assert deviation(run_graph(after, *given)[0], run_graph(before, *given)[0]) == EXACT


@pytest.mark.parametrize("padding_mask", ["valid", "~valid"])
def test_padding_enters_last_and_changes_nothing(padding_mask):
    inputs = {"hidden": ("batch", "rows", 8), "valid": ("batch", "rows")}

    def build(call, hidden, valid):
        return call(aten.mul.Tensor, hidden, 2)

    def make():
        return with_router(sub_graph_of(inputs, build, dtypes={"valid": "int64"}))

    _, after, _ = rewritten(RouteBlocks(("block",), (RATIO,), "straight-through", padding_mask=padding_mask), make)
    hidden, valid = randn(3, 63, 8), (randn(3, 63, seed=1) > 0).long()
    valid[1, 3:], valid[2] = 0, 0
    with torch.no_grad():
        logits = after.get_submodule("router.block")(hidden).masked_fill(valid == 0, -torch.inf)
    expected = hidden.clone()
    for b, count in enumerate((5, int(valid[1].sum()), 0)):
        expected[b, best(logits[b], count)] *= 2
    given = valid if padding_mask == "valid" else 1 - valid
    assert torch.equal(run_graph(after, hidden, given)[0], expected)


@pytest.mark.parametrize("padding_mask", [None, "valid"])
def test_case_2_sequences(padding_mask):
    inputs = {**INPUTS, "valid": ("batch", "rows")}

    def build(call, hidden, weights, table, valid):
        return mix(call, hidden, weights, table)

    def make():
        return with_router(sub_graph_of(inputs, build, dtypes={"valid": "int64"}))

    _, after, _ = rewritten(RouteBlocks(("block",), ("2/7",), "tanh", "sequence", padding_mask), make)
    hidden, weights, table = arguments(batch=7)
    valid = (randn(7, 63, seed=1) > 0).long()
    # Nothing is in the last sequence; what stands in padding is no one's.
    valid[6], hidden[valid == 0] = 0, 1e9
    seen = valid if padding_mask else torch.ones_like(valid)
    with torch.no_grad():
        mean = (hidden * (seen[:, :, None] != 0)).sum(1) / seen.sum(1, keepdim=True).clamp(min=1)  # [B, D]
        logits = after.get_submodule("router.block")(mean)
        ranked = logits.masked_fill(seen.sum(1) == 0, -torch.inf)
        expected = hidden.clone()
        for b in best(ranked, 2):
            y = hidden[b] + weights[b, 0] @ hidden[b] + table[0]
            expected[b] += logits[b].tanh() * (y - hidden[b])
    (actual,) = run_graph(after, hidden, weights, table, valid)
    assert deviation(actual, expected) <= EAGER
    assert (actual != hidden).flatten(1).any(1).sum() == 2


def gathers_inside():
    inputs = {"hidden": ("batch", "rows", 8), "positions": ("batch", "capacity"), "table": (1, "rows", 8)}

    def build(call, hidden, positions, table):
        return call(mod.gather_rows.default, call(aten.add.Tensor, hidden, table), positions)

    graph_module = with_router(sub_graph_of(inputs, build, dtypes={"positions": "int64"}))
    # As a block that was outlined is called: without the positions, which it was given since.
    (call,) = graph_module.graph.find_nodes(op="call_module", target="block")
    hidden, positions, table = call.args
    call.args, call.meta["val"] = (hidden, table), hidden.meta["val"]
    graph_module.graph.erase_node(positions)
    return graph_module


def test_case_3_a_block_that_gathers_inside_takes_all_rows():
    after = gathers_inside()
    PassManager([RouteBlocks(("block",), (RATIO,), "straight-through")])(after)
    (call,) = after.graph.find_nodes(op="call_module", target="block")
    assert [arg.name for arg in call.args] == ["hidden", "getitem", "table"]
    hidden, _, table = arguments()
    with torch.no_grad():
        logits = after.get_submodule("router.block")(hidden)
    expected = hidden.clone()
    for b in range(3):
        p = best(logits[b], 5)
        expected[b, p] += table[0, p]
    assert torch.equal(run_graph(after, hidden, table)[0], expected)


def test_case_4_masked_computes_every_row_and_keeps_the_chosen():
    before, after = routed(gate="straight-through", masked=True)
    given = arguments()
    (dense,), (actual,) = run_graph(before, *given), run_graph(after, *given)
    changed = (actual != given[0]).any(-1)
    assert changed.sum(1).tolist() == [5, 5, 5]
    assert torch.equal(actual[changed], dense[changed])


def test_two_blocks_share_a_capacity_and_a_mask():
    paths = ("layers.0", "layers.1")
    model = outlined(Stack(Attention(), Attention()),
                     {"hidden": randn(2, 5, 8), "attention_mask": torch.ones(2, 5, dtype=torch.long)},
                     paths).graph_module
    for path in paths:
        with_router(model, path)
    PassManager([RouteBlocks(paths, ("1/4", "1/4"), padding_mask="attention_mask")])(model)
    routes = model.graph.find_nodes(op="call_function", target=mod.route.default)
    assert len(routes) == 2 and routes[0].args[1:] == routes[1].args[1:]
    assert {node.meta["role"] for node in model.graph.nodes if "role" in node.meta} == {
        (path, role) for path in paths for role in ("logits", "positions", "filled", "gate", "output")}


# Contracts


def test_a_block_that_is_not_outlined():
    graph = graph_of({"hidden": ("batch", "rows", 8)}, lambda call, hidden: call(aten.relu.default, hidden))
    with pytest.raises(PassContractError, match="blocks are not outlined") as caught:
        PassManager([RouteBlocks(("block",), (RATIO,))])(graph)
    assert caught.value.details["found"] == "block" and caught.value.details["fix"] == "run outline-blocks first"


def test_a_block_that_is_called_twice():
    graph = with_router(sub_graph_of(INPUTS, mix))
    (call,) = graph.graph.find_nodes(op="call_module", target="block")
    with graph.graph.inserting_after(call):
        graph.graph.call_module("block", call.args)
    with pytest.raises(PassContractError, match="blocks are not outlined"):
        PassManager([RouteBlocks(("block",), (RATIO,))])(graph)


def test_a_block_that_is_not_merged():
    with pytest.raises(PassContractError, match="a routed block is not merged") as caught:
        RouteBlocks(("block",), (RATIO,)).ensures(sub_graph_of(INPUTS, mix))
    assert caught.value.details["found"] == "0 for 1 blocks"


def test_a_model_may_scatter_on_its_own():
    def make():
        graph = with_router(sub_graph_of(INPUTS, mix))
        output = graph.graph.output_node()
        with graph.graph.inserting_before(output):
            place = graph.graph.call_function(aten.zeros_like.default, (output.args[0][0],), {"dtype": torch.int64})
            summed = graph.graph.call_function(aten.scatter_add.default, (output.args[0][0], 1, place,
                                                                          output.args[0][0]))
        output.args = ((summed,),)
        graph.recompile()
        return graph

    before, after, _ = rewritten(RouteBlocks(("block",), ("1",), "straight-through"), make)
    given = arguments()
    assert deviation(run_graph(after, *given)[0], run_graph(before, *given)[0]) <= EAGER


# Parts that other passes use


SIDES = [
    (("batch", "rows"), (1,)), (("batch", "rows", 4), (1,)), (("batch", 2, "rows"), (2,)),
    (("batch", 1, "rows", "rows"), (2, 3)), (("batch", 1, 1, "rows"), (3,)), ((1, "rows", 4), (1,)),
    ((1, 2, "rows"), (2,)), ((1, 1, "rows", "rows"), (2, 3)), (("batch", 1, 4), ()), ((2, 4), ()),
]


def test_dims_of_the_sequence_are_found_by_their_symbol():
    inputs = {"hidden": ("batch", "rows", 8)} | {f"side_{i}": shape for i, (shape, _) in enumerate(SIDES)}
    body = graph_of(inputs, lambda call, hidden, *sides: hidden)
    assert side_dims(body) == [(along, shape[0] == "batch") for shape, along in SIDES]


@pytest.mark.parametrize(("shape", "along"), SIDES)
def test_side_inputs_are_gathered_along_every_dim_of_the_sequence(shape, along):
    def build(call, side, positions):
        return gather_side(call.graph, side, along, shape[0] == "batch", positions)

    sizes = tuple({"batch": 3, "rows": 63}.get(size, size) for size in shape)
    graph = graph_of({"side": sizes, "positions": (3, 5)}, build, dtypes={"positions": "int64"})
    side = randn(*sizes)
    positions = torch.stack([torch.randperm(63, generator=torch.Generator().manual_seed(b))[:5].sort().values
                             for b in range(3)])
    (actual,) = run_graph(graph, side, positions)
    if not along:
        assert torch.equal(actual, side)
    for b in range(3) if along else ():
        expected = side[b if shape[0] == "batch" else 0]
        for dim in along:
            expected = expected.index_select(dim - 1, positions[b])
        assert torch.equal(actual[b], expected)


@pytest.mark.parametrize(("ratio", "nodes", "count"), [
    ("1/8", ["add", "floordiv"], 8), ("5/63", ["mul", "add", "floordiv"], 5), ("1", [], 63)])
def test_the_capacity_is_counted_in_whole_numbers(ratio, nodes, count):
    graph_module = graph_of({"hidden": ("batch", "rows", 8)}, lambda call, hidden: call(aten.relu.default, hidden))
    graph = graph_module.graph
    with graph.inserting_before(graph.output_node()):
        hidden, relu = list(graph.nodes)[:2]
        size = emit_capacity(graph, hidden, 1, Fraction(ratio))
        assert emit_capacity(graph, hidden, 1, Fraction(ratio)) is size
        graph.output_node().args = ((graph.call_function(aten.slice.Tensor, (relu, 1, 0, size)),),)
    graph_module.recompile()
    assert nodes_of(graph_module)[1:-1] == ["aten.sym_size.int", *(str(getattr(operator, name)) for name in nodes)]
    assert run_graph(graph_module, randn(3, 63, 8))[0].shape == (3, count, 8)


def test_a_fixed_size_has_a_fixed_capacity():
    graph = graph_of({"hidden": ("batch", 63, 8)}, lambda call, hidden: call(aten.relu.default, hidden)).graph
    assert emit_capacity(graph, next(iter(graph.nodes)), 1, Fraction(5, 63)) == 5
