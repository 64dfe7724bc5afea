"""The oracle: each routed block takes the first K rows, with no router and no gate.

    before:  %y: [B, S, D] = call encoder.layer.1(%x, %mask)
    after:   %rows: [B, K, D] = aten.slice(%x, 1, 0, K)
             %y: [B, K, D] = call encoder.layer.1(%rows, mask sliced along every dim of the sequence)
             %out: [B, S, D] = aten.cat([%y, aten.slice(%x, 1, K)], 1)

    or:      %out: [B, S, D] = modcompile.merge_rows(%x, %y, 0 to K - 1 of each sequence, 1)

Why: no choice of rows can be faster than none. The time of the routed engine over this one's is what routing costs.
Which form is the faster depends on the runtime: a merge that writes in place touches K rows, aten.cat all of them.
"""

import dataclasses
from fractions import Fraction
from typing import ClassVar, Literal

import torch
import torch.fx
from modcompile.passes.round_capacity import emit_rounded
from modcompile.passes.route_blocks import emit_capacity, require_outlined, side_dims, takes_positions

from modcompile.pass_manager import Pass, PassResult

__all__ = ["TakeFirstRows"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class TakeFirstRows(Pass):
    """Lets the named blocks, which are sub-graphs already, see the first K rows (or sequences).

    Attributes:
        blocks: Module paths; ``ratios``: K/S of each, as "p/q".
        axis: token or sequence.
        multiple: K is rounded up to a multiple of this, as the routed model's.
        merge: Writes rows of tokens back with merge_rows.
    """

    name: ClassVar[str] = "take-first-rows"
    blocks: tuple[str, ...] = ()
    ratios: tuple[str, ...] = ()
    axis: Literal["token", "sequence"] = "token"
    multiple: int = 1
    merge: bool = False

    def requires(self, graph_module: torch.fx.GraphModule) -> None:
        """Each block is a sub-graph that is called once."""
        require_outlined(graph_module, self.blocks, self.name)

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Rewrites each call whose input is not sliced yet."""
        graph, modified = graph_module.graph, False
        calls = {node.target: node for node in graph.nodes if node.op == "call_module"}
        dim = 1 if self.axis == "token" else 0
        for path, ratio in zip(self.blocks, self.ratios, strict=True):
            call, body = calls[path], graph_module.get_submodule(path)
            if "first_rows" not in call.meta and Fraction(ratio) < 1:
                self._rewrite(graph, call, body, Fraction(ratio), dim)
                modified = True
        return PassResult(graph_module, modified)

    def _rewrite(self, graph: torch.fx.Graph, call: torch.fx.Node, body: torch.fx.GraphModule, ratio: Fraction,
                 dim: int) -> None:
        users = list(call.users)
        hidden, *sides = call.args
        with graph.inserting_before(call):
            count = emit_capacity(graph, hidden, dim, ratio)
            count = emit_rounded(graph, count, hidden.meta["val"].shape[dim], self.multiple)

            def first(value, dims):
                for d in dims:
                    value = graph.call_function(aten.slice.Tensor, (value, d, 0, count))
                return value

            inside, merge = dim == 1 and takes_positions(body), dim == 1 and self.merge
            if inside or merge:
                # [B, K] without a size of the batch: the first K counts of a row of zeros, one per sequence.
                zeros = graph.call_function(aten.zeros_like.default, (graph.call_function(
                    aten.select.int, (first(hidden, [1]), 2, 0)),), {"dtype": torch.int64})
                positions = graph.call_function(aten.add.Tensor, (zeros, graph.call_function(
                    aten.arange.default, (count,), {"device": hidden.meta["val"].device})))
            if inside:
                call.args = (hidden, positions, *sides)
            else:
                along = [rows if dim == 1 else (0,) if batched else () for rows, batched in side_dims(body)]
                call.args = (first(hidden, [dim]), *(first(s, d) for s, d in zip(sides, along, strict=True)))
        call.meta = {"first_rows": True}
        with graph.inserting_before(call.next):
            if merge:
                gate = graph.call_function(aten.ones_like.default, (positions,), {"dtype": torch.float32})
                merged = graph.call_function(torch.ops.modcompile.merge_rows.default, (hidden, call, positions, gate))
            else:
                rest = graph.call_function(aten.slice.Tensor, (hidden, dim, count))
                merged = graph.call_function(aten.cat.default, ([call, rest], dim))
        # Shaped as before: the next block, which may be taken too, reads its sizes from here.
        merged.meta["val"] = hidden.meta["val"]
        for user in users:
            user.replace_input_with(call, merged)
