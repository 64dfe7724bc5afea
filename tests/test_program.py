"""A model's structure apart from its tensors: printed stably, copied, saved as JSON, and never trusted when read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.fx
from tiny import Block, Mlp, Stack, check_golden, graph_of, nodes_of, outlined, run_graph
from torch import nn

from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.errors import IntegrityError, UnsupportedGraphError
from modcompile.program import Program, format_graph, order_tensors

aten = torch.ops.aten
X = torch.randn(3, 63, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def graph():
    return outlined(Stack(Block(causal=True), Mlp(dropout=0.1)), (torch.randn(2, 5, 8),), ["layers.0", "layers.1"])


# The printer


def test_golden(graph):
    check_golden("program", graph.format())


def test_conversions_print_alike(graph):
    """Symbols are numbered anew for every graph, from a counter of the process."""
    for _ in range(3):
        again = outlined(Stack(Block(causal=True), Mlp(dropout=0.1)), (torch.randn(3, 7, 8),), ["layers.0", "layers.1"])
        assert again.format() == graph.format()
    assert not re.search(r"\bs\d+\b", graph.format())


def test_processes_print_alike(graph):
    code = """
import torch
from tiny import Block, Mlp, Stack, outlined
model = Stack(Block(causal=True), Mlp(dropout=0.1))
print(outlined(model, (torch.randn(2, 5, 8),), ["layers.0", "layers.1"]).format(), end="")
"""
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parent)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert printed.stdout == graph.format(), printed.stderr


def test_a_sub_graphs_symbols_are_its_own(graph):
    """Even when they happen to be called like the main graph's."""
    text = graph.format()
    main, *bodies = text.split("\n\n")
    assert "float32[batch, sequence, 8]" in main
    assert all("%hidden: float32[d0, d1, 8]" in body and "batch" not in body for body in bodies)


def test_every_kind_of_value_has_a_text():
    def build(call, x):
        rows = call(aten.sym_size.int, x, 1)
        one, two = call(aten.split.Tensor, x, 4, 2), call(aten.full.default, [rows, 2], float("-inf"), device="cpu")
        return call(aten.to.dtype, x, torch.float16, memory_format=torch.preserve_format), one, two

    graph_module = graph_of({"x": ("batch", "rows", 8)}, build)
    text = format_graph(graph_module)
    assert "%sym_size_int: size d1 = aten.sym_size.int(%x, 1)" in text
    assert "%split_tensor: (float32[d0, d1, 4], float32[d0, d1, 4]) = aten.split.Tensor(%x, 4, 2)" in text
    assert "%full_default: float32[d1, 2] = aten.full.default([%sym_size_int, 2], -inf, device='cpu')" in text
    assert "aten.to.dtype(%x, float16, memory_format=torch.preserve_format)" in text


# Copies and tensors


def test_a_copy_is_apart_but_alike(graph):
    text, program = graph.format(), graph.program.copy()
    for node in program.graph.nodes:
        assert node not in list(graph.graph_module.graph.nodes)
    assert list(program.bodies) == ["layers.0", "layers.1"]
    made = program.assemble(graph.tensors())
    assert torch.equal(run_graph(made, X)[0], run_graph(graph.graph_module, X)[0])
    for module in program.bodies.values():
        for node in list(module.nodes)[::-1]:
            if node.op == "call_function" and not node.users:
                module.erase_node(node)
    assert graph.format() == text


def test_tensors_come_under_their_names_and_in_their_order(graph):
    tensors = dict(reversed(graph.tensors().items()))
    extra = {"unused.weight": nn.Parameter(torch.ones(2)), "layers.0.count": torch.zeros(1), "count": torch.zeros(1)}
    made = graph.program.copy().assemble({**tensors, **extra}, non_persistent=frozenset({"count"}))
    assert [name for name, _ in made.named_parameters()] == [*tensors, "unused.weight"]
    assert all(made.get_parameter(name) is tensor for name, tensor in tensors.items())
    assert "count" not in made.state_dict() and "layers.0.count" in made.state_dict()


def test_order_tensors_leaves_the_rest_at_the_end():
    module = nn.Module()
    for name in "cab":
        module.register_parameter(name, nn.Parameter(torch.zeros(1)))
        module.add_module(f"m{name}", nn.Linear(1, 1))
    order_tensors(module, ["ma.bias", "a", "mb.weight", "b", "ma.weight"])
    assert [name for name, _ in module.named_parameters()] == [
        "a", "b", "c", "ma.bias", "ma.weight", "mb.weight", "mb.bias", "mc.weight", "mc.bias"]


# JSON


@pytest.fixture(scope="module")
def mod():
    config = MoDConfig(blocks="all", capacity_ratio=5 / 63, gate="straight-through")
    return convert(Stack(Block(causal=True), Block(fused=True)), (torch.randn(2, 5, 8),), config)


def test_a_structure_survives_json(mod):
    text = json.dumps(mod.program.to_json())
    program = Program.from_json(json.loads(text))
    assert json.dumps(program.to_json()) == text
    tensors = {name: t for name, t in mod.tensors().items() if not name.startswith("router")}
    routers = {f"router.{path}": router for path, router in mod.routers.items()}
    made = program.assemble(tensors, routers)
    assert torch.equal(run_graph(made, X)[0], run_graph(mod.graph_module, X)[0])
    roles = [[node.meta.get("role") for node in graph.nodes] for graph in (program.graph, mod.program.graph)]
    assert roles[0] == roles[1] and ("layers.0", "logits") in roles[0]


def test_every_kind_of_argument_survives():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    arguments = (None, True, 3, 2.5, float("inf"), float("-inf"), "tanh", [1, (2, [x])], torch.float16,
                 torch.device("cuda", 1), torch.strided, torch.channels_last, slice(None, 3, x))
    options = {"alpha": 2, "memory_format": torch.preserve_format}
    graph.output((graph.call_function(aten.add.Tensor, arguments, options),))
    program = Program.from_json(json.loads(json.dumps(Program(graph).to_json())))
    node = program.graph.output_node().args[0][0]
    assert str(node.args) == str(arguments) and node.kwargs == options
    nan = Program.from_json({"graph": [{"name": "x", "op": "placeholder", "target": "x", "args": [{"float": "nan"}],
                                        "kwargs": {}}], "bodies": {}})
    assert nan.graph.find_nodes(op="placeholder")[0].args[0] != nan.graph.find_nodes(op="placeholder")[0].args[0]


def node(**changes):
    return {"name": "y", "op": "call_function", "target": "aten.relu.default", "args": [{"node": "x"}], "kwargs": {},
            **changes}


def read(row):
    rows = [node(name="x", op="placeholder", target="x", args=[]), row,
            node(name="output", op="output", target="output", args=[{"tuple": [{"node": "y"}]}])]
    return Program.from_json({"graph": rows, "bodies": {}})


def test_a_good_node_is_read():
    assert nodes_of(torch.fx.GraphModule({}, read(node()).graph)) == ["aten.relu.default"]


@pytest.mark.parametrize("target", [
    "builtins.eval", "os.system", "operator.call", "operator.attrgetter", "torch.load", "torch.save", "", "aten",
    "aten.no_such_op.default", "aten.relu.__class__", "aten.__class__.__init__", "modcompile.route.__call__",
    "aten.from_file.default", "aten.from_file.out", "higher_order.cond", "prim.device.default",
    "quantized.add.default", "profiler._record_function_enter.default",
])
def test_only_ops_of_the_known_namespaces_are_called(target):
    with pytest.raises(IntegrityError, match="the saved graph calls an unknown op") as caught:
        read(node(target=target))
    assert caught.value.details["found"] == target and caught.value.details["where"] == "graph: y"


@pytest.mark.parametrize("change", [
    {"args": [{"node": "z"}]}, {"args": [{"node": "y"}]}, {"args": [{"object": 1}]}, {"args": [{"dtype": "load"}]},
    {"args": [{"dtype": "no_such_dtype"}]}, {"args": [{"torch": "nn"}]}, {"args": [{"device": "nowhere"}]},
    {"args": [{"slice": [1, 2, 3, 4]}]}, {"args": [{"a": 1, "b": 2}]}, {"args": 3}, {"kwargs": [1]}, {"op": "call"},
    {"op": "call_method", "target": "numpy"}, {"name": "1"}, {"name": "x"}, {"name": None}, {"target": None},
    {"spec": ["float32"]}, {"spec": ["float32", [0.5]]},
    # What Python would run, were it written into the graph's code.
    {"kwargs": {"a=print(), b": 1}}, {"name": "y = print(), x"}, {"name": "class"},
    {"op": "placeholder", "target": "y=print()", "args": []}, {"op": "placeholder", "target": "lambda", "args": []},
    {"op": "get_attr", "target": 'a", print(), "b', "args": []}, {"op": "call_module", "target": 'a")(print(), "'},
    {"op": "get_attr", "target": "a\\", "args": []}, {"op": "get_attr", "target": "a\n", "args": []},
])
def test_nodes_that_are_not_well_formed(change):
    with pytest.raises(IntegrityError) as caught:
        read(node(**change))
    assert caught.value.details["where"].startswith("graph")


def test_a_missing_key_is_not_well_formed():
    for key in ("name", "op", "target", "args", "kwargs"):
        row = node()
        del row[key]
        with pytest.raises(IntegrityError):
            read(row)


def test_a_module_call_names_a_body_or_a_router():
    graph = read(node(op="call_module", target="layers.7")).graph
    with pytest.raises((IntegrityError, UnsupportedGraphError, AttributeError, KeyError, RuntimeError)):
        Program(graph).assemble({})


def test_what_cannot_be_saved():
    graph = torch.fx.Graph()
    graph.output((graph.call_function(torch.relu, (graph.placeholder("x"),)),))
    with pytest.raises(UnsupportedGraphError, match="calls something that is not an op"):
        Program(graph).to_json()
    graph = torch.fx.Graph()
    graph.output((graph.call_function(aten.relu.default, (graph.placeholder("x"), {1})),))
    with pytest.raises(UnsupportedGraphError, match="argument cannot be saved"):
        Program(graph).to_json()
