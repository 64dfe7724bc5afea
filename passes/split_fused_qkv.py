"""Splits a projection that makes queries, keys and values at once, by slicing its weight.

    before:  %qkv: [B, R, 3D] = aten.linear(%n, %w, %b);  %q, %k, %v = aten.split(%qkv, D, 2)
    after:   %q: [B, R, D] = aten.linear(%n, %w[0:D], %b[0:D])     and so on for %k, %v

Why: with keys and values from all rows, queries are needed for the chosen ones only. A fused projection would compute
them all. The parameter stays whole, under its name; a runtime folds the slices.

How the parts lie in the output is found by sending the numbers of its features through the views that take it apart:
1. a run of features is a slice of the weight;
2. runs at equal distances (queries, keys and values interleaved per head) are a slice of the weight seen per head.
"""

import dataclasses
from typing import Any, ClassVar

import torch
import torch.fx
from modcompile.passes.route_blocks import require_outlined

from modcompile.attention import VIEWS, SelfAttention, ancestors, self_attention
from modcompile.pass_manager import Pass, PassResult, Skip
from modcompile.shapes import shape_exprs, size_value

__all__ = ["SplitFusedQkv"]

aten = torch.ops.aten
# The operand that holds the weight, and the weight's dim of output features.
PROJECTIONS = {aten.linear.default: (1, 0), aten.addmm.default: (2, 1), aten.matmul.default: (1, 1),
               aten.mm.default: (1, 1)}
TAKES = {aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, aten.slice.Tensor,
         aten.select.int, aten.unbind.int}


@dataclasses.dataclass(frozen=True)
class SplitFusedQkv(Pass):
    """Splits fused projections in the named blocks.

    Attributes:
        blocks: Module paths of sub-graphs.
    """

    name: ClassVar[str] = "split-fused-qkv"
    blocks: tuple[str, ...] = ()

    def requires(self, graph_module: torch.fx.GraphModule) -> None:
        """Each block is a sub-graph that is called once."""
        require_outlined(graph_module, self.blocks, self.name)

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Finds the projection from which both the query and the key or value come."""
        skips, modified = [], False
        for path in self.blocks:
            graph = graph_module.get_submodule(path).graph
            attention = self_attention(graph)
            if isinstance(attention, Skip):
                continue
            query, others = ancestors([attention.query]), ancestors([attention.key, attention.value])
            fused = [node for node in graph.nodes if node in query and node in others and node.target in PROJECTIONS
                     and node.args[PROJECTIONS[node.target][0]].op == "get_attr"]
            # The last one: what comes before it is not the projection but what it projects.
            if fused:
                reason = _split(graph, fused[-1], others, attention)
                modified |= reason is None
                if reason:
                    skips.append(Skip(f"{path}: {reason}", fused[-1].name))
        return PassResult(graph_module, modified, tuple(skips))


def _split(graph: torch.fx.Graph, fused: torch.fx.Node, others: set, attention: SelfAttention) -> str | None:
    hidden = graph.find_nodes(op="placeholder")[0]
    batch, rows = (shape_exprs(hidden) or ())[:2]
    try:
        numbers = _feature_numbers(graph, fused, batch, rows)
    except RuntimeError:
        return "its views are of a batch whose size is fixed"
    query = ancestors([attention.query])

    def narrower(node: torch.fx.Node) -> bool:
        """Whether a value is some of the features, on their way to the queries alone or to the others alone."""
        return (isinstance(numbers.get(node), torch.Tensor) and numbers[node].numel() < numbers[fused].numel()
                and (node in query) != (node in others))

    parts = [node for node in numbers if narrower(node) and not any(map(narrower, node.all_input_nodes))]
    plans = [(_weight_slices(numbers[node]), node) for node in parts]
    for node in parts:
        exprs = shape_exprs(node) or ()
        if exprs.count(batch) != 1 or exprs.count(rows) != 1:
            return f"{node.name} merges the batch or the rows with features"
    if len(parts) < 2 or any(plan is None for plan, _ in plans):
        return "its parts are no slices of the weight"
    for plan, node in plans:
        assert plan is not None
        with graph.inserting_before(node):
            made = _project(graph, fused, node, plan, (batch, rows), hidden)
        made.meta = {"val": node.meta["val"], "nn_module_stack": node.meta.get("nn_module_stack", {})}
        node.replace_all_uses_with(made)
    return None


def _feature_numbers(graph: torch.fx.Graph, fused: torch.fx.Node, batch, rows) -> dict[torch.fx.Node, Any]:
    """Which output features each view of the projection holds, for one row of one sequence."""
    width = fused.meta["val"].shape[-1]
    numbers: dict = {fused: torch.arange(width).reshape([1] * (fused.meta["val"].dim() - 1) + [width])}

    def value(arg):
        expr = size_value(arg)
        return numbers[arg] if expr is None else int(expr.subs({batch: 1, rows: 1}))

    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if source in numbers and (node.target in VIEWS or node.target in TAKES or "getitem" in str(node.target)):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
            numbers[node] = node.target(*args, **kwargs)
    return numbers


def _weight_slices(numbers: torch.Tensor) -> tuple[int, int, int, int] | None:
    """(heads, stride, start, length): features start + h * stride .. + length for each head h."""
    flat = numbers.flatten()
    jumps = (flat.diff() != 1).nonzero().flatten()
    length = int(jumps[0]) + 1 if len(jumps) else len(flat)
    if len(flat) % length:
        return None
    runs = flat.reshape(-1, length)
    starts = runs[:, 0]
    stride = int(starts[1] - starts[0]) if len(starts) > 1 else length
    regular = torch.equal(runs, starts[0] + stride * torch.arange(len(starts))[:, None] + torch.arange(length))
    return (len(starts), stride, int(starts[0]), length) if regular and stride > 0 else None


def _project(graph: torch.fx.Graph, fused: torch.fx.Node, part: torch.fx.Node, plan: tuple, symbols: tuple,
             hidden: torch.fx.Node) -> torch.fx.Node:
    """The part's own projection, in the part's layout."""
    def call(target, *args):
        return graph.call_function(target, args)

    heads, stride, start, length = plan
    weight_at, feature_dim = PROJECTIONS[fused.target]

    def sliced(parameter, dim):
        if heads == 1:
            return call(aten.slice.Tensor, parameter, dim, start, start + length)
        # Case 2. A last head may end before its stride does: only whole ones fit the view.
        size = parameter.meta["val"].shape[dim]
        first = start // stride * stride
        whole = call(aten.slice.Tensor, parameter, dim, first, first + heads * stride) if size != heads * stride \
            else parameter
        seen = call(aten.unflatten.int, whole, dim, [heads, stride])
        run = call(aten.slice.Tensor, seen, dim + 1, start - first, start - first + length)
        return call(aten.flatten.using_ints, run, dim, dim + 1)

    def operand(index, arg):
        if not isinstance(arg, torch.fx.Node) or arg.op != "get_attr":
            return arg
        return sliced(arg, feature_dim if index == weight_at else 0)

    projected = call(fused.target, *(operand(i, arg) for i, arg in enumerate(fused.args)))
    sizes = {symbol: call(aten.sym_size.int, hidden, dim) for dim, symbol in enumerate(symbols)}
    exprs = shape_exprs(part) or ()
    lead = [e for e in shape_exprs(fused) or () if e in symbols]
    # Batch and rows merged into one dim lie batch first.
    lead = lead if len(lead) == 2 else list(symbols)
    features = [e for e in exprs if e not in symbols]
    seen = call(aten.reshape.default, projected, [*(sizes[e] for e in lead), *map(int, features)])
    order, spare = [], iter(range(2, len(exprs)))
    for expr in exprs:
        order.append(lead.index(expr) if expr in symbols else next(spare))
    return seen if order == list(range(len(exprs))) else call(aten.permute.default, seen, order)
