"""Gives every attention the operands that an ONNX operator takes.

    before:  %k8 = aten.reshape(aten.expand(aten.unsqueeze(%k, 2), [B, G, H/G, S, d]), [B, H, S, d])
             %y = aten.scaled_dot_product_attention(%q, %k8, %v8, %keep)                        keep: bool [B, 1, 1, S]
    after:   %mask = aten.where(aten.expand(%keep, [B, 1, S, S]), 0.0, -1.7e38)                 once for all blocks
             %y = aten.scaled_dot_product_attention(%q, %k, %v, %mask, enable_gqa=True)

Why: repeated heads are copies that no kernel needs, and a mask that each block makes for itself costs as much as a
small block.

1. Keys and values that were repeated for groups of heads are passed as they are.
2. A bool mask is added instead. Its fill is finite, half of the lowest number. Rows that may attend to nothing, as
   padding does, then average over everything; torch gives zeros, a runtime that takes -inf NaN, which would spread.
   A mask that is added already is clamped to that number, unless it was clamped when it was cast.
3. A mask with one row for all queries, or one column for all keys, is expanded where the operator wants one for each
   (``expand_rows``).
4. A causal flag becomes a mask where the operator has no such flag (``causal_masks``).
5. A scale that is zero or less, which ONNX Runtime does not take, is the queries'.
"""

__all__ = ["LowerAttention"]

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from modcompile.pass_manager import Pass, PassResult
from modcompile.shapes import dim_expr

# B batch  H heads  G key and value heads  S rows  d head dim

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


@dataclasses.dataclass(frozen=True)
class LowerAttention(Pass):
    """Rewrites the operands of every scaled_dot_product_attention.

    Attributes:
        expand_rows: Case 3 applies.
        causal_masks: Case 4 applies.
    """

    name: ClassVar[str] = "lower-attention"
    expand_rows: bool = False
    causal_masks: bool = False

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrites the operands in place; masks are shared between the nodes that had the same one."""
        made: dict[tuple, Node] = {}
        modified = False
        for node in graph_module.graph.find_nodes(op="call_function", target=ATTENTION):
            before = (node.args, node.kwargs)
            _share_heads(node)
            _scale_queries(graph_module.graph, node)
            self._mask(graph_module.graph, node, made)
            modified |= before != (node.args, node.kwargs)
        return PassResult(graph_module, modified)

    def _mask(self, graph: Graph, node: Node, made: dict[tuple, Node]) -> None:
        query, key, value, mask, causal = _operands(node)
        dtype = query.meta["val"].dtype

        def once(key: tuple, make: Callable[[], Node]) -> Node:
            if key not in made:
                with graph.inserting_before(node):
                    made[key] = make()
            return made[key]

        lacking: tuple[int, ...] = ()
        if causal and (self.causal_masks or query.meta["val"].dim() != 4):
            rows, columns = (dim_expr(operand.meta["val"].shape[-2]) for operand in (query, key))
            mask = once((rows, columns), functools.partial(_causal, graph, query, key))
            given, causal = torch.bool, False
        elif mask is None:
            return
        else:
            given = mask.meta["val"].dtype
            sides = {-2: query.meta["val"].shape[-2], -1: key.meta["val"].shape[-2]}
            lacking = tuple(dim for dim, size in sides.items() if mask.meta["val"].dim() > 1
                            and mask.meta["val"].shape[dim] == 1 and dim_expr(size) != 1)
        # What this pass made is finite: a second run leaves it as it is.
        finite = "finite" in mask.meta
        if self.expand_rows and lacking:
            sizes = tuple(dim_expr(sides[dim]) for dim in lacking)
            mask = once((mask, "rows", lacking, sizes), functools.partial(_expand, graph, mask, lacking, query, key))
        if given == torch.bool:
            mask = once((mask, "add", dtype), functools.partial(_additive, graph, mask, dtype))
        elif given == torch.float32 and not finite:
            mask = once((mask, "clamp"), functools.partial(graph.call_function, aten.clamp.default,
                                                           (mask, torch.finfo(torch.float32).min / 2)))
        mask.meta["finite"] = True
        # Dropout is training's; what is left besides are keywords alone.
        node.args = (query, key, value, mask, 0.0, causal)
        node.kwargs = {name: value for name, value in node.kwargs.items() if name in ("scale", "enable_gqa")}


def _operands(node: Node) -> tuple[Any, ...]:
    """Query, key, value, mask and the causal flag of an attention, wherever the call has them."""
    defaults = {"query": None, "key": None, "value": None, "attn_mask": None, "dropout_p": 0.0, "is_causal": False}
    given = defaults | dict(zip(defaults, node.args, strict=False)) | node.kwargs
    return tuple(given[name] for name in defaults if name != "dropout_p")


def _share_heads(node: Node) -> None:
    query, key, value, *_ = _operands(node)
    if query.meta["val"].dim() != 4:
        return
    heads = query.meta["val"].shape[1]
    sources = [_unrepeated(operand) for operand in (key, value)]
    groups = [source.meta["val"].shape[1] for source in sources if source is not None]
    if len(groups) == 2 and groups[0] == groups[1] != heads:
        node.args = (query, *sources, *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}


def _scale_queries(graph: Graph, node: Node) -> None:
    scale = node.kwargs.get("scale")
    if scale is not None and scale <= 0:
        query = _operands(node)[0]
        with graph.inserting_before(node):
            scaled = graph.call_function(aten.mul.Tensor, (query, scale))
        scaled.meta["val"] = query.meta["val"]
        node.args = (scaled, *node.args[1:])
        node.kwargs = {**node.kwargs, "scale": 1.0}


def _unrepeated(operand: Node) -> Node | None:
    """The value [B, G, S, d] whose heads an operand [B, H, S, d] repeats, each H / G times in a row."""
    shape = operand.meta["val"].shape
    if operand.target is aten.repeat_interleave.self_int and operand.args[2:3] == (1,):
        return operand.args[0]
    if operand.target is aten.expand.default and operand.args[0].meta["val"].shape[1:2] == (1,):
        return operand.args[0] if _same_but_heads(operand.args[0], operand) else None
    expanded = operand.args[0] if operand.target is aten.reshape.default else None
    # Between the two there may be a clone, which keeps the shape.
    if isinstance(expanded, Node) and expanded.target in (aten.clone.default, aten.contiguous.default):
        expanded = expanded.args[0]
    if not (isinstance(expanded, Node) and expanded.target is aten.expand.default):
        return None
    single = expanded.args[0]
    if single.target is not aten.unsqueeze.default or single.args[1] not in (2, -3):
        return None
    _, groups, repeats, _, width = expanded.meta["val"].shape
    if groups * repeats != shape[1] or width != shape[3]:
        return None
    return single.args[0] if _same_but_heads(single.args[0], operand) else None


def _same_but_heads(source: Node, operand: Node) -> bool:
    """Whether heads alone were repeated, and no sequences, rows or columns."""
    before, after = ([dim_expr(size) for size in node.meta["val"].shape] for node in (source, operand))
    return len(before) == len(after) == 4 and (before[0], *before[2:]) == (after[0], *after[2:])


def _causal(graph: Graph, query: Node, key: Node) -> Node:
    """Bool [S of query, S of key], true where the key is not after the query."""
    rows, columns = (
        graph.call_function(aten.arange.default, (graph.call_function(aten.sym_size.int, (operand, -2)),))
        for operand in (query, key)
    )
    return graph.call_function(aten.ge.Tensor, (graph.call_function(aten.unsqueeze.default, (rows, 1)), columns))


def _expand(graph: Graph, mask: Node, dims: tuple[int, ...], query: Node, key: Node) -> Node:
    """The mask with a row for each query, or a column for each key, where it lacks these dims."""
    sizes: list[Any] = [-1] * mask.meta["val"].dim()
    for dim in dims:
        sizes[dim] = graph.call_function(aten.sym_size.int, (query if dim == -2 else key, -2))
    return graph.call_function(aten.expand.default, (mask, sizes))


def _additive(graph: Graph, mask: Node, dtype: torch.dtype) -> Node:
    added = graph.call_function(aten.where.Scalar, (mask, 0.0, torch.finfo(dtype).min / 2))
    return graph.call_function(aten.to.dtype, (added, dtype))
