"""The manager holds every pass to its contract, and cleans up after it."""

import dataclasses
from typing import ClassVar

import pytest
import torch
import torch.fx
from tiny import Mlp, Stack, graph_of, nodes_of, outlined, sub_graph_of

from modcompile.errors import PassContractError, UnsupportedGraphError
from modcompile.pass_manager import Pass, PassManager, PassResult, Skip, nested_graphs

aten = torch.ops.aten


def graph():
    return graph_of({"x": ("batch", "sequence", 8)}, lambda call, x: call(aten.relu.default, x))


@dataclasses.dataclass(frozen=True)
class Edit(Pass):
    """Adds one to the output, without being tidy about it."""

    name: ClassVar[str] = "edit"
    times: int = 1
    honest: bool = True
    required: str = ""
    ensured: str = ""

    def requires(self, graph_module):
        if self.required:
            raise PassContractError(self.required)

    def call(self, graph_module):
        output = graph_module.graph.output_node()
        with graph_module.graph.inserting_before(output):
            for _ in range(self.times):
                graph_module.graph.call_function(aten.neg.default, (output.args[0][0],))
                added = graph_module.graph.call_function(aten.add.Tensor, (output.args[0][0], 1))
                output.args = ((added,),)
        return PassResult(graph_module, self.times > 0, (Skip("nothing to skip", "output"),))

    def ensures(self, graph_module):
        if self.ensured:
            raise PassContractError(self.ensured)


def test_dead_code_goes_shapes_are_completed_and_the_code_is_new():
    graph_module = graph()
    PassManager([Edit()])(graph_module)
    assert nodes_of(graph_module) == ["aten.relu.default", "aten.add.Tensor"]
    added = graph_module.graph.output_node().args[0][0]
    relu = added.args[0]
    assert added.meta["val"].shape == relu.meta["val"].shape
    x = torch.randn(1, 2, 8)
    assert torch.equal(graph_module(x)[0], torch.relu(x) + 1)


def test_sub_graphs_are_cleaned_too():
    graph_module = sub_graph_of({"x": ("batch", "rows", 8)}, lambda call, x: call(aten.relu.default, x))
    body = graph_module.get_submodule("block")

    @dataclasses.dataclass(frozen=True)
    class Inner(Pass):
        name: ClassVar[str] = "inner"

        def call(self, graph_module):
            output = body.graph.output_node()
            with body.graph.inserting_before(output):
                body.graph.call_function(aten.neg.default, (output.args[0],))
                output.args = (body.graph.call_function(aten.mul.Tensor, (output.args[0], 2)),)
            return PassResult(graph_module, True)

    PassManager([Inner()])(graph_module)
    assert nodes_of(body) == ["aten.relu.default", "aten.mul.Tensor"]
    assert body.graph.output_node().args[0].meta["val"].shape[2] == 8
    x = torch.randn(1, 2, 8)
    assert torch.equal(graph_module(x)[0], torch.relu(x) * 2)


def test_what_ran_and_what_was_skipped_is_kept():
    manager = PassManager([Edit(times=2), Edit(times=0)])
    manager(graph())
    options = {"honest": True, "required": "", "ensured": ""}
    assert manager.ran == [{"name": "edit", "options": {"times": 2, **options}, "modified": True},
                           {"name": "edit", "options": {"times": 0, **options}, "modified": False}]
    assert manager.skips == {"edit": (Skip("nothing to skip", "output"),)}


def test_a_broken_contract_stops_the_pipeline():
    for stages, problem in [([Edit(required="too early")], "too early"), ([Edit(ensured="not done")], "not done")]:
        manager = PassManager([*stages, Edit()])
        with pytest.raises(PassContractError, match=problem):
            manager(graph())
        assert not manager.ran
    assert issubclass(PassContractError, UnsupportedGraphError)


@pytest.mark.parametrize("broken", [
    lambda graph, output: graph.call_function(aten.matmul.default, (output.args[0][0], output.args[0][0])),
    lambda graph, output: graph.get_attr("no.such.tensor"),
    lambda graph, output: graph.create_node("call_module", "no_such_module", (output.args[0][0],)),
])
@pytest.mark.filterwarnings("ignore:Failed to fetch", "ignore:Attempted to insert")
def test_a_pass_that_breaks_the_graph_is_named(broken):
    @dataclasses.dataclass(frozen=True)
    class Break(Pass):
        name: ClassVar[str] = "break"

        def call(self, graph_module):
            output = graph_module.graph.output_node()
            with graph_module.graph.inserting_before(output):
                output.args = ((broken(graph_module.graph, output),),)
            return PassResult(graph_module, True)

    with pytest.raises(PassContractError, match="the graph is broken after pass break") as caught:
        PassManager([Break()])(graph())
    assert caught.value.details["where"] == "break" and "found" in caught.value.details


def test_nested_graphs():
    model = outlined(Stack(Mlp(), Mlp()), (torch.randn(2, 5, 8),), ["layers.0", "layers.1"])
    found = nested_graphs(model.graph_module)
    assert [path for path, _ in found] == ["", "layers.0", "layers.1"]
    assert all(isinstance(module, torch.fx.GraphModule) for _, module in found)


def test_a_pass_must_define_call():
    @dataclasses.dataclass(frozen=True)
    class Empty(Pass):
        name: ClassVar[str] = "empty"

    with pytest.raises(NotImplementedError, match=r"Empty must define call\(\)"):
        PassManager([Empty()])(graph())


def test_passes_are_values():
    assert Edit(times=2) == Edit(times=2) != Edit() and len({Edit(), Edit()}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Edit().times = 3
