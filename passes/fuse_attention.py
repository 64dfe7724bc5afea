"""Turns attention that is written out into one scaled_dot_product_attention.

    before:  %s = aten.matmul(%q, aten.transpose(%k, -2, -1));  %s = aten.mul(%s, 0.125)
             %s = aten.masked_fill(%s, %mask, -inf);  %p = aten.softmax(%s, -1);  %y = aten.matmul(%p, %v)
    after:   %y = aten.scaled_dot_product_attention(%q, %k, %v, aten.logical_not(%mask), 0.0, False, scale=0.125)

Why: runtimes have a fused kernel for one node, and the export chooses the form that each of them takes.

1. Scores may be scaled by numbers, before the mask.
2. One mask: added, or filled with -1e4 or less (once scaled) where true, or filled by a where.
3. Casts and dropout between the softmax and the second product are passed over.
"""

import dataclasses
from typing import ClassVar

import torch
import torch.fx

from modcompile.pass_manager import Pass, PassResult, Skip
from modcompile.shapes import shape_exprs

__all__ = ["FuseAttention"]

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
CASTS = (aten.to.dtype, aten.dropout.default, aten.type_as.default)
# A finite fill this low is as good as -inf: its softmax weight is 0 in every dtype.
LOW = -1e4


@dataclasses.dataclass(frozen=True)
class FuseAttention(Pass):
    """Fuses every attention of the form above."""

    name: ClassVar[str] = "fuse-attention"

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Starts from each softmax."""
        skips, modified = [], False
        for softmax in graph_module.graph.find_nodes(op="call_function", target=aten.softmax.int):
            reason = _fuse(graph_module.graph, softmax)
            if reason:
                skips.append(Skip(reason, softmax.name))
            modified |= reason is None
        return PassResult(graph_module, modified, tuple(skips))


def _fuse(graph: torch.fx.Graph, softmax: torch.fx.Node) -> str | None:
    """Rewrites one attention; the reason if it has another form."""
    rank = softmax.meta["val"].dim()
    if softmax.args[1] not in (-1, rank - 1):
        return "the softmax is not over the last dim"
    product = softmax
    while len(product.users) == 1 and (product is softmax or product.target in CASTS):
        weights, product = product, next(iter(product.users))
        if product.args[0] is not weights:
            break
    if product.target not in PRODUCTS or product.args[0] is not weights or rank != 4:
        return "the softmax does not feed a product of rank 4"
    score, scale, mask = softmax.args[0], 1.0, None
    while score.target not in PRODUCTS:
        found = _mask(score, scale)
        if score.target in CASTS:
            score = score.args[0]
        elif score.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(score.args[1], int | float):
            scale = scale * score.args[1] if score.target is aten.mul.Tensor else scale / score.args[1]
            score = score.args[0]
        elif found is None:
            return f"the scores pass through {score.target}"
        elif mask is not None:
            return "the scores have more than one mask"
        elif found[0] == "add" and scale != 1.0:
            return "the mask is added before the scores are scaled"
        else:
            mask, score = found[:2], found[2]
    (query, keys_t), values = score.args, product.args[1]
    reason = _unfit(softmax, score, mask, query, keys_t, values)
    if reason:
        return reason
    with graph.inserting_before(product):
        if keys_t.target is aten.transpose.int and {d % rank for d in keys_t.args[1:]} == {rank - 2, rank - 1}:
            keys = keys_t.args[0]
        else:
            keys = graph.call_function(aten.transpose.int, (keys_t, -2, -1))
        kind, bias = mask or ("keep", None)
        if kind == "drop":
            bias = graph.call_function(aten.logical_not.default, (bias,))
        fused = graph.call_function(aten.scaled_dot_product_attention.default,
                                    (query, keys, values, bias, 0.0, False), {"scale": scale})
    fused.meta = dict(product.meta)
    product.replace_all_uses_with(fused)
    graph.erase_node(product)
    return None


def _mask(node: torch.fx.Node, scale: float) -> tuple[str, torch.fx.Node, torch.fx.Node] | None:
    """Case 2: how a node masks scores that are scaled afterwards, by what, and the scores; None if it does not."""
    match node.target, node.args:
        case aten.add.Tensor, (first, torch.fx.Node() as second) if not node.kwargs:
            swapped = _from_product(second) and not _from_product(first)
            return ("add", first, second) if swapped else ("add", second, first)
        case aten.masked_fill.Scalar, (scores, mask, fill) if fill * scale <= LOW:
            return "drop", mask, scores
        case aten.where.ScalarOther, (mask, scores, fill) if fill * scale <= LOW:
            return "keep", mask, scores
    return None


def _from_product(node: torch.fx.Node) -> bool:
    """Whether a value is scores: a product of two computed values, scaled."""
    while node.target in (aten.mul.Tensor, aten.div.Tensor, *CASTS):
        node = node.args[0]
    return node.target in PRODUCTS


def _unfit(softmax: torch.fx.Node, score: torch.fx.Node, mask: tuple | None, query: torch.fx.Node,
           keys_t: torch.fx.Node, values: torch.fx.Node) -> str | None:
    """Why the operands have no place in the one node: it broadcasts masks, and heads of keys and values, no more."""
    if mask is not None and mask[1].meta["val"].dim() < 2:
        return "the mask has no dim of queries"
    if mask is not None and mask[1].meta["val"].dtype != (query.meta["val"].dtype if mask[0] == "add" else torch.bool):
        return f"the mask is {mask[1].meta['val'].dtype}"
    queries, keys, heads = (shape_exprs(node) or () for node in (query, keys_t, values))
    if shape_exprs(score) != shape_exprs(softmax):
        return "the mask has more batches or heads than the scores"
    if {len(queries), len(keys), len(heads)} != {4} or queries[:2] != (shape_exprs(score) or ())[:2] or (
            keys[:2] != heads[:2] or keys[0] != queries[0]):
        return "queries, keys and values are not [B, H, R, d] each"
    return None
