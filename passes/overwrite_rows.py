"""Writes merged rows over the old ones where every slot's gate is 1.

    before:  %gate = aten.ones_like(%positions, dtype=float32)
             %m: [B, S, D] = modcompile.merge_rows(%x, %y: [B, K, D], %positions, %gate)
    after:   %b: [B, 1] = aten.unsqueeze(aten.arange(B), 1)
             %m = aten.index_put(%x, [%b, %positions], %y)

Why: a merge reads what it writes over, for a gate can be anything between. Of ones a compiler sees what is left: it
writes K rows in place, in the kernel that makes them.
"""

import dataclasses
from typing import ClassVar

import torch
import torch.fx
from modcompile.passes.norm_before_merge import without_casts

# Registers the namespace's ops.
import modcompile.ops  # noqa: F401
from modcompile.pass_manager import Pass, PassResult

__all__ = ["OverwriteRows"]

# B batch  S rows  K capacity  D model dim

aten, mod = torch.ops.aten, torch.ops.modcompile


@dataclasses.dataclass(frozen=True)
class OverwriteRows(Pass):
    """Rewrites every merge whose gate is made of ones."""

    name: ClassVar[str] = "overwrite-rows"

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """The number of the batch's row goes with each of its positions."""
        graph, modified = graph_module.graph, False
        for merge in graph.find_nodes(op="call_function", target=mod.merge_rows.default):
            x, y, positions, gate = merge.args
            if without_casts(gate).target is not aten.ones_like.default:
                continue
            value = x.meta["val"]
            with graph.inserting_before(merge):
                size = value.shape[0]
                size = size if isinstance(size, int) else graph.call_function(aten.sym_size.int, (x, 0))
                counted = graph.call_function(aten.arange.default, (size,), {"device": value.device})
                batch = graph.call_function(aten.unsqueeze.default, (counted, 1))
                put = graph.call_function(aten.index_put.default, (x, [batch, positions], y))
            put.meta = dict(merge.meta)
            merge.replace_all_uses_with(put)
            graph.erase_node(merge)
            modified = True
        return PassResult(graph_module, modified)
