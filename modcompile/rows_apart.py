"""Which operations of a block keep its rows apart: what each row becomes follows from that row alone.

Only attention may look at several rows. Of what else does, the chosen rows alone would give something else than all of
them (``attend_to_all``), and rows that nobody chose would be seen in empty slots (``decide_rows``). What is not known
to keep rows apart counts as mixing them.
"""

import operator
from collections.abc import Iterable

import sympy
import torch
import torch.fx
import torch.utils._pytree as pytree

from modcompile.attention import VIEWS, SelfAttention
from modcompile.pointwise import is_pointwise
from modcompile.shapes import dim_expr, shape_exprs, size_value

__all__ = ["RowsApart"]

aten = torch.ops.aten
# Ops that treat every row alike and apart, if what they give has the rows still; ...
ROW_BY_ROW = frozenset({
    *(op.overloadpacket for op in VIEWS), aten.all, aten.amax, aten.amin, aten.any, aten.detach, aten.embedding,
    aten.full_like, aten.linalg_vector_norm, aten.linear, aten.logsumexp, aten.mean, aten.movedim, aten.mT,
    aten.native_dropout, aten.norm, aten.ones_like, aten.prelu, aten.prod, aten.stack, aten.std, aten.sum,
    aten.swapaxes, aten.t, aten.to, aten._to_copy, aten.type_as, aten.var, aten.zeros_like})
# What does with scores as it does with rows, or makes others of their size that are all alike.
APART_IN_SCORES = frozenset({
    aten.clone, aten.contiguous, aten.detach, aten.dropout, aten.full_like, aten.native_dropout, aten.ones_like,
    aten.reshape, aten.to, aten._to_copy, aten.type_as, aten.unsqueeze, aten.view, aten.zeros_like})
# ... those of them that could give rows other elements; ...
RESHAPES = (aten.flatten, aten.reshape, aten.unflatten, aten.view)
# ... where another of their operands is no rows'; ...
PRODUCTS = (aten.addmm, aten.baddbmm, aten.bmm, aten.einsum, aten.matmul, aten.mm, aten.scaled_dot_product_attention)
# ... where they look along another dim than the rows', an argument of this place and default; ...
ALONG = {aten.argmax: (1, None), aten.argmin: (1, None), aten.argsort: (1, -1), aten.cat: (1, 0), aten.chunk: (2, 0),
         aten.cumprod: (1, None), aten.cumsum: (1, None), aten.gather: (1, None), aten.glu: (1, -1),
         aten.index_select: (1, None), aten.log_softmax: (1, None), aten._log_softmax: (1, None), aten.max: (1, None),
         aten.median: (1, None), aten.min: (1, None), aten.narrow: (1, None), aten.select: (1, None),
         aten.slice: (1, 0), aten.softmax: (1, None), aten._softmax: (1, None), aten.sort: (1, -1),
         aten.repeat_interleave: (2, None), aten.split: (2, 0), aten.split_with_sizes: (2, 0), aten.topk: (2, -1),
         aten.unbind: (1, 0)}
# What makes one number of those along some dims, its second argument, or along all.
SUMMARIES = (aten.amax, aten.amin, aten.logsumexp, aten.mean, aten.sum)
# ... and of what they normalize.
NORMS = (aten.layer_norm, aten.native_layer_norm, aten.rms_norm)


class RowsApart:
    """What is made of a block's hidden state, [B, R, D], and whether it keeps rows apart.

    Attributes:
        moving: The nodes that are made of the hidden state, sizes apart.

    Args:
        graph: Of the block.
        attention: Its one attention.
    """

    def __init__(self, graph: torch.fx.Graph, attention: SelfAttention):
        self.attention = attention
        hidden = graph.find_nodes(op="placeholder")[0]
        self.batch, self.rows = (shape_exprs(hidden) or ())[:2]
        self.moving = {hidden}
        for node in graph.nodes:
            is_size = not isinstance(node.meta.get("val"), torch.Tensor | list | tuple)
            # Of its second operand a cast takes the dtype alone.
            made_of = node.all_input_nodes[:1] if node.target is aten.type_as.default else node.all_input_nodes
            if not is_size and not self.moving.isdisjoint(made_of):
                self.moving.add(node)

    def mixed(self, nodes: Iterable[torch.fx.Node]) -> tuple[torch.fx.Node, str] | None:
        """The first of the nodes outside of attention that sees several rows at once, and what is expected instead."""
        attention = self.attention
        for node in nodes:
            if node in (attention.first, attention.last) or node.target is operator.getitem:
                continue
            if node in attention.scores:
                if not self._keeps_queries_apart(node):
                    return node, ("scores of which each query's are computed by themselves; a mask that is made from "
                                  "positions (torch.arange), not like the scores")
            elif not (self._keeps_rows(node) and self._is_apart(node)):
                return node, "no operation but attention that sees several rows at once"
        return None

    def _keeps_queries_apart(self, node: torch.fx.Node) -> bool:
        """Whether each query's scores, along the last dim but one, follow from the same query's alone."""
        packet = getattr(node.target, "overloadpacket", None)
        if is_pointwise(node.target) or packet in APART_IN_SCORES:
            return True
        if packet in PRODUCTS:
            # Heads that are mixed.
            others = [arg for arg in node.all_input_nodes if arg not in self.moving]
            return not any(self._place(arg) for arg in others)
        if packet is aten.conv2d:
            return all(size == 1 for size in (shape_exprs(node.args[1]) or ())[2:])
        if packet is aten.batch_norm:
            return not node.args[5]
        if packet in ALONG:
            dim, rank = _dim(node), len(shape_exprs(node.args[0]) or ())
            return isinstance(dim, int) and dim % rank != rank - 2
        if packet in SUMMARIES:
            dims, rank = _dims(node), len(shape_exprs(node.args[0]) or ())
            return bool(dims) and all(dim % rank != rank - 2 for dim in dims)
        return False

    def _keeps_rows(self, node: torch.fx.Node) -> bool:
        value = node.meta.get("val")
        made = value if isinstance(value, list | tuple) else [value]
        return all(any(self.rows in dim_expr(size).free_symbols for size in part.shape) for part in made)

    def _is_apart(self, node: torch.fx.Node) -> bool:
        """Whether each row of a value follows from the same row alone of what it is made of."""
        packet = getattr(node.target, "overloadpacket", None)
        moving = [arg for arg in node.all_input_nodes if arg in self.moving]
        others = [arg for arg in node.all_input_nodes if size_value(arg) is None and arg not in moving]
        if is_pointwise(node.target):
            # A number of rows would become that of the chosen ones.
            sizes = [size for arg in node.all_input_nodes if (size := size_value(arg)) is not None]
            counted = any(self.rows in size.free_symbols for size in sizes)
            return not counted and all(self._place(arg) == self._place(node) for arg in moving)
        if packet in PRODUCTS:
            factors = [arg for arg in pytree.tree_leaves((node.args, node.kwargs)) if arg in moving]
            return len(factors) == 1 and not any(self._place(arg) for arg in others)
        if packet in ALONG:
            dim, exprs = _dim(node), shape_exprs(moving[0]) or ()
            return isinstance(dim, int) and self.rows not in exprs[dim].free_symbols
        if packet in NORMS:
            return all(isinstance(size, int) for size in node.args[1])
        if packet in (aten.index, aten._unsafe_index):
            # A table, which rows look something up in.
            return node.args[0] not in moving and not self._place(node.args[0])
        if packet in (aten.pad, aten.constant_pad_nd):
            return len(node.args[1]) // 2 < (self._place(moving[0]) or 0)
        if packet is aten.repeat:
            return node.args[1][-(self._place(node) or 0)] == 1
        if packet in RESHAPES:
            return not self._strides(moving[0]).isdisjoint(self._strides(node))
        return packet in ROW_BY_ROW

    def _strides(self, node: torch.fx.Node) -> set[sympy.Expr]:
        """How many elements a row is from the next; the batch may be merged into its dim, from before or behind."""
        exprs, place = shape_exprs(node) or (), self._place(node) or 0
        behind = sympy.prod(exprs[len(exprs) - place:]) / self.rows
        return {behind, behind / self.batch}

    def _place(self, node: torch.fx.Node) -> int | None:
        """Where the rows are among a value's dims, counted from the last, which is 1; None if nowhere."""
        exprs = reversed(shape_exprs(node) or ())
        return next((i for i, expr in enumerate(exprs, 1) if self.rows in expr.free_symbols), None)


def _dims(node: torch.fx.Node) -> list[int]:
    """What an operation of ``SUMMARIES`` looks along; nothing, where that is all dims."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return [dims] if isinstance(dims, int) else list(dims) if isinstance(dims, list | tuple) else []


def _dim(node: torch.fx.Node) -> object:
    """What an operation of ``ALONG`` looks along."""
    place, usual = ALONG[node.target.overloadpacket]
    return node.args[place] if len(node.args) > place else node.kwargs.get("dim", usual)
