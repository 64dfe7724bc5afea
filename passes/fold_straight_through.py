"""Replaces the straight-through gate by the constant that it is outside of training.

    before:  %s: [B, K] = aten.sigmoid(aten.gather(%r, 1, %positions))
             %g = aten.where(%filled, (%s - aten.detach(%s)) + 1, 0.0)
    after:   %g = aten.to.dtype(%filled, float32)

    before:  %g = (%s - aten.detach(%s)) + 1
    after:   %g = aten.ones_like(%positions, dtype=float32)

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
    """Folds every gate of the forms above."""

    name: ClassVar[str] = "fold-straight-through"

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Matches the sum and what it is made of; nothing may broadcast or be scaled on the way."""
        found = False
        for one in graph_module.graph.find_nodes(op="call_function", target=aten.add.Tensor):
            if (share := self._share(one)) is None:
                continue
            found = True
            dtype = one.meta["val"].dtype
            for where in [user for user in one.users if user.target is aten.where.ScalarOther]:
                filled, _, otherwise = where.args
                if otherwise == 0.0 and shape_exprs(filled) == shape_exprs(where):
                    where.target, where.args = aten.to.dtype, (filled, dtype)
            one.target, one.args, one.kwargs = aten.ones_like.default, (self._like(share),), {"dtype": dtype}
        return PassResult(graph_module, found)

    @staticmethod
    def _share(one: torch.fx.Node) -> torch.fx.Node | None:
        """s, of a node (s - detach(s)) + 1."""
        zero, added = one.args
        if added != 1 or one.kwargs or zero.target is not aten.sub.Tensor or zero.kwargs:
            return None
        share, other = zero.args
        detached = isinstance(other, torch.fx.Node) and other.target is aten.detach.default and other.args[0] is share
        # Of a value without bounds, the difference may be one of infinities.
        return share if detached and share.target is aten.sigmoid.default else None

    @staticmethod
    def _like(share: torch.fx.Node) -> torch.fx.Node:
        """A value of the same shape that is there in any case: the positions, of which the logits were gathered."""
        chosen = share.args[0]
        return chosen.args[2] if chosen.target is aten.gather.default else chosen
