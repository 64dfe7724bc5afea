"""Drops whole blocks.

    before:  %y: [B, S, D] = call encoder.layer.3(%x, %mask)
    after:   %x in place of %y

Why: the dense model of equal FLOPs is what a user would pick instead of a routed one.
"""

import dataclasses
from typing import ClassVar

import torch.fx

from modcompile.pass_manager import Pass, PassResult

__all__ = ["PruneBlocks"]


@dataclasses.dataclass(frozen=True)
class PruneBlocks(Pass):
    """Removes the named blocks, which are sub-graphs already.

    Attributes:
        blocks: Module paths.
    """

    name: ClassVar[str] = "prune-blocks"
    blocks: tuple[str, ...] = ()

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Each block's hidden input takes the place of its output."""
        calls = [node for node in graph_module.graph.nodes if node.op == "call_module" and node.target in self.blocks]
        for node in calls:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
        return PassResult(graph_module, bool(calls))
