"""Writes a batched product that also adds as a product and a sum.

    before:  %s: [N, R, T] = aten.baddbmm(%bias, %q, %k, beta=1.0, alpha=0.125)
    after:   %p: [N, R, T] = aten.bmm(%q, %k)
             %s: [N, R, T] = aten.add(aten.mul(%p, 0.125), %bias)

Why: attention with a bias is written like this, and then shows neither its product nor its bias to other passes. Nor
can the shape of the one node be computed at sizes that vary, where the bias broadcasts (PyTorch 2.13).

1. A factor of 1 makes no node.
2. With beta=0 there is no sum: the bias, often memory that was never written, counts for nothing, NaN included.
"""

import dataclasses
from typing import ClassVar

import torch
import torch.fx

from modcompile.pass_manager import Pass, PassResult

__all__ = ["SplitBaddbmm"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class SplitBaddbmm(Pass):
    """Rewrites every ``baddbmm``."""

    name: ClassVar[str] = "split-baddbmm"

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Builds the product, then what is added to it."""
        graph = graph_module.graph
        nodes = graph.find_nodes(op="call_function", target=aten.baddbmm.default)
        for node in nodes:
            bias, *factors = node.args
            alpha, beta = (node.kwargs.get(name, 1) for name in ("alpha", "beta"))
            with graph.inserting_before(node):
                result = self._scaled(graph, node, self._made(graph, node, aten.bmm.default, *factors), alpha)
                # Case 2.
                if beta != 0:
                    result = self._made(graph, node, aten.add.Tensor, result, self._scaled(graph, node, bias, beta))
            node.replace_all_uses_with(result)
            graph.erase_node(node)
        return PassResult(graph_module, bool(nodes))

    def _scaled(self, graph: torch.fx.Graph, node: torch.fx.Node, value: torch.fx.Node, factor: float) -> torch.fx.Node:
        # Case 1.
        if factor == 1:
            return value
        made = self._made(graph, node, aten.mul.Tensor, value, factor)
        made.meta["val"] = value.meta["val"]
        return made

    @staticmethod
    def _made(graph: torch.fx.Graph, node: torch.fx.Node, target, *args) -> torch.fx.Node:
        """A node of the shape, and of the module, that the given one has."""
        made = graph.call_function(target, args)
        made.meta = {name: node.meta[name] for name in ("val", "nn_module_stack") if name in node.meta}
        return made
