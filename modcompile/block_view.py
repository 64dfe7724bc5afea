"""The blocks of a graph node by node: what enters one, what leaves it, and why it cannot be routed.

A block's nodes are those whose module stack holds its path; its hidden state is the one value that enters and leaves
with the same shape; everything else that enters is a side input (mask, cos, sin), whose dims along the sequence are
found by their symbol.
"""

__all__ = ["BlockView", "analyse_block", "block_groups", "module_paths"]

import collections
import dataclasses

import sympy
import torch
import torch.fx

from modcompile.attention import SDPA, SOFTMAXES
from modcompile.block_sides import ROWS, Side, in_rows, side_of
from modcompile.pass_manager import Skip
from modcompile.pointwise import is_pointwise
from modcompile.shapes import describe, shape_exprs, size_value

# B batch  S rows  D model dim

aten = torch.ops.aten
# Ops that are not pointwise, but change each row of a hidden state by itself.
ROW_WISE = (aten.dropout, aten.native_dropout, aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten.batch_norm,
            aten.to, aten._to_copy, aten.contiguous, aten.clone)
# What norms that are written out have beside these.
OF_NORMS = (aten.mean, aten.sum, aten.var, aten.std, aten.norm, aten.linalg_vector_norm, aten.expand, aten.expand_as)


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
        return in_rows(size, self.batch, self.rows)


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
                    f"{len(own)} hidden inputs: {', '.join(map(describe, own))}; a routed block has one", path)
    hidden = own[0]
    if rivals := _rivals(hidden, candidates, siblings):
        return Skip(f"{1 + len(rivals)} hidden inputs: {', '.join(map(describe, [hidden, *rivals]))}; a routed block "
                    "has one", path)
    body = _reached(members, hidden)
    results = [n for n in body if any(user not in inside for user in n.users)]
    if len(results) != 1:
        found = ", ".join(map(describe, results))
        return Skip(f"{len(results)} hidden outputs: {found}; a routed block has one", path)
    result = results[0]
    if shape_exprs(result) != shape_exprs(hidden) or result.meta["val"].dtype != hidden.meta["val"].dtype:
        return Skip(f"the output {describe(result)} is not shaped like the input {describe(hidden)}", path)
    if _rejoins(hidden, result, siblings):
        return Skip("its residual is outside of it: rows that pass by would be added to themselves; wrap x + f(x) in "
                    "one module", path)
    exprs = shape_exprs(hidden) or ()
    if len(exprs) != 3:
        return Skip(f"the hidden state {describe(hidden)} is not [B, S, D]", path)
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
            known |= {e for e in (in_rows(e, batch, rows) for e in shape_exprs(arg) or ()) if e.is_Symbol}
            side = side_of(arg, node, batch, rows)
            if isinstance(side, Skip):
                return Skip(side.reason, path)
            sides[arg, side.rank] = side
    for node in body:
        for arg in node.all_input_nodes:
            expr = size_value(arg)
            if expr is not None and not in_rows(expr, batch, rows).free_symbols <= known:
                return Skip(f"{node.name} uses the size {expr}, which no input of the block carries", path)
    return BlockView(path, hidden, result, body, sides, batch, rows)


def _tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
