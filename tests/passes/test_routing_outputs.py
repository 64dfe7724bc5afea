"""What an engine hands out beside the model's own outputs, and taking it off again."""

import pytest
import torch
from modcompile.passes.route_blocks import RouteBlocks
from modcompile.passes.routing_outputs import ROLES, RoutingOutputs
from tiny import check_rewrite, nodes_of, randn, rewritten, run_again, run_graph, sub_graph_of

from modcompile.errors import PassContractError
from modcompile.pass_manager import PassManager
from modcompile.routers import Router

aten = torch.ops.aten
NAMES = tuple(f"block:{role}" for role in ROLES)


def routed():
    graph_module = sub_graph_of({"hidden": ("batch", "rows", 8)}, lambda call, x: call(aten.relu.default, x))
    router = Router(8)
    with torch.no_grad():
        router.weight.copy_(randn(1, 8, seed=1))
    graph_module.add_submodule("router.block", router)
    return PassManager([RouteBlocks(("block",), ("5/63",), "sigmoid")])(graph_module)


def test_golden():
    before, after, _ = rewritten(RoutingOutputs(1, True, NAMES), routed)
    check_rewrite("routing_outputs", before, after)


def test_the_routing_follows_the_models_own_outputs():
    before, after, _ = rewritten(RoutingOutputs(1, True, NAMES), routed)
    x = randn(3, 63, 8)
    own, logits, positions, filled, gate = run_graph(after, x)
    assert torch.equal(own, run_graph(before, x)[0])
    with torch.no_grad():
        assert torch.equal(logits, after.get_submodule("router.block")(x))
    assert torch.equal(positions, torch.ops.modcompile.route(logits, None, 5)[0]) and filled.all()
    assert torch.equal(gate, logits.gather(1, positions).sigmoid())


def test_they_come_in_the_order_that_is_asked_for():
    graph_module = PassManager([RoutingOutputs(1, True, ("block:output", "block:logits"))])(routed())
    _, output, logits = graph_module.graph.output_node().args[0]
    assert output.meta["role"] == ("block", "output") and logits.meta["role"] == ("block", "logits")


def test_they_are_taken_off_again():
    graph_module = routed()
    before = nodes_of(graph_module)
    PassManager([RoutingOutputs(1, True, NAMES), RoutingOutputs(1, False, NAMES)])(graph_module)
    assert len(graph_module.graph.output_node().args[0]) == 1 and nodes_of(graph_module) == before
    run_again(RoutingOutputs(1, False), graph_module)


def test_a_role_that_nobody_has():
    with pytest.raises(PassContractError, match="there is no routing to return") as caught:
        PassManager([RoutingOutputs(1, True, (*NAMES, "other:gate"))])(routed())
    assert caught.value.details["found"] == "other:gate" and "block:gate" in caught.value.details["expected"]
