"""Puts a router, a choice of K rows, and a merge around each routed block.

    before:  %y: [B, S, D] = call encoder.layer.1(%x, %mask)
    after:   %logits: [B, S] = call router.encoder.layer.1(%x)
             %positions, %filled: [B, K] = modcompile.route(%logits, %valid, K)
             %rows: [B, K, D] = modcompile.gather_rows(%x, %positions)
             %mask_rows: [B, 1, K, K] = the mask, gathered along every dim that runs along the sequence
             %y: [B, K, D] = call encoder.layer.1(%rows, %mask_rows)
             %gate: [B, K] = gate(logits at positions), 0 where not filled
             %out: [B, S, D] = modcompile.merge_rows(%x, %y, %positions, %gate)

Why: this is Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258, equation 1). Positions ascend, so a causal mask
among the chosen rows stays causal, and what was computed from positions stays the original's.

1. Token axis: K of the S rows of each sequence.
2. Sequence axis: K of the B sequences; a sequence's logit is that of its mean valid row.
3. A block that attends to all rows (see attend-to-all) takes the hidden state and the positions, and gathers inside.
4. Masked: the block computes every row, and only the chosen ones are kept. It saves nothing; it is what implementations
   around a framework's layers do, and is here to be compared with.
5. Depth, on the sequence axis: the first block's router predicts a depth from its input, and the further blocks' take
   that prediction in the place of a hidden state.
6. Attention: what rows received in the block before takes the place of a hidden state.
"""

import dataclasses
import operator
from fractions import Fraction
from typing import ClassVar, Literal

import torch
import torch.fx

from modcompile.config import capacity
from modcompile.errors import PassContractError
from modcompile.interface import graph_name
from modcompile.pass_manager import Pass, PassResult
from modcompile.received import received_attention
from modcompile.routers import router_path
from modcompile.shapes import shape_exprs, size_value

__all__ = ["RouteBlocks", "emit_capacity", "gather_side", "require_outlined", "side_dims", "takes_positions"]

aten, mod = torch.ops.aten, torch.ops.modcompile
POSITIONS = "positions"


@dataclasses.dataclass(frozen=True)
class RouteBlocks(Pass):
    """Routes the named blocks, which are sub-graphs already and have a router module each.

    Attributes:
        blocks: Module paths, in the model's order; ``ratios``: K/S of each, as "p/q".
        gate: raw, sigmoid, tanh, straight-through, or scale, a parameter of the router.
        axis: token or sequence.
        padding_mask: The input that is nonzero at valid tokens, or with a leading "~" at padding; None: all are valid,
            and so are those of a block whose rows are not the mask's.
        masked: Case 4, on the token axis.
        seen: What the routers see: "hidden", the block's hidden state, "depth" (case 5), or "attention" (case 6).
    """

    name: ClassVar[str] = "route-blocks"
    blocks: tuple[str, ...] = ()
    ratios: tuple[str, ...] = ()
    gate: Literal["raw", "sigmoid", "tanh", "straight-through", "scale"] = "raw"
    axis: Literal["token", "sequence"] = "token"
    padding_mask: str | None = None
    masked: bool = False
    seen: Literal["hidden", "depth", "attention"] = "hidden"

    def requires(self, graph_module: torch.fx.GraphModule) -> None:
        """Each block is a sub-graph that is called once."""
        require_outlined(graph_module, self.blocks, self.name)

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Rewrites each call; a block whose router is called already is left alone."""
        graph = graph_module.graph
        calls = {node.target: node for node in graph.nodes if node.op == "call_module"}
        pending = [(path, Fraction(ratio)) for path, ratio in zip(self.blocks, self.ratios, strict=True)
                   if router_path(path) not in calls]
        for path, ratio in pending:
            self._route(graph_module, calls[path], ratio)
        return PassResult(graph_module, bool(pending))

    def ensures(self, graph_module: torch.fx.GraphModule) -> None:
        """Each block's output is merged."""
        merges = len(graph_module.graph.find_nodes(op="call_function", target=mod.merge_rows.default))
        if merges < len(self.blocks):
            raise PassContractError("a routed block is not merged", expected="one merge_rows per block",
                                    where=self.name, found=f"{merges} for {len(self.blocks)} blocks")

    def _route(self, graph_module: torch.fx.GraphModule, call: torch.fx.Node, ratio: Fraction) -> None:
        graph, body, users = graph_module.graph, graph_module.get_submodule(call.target), list(call.users)
        hidden, *sides = call.args
        tokens = self.axis == "token"
        dims = side_dims(body)
        with graph.inserting_before(call):
            mask = self._valid(graph)
            # A mask of other rows, as an encoder's is in a decoder, says nothing of these.
            valid = mask if mask and shape_exprs(mask.args[0]) == (shape_exprs(hidden) or ())[:2] else None
            if tokens:
                seen = received_attention(graph_module, call.target, hidden, valid) if self.seen == "attention" else \
                    hidden
                logits = graph.call_module(router_path(call.target), (seen,))
            else:
                depth = self._predicted_depth(graph)
                seen = _mean_row(graph, hidden, valid) if depth is None else depth
                logits = graph.call_function(aten.unsqueeze.default,
                                             (graph.call_module(router_path(call.target), (seen,)), 0))
                valid = None if mask is None else graph.call_function(
                    aten.unsqueeze.default, (graph.call_function(aten.any.dim, (mask, 1)), 0))
            count = emit_capacity(graph, hidden, 1 if tokens else 0, ratio)
            routed = graph.call_function(mod.route.default, (logits, valid, count))
            positions, filled = (graph.call_function(operator.getitem, (routed, i)) for i in (0, 1))
            if not tokens:
                rows = _gather_sequences(graph, hidden, positions)
                inputs = (rows, *(_gather_sequences(graph, side, positions) if batched else side
                                  for side, (_, batched) in zip(sides, dims, strict=True)))
            elif self.masked:
                inputs = (hidden, *sides)
            elif takes_positions(body):
                inputs = (hidden, positions, *sides)
            else:
                rows = graph.call_function(mod.gather_rows.default, (hidden, positions))
                inputs = (rows, *(gather_side(graph, side, along, batched, positions)
                                  for side, (along, batched) in zip(sides, dims, strict=True)))
        call.args = inputs
        # The call now gives K rows: its recorded shape is no longer true.
        call.meta.pop("val", None)
        with graph.inserting_before(call.next):
            gate = self._gate(graph, call.target, logits, positions, filled)
            made = graph.call_function(mod.gather_rows.default, (call, positions)) if self.masked else call
            merged = graph.call_function(mod.merge_rows.default, (hidden, made, positions, gate)) if tokens else \
                _merge_sequences(graph, hidden, made, positions, gate)
        # Shaped as before: the next block, which may be routed too, reads its sizes from here.
        merged.meta["val"] = hidden.meta["val"]
        for user in users:
            user.replace_input_with(call, merged)
        for role, node in (("logits", logits), ("positions", positions), ("filled", filled), ("gate", gate),
                           ("output", merged)):
            node.meta["role"] = (call.target, role)

    def _valid(self, graph: torch.fx.Graph) -> torch.fx.Node | None:
        """What the padding mask says is valid, bool [B, S]; None without one."""
        if self.padding_mask is None:
            return None
        name = graph_name(self.padding_mask.removeprefix("~"))
        mask = next(node for node in graph.find_nodes(op="placeholder") if node.target == name)
        target = aten.eq.Scalar if self.padding_mask.startswith("~") else aten.ne.Scalar
        known = next((user for user in mask.users if user.target is target and user.args[1] == 0
                      and user.meta.get("valid")), None)
        if known is None:
            # Once for all blocks, as early as can be.
            first = next(node for node in graph.nodes if node.op != "placeholder")
            with graph.inserting_before(first):
                known = graph.call_function(target, (mask, 0))
            known.meta["valid"] = True
        return known

    def _predicted_depth(self, graph: torch.fx.Graph) -> torch.fx.Node | None:
        """Case 5: what the first block's router gave, if it is called already."""
        first = router_path(self.blocks[0])
        return next((n for n in graph.nodes if n.op == "call_module" and n.target == first), None) \
            if self.seen == "depth" else None

    def _gate(self, graph: torch.fx.Graph, block: str, logits, positions, filled) -> torch.fx.Node:
        """The chosen rows' weights, float32 [B, K]."""
        def call(target, *args):
            return graph.call_function(target, args)

        chosen = call(aten.gather.default, logits, 1, positions)
        if self.gate == "raw":
            gate = chosen
        elif self.gate == "scale":
            gate = call(aten.add.Tensor, call(aten.zeros_like.default, chosen),
                        graph.get_attr(f"{router_path(block)}.scale"))
        elif self.gate == "tanh":
            gate = call(aten.tanh.default, chosen)
        else:
            gate = call(aten.sigmoid.default, chosen)
        if self.gate == "straight-through":
            # 1 in the forward, exactly; the gradient is that of sigmoid(r).
            gate = call(aten.add.Tensor, call(aten.sub.Tensor, gate, call(aten.detach.default, gate)), 1)
        return call(aten.where.ScalarOther, filled, gate, 0.0)


def require_outlined(graph_module: torch.fx.GraphModule, blocks: tuple[str, ...], stage: str) -> None:
    """Raises PassContractError unless each block that a pass names is a sub-graph that is called once."""
    called = [node.target for node in graph_module.graph.nodes if node.op == "call_module"]
    wrong = [path for path in blocks if called.count(path) != 1]
    if wrong:
        raise PassContractError("blocks are not outlined", expected="one call of a sub-graph per block",
                                found=", ".join(wrong), where=stage, fix="run outline-blocks first")


def takes_positions(body: torch.fx.GraphModule) -> bool:
    """Whether a block gathers inside: attend-to-all gave it the positions as second input."""
    return [node.name for node in body.graph.find_nodes(op="placeholder")][1:2] == [POSITIONS]


def side_dims(body: torch.fx.GraphModule) -> list[tuple[tuple[int, ...], bool]]:
    """For each side input of a sub-graph: its dims along the sequence, and whether dim 0 runs along the batch."""
    hidden, *sides = [node for node in body.graph.find_nodes(op="placeholder") if node.name != POSITIONS]
    batch, rows, _ = shape_exprs(hidden) or ()
    found = []
    for side in sides:
        exprs = shape_exprs(side) or ()
        found.append((tuple(i for i, e in enumerate(exprs) if e == rows), bool(exprs) and exprs[0] == batch))
    return found


def gather_side(graph: torch.fx.Graph, side: torch.fx.Node, along: tuple[int, ...], batched: bool,
                positions: torch.fx.Node) -> torch.fx.Node:
    """A side input with each of the dims ``along`` gathered at the positions [B, K].

    A side input without a batch (dim 0 of size 1) is looked up, which gives it one.
    """
    for dim in along:
        if not batched:
            # [1, ..., S, ...] -> [S, ...] -> [B, K, ...]
            table = graph.call_function(aten.select.int, (side, 0, 0))
            if dim != 1:
                table = graph.call_function(aten.transpose.int, (table, 0, dim - 1))
            side = graph.call_function(aten.index.Tensor, (table, [positions]))
            batched = True
        else:
            if dim != 1:
                side = graph.call_function(aten.transpose.int, (side, 1, dim))
            side = graph.call_function(mod.gather_rows.default, (side, positions))
        if dim != 1:
            side = graph.call_function(aten.transpose.int, (side, 1, dim))
    return side


def emit_capacity(graph: torch.fx.Graph, hidden: torch.fx.Node, dim: int, ratio: Fraction) -> torch.fx.Node | int:
    """K = ceil(ratio * size of the hidden state's dim): a number if the size is one, else one node for all blocks."""
    size = hidden.meta["val"].shape[dim]
    if isinstance(size, int):
        return capacity(ratio, size)
    size_node = next((node for node in graph.nodes if size_value(node) == size.node.expr), None)
    if size_node is None:
        size_node = graph.call_function(aten.sym_size.int, (hidden, dim))
        size_node.meta["val"] = size
    p, q = ratio.as_integer_ratio()
    if p == q:
        return size_node
    key = (size_node, p, q)
    known = next((node for node in graph.nodes if node.meta.get("capacity") == key), None)
    if known is None:
        with graph.inserting_before(size_node.next):
            scaled = size_node if p == 1 else graph.call_function(operator.mul, (size_node, p))
            known = graph.call_function(operator.floordiv, (graph.call_function(operator.add, (scaled, q - 1)), q))
        known.meta["capacity"] = key
    return known


def _mean_row(graph: torch.fx.Graph, hidden: torch.fx.Node, valid: torch.fx.Node | None) -> torch.fx.Node:
    """The mean valid row of each sequence, float32 [B, D]."""
    def call(target, *args):
        return graph.call_function(target, args)

    rows = call(aten.to.dtype, hidden, torch.float32)
    if valid is None:
        return call(aten.mean.dim, rows, [1])
    # A row of padding may hold anything, NaN included: it is left out, not weighted by 0.
    mask = call(aten.unsqueeze.default, valid, -1)
    total = call(aten.sum.dim_IntList, call(aten.where.ScalarOther, mask, rows, 0.0), [1])
    count = call(aten.clamp.default, call(aten.sum.dim_IntList, call(aten.to.dtype, mask, torch.float32), [1]), 1.0)
    return call(aten.div.Tensor, total, count)


def _gather_sequences(graph: torch.fx.Graph, value: torch.fx.Node, positions: torch.fx.Node) -> torch.fx.Node:
    """The chosen sequences [K, ...] of a value [B, ...], for positions [1, K]."""
    whole = graph.call_function(aten.unsqueeze.default, (value, 0))
    return graph.call_function(aten.squeeze.dim,
                               (graph.call_function(mod.gather_rows.default, (whole, positions)), 0))


def _merge_sequences(graph: torch.fx.Graph, hidden, y, positions, gate) -> torch.fx.Node:
    """The hidden state [B, S, D] with the chosen sequences replaced: a sequence is one row of S * D."""
    def flat(value):
        rows = graph.call_function(aten.flatten.using_ints, (value, 1, 2))
        return graph.call_function(aten.unsqueeze.default, (rows, 0))

    merged = graph.call_function(mod.merge_rows.default, (flat(hidden), flat(y), positions, gate))
    width = int(hidden.meta["val"].shape[2])
    return graph.call_function(aten.unflatten.int, (graph.call_function(aten.squeeze.dim, (merged, 0)), 1, [-1, width]))
