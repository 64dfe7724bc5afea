"""Takes the mask of filled slots off gates that it leaves as they are.

    before:  %route = modcompile.route(%logits, None, K);  %filled = operator.getitem(%route, 1)
             %g = aten.where(%filled, %gate, 0.0)
    after:   %g = %gate

Why: without padding every slot is filled, which no runtime knows. What is left of a gate may be a constant.
"""

import dataclasses
import operator
from typing import ClassVar

import torch
import torch.fx

# Registers the namespace's ops.
import modcompile.ops  # noqa: F401
from modcompile.pass_manager import Pass, PassResult
from modcompile.shapes import shape_exprs

__all__ = ["FoldFilled"]

aten, mod = torch.ops.aten, torch.ops.modcompile


@dataclasses.dataclass(frozen=True)
class FoldFilled(Pass):
    """Rewrites every gate of a route without a mask."""

    name: ClassVar[str] = "fold-filled"

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Looks at what uses the second result of such a route; the result itself stays for others."""
        modified = False
        for route in graph_module.graph.find_nodes(op="call_function", target=mod.route.default):
            if route.args[1] is not None:
                continue
            for filled in [user for user in route.users if user.target is operator.getitem and user.args[1] == 1]:
                for where in [user for user in filled.users if user.target is aten.where.ScalarOther]:
                    condition, gate, _ = where.args
                    if condition is filled and shape_exprs(gate) == shape_exprs(where):
                        where.replace_all_uses_with(gate)
                        graph_module.graph.erase_node(where)
                        modified = True
        return PassResult(graph_module, modified)
