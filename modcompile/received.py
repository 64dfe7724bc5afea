"""The attention that the rows of a block received in the block before it: scores for routing without parameters.

    before:  %h: [B, S, D] = call layers.0(%x, %mask)
    after:   %h: [B, S, D] = call layers.0(%x, %mask)
             %q, %k = what layers.0 makes of %x for its attention
             %weights: [B, H, S, S] = softmax(%q %k^T / sqrt(d) + %mask)
             %received: [B, S] = the sum over queries of the mean over heads, 1 on average

Why: what the other rows look at is worth computing (A-MoD, Gadhikar et al. 2024, for vision transformers), and no
router has to learn it. A fused attention never writes its weights, so they are computed beside it; the products for
queries and keys are the block's own, and a compiler finds that they are there already.

1. Attention in one node is written out; written out already, its weights are taken as they are.
2. What a row of padding looks at does not count.
"""

import torch
import torch.fx

from modcompile.attention import SelfAttention, ancestors, attention_arguments, self_attention
from modcompile.errors import UnsupportedGraphError
from modcompile.pass_manager import Skip
from modcompile.shapes import shape_exprs

__all__ = ["received_attention"]

aten = torch.ops.aten

# B batch  H heads  S rows  d head dim


def received_attention(graph_module: torch.fx.GraphModule, path: str, hidden: torch.fx.Node,
                       valid: torch.fx.Node | None) -> torch.fx.Node:
    """What each row received in the block before, float32 [B, S], computed at the graph's insertion point.

    Args:
        graph_module: The graph, with outlined blocks.
        path: The block that is to be routed.
        hidden: Its hidden state.
        valid: Which rows are no padding, bool [B, S]; None: all.

    Raises:
        UnsupportedGraphError: The hidden state is not what a block gives that computes every row, or that block's
            attention is unknown.
    """
    inner = graph_module.get_submodule(hidden.target) if hidden.op == "call_module" else None
    if not isinstance(inner, torch.fx.GraphModule):
        raise _unfit(path, "a block that computes every row right before it", hidden.name,
                     "route every other block: the second, the fourth, ...")
    attention = self_attention(inner.graph)
    if isinstance(attention, Skip):
        raise _unfit(path, "one self-attention in the block before", attention.reason,
                     "route other blocks, or use another router")
    return _received(graph_module.graph, hidden, inner, attention, valid)


def _unfit(path: str, expected: str, found: str, fix: str) -> UnsupportedGraphError:
    return UnsupportedGraphError(f"block {path} cannot be routed by attention", expected=expected, found=found,
                                 where=path, fix=fix)


def _received(graph: torch.fx.Graph, call: torch.fx.Node, body: torch.fx.GraphModule, attention: SelfAttention,
              valid: torch.fx.Node | None) -> torch.fx.Node:
    def emit(target, *args):
        return graph.call_function(target, args)

    if attention.fused:
        mask = attention_arguments(attention.first)["attn_mask"]
        made = _copy(graph, call, body, [attention.query, attention.key, *([mask] if mask else [])])
        weights, rank = _weights(graph, attention, made[attention.query], made[attention.key], made.get(mask)), 4
    else:
        last = attention.last.args[0]
        rank, copied = last.meta["val"].dim(), _copy(graph, call, body, [last])[last]
        weights = emit(aten.to.dtype, copied, torch.float32)
        heads = (shape_exprs(last) or ())[0] / (shape_exprs(body.graph.find_nodes(op="placeholder")[0]) or ())[0]
        if heads != 1:
            # They are folded into the batch.
            weights, rank = emit(aten.unflatten.int, weights, 0, [-1, int(heads)]), rank + 1
    if rank > 3:
        weights = emit(aten.mean.dim, weights, list(range(1, rank - 2)))  # [B, S, S]
    if valid is not None:
        weights = emit(aten.where.ScalarOther, emit(aten.unsqueeze.default, valid, -1), weights, 0.0)
    return emit(aten.sum.dim_IntList, weights, [1])


def _copy(graph: torch.fx.Graph, call: torch.fx.Node, body: torch.fx.GraphModule, roots: list[torch.fx.Node]
          ) -> dict[torch.fx.Node, torch.fx.Node]:
    """What a sub-graph computes the roots from, in the graph that calls it."""
    values = dict(zip(body.graph.find_nodes(op="placeholder"), call.args, strict=True))
    needed = ancestors(roots)
    for node in body.graph.nodes:
        if node in needed and node.op == "get_attr":
            values[node] = graph.get_attr(f"{call.target}.{node.target}")
        elif node in needed and node.op == "call_function":
            values[node] = graph.node_copy(node, values.__getitem__)
            # Shapes are told by the sub-graph's own symbols.
            values[node].meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}
    return values


def _weights(graph: torch.fx.Graph, attention: SelfAttention, query: torch.fx.Node, key: torch.fx.Node,
             mask: torch.fx.Node | None) -> torch.fx.Node:
    """Case 1: the weights of an attention node, float32 [B, H, S, S]."""
    def emit(target, *args, **kwargs):
        return graph.call_function(target, args, kwargs)

    arguments, heads = attention_arguments(attention.first), attention.query.meta["val"].shape
    query, key = (emit(aten.to.dtype, value, torch.float32) for value in (query, key))
    groups = attention.key.meta["val"].shape[1]
    if arguments["enable_gqa"]:
        # Several heads of queries share one of keys.
        query, key = emit(aten.unflatten.int, query, 1, [int(groups), -1]), emit(aten.unsqueeze.default, key, 2)
    scores = emit(aten.matmul.default, query, emit(aten.transpose.int, key, -2, -1))
    if arguments["enable_gqa"]:
        scores = emit(aten.flatten.using_ints, scores, 1, 2)
    scale = arguments["scale"] if arguments["scale"] is not None else int(heads[-1]) ** -0.5
    scores = emit(aten.mul.Tensor, scores, scale)
    if arguments["is_causal"]:
        rows = emit(aten.arange.default, emit(aten.sym_size.int, scores, 2), device=attention.query.meta["val"].device)
        mask = emit(aten.ge.Tensor, emit(aten.unsqueeze.default, rows, -1), rows)
        scores = emit(aten.where.ScalarOther, mask, scores, -torch.inf)
    elif mask is not None and arguments["attn_mask"].meta["val"].dtype == torch.bool:
        scores = emit(aten.where.ScalarOther, mask, scores, -torch.inf)
    elif mask is not None:
        scores = emit(aten.add.Tensor, scores, mask)
    return emit(aten.softmax.int, scores, -1)
