"""Replaces the straight-through gate by the constant that it is outside of training.

    before:  %s = aten.sigmoid(%r);  %g = aten.where(%filled, (%s - aten.detach(%s)) + 1, 0.0)
    after:   %g = aten.to.dtype(%filled, float32)

Why: no runtime knows that s - s is 0 for every s it will see.
"""

import dataclasses
from typing import ClassVar

import torch
import torch.fx

from modcompile.pass_manager import Pass, PassResult
from modcompile.shapes import shape_exprs

__all__ = ["FoldStraightThrough"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class FoldStraightThrough(Pass):
    """Folds every gate of the form above."""

    name: ClassVar[str] = "fold-straight-through"

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Matches the where, then its operands; nothing may broadcast or be scaled on the way."""
        gates = [node for node in graph_module.graph.find_nodes(op="call_function", target=aten.where.ScalarOther)
                 if self._is_straight_through(node)]
        for node in gates:
            node.target, node.args = aten.to.dtype, (node.args[0], node.meta["val"].dtype)
        return PassResult(graph_module, bool(gates))

    @staticmethod
    def _is_straight_through(node: torch.fx.Node) -> bool:
        filled, one, otherwise = node.args
        if otherwise != 0.0 or shape_exprs(filled) != shape_exprs(node):
            return False
        if one.target is not aten.add.Tensor or one.args[1] != 1 or one.kwargs:
            return False
        zero = one.args[0]
        if zero.target is not aten.sub.Tensor or zero.kwargs:
            return False
        share, other = zero.args
        return isinstance(other, torch.fx.Node) and other.target is aten.detach.default and other.args[0] is share
