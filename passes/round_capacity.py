"""Rounds each capacity up to a multiple, never above the number of rows.

    before:  %positions, %filled = modcompile.route(%logits, %valid, %K)
    after:   %K_rounded = sym_min((%K + m - 1) // m * m, S)
             %positions, %filled = modcompile.route(%logits, %valid, %K_rounded)

Why: matrix products run in tiles of 64 or 128 rows; a K between two multiples pays for the larger one anyway.
"""

import dataclasses
import operator
from typing import ClassVar

import torch
import torch.fx

from modcompile.pass_manager import Pass, PassResult
from modcompile.shapes import dim_expr, size_value

__all__ = ["RoundCapacity", "emit_rounded"]


@dataclasses.dataclass(frozen=True)
class RoundCapacity(Pass):
    """Rounds K of every route.

    Attributes:
        multiple: K becomes a multiple of this, or all rows.
    """

    name: ClassVar[str] = "round-capacity"
    multiple: int = 1

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Rewrites the capacity of each route that is not rounded yet."""
        graph, modified = graph_module.graph, False
        for route in graph.find_nodes(op="call_function", target=torch.ops.modcompile.route.default):
            logits, valid, count = route.args
            rounded = emit_rounded(graph, count, logits.meta["val"].shape[1], self.multiple)
            if rounded != count:
                route.args = (logits, valid, rounded)
                _forget_shapes(route)
                modified = True
        return PassResult(graph_module, modified)


def emit_rounded(graph: torch.fx.Graph, count, rows, multiple: int):
    """K rounded up to a multiple and capped at the number of rows; one node per distinct K."""
    if isinstance(count, int):
        return min(int(rows), -(-count // multiple) * multiple)
    size = next(node for node in graph.nodes if size_value(node) == dim_expr(rows))
    if multiple == 1 or size is count or count.meta.get("multiple") == multiple:
        return count
    known = next((node for node in graph.nodes if node.meta.get("rounded_from") is count), None)
    if known is not None:
        return known
    with graph.inserting_before(count.next):
        padded = graph.call_function(operator.add, (count, multiple - 1))
        tiles = graph.call_function(operator.floordiv, (padded, multiple))
        made = graph.call_function(torch.sym_min, (graph.call_function(operator.mul, (tiles, multiple)), size))
    made.meta |= {"multiple": multiple, "rounded_from": count}
    return made


def _forget_shapes(route: torch.fx.Node) -> None:
    """What was [B, K, ...] is computed anew with the rounded K, up to the merge, which gives [B, S, D] as before."""
    pending = [route]
    while pending:
        node = pending.pop()
        if "val" in node.meta:
            del node.meta["val"]
            pending.extend(user for user in node.users if user.target is not torch.ops.modcompile.merge_rows.default)
