"""The sizes of an exported graph: which vary, what they are called, and which are one."""

__all__ = ["any_size", "check_float_sizes", "fixed_names", "merged_symbols", "name_symbols", "varying_sizes"]

import math

import sympy
import torch
import torch.fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import ToFloat

from modcompile.errors import UnsupportedGraphError
from modcompile.shapes import dim_expr, equalities, shape_exprs

ROLES = ("batch", "sequence")
# From a size to one far above it, which leaves the same remainder for all likely divisors.
FAR = math.factorial(20)


def any_size(value):
    """Of an argument, the dynamic sizes of an export in which every dim may vary."""
    return {dim: torch.export.Dim.AUTO for dim in range(value.dim())} if isinstance(value, torch.Tensor) else None


def varying_sizes(graph: torch.fx.Graph, arguments: dict, symbols: set) -> dict:
    """The dynamic sizes of an export in which only the dims of these symbols vary."""
    nodes = iter(graph.find_nodes(op="placeholder"))

    def dims(value):
        if not isinstance(value, torch.Tensor):
            return None
        sizes = shape_exprs(next(nodes)) or ()
        return {dim: torch.export.Dim.AUTO for dim, size in enumerate(sizes) if size in symbols}

    return pytree.tree_map(dims, arguments)


def name_symbols(graph: torch.fx.Graph) -> tuple[dict, dict[str, int]]:
    """A name and the example's size for each symbol of the inputs: "batch" is dim 0, "sequence" dim 1, by first use.

    Two symbols of equal size at the same dim get one name: a mask's batch is the batch, though nothing in the graph may
    compare them. To keep two lengths apart, give them different sizes in the example.
    """
    names: dict = {}
    roles: dict[tuple[int, int], str] = {}
    hints: dict[str, int] = {}
    for node in graph.find_nodes(op="placeholder"):
        for dim, size in enumerate(node.meta["val"].shape):
            expr = dim_expr(size)
            if not expr.is_number and expr not in names:
                hint = size.node.hint
                if not expr.is_Symbol:
                    raise UnsupportedGraphError(
                        "an input's size depends on another's", found=f"dim {dim} is {expr}", where=node.name,
                        expected="sizes that are equal or independent",
                        fix="pass inputs of equal length, or capture with dynamic=False")
                free = dim < len(ROLES) and ROLES[dim] not in hints
                names[expr] = roles.setdefault((dim, hint), ROLES[dim] if free else f"{node.name}_{dim}")
                hints[names[expr]] = hint
    return names, hints


def fixed_names(graph: torch.fx.Graph, names: dict, hints: dict[str, int]) -> set[str]:
    """The names of sizes that the model fixes only together, or to a few values.

    torch.export puts a number for a size that one equality gives, as S + 1 = 17 does, but only guards
    (height // 4) * (width // 4) = 16, for an image whose patches have 16 positions.
    """
    known = {symbol: hints[name] for symbol, name in names.items()}
    merged, fixed = merged_symbols(names), set()
    for equality in equalities(graph):
        # Sizes of one name will be one size: 4 * B // B' = 4 fixes nothing.
        equality = equality.xreplace(merged)
        if not equality.is_Equality:
            continue
        left, right = equality.args
        # B * S = B * 16 fixes S. What makes two sizes depend on each other fixes neither.
        above, below = sympy.fraction(left / (right or 1))
        if not (above.free_symbols and below.free_symbols) and not equality.has(ToFloat):
            # S % 4 = 0 and S // (S // 4) = 4 hold far from the example too: they fix nothing.
            fixed |= {names[symbol] for symbol in equality.free_symbols & known.keys()
                      if equality.xreplace(known | {symbol: known[symbol] + FAR}) is sympy.false}
    return fixed


def check_float_sizes(graph: torch.fx.Graph, names: dict) -> None:
    """Refuses a size that was computed through a float: torch.export fixes it at the example's, and only guards it.

    Raises:
        UnsupportedGraphError: Such a guard on a size that may vary.
    """
    for equality in equalities(graph):
        fixed = next((side for side in equality.args if side.is_number), None)
        if fixed is not None and equality.has(ToFloat) and equality.free_symbols & names.keys():
            computed = next(side for side in equality.args if side is not fixed)
            text = str(computed.xreplace({symbol: sympy.Symbol(name) for symbol, name in names.items()}))
            raise UnsupportedGraphError("the model computes a size through a float, which fixes it", where="forward",
                                        expected="sizes in integers", found=f"{text}, {fixed} in the example",
                                        fix="write x // 2 for int(x * 0.5), or capture with dynamic=False")


def merged_symbols(names: dict) -> dict:
    """For each symbol that is not the first of its name, the one that is."""
    first: dict = {}
    merged = {symbol: first.setdefault(name, symbol) for symbol, name in names.items()}
    return {symbol: kept for symbol, kept in merged.items() if symbol != kept}
