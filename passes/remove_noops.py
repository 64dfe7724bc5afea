"""Removes what tracing leaves behind and what changes nothing.

    before:  %a = aten._assert_tensor_metadata(%x, dtype=float32)
             %b: float32[B, S, D] = aten.to.dtype(%x, float32)         x is float32 already
             %c: float32[B, S, D] = aten.slice(%b, 1, 0, 9223372036854775807)
             %y = aten.add(%c, 1)
    after:   %y = aten.add(%x, 1)

Why: assertions fix devices, and an identity between a block's input and its residual addition hides that both are the
same value, so the block would seem to have two hidden inputs.

1. Assertions on metadata and sizes go.
2. A cast to the dtype that the value has goes.
3. A slice, expand or reshape that gives its input's shape goes; so do alias and contiguous.
4. A view becomes a reshape: strides are the source's, and gathered rows have others. One that is shaped like another
   value, or expanded like it, is given that one's sizes: of its elements nothing is made.
5. What is joined with values of no elements is joined without them: so a cache begins, which nothing is kept in.

A copy of memory that is still written to in place stays: without it, the write would reach what was copied.
"""

import dataclasses
import operator
from typing import ClassVar

import torch
import torch.fx

from modcompile.pass_manager import Pass, PassResult, call_for
from modcompile.shapes import dim_expr, shape_exprs

__all__ = ["RemoveNoops"]

aten = torch.ops.aten
ASSERTIONS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range.default,
              aten.sym_constrain_range_for_size.default, aten._assert_async.msg)
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.to.other)
RESHAPES = (aten.slice.Tensor, aten.expand.default, aten.reshape.default)
LIKE = {aten.view_as.default: aten.reshape.default, aten.reshape_as.default: aten.reshape.default,
        aten.expand_as.default: aten.expand.default}
COPIES = (aten.alias.default, aten.contiguous.default, aten.lift_fresh_copy.default)


@dataclasses.dataclass(frozen=True)
class RemoveNoops(Pass):
    """Removes assertions and identities."""

    name: ClassVar[str] = "remove-noops"

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Removes the nodes of cases 1 to 3, reshapes those of case 4, and shortens those of case 5."""
        modified = False
        written = {_origin(node.args[0]) for node in graph_module.graph.nodes if _writes(node)}
        for node in list(graph_module.graph.nodes):
            if node.target is aten.view.default:
                node.target = aten.reshape.default
                modified = True
            elif node.target in LIKE:
                self._take_sizes(node)
                modified = True
            elif node.target is aten.cat.default:
                modified |= self._leave_out_empty(node)
            if node.target in ASSERTIONS:
                graph_module.graph.erase_node(node)
                modified = True
            elif (self._is_identity(node) or _joins_one(node)) and not (written and _origin(node) in written):
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph_module.graph.erase_node(node)
                modified = True
        return PassResult(graph_module, modified)

    @staticmethod
    def _take_sizes(node: torch.fx.Node) -> None:
        """Case 4: the sizes of the second operand take its place."""
        value, like = node.args
        with node.graph.inserting_before(node):
            sizes = [call_for(node, aten.sym_size.int, like, dim) if isinstance(size, torch.SymInt) else size
                     for dim, size in enumerate(like.meta["val"].shape)]
        for dim, size in enumerate(sizes):
            if isinstance(size, torch.fx.Node):
                size.meta["val"] = like.meta["val"].shape[dim]
        node.target, node.args = LIKE[node.target], (value, sizes)

    @staticmethod
    def _leave_out_empty(node: torch.fx.Node) -> bool:
        """Case 5. Of one value that is left, it is an identity."""
        values = [part.meta.get("val") for part in node.args[0]]
        if any(not isinstance(value, torch.Tensor) for value in values):
            return False
        kept = [part for part, value in zip(node.args[0], values, strict=True)
                if value.dtype != node.meta["val"].dtype or not any(dim_expr(size) == 0 for size in value.shape)]
        if not kept or len(kept) == len(values):
            return False
        node.args = (kept, *node.args[1:])
        return True

    @staticmethod
    def _is_identity(node: torch.fx.Node) -> bool:
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], torch.fx.Node):
            return False
        source, value = node.args[0].meta.get("val"), node.meta.get("val")
        if not isinstance(source, torch.Tensor) or not isinstance(value, torch.Tensor):
            return False
        if node.target in CASTS:
            return source.dtype == value.dtype and source.device == value.device and not node.kwargs.get("copy")
        same = shape_exprs(node) == shape_exprs(node.args[0])
        if node.target is aten.slice.Tensor:
            # A slice with a step of its own never keeps the shape, except over one row.
            return same and (len(node.args) < 5 or node.args[4] == 1)
        return node.target in COPIES or (same and node.target in RESHAPES)


def _joins_one(node: torch.fx.Node) -> bool:
    return node.target is aten.cat.default and len(node.args[0]) == 1


def _writes(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _origin(node: torch.fx.Node) -> torch.fx.Node:
    """The value whose memory a node would show, were no copy made on the way: an input, or what made new memory."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], torch.fx.Node) and _shows(node.target):
        node = node.args[0]
    return node


def _shows(target: object) -> bool:
    """Whether an op gives its first argument, or a view of it, if nothing makes it copy."""
    returns = target._schema.returns if isinstance(target, torch._ops.OpOverload) else ()
    return (target in (*CASTS, *COPIES, aten.dropout.default, operator.getitem)
            or any(result.alias_info is not None for result in returns))
