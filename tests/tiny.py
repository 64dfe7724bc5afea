"""Tiny models and hand-made graphs for the tests of the compiler's parts, and the golden texts they are held against.

Nothing here takes transformers. Sizes are odd on purpose: D 8, H 2, 5 rows to capture with and 63 to run.
"""

__all__ = ["Attention", "Block", "Mlp", "Stack", "assert_same", "check_golden", "check_rewrite", "graph_of", "nodes_of",
           "outlined", "randn", "randomise_routers", "rewritten", "run_again", "run_graph", "sub_graph_of"]

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.fx
from modcompile.passes.outline_blocks import OutlineBlocks
from tolerances import EXACT, deviation
from torch import Tensor, nn
from torch.nn import functional

from modcompile.capture import capture
from modcompile.model import GraphModel, MoDModel
from modcompile.pass_manager import Pass, PassManager, PassResult
from modcompile.program import format_graph
from modcompile.shapes import fake_inputs, propagate
from modcompile.spec import TensorSpec

# B batch  S rows  D model dim  H heads

WIDTH, HEADS = 8, 2
GOLDEN = Path(__file__).parent / "golden"


class Mlp(nn.Module):
    """A pre-norm block whose rows do not see each other."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.dropout(self.down(functional.relu(self.up(self.norm(hidden)))))


class Attention(nn.Module):
    """Self-attention with a residual: causal, or under a mask [B, S] that is nonzero at valid rows."""

    def __init__(self, causal: bool = False, fused: bool = False):
        super().__init__()
        self.causal, self.fused = causal, fused
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, rows, _ = hidden.shape
        parts = self.qkv(hidden).chunk(3, -1) if self.fused else (f(hidden) for f in (self.query, self.key, self.value))
        query, key, value = (part.view(batch, rows, HEADS, -1).transpose(1, 2) for part in parts)  # [B, H, S, D / H]
        keep = None if mask is None else mask[:, None, None, :] != 0  # [B, 1, 1, S]
        mixed = functional.scaled_dot_product_attention(query, key, value, keep, is_causal=self.causal)
        return hidden + self.out(mixed.transpose(1, 2).reshape(batch, rows, WIDTH))


class Block(nn.Module):
    """Attention, then an MLP."""

    def __init__(self, causal: bool = False, fused: bool = False, dropout: float = 0.0):
        super().__init__()
        self.attention, self.mlp = Attention(causal, fused), Mlp(dropout=dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.mlp(self.attention(hidden, mask))


class Stack(nn.Module):
    """Blocks in a list, with the same random weights every time."""

    def __init__(self, *layers: nn.Module, seed: int = 0):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() < 2:
                    parameter.copy_(name.endswith("norm.weight") + 0.1 * noise)
                else:
                    parameter.copy_(noise * parameter.shape[1] ** -0.5)
        self.eval()

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden) if attention_mask is None else layer(hidden, attention_mask)
        return hidden


def randomise_routers(model: MoDModel, seed: int = 0) -> MoDModel:
    """Gives every router random weights: logits of about 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in model.routers.values():
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * router.weight.shape[1] ** -0.5)
            router.bias.copy_(torch.randn(1, generator=generator))
    return model


def outlined(model: nn.Module, example: dict | tuple, blocks: Sequence[str], *stages: Pass) -> GraphModel:
    """Captures a model, outlines some blocks and runs further passes; the manager checks the graph after each."""
    graph = capture(model, example)
    PassManager([OutlineBlocks(tuple(blocks)), *stages])(graph.graph_module)
    return graph


def graph_of(inputs: Mapping[str, Sequence[int | str]], build: Callable[..., object],
             tensors: Mapping[str, Tensor] | None = None, dtypes: Mapping[str, str] | None = None
             ) -> torch.fx.GraphModule:
    """A graph built by hand, with shapes.

    Args:
        inputs: The shape of each input, symbols by name.
        build: Called with ``call(op, *args, **kwargs)`` and the inputs' nodes; returns the outputs.
        tensors: What ``build`` may take as ``call.tensor(name)``.
        dtypes: Of the inputs that are not float32.
    """
    graph_module = torch.fx.GraphModule(dict(tensors or {}), _graph(inputs, build))
    specs = [TensorSpec(name=name, dtype=(dtypes or {}).get(name, "float32"), shape=tuple(shape))
             for name, shape in inputs.items()]
    propagate(graph_module, fake_inputs(specs))
    return graph_module


def sub_graph_of(inputs: Mapping[str, Sequence[int | str]], build: Callable[..., object],
                 tensors: Mapping[str, Tensor] | None = None, dtypes: Mapping[str, str] | None = None
                 ) -> torch.fx.GraphModule:
    """A graph that calls one sub-graph, "block", built by hand, on its own inputs."""
    def one(call, *nodes):
        result = build(call, *nodes)
        call.graph.output(result)
        return None

    body = torch.fx.GraphModule(dict(tensors or {}), _graph(inputs, one))
    specs = [TensorSpec(name=name, dtype=(dtypes or {}).get(name, "float32"), shape=tuple(shape))
             for name, shape in inputs.items()]
    propagate(body, fake_inputs(specs))
    graph = torch.fx.Graph()
    graph.output((graph.call_module("block", tuple(graph.placeholder(name) for name in inputs)),))
    graph_module = torch.fx.GraphModule({"block": body}, graph)
    propagate(graph_module, fake_inputs(specs))
    return graph_module


class _Call:
    def __init__(self, graph: torch.fx.Graph):
        self.graph = graph

    def __call__(self, target, *args, **kwargs) -> torch.fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def tensor(self, name: str) -> torch.fx.Node:
        return self.graph.get_attr(name)


def _graph(inputs: Mapping[str, Sequence[int | str]], build: Callable[..., object]) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    result = build(_Call(graph), *(graph.placeholder(name) for name in inputs))
    if result is not None:
        graph.output(result if isinstance(result, tuple) else (result,))
    return graph


def nodes_of(graph_module: torch.fx.GraphModule) -> list[str]:
    """What a graph calls, in order."""
    return [str(node.target) for node in graph_module.graph.nodes if node.op in ("call_function", "call_module")]


def run_again(stage: Pass, graph_module: torch.fx.GraphModule) -> PassResult:
    """Runs a pass a second time, which must change nothing."""
    before = format_graph(graph_module)
    result = stage.call(graph_module)
    assert not result.modified
    assert format_graph(result.graph_module) == before
    return result


def rewritten(stage: Pass, make: Callable[[], torch.fx.GraphModule]
              ) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule, list[str]]:
    """Runs a pass on a graph, under the manager, and then again.

    Args:
        stage: The pass; it may not change recorded shapes in place, which the graph before shares.
        make: Builds the graph.

    Returns:
        The graph before and after, and the reasons for what the pass left alone.
    """
    after = make()
    before = copy.deepcopy(after)
    manager = PassManager([stage])
    manager(after)
    run_again(stage, after)
    return before, after, [skip.reason for skip in manager.skips[stage.name]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    """The same random numbers every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(before: torch.fx.GraphModule, after: torch.fx.GraphModule, *inputs: Tensor,
                tolerance: float = EXACT) -> None:
    """Two graphs give the same numbers, by `deviation`."""
    expected = run_graph(before, *(value.clone() for value in inputs))
    for actual, value in zip(run_graph(after, *inputs), expected, strict=True):
        assert actual.dtype == value.dtype
        assert deviation(actual, value) <= tolerance


def run_graph(graph_module: torch.fx.GraphModule, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Runs a graph without recording gradients."""
    with torch.no_grad():
        return graph_module(*inputs)


def check_golden(name: str, text: str) -> None:
    """Compares a text with the file of that name; ``MODCOMPILE_WRITE_GOLDEN=1`` writes it instead."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("MODCOMPILE_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def check_rewrite(name: str, before: torch.fx.GraphModule, after: torch.fx.GraphModule) -> None:
    """Compares the texts of the graph before and after a pass with the file of that name."""
    check_golden(name, f"before\n{format_graph(before)}\nafter\n{format_graph(after)}")
