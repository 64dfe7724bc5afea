"""Splits a block at its attention: all rows offer keys and values, the chosen ones query.

    before:  graph block(%hidden: [B, R, D], %mask: [B, 1, R, R]) -> [B, R, D]
                %n = norm(%hidden);  %q, %k, %v = linear(%n);  %a = attention(%q, %k, %v, %mask);  ...
    after:   graph block(%hidden: [B, R, D], %positions: [B, K], %mask: [B, 1, R, R]) -> [B, K, D]
                %n = norm(%hidden);  %k, %v = linear(%n)                         all rows
                %n_k = gather_rows(%n, %positions);  %q = linear(%n_k)           chosen rows
                %a = attention(%q, %k, %v, gather_rows(%mask, %positions));  ... chosen rows

Why: the chosen rows' result is exactly the dense block's, at the cost of the keys and values of the others. Pretrained
models want it.

1. What the key and value operands need is computed on all rows, as is a bias that is made from the rows themselves;
   everything else on the chosen ones.
2. A value of all rows that a chosen row needs is gathered; a view of one, or one whose batch and rows are merged into
   one dim, is computed again from what it was made of, which is gathered.
3. Scores have queries along the last dim but one, and keys along the last: what is combined with them (masks, biases)
   is gathered along the first of these alone; a causal flag becomes position >= key position. One number of each query,
   such as its largest score, is made of the chosen rows' scores.
4. A size R becomes K where chosen rows are reshaped; the last size of scores stays.
5. Outside its attention a block may do only what is known to keep rows apart: shifted, selected or multiplied with each
   other, the chosen ones would give something else than all of them. What is done with scores keeps queries apart.
"""

import dataclasses
from typing import ClassVar

import torch
import torch.fx
from modcompile.passes.hoist_sizes import emit_size
from modcompile.passes.route_blocks import POSITIONS, gather_side, require_outlined, takes_positions

from modcompile.attention import VIEWS, SelfAttention, ancestors, attention_arguments, self_attention
from modcompile.errors import PassContractError, UnsupportedGraphError
from modcompile.pass_manager import Pass, PassResult, Skip
from modcompile.rows_apart import RowsApart
from modcompile.shapes import describe, fake_mode_of, new_symbol, shape_exprs, size_value

__all__ = ["AttendToAll"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class AttendToAll(Pass):
    """Lets the chosen rows of the named blocks attend to every row.

    Attributes:
        blocks: Module paths of sub-graphs.
    """

    name: ClassVar[str] = "attend-to-all"
    blocks: tuple[str, ...] = ()

    def requires(self, graph_module: torch.fx.GraphModule) -> None:
        """Each block is a sub-graph that is called once."""
        require_outlined(graph_module, self.blocks, self.name)

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Splits each sub-graph that does not take positions yet.

        Raises:
            UnsupportedGraphError: A block that cannot be split, with the reason.
        """
        modified = False
        # Blocks that see the same hidden state's sizes take positions of the same sizes.
        known: dict[int, torch.Tensor] = {}
        for path in self.blocks:
            body = graph_module.get_submodule(path)
            if takes_positions(body):
                continue
            attention = self_attention(body.graph)
            if isinstance(attention, Skip):
                raise UnsupportedGraphError(f"block {path} cannot attend to all rows", found=attention.reason,
                                            expected="one self-attention", where=attention.node or path,
                                            fix='use attend_to="chosen"')
            _Split(body, attention, path, known).run()
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


class _Split:
    """One sub-graph being split."""

    def __init__(self, body: torch.fx.GraphModule, attention: SelfAttention, path: str, known: dict[int, torch.Tensor]):
        self.graph, self.attention, self.path = body.graph, attention, path
        self.inputs = body.graph.find_nodes(op="placeholder")
        self.hidden = self.inputs[0]
        self.apart = RowsApart(body.graph, attention)
        self.batch, self.rows, self.moving = self.apart.batch, self.apart.rows, self.apart.moving
        self.keys = ancestors([attention.key, attention.value, *self._beside()])
        self.versions: dict[tuple, torch.fx.Node] = {}
        self.sizes: dict = {}
        with self.graph.inserting_after(self.hidden):
            self.positions = self.graph.placeholder(POSITIONS)
        kind = id(self.hidden.meta["val"])
        if kind not in known:
            known[kind] = self._positions(fake_mode_of(body))
        self.positions.meta["val"] = known[kind]

    def _positions(self, mode) -> torch.Tensor:
        """[B, K], with a K that is no other size."""
        hidden = self.hidden.meta["val"]
        taken = {d.node.hint for n in self.inputs for d in n.meta["val"].shape if isinstance(d, torch.SymInt)}
        count = new_symbol(mode.shape_env, "capacity", next(n for n in (5, 7, 11, 13, 17) if n not in taken))
        with mode:
            return torch.empty([hidden.shape[0], count], dtype=torch.int64, device=hidden.device)

    def _beside(self) -> list[torch.fx.Node]:
        """What the scores are combined with, and is made from the rows as well: a bias between contents and places."""
        scores = {*self.attention.scores, self.attention.first}
        return [arg for node in self.attention.scores for arg in node.all_input_nodes
                if arg not in scores and arg in self.moving]

    def run(self) -> None:
        """Rewrites what is not needed by keys and values."""
        chosen = [node for node in self.graph.nodes if node.op == "call_function" and node not in self.keys
                  and node in self.moving]
        if (found := self.apart.mixed(chosen)) is not None:
            raise self._unfit(*found)
        for node in chosen:
            with self.graph.inserting_before(node):
                if node is self.attention.first and self.attention.fused:
                    self._query_only(node)
                elif node in self.attention.scores or node in (self.attention.first, self.attention.last):
                    self._reroute_scores(node)
                else:
                    self._reroute(node)
            node.meta.pop("val", None)

    def _reroute(self, node: torch.fx.Node) -> None:
        node.args, node.kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._version)

    def _reroute_scores(self, node: torch.fx.Node) -> None:
        """Case 3, written out: keys and values stay as they are, so does the last size of scores."""
        attention = self.attention
        kept = {attention.first: attention.key, attention.last: attention.value}.get(node)
        own = {*attention.scores, attention.first, attention.query}

        def version(arg):
            if arg is kept:
                return arg
            return self._version(arg) if size_value(arg) is not None or arg in own else self._beside_scores(arg)

        args = [torch.fx.node.map_arg(arg, version) for arg in node.args]
        if node.target in VIEWS and node is not attention.last and isinstance(node.args[1], list | tuple):
            args[1] = [*args[1][:-1], node.args[1][-1]]
        node.args, node.kwargs = tuple(args), torch.fx.node.map_arg(node.kwargs, version)

    def _query_only(self, node: torch.fx.Node) -> None:
        """Case 3, in one node."""
        arguments = attention_arguments(node)
        mask = arguments["attn_mask"]
        if mask is not None:
            mask = self._beside_scores(mask)
        elif arguments["is_causal"]:
            mask = self._causal_mask()
        query = self._version(self.attention.query)
        node.args = (query, arguments["key"], arguments["value"], mask, arguments["dropout_p"], False)
        node.kwargs = {name: node.kwargs[name] for name in ("scale", "enable_gqa") if name in node.kwargs}

    def _beside_scores(self, arg: torch.fx.Node) -> torch.fx.Node:
        """A mask or bias [..., R or 1, R], with its rows at the chosen positions."""
        exprs = shape_exprs(arg) or ()
        if len(exprs) < 2 or exprs[-2] != self.rows:
            return arg
        if exprs[0] in (1, self.batch):
            return gather_side(self.graph, arg, (len(exprs) - 2,), exprs[0] == self.batch, self.positions)
        if not (exprs[0] / self.batch).is_Integer:
            raise self._unfit(arg, "masks and biases with a leading dim of the batch, or of 1")
        # Heads are folded into the batch.
        unfolded = self.graph.call_function(aten.unflatten.int, (arg, 0, [-1, int(exprs[0] / self.batch)]))
        gathered = gather_side(self.graph, unfolded, (len(exprs) - 1,), True, self.positions)
        return self.graph.call_function(aten.flatten.using_ints, (gathered, 0, 1))

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
            raise self._unfit(arg, "values with one dim along the sequence and one along the batch")
        lead = exprs.index(self.batch) if self.batch in exprs else 0
        if lead == 0:
            return gather_side(self.graph, arg, (along[0],), self.batch in exprs, self.positions)
        # A layout such as [S, B, D]: the batch goes first and back.
        swapped = self.graph.call_function(aten.transpose.int, (arg, 0, lead))
        rows = lead if along[0] == 0 else along[0]
        gathered = gather_side(self.graph, swapped, (rows,), True, self.positions)
        return self.graph.call_function(aten.transpose.int, (gathered, 0, lead))

    def _unfit(self, arg: torch.fx.Node, expected: str) -> UnsupportedGraphError:
        return UnsupportedGraphError(f"block {self.path} cannot attend to all rows", expected=expected, where=arg.name,
                                     found=describe(arg), fix='use attend_to="chosen"')

    def _size(self, expr):
        if expr not in self.sizes:
            # At the top, so that every user comes after it.
            first = next(node for node in self.graph.nodes if node.op != "placeholder")
            with self.graph.inserting_before(first):
                dims = dict.fromkeys(dim for node in self.inputs for dim in shape_exprs(node) or ())
                symbols = {dim: self._symbol(dim) for dim in dims if dim in expr.free_symbols}
                self.sizes[expr] = symbols[expr] if expr in symbols else emit_size(self.graph, expr, symbols)
        return self.sizes[expr]

    def _symbol(self, symbol) -> torch.fx.Node:
        source, dim = (self.positions, 1) if symbol == self.rows else next(
            (node, i) for node in self.inputs for i, e in enumerate(shape_exprs(node) or ()) if e == symbol)
        return self.graph.call_function(aten.sym_size.int, (source, dim))
