"""Writes a product of flattened rows, which adds a bias, as one of rows in their place.

    before:  %flat: [B * S, D] = aten.reshape(%x, [-1, D]);  %p: [B * S, N] = aten.addmm(%b, %flat, %w)
             %y: [B, S, N] = aten.reshape(%p, [B, S, N])
    after:   %y: [B, S, N] = aten.add(aten.matmul(%x, %w), %b)

Why: the bias is then a sum of its own, which runtimes take into the activation or the norm that follows; inside a
``Gemm`` ONNX Runtime's CUDA provider copies it over the whole result first. And nothing is reshaped.
"""

__all__ = ["UnflattenProducts"]

import dataclasses
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from modcompile.pass_manager import Pass, PassResult
from modcompile.shapes import dim_expr, shape_exprs

# B batch  S rows  D width before  N width after

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class UnflattenProducts(Pass):
    """Rewrites every ``addmm`` whose rows are flattened before and unflattened after."""

    name: ClassVar[str] = "unflatten-products"

    def call(self, graph_module: GraphModule) -> PassResult:
        """An addmm with other factors than 1, or used flat as well, stays."""
        graph, modified = graph_module.graph, False
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            bias, flat, weight = node.args
            source = flat.args[0] if flat.target is aten.reshape.default else None
            if source is None or node.kwargs or not all(_restores(user, source) for user in node.users):
                continue
            # A bias of each column, and rows of which nothing but the leading dims were merged.
            widths = [dim_expr(operand.meta["val"].shape[-1]) for operand in (source, flat, bias, node)]
            if bias.meta["val"].dim() != 1 or widths[0] != widths[1] or widths[2] != widths[3]:
                continue
            with graph.inserting_before(node):
                product = graph.call_function(aten.matmul.default, (source, weight))
                total = graph.call_function(aten.add.Tensor, (product, bias))
            for made in (product, total):
                made.meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}
            for user in list(node.users):
                user.replace_all_uses_with(total)
            modified = True
        return PassResult(graph_module, modified)


def _restores(user: Node, source: Node) -> bool:
    """Whether a user gives the product's rows the dims that the source's rows have."""
    before, after = shape_exprs(source) or (), shape_exprs(user) or ()
    return (user.target is aten.reshape.default and len(before) == len(after) > 2 and before[:-1] == after[:-1]
            and len(shape_exprs(user.args[0]) or ()) == 2)
