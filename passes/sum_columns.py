"""Writes a float32 product with one column, as a router's is, as the sum that it is.

    before:  %logits: float32[B, S, 1] = aten.linear(%x, %weight, %bias)           weight[1, D]
    after:   %sum: float32[B, S, 1] = aten.sum(aten.mul(%x, %weight), [-1], True)
             %logits: float32[B, S, 1] = aten.add(%sum, %bias)

Why: for a compiler that writes kernels, the sum is part of the kernel that makes x. A product is a library's, and the
kernel before it has to write x for it, as float32: for 8 x 1024 rows of 1024 values 34 MB, which are then read again.

1. Without a bias there is no addition.
2. A product in half precision stays: its terms would be rounded before they are summed.
"""

import dataclasses
from typing import ClassVar

import torch
import torch.fx

from modcompile.pass_manager import Pass, PassResult, call_for

__all__ = ["SumColumns"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class SumColumns(Pass):
    """Rewrites every float32 ``linear`` that has one output feature."""

    name: ClassVar[str] = "sum-columns"

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Builds the sum, then what is added to it."""
        graph, modified = graph_module.graph, False
        for node in graph.find_nodes(op="call_function", target=aten.linear.default):
            x, weight, bias = (*node.args, None)[:3]
            # Case 2.
            if weight.meta["val"].shape[0] != 1 or x.meta["val"].dtype != torch.float32:
                continue
            with graph.inserting_before(node):
                terms = call_for(node, aten.mul.Tensor, x, weight, like=x)
                result = call_for(node, aten.sum.dim_IntList, terms, [-1], True, like=node)
                # Case 1.
                if bias is not None:
                    result = call_for(node, aten.add.Tensor, result, bias, like=node)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
            modified = True
        return PassResult(graph_module, modified)
