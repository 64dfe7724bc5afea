"""Adds each routed block's logits, positions, filled slots and gates to the graph's outputs, or takes them off again.

    before:  return (%logits,)
    after:   return (%logits, %r1_logits, %r1_positions, %r1_filled, %r1_gate, ...)

Why: an engine that hands out its routing can be explained and verified; one that does not is smaller and faster.
"""

import dataclasses
from typing import ClassVar

import torch.fx

from modcompile.errors import PassContractError
from modcompile.pass_manager import Pass, PassResult

__all__ = ["ROLES", "RoutingOutputs"]

ROLES = ("logits", "positions", "filled", "gate")


@dataclasses.dataclass(frozen=True)
class RoutingOutputs(Pass):
    """Sets what the graph returns after the model's own outputs.

    Attributes:
        outputs: The number of the model's own outputs.
        keep: Whether the routing follows them.
        roles: Names of the nodes to return, in order, as "block path:role"; the pass finds them by that role.
    """

    name: ClassVar[str] = "routing-outputs"
    outputs: int = 0
    keep: bool = True
    roles: tuple[str, ...] = ()

    def requires(self, graph_module: torch.fx.GraphModule) -> None:
        """Each role is a node's."""
        known = _by_role(graph_module)
        missing = [role for role in self.roles if self.keep and role not in known]
        if missing:
            raise PassContractError("there is no routing to return", expected=f"roles among {', '.join(known)}",
                                    found=", ".join(missing), where=self.name, fix="run route-blocks first")

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Rewrites the output node."""
        output, known = graph_module.graph.output_node(), _by_role(graph_module)
        wanted = (*output.args[0][:self.outputs], *(known[role] for role in self.roles if self.keep))
        modified = wanted != tuple(output.args[0])
        if modified:
            output.args = (wanted,)
        return PassResult(graph_module, modified)


def _by_role(graph_module: torch.fx.GraphModule) -> dict[str, torch.fx.Node]:
    return {":".join(node.meta["role"]): node for node in graph_module.graph.nodes if "role" in node.meta}
