"""Drops whole blocks.

    before:  %y: [B, S, D] = call encoder.layer.3(%x, %mask)
    after:   %x in place of %y

Why: the dense model of equal FLOPs is what a user would pick instead of a routed one.

A block that stands in the graph node by node is dropped from there, and what is left can be converted: so one can route
what pruning left.
"""

import dataclasses
from typing import ClassVar

import torch.fx

from modcompile.block_view import analyse_block, block_groups
from modcompile.pass_manager import Pass, PassResult, Skip

__all__ = ["PruneBlocks"]


@dataclasses.dataclass(frozen=True)
class PruneBlocks(Pass):
    """Removes the named blocks.

    Attributes:
        blocks: Module paths. One that the graph does not hold is left out already.
    """

    name: ClassVar[str] = "prune-blocks"
    blocks: tuple[str, ...] = ()

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Each block's hidden input takes the place of its output."""
        graph = graph_module.graph
        calls = [node for node in graph.nodes if node.op == "call_module" and node.target in self.blocks]
        for node in calls:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        groups = [[path for _, path in group] for group in block_groups(graph).values()]
        siblings = {path: [other for other in group if other != path] for group in groups for path in group}
        views = (analyse_block(graph, path, siblings[path]) for path in siblings if path in self.blocks)
        changed, skips = bool(calls), []
        for view in views:
            if isinstance(view, Skip):
                # What is left of a sub-graph's block outside of it has no hidden state either.
                skips.append(view)
                continue
            view.result.replace_all_uses_with(view.hidden)
            for node in reversed(view.body):
                graph.erase_node(node)
            changed = True
        return PassResult(graph_module, changed, tuple(skips))
