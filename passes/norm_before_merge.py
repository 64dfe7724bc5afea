"""Takes the norm of a routed block's rows, and of all the others, before they are merged.

    before:  %m: [B, S, D] = modcompile.merge_rows(%x, %y: [B, K, D], %positions, %gate)
             %n = aten.layer_norm(%m, [D], %weight, %bias)
    after:   %x_n: [B, S, D] = aten.layer_norm(%x, ...);  %y_n: [B, K, D] = aten.layer_norm(%y, ...)
             %m = modcompile.merge_rows(%x, %y, %positions, %gate)
             %n = modcompile.merge_rows(%x_n, %y_n, %positions, %gate)

Why: a norm takes every row by itself. That of all rows is then part of the kernel that makes them, before the block,
and after it two merges write K rows each in place, instead of a kernel that reads and writes all rows again.

1. Each slot's gate is 0 or 1: a merged row is x's or y's, and so is its norm. That of a mix is not the mix of norms.
2. Where a block takes more than half of the rows, all of them are nearly normed twice, and the norm stays behind.
3. The norms stand before both merges: what writes in place must be the last to use x.
"""

import dataclasses
from typing import ClassVar

import torch
import torch.fx

# Registers the namespace's ops.
import modcompile.ops  # noqa: F401
from modcompile.pass_manager import Pass, PassResult, call_for

__all__ = ["NormBeforeMerge", "without_casts"]

# B batch  S rows  K capacity  D model dim

aten, mod = torch.ops.aten, torch.ops.modcompile

_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
# Case 2.
_MOST_ROWS = 0.5


@dataclasses.dataclass(frozen=True)
class NormBeforeMerge(Pass):
    """Moves every norm of the last dim behind whose merge the gate is a switch; sizes of rows must be known."""

    name: ClassVar[str] = "norm-before-merge"

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Looks at each merge, and at every norm of its result."""
        graph, modified = graph_module.graph, False
        for merge in graph.find_nodes(op="call_function", target=mod.merge_rows.default):
            x, y, positions, gate = merge.args
            rows, capacity = x.meta["val"].shape[1], y.meta["val"].shape[1]
            few = isinstance(rows, int) and isinstance(capacity, int) and capacity <= _MOST_ROWS * rows
            if not few or not is_switch(gate):
                continue
            for norm in [user for user in merge.users if user.target in _NORMS and user.args[0] is merge]:
                shape, rest = norm.args[1], norm.args[2:]
                parameters = [node for node in norm.all_input_nodes if node is not merge]
                # More than one dim is not row by row.
                if len(shape) != 1 or any(node.op not in ("get_attr", "placeholder") for node in parameters):
                    continue
                # Case 3. A parameter that others use before stays where it is.
                for node in parameters:
                    if merge < node:
                        merge.prepend(node)
                with graph.inserting_before(merge):
                    normed = [call_for(norm, norm.target, value, shape, *rest, like=value, **norm.kwargs)
                              for value in (x, y)]
                with graph.inserting_before(norm):
                    merged = call_for(norm, mod.merge_rows.default, *normed, positions, gate, like=norm)
                norm.replace_all_uses_with(merged)
                graph.erase_node(norm)
                modified = True
        return PassResult(graph_module, modified)


def is_switch(gate: torch.fx.Node) -> bool:
    """Whether a gate is known to be 0 or 1 in every slot: ones, or what says which slots are filled."""
    return without_casts(gate).target in (aten.to.dtype, aten.ones_like.default)


def without_casts(gate: torch.fx.Node) -> torch.fx.Node:
    """A gate before it was cast from one floating type to another."""
    while gate.target is aten.to.dtype and gate.args[0].meta["val"].dtype != torch.bool:
        gate = gate.args[0]
    return gate
