"""Side inputs of a block: what enters it beside the hidden state, and along which dims it is gathered."""

__all__ = ["ROWS", "Side", "in_rows", "side_of", "side_rank"]

import dataclasses

import sympy
import torch.fx
from torch.utils._sympy.symbol import SymT, symbol_is_type

from modcompile.attention import SDPA
from modcompile.pass_manager import Skip
from modcompile.pointwise import is_pointwise
from modcompile.shapes import describe, shape_exprs

# B batch  S rows

# Stands for the number of rows that a block sees, in the sizes inside it.
ROWS = sympy.Symbol("rows", integer=True, positive=True)


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


def in_rows(size: sympy.Expr, batch: sympy.Expr, rows: sympy.Expr) -> sympy.Expr:
    """A size of a block whose hidden state is [batch, rows, D], with ROWS for S."""
    if rows.is_number:
        # Known where it stands alone, or multiplies the batch.
        return {rows: ROWS, rows * batch: ROWS * batch}.get(size, size)
    return size.xreplace({rows: ROWS})


def side_rank(arg: torch.fx.Node, user: torch.fx.Node) -> int:
    """The rank at which a consumer reads a side input: its output's where it broadcasts, else the value's own."""
    broadcasts = is_pointwise(user.target)
    if user.target is SDPA and len(user.args) > 3 and user.args[3] is arg:
        return len(shape_exprs(user.args[0]) or ())
    if user.target is SDPA and user.kwargs.get("attn_mask") is arg:
        return len(shape_exprs(user.args[0]) or ())
    return len(shape_exprs(user) or ()) if broadcasts else len(shape_exprs(arg) or ())


def side_of(arg: torch.fx.Node, user: torch.fx.Node, batch: sympy.Expr, rows: sympy.Expr) -> Side | Skip:
    """How a value enters a block whose hidden state is [batch, rows, D] and in which ``user`` reads it, or why not."""
    exprs = shape_exprs(arg) or ()
    if arg.meta["val"].is_complex():
        return Skip(f"the side input {describe(arg)} is complex, which no runtime takes; pass cosines and sines")
    for expr in exprs:
        if any(symbol_is_type(symbol, SymT.UNBACKED_INT) for symbol in expr.free_symbols):
            return Skip(f"the side input {describe(arg)} has a dim of {expr}, which is computed from a tensor's "
                        "values; compute sizes from sizes (x.shape), in integers")
        if expr != rows and batch in expr.free_symbols and rows in expr.free_symbols:
            return Skip(f"the side input {describe(arg)} has a dim of {expr}: rows of all sequences in one order, as "
                        "experts have that sort them; let each row take its own experts' weights (with transformers: "
                        "model.set_experts_implementation('batched_mm'))")
        if expr != rows and ROWS in in_rows(expr, batch, rows).free_symbols:
            return Skip(f"the side input {describe(arg)} has a dim of {expr}, which cannot be gathered")
    if not any(batch in expr.free_symbols | {expr} or expr == rows for expr in exprs):
        # Nothing to gather: parameters, tables and scalars go in as they are.
        return Side(arg, len(exprs))
    rank = side_rank(arg, user)
    first = exprs[0] if rank == len(exprs) else sympy.Integer(1)
    if first == batch or (first == 1 and batch not in exprs):
        beside = (shape_exprs(user) or ())[:1]
        if first != batch and rows in exprs and rank == len(shape_exprs(user) or ()) and beside[0] not in (batch, 1):
            # Gathered for each sequence, it would fit the batch alone.
            return Skip(f"the side input {describe(arg)} of {user.name} meets {beside[0]} heads and sequences in one "
                        "dim")
        return Side(arg, rank)
    places = first / batch
    if places.is_Integer and batch not in exprs:
        return Side(arg, rank, int(places))
    return Skip(f"the side input {describe(arg)} of {user.name} has no leading batch dim to gather along")
