"""Turns attention that is written out into one scaled_dot_product_attention.

    before:  %s = aten.matmul(%q, aten.transpose(%k, -2, -1));  %s = aten.mul(%s, 0.125)
             %s = aten.masked_fill(%s, %mask, -inf);  %p = aten.softmax(%s, -1);  %y = aten.matmul(%p, %v)
    after:   %y = aten.scaled_dot_product_attention(%q, %k, %v, aten.logical_not(%mask), 0.0, False, scale=0.125)

Why: runtimes have a fused kernel for one node, and the export chooses the form that each of them takes.

1. Scores may be scaled by numbers, before the mask.
2. One mask: added, or filled with -1e4 or less where true, or filled by a where.
3. Casts and dropout between the softmax and the second product are passed over.
"""

import dataclasses
from typing import ClassVar

import torch
import torch.fx

from modcompile.pass_manager import Pass, PassResult, Skip

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
        product = next(iter(product.users))
    if product.target not in PRODUCTS or rank != 4:
        return "the softmax does not feed a product of rank 4"
    score, scale, mask = softmax.args[0], 1.0, None
    while score.target not in PRODUCTS:
        other = score.args[1] if len(score.args) > 1 else None
        if score.target in CASTS:
            score = score.args[0]
        elif score.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(other, int | float):
            scale = scale * other if score.target is aten.mul.Tensor else scale / other
            score = score.args[0]
        elif mask is not None:
            return "the scores have more than one mask"
        elif score.target is aten.add.Tensor and isinstance(other, torch.fx.Node) and scale != 1.0:
            return "the mask is added before the scores are scaled"
        elif score.target is aten.add.Tensor and isinstance(other, torch.fx.Node):
            own, bias = score.args if "matmul" in str(score.args[0].target) or _from_product(score.args[0]) else \
                reversed(score.args)
            mask, score = ("add", bias), own
        elif score.target is aten.masked_fill.Scalar and score.args[2] <= LOW:
            mask, score = ("drop", other), score.args[0]
        elif score.target in (aten.where.ScalarOther,) and score.args[2] <= LOW:
            mask, score = ("keep", score.args[0]), score.args[1]
        else:
            return f"the scores pass through {score.target}"
    query, keys_t = score.args
    with graph.inserting_before(product):
        if keys_t.target is aten.transpose.int and {d % rank for d in keys_t.args[1:]} == {rank - 2, rank - 1}:
            keys = keys_t.args[0]
        else:
            keys = graph.call_function(aten.transpose.int, (keys_t, -2, -1))
        kind, bias = mask or ("keep", None)
        if kind == "drop":
            bias = graph.call_function(aten.logical_not.default, (bias,))
        fused = graph.call_function(aten.scaled_dot_product_attention.default,
                                    (query, keys, product.args[1], bias, 0.0, False), {"scale": scale})
    fused.meta = dict(product.meta)
    product.replace_all_uses_with(fused)
    graph.erase_node(product)
    return None


def _from_product(node: torch.fx.Node) -> bool:
    """Whether a value is scores: a product of two computed values, scaled."""
    while node.target in (aten.mul.Tensor, aten.div.Tensor, *CASTS):
        node = node.args[0]
    return node.target in PRODUCTS
