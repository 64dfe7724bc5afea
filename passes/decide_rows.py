"""Lets each row decide for itself whether it enters a block, as a token must that is generated.

    before:  %positions, %filled = modcompile.route(%logits, %valid, K)
             %y: [B, K, D] = call h.1(%rows, %mask)
    after:   %takes: [B, S] = %valid and %logits > threshold
             %positions, %filled = modcompile.route(%logits, %takes, K)
             %y: [B, K, D] = call h.1(%rows, %filled, %mask)

Why: the K best rows of a sequence are known when all of it is. A row that compares its own logit with a number, or asks
a predictor, knows at once. Where all S rows have a slot, this model says of a text what generating it token by token
would, for every token at a time. Where K is less, a sequence of which more rows want to enter loses those of the lowest
logits; one of which fewer do leaves slots empty.

1. The router's own logit decides, or a predictor's: one hidden layer on what the router sees.
2. No row attends to an empty slot: attention in one node gets a mask; written out, its scores are filled. Nothing else
   may see several rows.
3. A block that attends to all rows sees the same keys and values, whoever enters.
"""

import dataclasses
from typing import ClassVar

import torch
import torch.fx
from modcompile.passes.route_blocks import require_outlined, takes_positions

from modcompile.attention import SOFTMAXES, attention_arguments, self_attention
from modcompile.errors import PassContractError, UnsupportedGraphError
from modcompile.pass_manager import Pass, PassResult, Skip
from modcompile.rows_apart import RowsApart
from modcompile.shapes import fake_mode_of, shape_exprs

__all__ = ["DecideRows", "predictor_path"]

aten, mod = torch.ops.aten, torch.ops.modcompile

# B batch  S rows  K capacity  D model dim


def predictor_path(block: str) -> str:
    """Where the parameters of a block's predictor are."""
    return f"predictor.{block}"


@dataclasses.dataclass(frozen=True)
class DecideRows(Pass):
    """Rewrites the named blocks, whose tokens are routed already.

    Attributes:
        blocks: Module paths.
        thresholds: Of each block: a row enters whose logit is above.
        predictors: The logit is a predictor's, an ``MlpRouter`` at ``predictor_path``, instead of the router's.
    """

    name: ClassVar[str] = "decide-rows"
    blocks: tuple[str, ...] = ()
    thresholds: tuple[float, ...] = ()
    predictors: bool = False

    def requires(self, graph_module: torch.fx.GraphModule) -> None:
        """Each block is a sub-graph behind a choice of rows."""
        require_outlined(graph_module, self.blocks, self.name)
        missing = [path for path in self.blocks if _route_of(graph_module.graph, path) is None]
        if missing:
            raise PassContractError("blocks are not routed", expected="one choice of rows per block",
                                    found=", ".join(missing), where=self.name, fix="run route-blocks first")

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Rewrites each choice that is not a decision yet.

        Raises:
            UnsupportedGraphError: A block whose empty slots cannot be hidden from the others.
        """
        graph, modified = graph_module.graph, False
        calls = {node.target: node for node in graph.nodes if node.op == "call_module"}
        for path, threshold in zip(self.blocks, self.thresholds, strict=True):
            route = _route_of(graph, path)
            if route is None or _decides(route):
                continue
            self._decide(graph, route, path, threshold)
            body = graph_module.get_submodule(path)
            if not takes_positions(body):
                _hide_empty_slots(body, path)
                rows, *sides = calls[path].args
                filled = next(user for user in route.users if user.args[1] == 1)
                calls[path].args = (rows, filled, *sides)
            modified = True
        return PassResult(graph_module, modified)

    def ensures(self, graph_module: torch.fx.GraphModule) -> None:
        """Each choice is among the rows that want to enter."""
        wrong = [path for path in self.blocks if not _decides(_route_of(graph_module.graph, path))]
        if wrong:
            raise PassContractError("rows do not decide", expected="a decision before each choice",
                                    found=", ".join(wrong), where=self.name)

    def _decide(self, graph: torch.fx.Graph, route: torch.fx.Node, path: str, threshold: float) -> None:
        logits, valid, count = route.args
        with graph.inserting_before(route):
            asked = _predict(graph, logits.args[0], predictor_path(path)) if self.predictors else logits
            takes = graph.call_function(aten.gt.Scalar, (asked, threshold))
            if valid is not None:
                takes = graph.call_function(aten.logical_and.default, (takes, valid))
        if self.predictors:
            asked.meta["role"] = (path, "decision")
        takes.meta["decides"] = True
        route.args = (logits, takes, count)


def _route_of(graph: torch.fx.Graph, path: str) -> torch.fx.Node | None:
    """The node that chooses a block's rows."""
    return next((node for node in graph.find_nodes(op="call_function", target=mod.route.default)
                 if node.args[0].meta.get("role") == (path, "logits")), None)


def _decides(route: torch.fx.Node | None) -> bool:
    return route is not None and route.args[1] is not None and route.args[1].meta.get("decides", False)


def _predict(graph: torch.fx.Graph, seen: torch.fx.Node, path: str) -> torch.fx.Node:
    """What an ``MlpRouter`` says, [B, S]. Its parameters are the graph's, so that they are saved and exported."""
    def layer(x, prefix):
        return graph.call_function(aten.linear.default, (x, graph.get_attr(f"{path}.{prefix}weight"),
                                                         graph.get_attr(f"{path}.{prefix}bias")))

    x = graph.call_function(aten.to.dtype, (seen, torch.float32))
    hidden = graph.call_function(aten.silu.default, (layer(x, "up_"),))
    return graph.call_function(aten.squeeze.dim, (layer(hidden, ""), -1))


def _hide_empty_slots(body: torch.fx.GraphModule, path: str) -> None:
    """Case 2: a new input, ``filled``, after the hidden state, and no key where it is false."""
    graph = body.graph
    attention = self_attention(graph)
    if isinstance(attention, Skip):
        raise UnsupportedGraphError(f"rows of block {path} cannot decide for themselves", found=attention.reason,
                                    expected="one self-attention", where=attention.node or path,
                                    fix='use attend_to="all", or route other blocks')
    apart = RowsApart(graph, attention)
    made = (node for node in graph.nodes if node in apart.moving and node.op == "call_function")
    if (found := apart.mixed(made)) is not None:
        raise UnsupportedGraphError(f"rows of block {path} cannot decide for themselves", where=found[0].name,
                                    expected=found[1], found=f"{found[0].name} = {found[0].target}",
                                    fix="route other blocks")
    hidden = graph.find_nodes(op="placeholder")[0]
    with graph.inserting_after(hidden):
        filled = graph.placeholder("filled")
    with fake_mode_of(body):
        filled.meta["val"] = hidden.meta["val"].new_empty(hidden.meta["val"].shape[:2], dtype=torch.bool)
    if attention.fused:
        place = attention.first
    else:
        place = next(node for node in attention.scores if node.target in SOFTMAXES)
    scores = attention.query if attention.fused else place
    exprs, batch = shape_exprs(scores) or (), (shape_exprs(hidden) or ())[0]
    if exprs[0] != batch:
        raise UnsupportedGraphError(f"rows of block {path} cannot decide for themselves", where=scores.name,
                                    expected="attention with a leading dim of the batch",
                                    found=f"{scores.name} [{', '.join(map(str, exprs))}]",
                                    fix='use attend_to="all", or route other blocks')
    with graph.inserting_before(place):
        keep = filled
        for _ in exprs[2:]:
            keep = graph.call_function(aten.unsqueeze.default, (keep, 1))  # [B, 1, ..., K]
        if attention.fused:
            _mask_keys(graph, place, hidden, keep)
        else:
            masked = graph.call_function(aten.where.ScalarOther, (keep, place.args[0], -torch.inf))
            place.args = (masked, *place.args[1:])


def _mask_keys(graph: torch.fx.Graph, node: torch.fx.Node, hidden: torch.fx.Node, keep: torch.fx.Node) -> None:
    """Adds ``keep`` to the mask of an attention node."""
    def call(target, *args, **kwargs):
        return graph.call_function(target, args, kwargs)

    arguments = attention_arguments(node)
    mask = arguments["attn_mask"]
    if mask is None and arguments["is_causal"]:
        rows = call(aten.arange.default, call(aten.sym_size.int, hidden, 1), device=hidden.meta["val"].device)
        mask = call(aten.logical_and.default, keep, call(aten.ge.Tensor, call(aten.unsqueeze.default, rows, -1), rows))
    elif mask is None:
        mask = keep
    elif mask.meta["val"].dtype == torch.bool:
        mask = call(aten.logical_and.default, mask, keep)
    else:
        mask = call(aten.where.ScalarOther, keep, mask, -torch.inf)
    node.args = (*(arguments[name] for name in ("query", "key", "value")), mask, arguments["dropout_p"], False)
    node.kwargs = {name: node.kwargs[name] for name in ("scale", "enable_gqa") if name in node.kwargs}
