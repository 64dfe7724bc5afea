"""Finds where the rows of a block see each other, as one ``scaled_dot_product_attention`` or written out.

Written out, attention is two products with a softmax between them. Whatever stands between the first product and the
softmax (scales, masks, biases, a soft cap) works on scores, whose last dim runs along the keys and whose last but one
runs along the queries; what stands between the softmax and the second product does too. One number of each query, such
as its largest score, has a last dim of 1.
"""

import dataclasses
from collections.abc import Iterable

import sympy
import torch
import torch.fx
from torch.utils import _pytree as pytree

from modcompile.pass_manager import Skip
from modcompile.shapes import dim_expr, shape_exprs, size_value

__all__ = ["SDPA", "SOFTMAXES", "VIEWS", "SelfAttention", "ancestors", "attention_arguments", "self_attention"]

# B batch  H heads  R rows  d head dim

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
# Products of two computed values.
PRODUCTS = (aten.matmul.default, aten.bmm.default)
# Ops that move no data of their own: what they give is what they were given.
VIEWS = frozenset({aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default,
                   aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, aten.unflatten.int,
                   aten.flatten.using_ints, aten.contiguous.default, aten.clone.default, aten.view.default,
                   aten.expand.default, aten.alias.default, aten.dropout.default})


@dataclasses.dataclass(frozen=True)
class SelfAttention:
    """One attention whose keys come from the block's hidden state.

    Attributes:
        query: [..., R, d]; ``key``: [..., R, d], or written out its transpose; ``value``: [..., R, d].
        first: The product of queries and keys; ``last``: the product with the values. One node, where it is fused.
        scores: The nodes from the first product to what the last one takes, without the two: none where it is fused.
    """

    query: torch.fx.Node
    key: torch.fx.Node
    value: torch.fx.Node
    first: torch.fx.Node
    last: torch.fx.Node
    scores: frozenset[torch.fx.Node]

    @property
    def fused(self) -> bool:
        """Whether it is one node."""
        return self.first is self.last


def attention_arguments(node: torch.fx.Node) -> dict:
    """The arguments of an attention node by name, with defaults."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def ancestors(nodes: Iterable[torch.fx.Node]) -> set[torch.fx.Node]:
    """The nodes that the given ones are computed from, themselves included."""
    found, pending = set(), list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def self_attention(graph: torch.fx.Graph) -> SelfAttention | Skip:
    """The one attention of a block's sub-graph whose keys come from its hidden state, or why there is none."""
    hidden = graph.find_nodes(op="placeholder")[0]
    rows = (shape_exprs(hidden) or ())[1]
    found: list[SelfAttention] = []
    reasons: list[Skip] = []
    unknown: list[Skip] = []
    for node in graph.nodes:
        if node.target is SDPA:
            operands = attention_arguments(node)
            one: SelfAttention | Skip = SelfAttention(operands["query"], operands["key"], operands["value"], node, node,
                                                      frozenset())
        elif node.target in SOFTMAXES:
            one = _written_out(node, hidden)
        else:
            continue
        if isinstance(one, Skip):
            reasons.append(one)
            # Over experts, say, a softmax is no one's business; over rows, they see each other in it.
            if (shape_exprs(node) or ())[node.args[1]] == rows:
                unknown.append(one)
        elif hidden in ancestors([one.key]):
            found.append(one)
    if len(found) > 1:
        return Skip(f"{len(found)} self-attentions", found[1].last.name)
    if found:
        return unknown[0] if unknown else found[0]
    return reasons[0] if reasons else Skip("no attention: neither scaled_dot_product_attention nor a softmax")


def _written_out(softmax: torch.fx.Node, hidden: torch.fx.Node) -> SelfAttention | Skip:
    rank = softmax.meta["val"].dim()
    if softmax.args[1] not in (-1, rank - 1):
        return Skip(f"{softmax.name} is not over the last dim", softmax.name)
    ends = _nearest_ends(softmax)
    last = ends[0] if len(ends) == 1 else softmax
    if last.target not in PRODUCTS or softmax not in ancestors([last.args[0]]):
        return Skip(f"{softmax.name} is not followed by one product with values", softmax.name)
    weights, value = last.args
    products = _nearest_products(weights, hidden)
    if len(products) != 1:
        names = ", ".join(sorted(node.name for node in products)) or "no product"
        return Skip(f"the scores of {softmax.name} come from {names}; attention has one product of queries and keys",
                    softmax.name)
    first = products[0]
    query, key = first.args
    above = ancestors([weights])
    # In the graph's order, so that the same reason is given every time.
    scores = [node for node in softmax.graph.nodes if node in above and node is not first
              and size_value(node) is None and first in ancestors([node])]
    rows = (shape_exprs(hidden) or ())[1]
    for node in (first, *scores):
        if not _is_of_queries(node, rows) or (node in (first, softmax) and (shape_exprs(node) or ())[-1] != rows):
            return Skip(f"{node.name} stands between the product and the softmax {softmax.name}, but does not give "
                        "scores of queries and keys", node.name)
    return SelfAttention(query, key, value, first, last, frozenset(scores))


def _is_of_queries(node: torch.fx.Node, rows: sympy.Expr) -> bool:
    """Whether a value, or each of several, has a score for each pair of rows, or one number for each query."""
    value = node.meta.get("val")
    shapes = [[dim_expr(size) for size in part.shape[-2:]] for part in pytree.tree_leaves(value)]
    return bool(shapes) and all(shape in ([rows, rows], [rows, 1]) for shape in shapes)


def _nearest_ends(softmax: torch.fx.Node) -> list[torch.fx.Node]:
    """The products that weights go into, and the graph's output where they go there without one."""
    ends, seen, pending = [], set(), [softmax]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in PRODUCTS or node.op == "output":
            ends.append(node)
        else:
            pending.extend(node.users)
    return ends


def _nearest_products(weights: torch.fx.Node, hidden: torch.fx.Node) -> list[torch.fx.Node]:
    """The products of two values of the rows that weights come from, without those that these come from in turn."""
    products, seen, pending = [], set(), [weights]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in PRODUCTS and all(hidden in ancestors([operand]) for operand in node.args):
            products.append(node)
        else:
            pending.extend(node.all_input_nodes)
    return products
