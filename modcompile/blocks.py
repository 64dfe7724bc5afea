"""Finds what could be routed: repeated sub-modules that map one hidden state [B, S, D] to another.

The graph alone decides. A block's nodes are those whose module stack holds its path; its hidden state is the one value
that enters and leaves with the same shape; everything else that enters is a side input (mask, cos, sin), whose dims
along the sequence are found by their symbol.
"""

import collections
import dataclasses
import fnmatch
import re

import sympy
import torch
import torch.fx
from torch.utils._sympy.symbol import SymT, symbol_is_type

from modcompile.attention import SDPA, SOFTMAXES
from modcompile.capture import capture
from modcompile.config import MoDConfig
from modcompile.errors import UsageError
from modcompile.model import GraphModel
from modcompile.neighbours import sees_places
from modcompile.pass_manager import Skip
from modcompile.shapes import shape_exprs, size_value

__all__ = ["ROWS", "Block", "BlockReport", "BlockView", "Side", "analyse_block", "block_groups", "find_blocks",
           "select_blocks"]

# B batch  S rows  D model dim
aten = torch.ops.aten
# Ops that broadcast, of which torch tags some overloads alone, or none.
UNTAGGED = (aten.where, aten.masked_fill, aten.__and__, aten.__or__, aten.__xor__, aten.rsub, aten.floor_divide,
            aten.subtract, aten.multiply, aten.divide, aten.true_divide)
# Ops that are not pointwise, but change each row of a hidden state by itself.
ROW_WISE = (aten.dropout, aten.native_dropout, aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten.batch_norm,
            aten.to, aten._to_copy, aten.contiguous, aten.clone)
# What norms that are written out have beside these.
OF_NORMS = (aten.mean, aten.sum, aten.var, aten.std, aten.norm, aten.linalg_vector_norm, aten.expand, aten.expand_as)


@dataclasses.dataclass(frozen=True)
class Side:
    """A side input of a block: a value from outside that is not the hidden state.

    Attributes:
        node: The value in the main graph.
        rank: The rank that its consumer broadcasts it to; leading dims of 1 are added up to there.
        folded: How many places dim 0 has for each sequence: more than 1 where heads are folded into the batch.
    """

    node: torch.fx.Node
    rank: int
    folded: int = 1


# Stands for the number of rows that a block sees, in the sizes inside it.
ROWS = sympy.Symbol("rows", integer=True, positive=True)


@dataclasses.dataclass(frozen=True)
class BlockView:
    """A block in its graph, ready to be outlined.

    Attributes:
        path: The module path.
        hidden: The value that enters.
        result: The value that leaves.
        body: The nodes between them, in order. Nodes of the module that do not depend on the hidden state stay outside:
            what they compute belongs to the original positions.
        sides: The side inputs by (node, rank).
        batch: The size of dim 0 of the hidden state, as an expression; ``rows``: of dim 1.
    """

    path: str
    hidden: torch.fx.Node
    result: torch.fx.Node
    body: tuple[torch.fx.Node, ...]
    sides: dict[tuple[torch.fx.Node, int], Side]
    batch: sympy.Expr
    rows: sympy.Expr

    def in_rows(self, size: sympy.Expr) -> sympy.Expr:
        """A size of the block, with ROWS for S."""
        return _in_rows(size, self.batch, self.rows)


def _in_rows(size: sympy.Expr, batch: sympy.Expr, rows: sympy.Expr) -> sympy.Expr:
    if rows.is_number:
        # Known where it stands alone, or multiplies the batch.
        return {rows: ROWS, rows * batch: ROWS * batch}.get(size, size)
    return size.xreplace({rows: ROWS})


@dataclasses.dataclass(frozen=True)
class Block:
    """One repeated sub-module, and whether it can be routed.

    Attributes:
        path: Module path, such as "encoder.layer.1".
        group: The path of the list it belongs to; ``index``: its place in it.
        hidden_shape: Dims of the hidden state, if one was found.
        reason: Why it cannot be routed; None if it can.
        note: What to know before it is routed; None if there is nothing.
    """

    path: str
    group: str
    index: int
    hidden_shape: tuple[int | str, ...] | None
    reason: str | None
    note: str | None = None

    @property
    def routable(self) -> bool:
        """Whether the block can be routed."""
        return self.reason is None


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """The blocks of a model, in the order of its graph."""

    blocks: tuple[Block, ...]

    def __iter__(self):
        return iter(self.blocks)

    def __len__(self):
        return len(self.blocks)

    @property
    def groups(self) -> dict[str, list[Block]]:
        """The blocks of each list of modules."""
        groups: dict[str, list[Block]] = {}
        for block in self.blocks:
            groups.setdefault(block.group, []).append(block)
        return groups

    @property
    def routable(self) -> list[Block]:
        """The blocks that can be routed."""
        return [block for block in self.blocks if block.routable]


def find_blocks(model: torch.nn.Module, example_inputs=None) -> BlockReport:
    """What could be routed in a model, and for the rest why not.

    Args:
        model: A module (then with example inputs, as for ``capture``) or a GraphModel.
        example_inputs: Arguments of the model's forward.

    Raises:
        UsageError: A model that was converted, or a variant of one: its blocks are found already.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> report = find_blocks(torch.nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 8),))
        >>> [(block.path, block.routable) for block in report]
        [('layers.0', True), ('layers.1', True)]
    """
    graph_model = model if isinstance(model, GraphModel) else capture(model, example_inputs)
    if bodies := graph_model.program.bodies:
        raise UsageError("the model was converted already", expected="a dense model", where="find_blocks",
                         found=f"{type(model).__name__} with the blocks {', '.join(bodies)}",
                         fix="give the dense model that it came from; other capacities: MoDModel.with_capacity")
    graph = graph_model.graph_module.graph
    placeholders = zip(graph.find_nodes(op="placeholder"), graph_model.inputs, strict=True)
    names = {expr: spec.shape[i] for node, spec in placeholders for i, expr in enumerate(shape_exprs(node) or ())}
    symbols = {expr: sympy.Symbol(name) for expr, name in names.items() if expr.is_Symbol}
    blocks = []
    for group, paths in block_groups(graph).items():
        for index, path in paths:
            found = analyse_block(graph, path, [sibling for _, sibling in paths if sibling != path])
            shape = note = None
            if isinstance(found, BlockView):
                if (node := sees_places(found.body, ROWS, found.in_rows)) is not None:
                    note = f"{node.name} looks at rows by their place, outside of attention"
                exprs = [expr.xreplace(symbols) for expr in shape_exprs(found.hidden) or ()]
                shape = tuple(int(expr) if expr.is_number else str(expr) for expr in exprs)
            reason = _with_names(found.reason, names) if isinstance(found, Skip) else None
            blocks.append(Block(path, group, index, shape, reason, note))
    return BlockReport(tuple(blocks))


def _with_names(text: str, names: dict) -> str:
    """A reason with the inputs' names for symbols, which are numbered differently in every process."""
    known = {str(symbol): str(name) for symbol, name in names.items()}
    return re.sub(r"\bs\d+\b", lambda match: known.get(match[0], match[0]), text)


def select_blocks(report: BlockReport, config: MoDConfig) -> list[str]:
    """The paths that ``config.blocks`` names, in the model's order.

    Raises:
        UsageError: Nothing to route, an index or glob that names no block, or one that names a block that cannot be;
            likewise for ``config.dropped``.
    """
    if not report.routable:
        reasons = "; ".join(f"{b.path}: {b.reason}" for b in report.blocks[:4]) or "no repeated sub-modules"
        raise UsageError("the model has no block that can be routed", found=reasons, where="find_blocks",
                         expected="at least two numbered sub-modules that map a hidden state [B, S, D] to one of the "
                         "same shape",
                         fix="modcompile inspect shows what was found" if report.blocks else
                         "put the layers into an nn.ModuleList, and call each as layer(x), not layer.forward(x)")
    if config.blocks in ("every-other", "all"):
        chosen = {b.path for blocks in report.groups.values()
                  for i, b in enumerate(b for b in blocks if b.routable) if config.blocks == "all" or i % 2 == 1}
    else:
        chosen = _named_blocks(report, (config.blocks,) if isinstance(config.blocks, str) else config.blocks)
    routable = [block.path for block in report.routable]
    if unknown := [path for path in config.dropped if path not in routable]:
        raise UsageError("a block to drop is none", expected=", ".join(routable), found=", ".join(unknown),
                         where="MoDConfig.dropped")
    chosen -= set(config.dropped)
    # A model may leave out blocks and route none.
    if not chosen and not config.dropped:
        raise UsageError("blocks chooses nothing to route", found=repr(config.blocks), where="MoDConfig.blocks",
                         expected="one or more of " + ", ".join(b.path for b in report.routable),
                         fix='pass blocks="all", or name the blocks')
    return [b.path for b in report if b.path in chosen]


def _named_blocks(report: BlockReport, patterns: tuple[int, ...] | tuple[str, ...]) -> set[str]:
    chosen = set()
    for pattern in patterns:
        matches = [b for b in report if (b.index == pattern if isinstance(pattern, int) else
                                         fnmatch.fnmatchcase(b.path, pattern))]
        if not matches:
            raise UsageError(f"blocks names no block: {pattern!r}", where="MoDConfig.blocks", found=pattern,
                             expected=", ".join(b.path for b in report))
        # A glob may pass over what cannot be routed; an exact name or index may not.
        exact = isinstance(pattern, int) or not re.search(r"[*?\[]", pattern)
        for block in matches:
            if block.reason and exact:
                raise UsageError(f"block {block.path} cannot be routed", found=block.reason, where="MoDConfig.blocks",
                                 expected="one of " + ", ".join(b.path for b in report.routable))
        if not any(b.routable for b in matches):
            raise UsageError(f"no block of {pattern!r} can be routed", found=matches[0].reason,
                             where="MoDConfig.blocks", expected="one of " + ", ".join(b.path for b in report.routable))
        chosen |= {b.path for b in matches if b.routable}
    return chosen


def module_paths(node: torch.fx.Node) -> list[str]:
    """The module paths that a node was traced under, outermost first; of a block that was outlined, its own."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return [*paths, str(node.target)] if node.op == "call_module" else paths


def block_groups(graph: torch.fx.Graph) -> dict[str, list[tuple[int, str]]]:
    """Index and path of numbered siblings, by their parent's path; lists inside a listed module are left to it."""
    groups: dict[str, dict[int, str]] = collections.defaultdict(dict)
    for node in graph.nodes:
        for path in module_paths(node):
            parent, _, number = path.rpartition(".")
            if number.isdigit():
                groups[parent][int(number)] = path
    repeated = {parent: paths for parent, paths in groups.items() if len(paths) > 1}
    outer = [p for paths in repeated.values() for p in paths.values()]
    return {parent: sorted(paths.items()) for parent, paths in repeated.items()
            if not any(parent == path or parent.startswith(path + ".") for path in outer)}


def _tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _describe(node: torch.fx.Node) -> str:
    return f"{node.name} [{', '.join(map(str, shape_exprs(node) or ()))}]"


def analyse_block(graph: torch.fx.Graph, path: str, siblings: list[str]) -> BlockView | Skip:
    """The block at a path as it stands in the graph, or why it cannot be routed.

    Args:
        graph: The main graph, with shapes.
        path: The block's module path.
        siblings: Paths of the other blocks of its list; a value that they use too is not this block's hidden state.
    """
    members = [n for n in graph.nodes if n.op == "call_function" and path in module_paths(n)
               and size_value(n) is None]
    inside = set(members)
    entering = list(dict.fromkeys(arg for n in members for arg in n.all_input_nodes
                                  if arg not in inside and arg.op != "get_attr" and _tensor(arg)))
    leaving = [n for n in members if _tensor(n) and any(user not in inside for user in n.users)]
    shared = {n for n in entering if any(s in module_paths(user) for user in n.users for s in siblings)}
    candidates = [n for n in entering if n.meta["val"].is_floating_point()
                  and any(shape_exprs(n) == shape_exprs(out) for out in leaving)]
    own = [n for n in candidates if n not in shared] or candidates
    if len(own) != 1:
        return Skip("no value enters and leaves with one shape" if not own else
                    f"{len(own)} hidden inputs: {', '.join(map(_describe, own))}; a routed block has one", path)
    hidden = own[0]
    if rivals := _rivals(hidden, candidates, siblings):
        return Skip(f"{1 + len(rivals)} hidden inputs: {', '.join(map(_describe, [hidden, *rivals]))}; a routed block "
                    "has one", path)
    body = _reached(members, hidden)
    results = [n for n in body if any(user not in inside for user in n.users)]
    if len(results) != 1:
        found = ", ".join(map(_describe, results))
        return Skip(f"{len(results)} hidden outputs: {found}; a routed block has one", path)
    result = results[0]
    if shape_exprs(result) != shape_exprs(hidden) or result.meta["val"].dtype != hidden.meta["val"].dtype:
        return Skip(f"the output {_describe(result)} is not shaped like the input {_describe(hidden)}", path)
    if _rejoins(hidden, result, siblings):
        return Skip("its residual is outside of it: rows that pass by would be added to themselves; wrap x + f(x) in "
                    "one module", path)
    exprs = shape_exprs(hidden) or ()
    if len(exprs) != 3:
        return Skip(f"the hidden state {_describe(hidden)} is not [B, S, D]", path)
    batch, rows, width = exprs
    return (_unfit(path, body, batch, rows, width) or _late_input(path, graph, body, result)
            or _with_sides(path, hidden, result, body, batch, rows))


def _rivals(hidden: torch.fx.Node, candidates: list[torch.fx.Node], siblings: list[str]) -> list[torch.fx.Node]:
    """Values that may be the hidden state as well as one that only this block uses.

    What all siblings use is a side input. What another block gives, or a few use, as skips over several blocks are, may
    be the hidden state, and what only this one uses its condition.
    """
    def is_given(node: torch.fx.Node) -> bool:
        return any(sibling in module_paths(node) for sibling in siblings)

    def is_everyones(node: torch.fx.Node) -> bool:
        return all(any(sibling in module_paths(user) for user in node.users) for sibling in siblings)

    return [] if is_given(hidden) else [node for node in candidates if node is not hidden
                                        and (is_given(node) or not is_everyones(node))]


def _rejoins(hidden: torch.fx.Node, result: torch.fx.Node, siblings: list[str]) -> bool:
    """Whether a block's output, scaled or normed, meets what its input was made of in turn: x + f(norm(x))."""
    entered, before = [hidden], hidden
    while (found := _element_wise(before, hidden)) is not None and len(found) == 1:
        before = found[0]
        entered.append(before)
    pending = [result]
    while pending:
        node = pending.pop()
        for user in node.users:
            if any(sibling in module_paths(user) for sibling in siblings):
                continue
            others = [arg for arg in _element_wise(user, hidden) or [] if arg is not node]
            if any(_unscaled(other) in entered for other in others):
                return True
            if not others and _element_wise(user, hidden):
                pending.append(user)
    return False


def _element_wise(node: torch.fx.Node, like: torch.fx.Node) -> list[torch.fx.Node] | None:
    """The operands shaped as a hidden state of what scales, norms or combines such; None for any other node."""
    packet = getattr(node.target, "overloadpacket", None)
    if not (is_pointwise(node.target) or packet in ROW_WISE) or shape_exprs(node) != shape_exprs(like):
        return None
    # What is expanded was smaller: a norm's length, say.
    return [arg for arg in node.all_input_nodes if shape_exprs(arg) == shape_exprs(like)
            and getattr(arg.target, "overloadpacket", None) not in (aten.expand, aten.expand_as)]


def _unscaled(node: torch.fx.Node) -> torch.fx.Node:
    """What a value is a multiple of: x for 1.5 x."""
    while node.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], int | float):
        node = node.args[0]
    return node


def _reached(members: list[torch.fx.Node], hidden: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
    reached = {hidden}
    for node in members:
        if any(arg in reached for arg in node.all_input_nodes):
            reached.add(node)
    return tuple(node for node in members if node in reached)


def _unfit(path: str, body, batch: sympy.Expr, rows: sympy.Expr, width: sympy.Expr) -> Skip | None:
    """Layouts in which dim 1 is not, or cannot be told to be, the sequence."""
    for node in body:
        if node.target is SDPA and (shape_exprs(node.args[0]) or ())[-2] == batch:
            return Skip("attention runs along dim 0 of the hidden state, which is [S, B, D]; a routed block has "
                        "[B, S, D] (batch_first=True)", path)
        if node.target in SOFTMAXES and (shape_exprs(node) or ())[node.args[1]] == batch:
            return Skip("a softmax runs along dim 0 of the hidden state, which is [S, B, D]; a routed block has "
                        "[B, S, D] (batch_first=True)", path)
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return Skip(f"{node.name} = {node.target} writes to {node.args[0]} in place, and this is read elsewhere, "
                        "or has no other form; make a new value instead (torch.cat, torch.where)", path)
    if not any(arg.op == "get_attr" for node in body for arg in node.all_input_nodes):
        return Skip("it has no parameters: there is too little in it to save", path)
    if all(is_pointwise(node.target) or getattr(node.target, "overloadpacket", None) in (*ROW_WISE, *OF_NORMS)
           for node in body):
        return Skip("it only norms, scales or adds, without any product: there is too little in it to save", path)
    if rows.is_number:
        sizes = {width} | {e for n in body for arg in n.all_input_nodes if arg.op == "get_attr"
                           for e in shape_exprs(arg) or ()}
        if rows in sizes or rows == batch:
            return Skip(f"S = {rows} is fixed and also the size of a parameter's dim, so the two cannot be told apart; "
                        "choose an input with another number of tokens, or keep tables of positions out of the block",
                        path)
        if rows == 1:
            return Skip("S = 1: there is nothing to choose from", path)
    return None


def _late_input(path: str, graph: torch.fx.Graph, body, result: torch.fx.Node) -> Skip | None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    late = [arg for node in body for arg in node.all_input_nodes if order[arg] > order[result]]
    return Skip(f"{late[0].name} is computed after the block's output and used in it", path) if late else None


def _with_sides(path, hidden, result, body, batch, rows) -> BlockView | Skip:
    inside, sides = {hidden, *body}, {}
    known = {e for e in (batch, ROWS) if e.is_Symbol}
    for node in body:
        for arg in node.all_input_nodes:
            if arg in inside or not _tensor(arg) or (arg.op == "get_attr" and arg.target.startswith(f"{path}.")):
                continue
            known |= {e for e in (_in_rows(e, batch, rows) for e in shape_exprs(arg) or ()) if e.is_Symbol}
            side = _side(arg, node, batch, rows)
            if isinstance(side, Skip):
                return Skip(side.reason, path)
            sides[arg, side.rank] = side
    for node in body:
        for arg in node.all_input_nodes:
            expr = size_value(arg)
            if expr is not None and not _in_rows(expr, batch, rows).free_symbols <= known:
                return Skip(f"{node.name} uses the size {expr}, which no input of the block carries", path)
    return BlockView(path, hidden, result, body, sides, batch, rows)


def is_pointwise(target: object) -> bool:
    """Whether an op computes each element of its broadcast operands by itself. torch tags not every overload of one."""
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags
        # With a condition alone it says where that holds.
        or (target.overloadpacket in UNTAGGED and target is not aten.where.default))


def side_rank(arg: torch.fx.Node, user: torch.fx.Node) -> int:
    """The rank at which a consumer reads a side input: its output's where it broadcasts, else the value's own."""
    broadcasts = is_pointwise(user.target)
    if user.target is SDPA and len(user.args) > 3 and user.args[3] is arg:
        return len(shape_exprs(user.args[0]) or ())
    if user.target is SDPA and user.kwargs.get("attn_mask") is arg:
        return len(shape_exprs(user.args[0]) or ())
    return len(shape_exprs(user) or ()) if broadcasts else len(shape_exprs(arg) or ())


def _side(arg: torch.fx.Node, user: torch.fx.Node, batch: sympy.Expr, rows: sympy.Expr) -> Side | Skip:
    exprs = shape_exprs(arg) or ()
    if arg.meta["val"].is_complex():
        return Skip(f"the side input {_describe(arg)} is complex, which no runtime takes; pass cosines and sines")
    for expr in exprs:
        if any(symbol_is_type(symbol, SymT.UNBACKED_INT) for symbol in expr.free_symbols):
            return Skip(f"the side input {_describe(arg)} has a dim of {expr}, which is computed from a tensor's "
                        "values; compute sizes from sizes (x.shape), in integers")
        if expr != rows and batch in expr.free_symbols and rows in expr.free_symbols:
            return Skip(f"the side input {_describe(arg)} has a dim of {expr}: rows of all sequences in one order, as "
                        "experts have that sort them; let each row take its own experts' weights (with transformers: "
                        "model.set_experts_implementation('batched_mm'))")
        if expr != rows and ROWS in _in_rows(expr, batch, rows).free_symbols:
            return Skip(f"the side input {_describe(arg)} has a dim of {expr}, which cannot be gathered")
    if not any(batch in expr.free_symbols | {expr} or expr == rows for expr in exprs):
        # Nothing to gather: parameters, tables and scalars go in as they are.
        return Side(arg, len(exprs))
    rank = side_rank(arg, user)
    first = exprs[0] if rank == len(exprs) else sympy.Integer(1)
    if first == batch or (first == 1 and batch not in exprs):
        beside = (shape_exprs(user) or ())[:1]
        if first != batch and rows in exprs and rank == len(shape_exprs(user) or ()) and beside[0] not in (batch, 1):
            # Gathered for each sequence, it would fit the batch alone.
            return Skip(f"the side input {_describe(arg)} of {user.name} meets {beside[0]} heads and sequences in one "
                        "dim")
        return Side(arg, rank)
    places = first / batch
    if places.is_Integer and batch not in exprs:
        return Side(arg, rank, int(places))
    return Skip(f"the side input {_describe(arg)} of {user.name} has no leading batch dim to gather along")
