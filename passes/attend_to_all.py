"""Splits a block at its attention: all rows offer keys and values, the chosen ones query.

    before:  graph block(%hidden: [B, R, D], %mask: [B, 1, R, R]) -> [B, R, D]
                %n = norm(%hidden);  %q, %k, %v = linear(%n);  %a = attention(%q, %k, %v, %mask);  ...
    after:   graph block(%hidden: [B, R, D], %positions: [B, K], %mask: [B, 1, R, R]) -> [B, K, D]
                %n = norm(%hidden);  %k, %v = linear(%n)                         all rows
                %n_k = gather_rows(%n, %positions);  %q = linear(%n_k)           chosen rows
                %a = attention(%q, %k, %v, gather_rows(%mask, %positions));  ... chosen rows

Why: the chosen rows' result is exactly the dense block's, at the cost of the keys and values of the others. Pretrained
models want it.

1. What the key and value operands need is computed on all rows; everything else on the chosen ones.
2. A value of all rows that a chosen row needs is gathered; a view of one, or one whose batch and rows are merged into
   one dim, is computed again from what it was made of, which is gathered.
3. The mask is gathered along the query dim only; a causal flag becomes position >= key position.
4. A size R becomes K where chosen rows are reshaped.
"""

import dataclasses
from typing import ClassVar

import torch
import torch.fx
from modcompile.passes.hoist_sizes import emit_size
from modcompile.passes.route_blocks import POSITIONS, gather_side, takes_positions

from modcompile.errors import PassContractError, UnsupportedGraphError
from modcompile.pass_manager import Pass, PassResult, Skip
from modcompile.shapes import fake_mode_of, new_symbol, shape_exprs, size_value

__all__ = ["VIEWS", "AttendToAll", "attention_arguments", "self_attention"]

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
# Ops that move no data of their own: what they give is what they were given.
VIEWS = frozenset({aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default,
                   aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, aten.unflatten.int,
                   aten.flatten.using_ints, aten.contiguous.default, aten.clone.default, aten.view.default,
                   aten.expand.default, aten.alias.default, aten.dropout.default})


@dataclasses.dataclass(frozen=True)
class AttendToAll(Pass):
    """Lets the chosen rows of the named blocks attend to every row.

    Attributes:
        blocks: Module paths of sub-graphs.
    """

    name: ClassVar[str] = "attend-to-all"
    blocks: tuple[str, ...] = ()

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Splits each sub-graph that does not take positions yet.

        Raises:
            UnsupportedGraphError: A block that cannot be split, with the reason.
        """
        modified = False
        for path in self.blocks:
            body = graph_module.get_submodule(path)
            if takes_positions(body):
                continue
            attention = self_attention(body.graph)
            if isinstance(attention, Skip):
                raise UnsupportedGraphError(f"block {path} cannot attend to all rows", found=attention.reason,
                                            expected="one self-attention", where=attention.node or path,
                                            fix='use attend_to="chosen"')
            _Split(body, attention, path).run()
            modified = True
        return PassResult(graph_module, modified)

    def ensures(self, graph_module: torch.fx.GraphModule) -> None:
        """Each block gives as many rows as it takes positions."""
        for path in self.blocks:
            body = graph_module.get_submodule(path)
            _, positions = body.graph.find_nodes(op="placeholder")[:2]
            result = body.graph.output_node().args[0]
            if (shape_exprs(result) or ())[:2] != shape_exprs(positions):
                raise PassContractError("a split block gives the wrong rows", expected=shape_exprs(positions),
                                        where=path, found=shape_exprs(result),
                                        fix='use attend_to="chosen", and report the model')


def attention_arguments(node: torch.fx.Node) -> dict:
    """The arguments of an attention node by name, with defaults."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def ancestors(nodes: list[torch.fx.Node]) -> set[torch.fx.Node]:
    """The nodes that the given ones are computed from, themselves included."""
    found, pending = set(), list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def self_attention(graph: torch.fx.Graph) -> torch.fx.Node | Skip:
    """The one attention whose keys come from the block's hidden state."""
    hidden = graph.find_nodes(op="placeholder")[0]
    nodes = graph.find_nodes(op="call_function", target=SDPA)
    own = [node for node in nodes if hidden in ancestors([attention_arguments(node)["key"]])]
    if len(own) == 1:
        return own[0]
    softmaxes = [node.name for node in graph.nodes if "softmax" in str(node.target)]
    return Skip(f"{len(own)} self-attentions as scaled_dot_product_attention" if own or not softmaxes else
                f"attention written out around {softmaxes[0]} in a form that fuse-attention does not know",
                softmaxes[0] if softmaxes and not own else "")


class _Split:
    """One sub-graph being split."""

    def __init__(self, body: torch.fx.GraphModule, attention: torch.fx.Node, path: str):
        self.graph, self.attention, self.path = body.graph, attention, path
        self.inputs = body.graph.find_nodes(op="placeholder")
        self.hidden = self.inputs[0]
        self.batch, self.rows = (shape_exprs(self.hidden) or ())[:2]
        self.arguments = attention_arguments(attention)
        self.keys = ancestors([self.arguments["key"], self.arguments["value"]])
        self.versions: dict[tuple, torch.fx.Node] = {}
        self.sizes: dict = {}
        mode = fake_mode_of(body)
        with self.graph.inserting_after(self.hidden):
            self.positions = self.graph.placeholder(POSITIONS)
        taken = {d.node.hint for n in self.inputs for d in n.meta["val"].shape if isinstance(d, torch.SymInt)}
        count = new_symbol(mode.shape_env, "capacity", next(n for n in (5, 7, 11, 13, 17) if n not in taken))
        with mode:
            self.positions.meta["val"] = torch.empty([self.hidden.meta["val"].shape[0], count], dtype=torch.int64,
                                                     device=self.hidden.meta["val"].device)

    def run(self) -> None:
        """Rewrites what is not needed by keys and values."""
        chosen = [node for node in self.graph.nodes if node.op == "call_function" and node not in self.keys
                  and size_value(node) is None and self.hidden in ancestors([node])]
        for node in chosen:
            with self.graph.inserting_before(node):
                if node is self.attention:
                    self._query_only(node)
                else:
                    self._reroute(node)
            node.meta.pop("val", None)

    def _reroute(self, node: torch.fx.Node) -> None:
        node.args, node.kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._version)

    def _query_only(self, node: torch.fx.Node) -> None:
        """Case 3."""
        mask = self.arguments["attn_mask"]
        if mask is not None:
            exprs = shape_exprs(mask) or ()
            along = (len(exprs) - 2,) if exprs[-2] == self.rows else ()
            mask = gather_side(self.graph, mask, along, exprs[0] == self.batch, self.positions)
        elif self.arguments["is_causal"]:
            mask = self._causal_mask()
        query = self._version(self.arguments["query"])
        node.args = (query, self.arguments["key"], self.arguments["value"], mask, self.arguments["dropout_p"], False)
        node.kwargs = {name: node.kwargs[name] for name in ("scale", "enable_gqa") if name in node.kwargs}

    def _causal_mask(self) -> torch.fx.Node:
        """[B, 1, K, R]: a chosen row sees the keys up to its own position."""
        def call(target, *args, **kwargs):
            return self.graph.call_function(target, args, kwargs)

        queries = call(aten.unsqueeze.default, call(aten.unsqueeze.default, self.positions, 1), -1)
        keys = call(aten.arange.default, call(aten.sym_size.int, self.hidden, 1),
                    device=self.hidden.meta["val"].device)
        return call(aten.ge.Tensor, queries, keys)

    def _version(self, arg: torch.fx.Node) -> torch.fx.Node | int:
        """What stands for a value, or a size, among the chosen rows. Case 2 and case 4."""
        expr = size_value(arg)
        if expr is not None:
            return self._size(expr) if self.rows in expr.free_symbols else arg
        if arg.op == "get_attr" or (arg not in self.keys and arg not in self.inputs):
            return arg
        if arg in self.versions:
            return self.versions[arg]
        exprs = shape_exprs(arg)
        if exprs is not None and not any(self.rows in e.free_symbols for e in exprs):
            return arg
        plain = exprs is not None and all(e == self.rows or self.rows not in e.free_symbols for e in exprs)
        if arg.op == "call_function" and (not plain or arg.target in VIEWS):
            made = self.graph.node_copy(arg, self._version)
            made.meta = {"nn_module_stack": arg.meta.get("nn_module_stack", {})}
        else:
            made = self._gather(arg, exprs or ())
        self.versions[arg] = made
        return made

    def _gather(self, arg: torch.fx.Node, exprs: tuple) -> torch.fx.Node:
        along = [i for i, e in enumerate(exprs) if e == self.rows]
        if len(along) != 1 or (self.batch not in exprs and exprs[0] != 1):
            raise UnsupportedGraphError(f"block {self.path} cannot attend to all rows", where=arg.name,
                                        expected="values with one dim along the sequence and one along the batch",
                                        found=f"{arg.name} [{', '.join(map(str, exprs))}]",
                                        fix='use attend_to="chosen"')
        lead = exprs.index(self.batch) if self.batch in exprs else 0
        if lead == 0:
            return gather_side(self.graph, arg, (along[0],), self.batch in exprs, self.positions)
        # A layout such as [S, B, D]: the batch goes first and back.
        swapped = self.graph.call_function(aten.transpose.int, (arg, 0, lead))
        rows = lead if along[0] == 0 else along[0]
        gathered = gather_side(self.graph, swapped, (rows,), True, self.positions)
        return self.graph.call_function(aten.transpose.int, (gathered, 0, lead))

    def _size(self, expr):
        if expr not in self.sizes:
            # At the top, so that every user comes after it.
            first = next(node for node in self.graph.nodes if node.op != "placeholder")
            with self.graph.inserting_before(first):
                symbols = {symbol: self._symbol(symbol) for symbol in sorted(expr.free_symbols, key=str)}
                self.sizes[expr] = symbols[expr] if expr in symbols else emit_size(self.graph, expr, symbols)
        return self.sizes[expr]

    def _symbol(self, symbol) -> torch.fx.Node:
        source, dim = (self.positions, 1) if symbol == self.rows else next(
            (node, i) for node in self.inputs for i, e in enumerate(shape_exprs(node) or ()) if e == symbol)
        return self.graph.call_function(aten.sym_size.int, (source, dim))
