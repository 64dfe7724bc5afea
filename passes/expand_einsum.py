"""Writes an einsum as the product that it is: of matrices, or of elements.

    before:  %s: [B, H, Q, K] = aten.einsum("bqhd,bkhd->bhqk", [%q, %k])
    after:   %s: [B, H, Q, K] = aten.matmul(aten.transpose(%q, 1, 2), aten.transpose(aten.transpose(%k, 1, 2), -2, -1))

Why: much research code writes attention so, and einops does. Its products are then those that other passes, and the
kernels of every runtime, know. PyTorch computes an einsum in the same way, but first merges the heads into the batch.

1. A dim that is summed and in both factors is the matrices' inner one, or several flattened; a dim in both that is kept
   is one of their batch.
2. A dim in one factor alone is its rows, or columns. Of several, such as groups of heads and queries, the one that
   varies, or is the largest, is; over the others the other factor broadcasts. A factor of parameters alone would be
   copied for it: there they are flattened, and restored in the product.
3. Where nothing is summed, or neither factor has a dim of its own, elements are multiplied, and then summed.
4. Three operands and more are multiplied two at a time, in the order that PyTorch has chosen.
5. A diagonal, a sum over what broadcasts, and integers stay as they are.
"""

import dataclasses
import string
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.fx

from modcompile.pass_manager import Pass, PassResult, Skip, call_for
from modcompile.shapes import dim_expr, propagate_missing, shape_exprs

__all__ = ["ExpandEinsum"]

# B batch  H heads  Q queries  K keys

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class ExpandEinsum(Pass):
    """Rewrites every ``einsum``."""

    name: ClassVar[str] = "expand-einsum"

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Parses each equation, then multiplies."""
        graph, modified, skips = graph_module.graph, False, []
        nodes = graph.find_nodes(op="call_function", target=aten.einsum.default)
        if nodes:
            # Tracing records no shapes of parameters.
            propagate_missing(graph_module)
        moving: set[torch.fx.Node] = set()
        for node in graph.nodes:
            if node.op == "placeholder" or not moving.isdisjoint(node.all_input_nodes):
                moving.add(node)
        for node in nodes:
            factors, kept = _parsed(node, moving)
            if (reason := _unfit(node, factors, kept)) is not None:
                skips.append(Skip(reason, node.name))
                continue
            with graph.inserting_before(node):
                result = _Product(node, factors).of(factors, kept)
            # An operand of a later einsum.
            result.meta.setdefault("val", node.meta["val"])
            if node in moving:
                moving.add(result)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
            modified = True
        return PassResult(graph_module, modified, tuple(skips))


@dataclasses.dataclass(frozen=True, eq=False)
class _Factor:
    """A value whose dims have names.

    Attributes:
        node: The value.
        dims: A name for each.
        held: Whether it is made of parameters alone.
    """

    node: torch.fx.Node
    dims: tuple[str, ...]
    held: bool


def _parsed(node: torch.fx.Node, moving: set[torch.fx.Node]) -> tuple[list[_Factor], tuple[str, ...]]:
    """The operands and the dims of the result, named as in the equation; what "..." stands for is numbered."""
    equation, operands = node.args[0].replace(" ", "").replace("...", "."), node.args[1]
    before, arrow, after = equation.partition("->")
    factors = []
    for text, operand in zip(before.split(","), operands, strict=True):
        count = operand.meta["val"].dim() - len(text.replace(".", ""))
        factors.append(_Factor(operand, _named(text, count), operand not in moving))
    most = max(sum(name.isdigit() for name in factor.dims) for factor in factors)
    if not arrow:
        after = "." + "".join(sorted(name for name in set(before) & set(string.ascii_letters)
                                     if before.count(name) == 1))
    return factors, _named(after, most)


def _named(text: str, count: int) -> tuple[str, ...]:
    """A name for each dim: those that "..." stands for count from the last, as they broadcast."""
    start, dots, end = text.partition(".")
    return (*start, *(str(place) for place in range(count if dots else 0, 0, -1)), *end)


def _unfit(node: torch.fx.Node, factors: list[_Factor], kept: tuple[str, ...]) -> str | None:
    """Case 5."""
    if not node.meta["val"].dtype.is_floating_point:
        return f"the product is {node.meta['val'].dtype}"
    sizes: dict[str, set] = {}
    for factor in factors:
        if len(set(factor.dims)) < len(factor.dims):
            return "a dim is named twice: a diagonal"
        for name, size in zip(factor.dims, shape_exprs(factor.node) or (), strict=True):
            sizes.setdefault(name, set()).add(size)
    broadcast = [name for name, found in sizes.items() if 1 in found and len(found) > 1 and name not in kept]
    return f"the sum over {', '.join(broadcast)} broadcasts" if broadcast else None


class _Product:
    """The calls that stand for one einsum."""

    def __init__(self, node: torch.fx.Node, factors: list[_Factor]):
        self.node = node
        # Where each dim's size is found: not where it is 1 and broadcasts.
        self.places: dict[str, tuple[torch.fx.Node, int]] = {}
        for factor in factors:
            for place, name in enumerate(factor.dims):
                if name not in self.places or dim_expr(factor.node.meta["val"].shape[place]) != 1:
                    self.places[name] = (factor.node, place)

    def of(self, factors: Sequence[_Factor], kept: tuple[str, ...]) -> torch.fx.Node:
        """The product of the factors, summed over all but the dims that are kept."""
        left, path = list(factors), list(self.node.kwargs.get("path") or ())
        while len(left) > 1:
            one, other = (left[place] for place in (path[:2] or (0, 1)))
            left, path = [factor for factor in left if factor not in (one, other)], path[2:]
            # In the order of the result.
            wanted = tuple(dict.fromkeys([*kept, *(name for factor in left for name in factor.dims)]))
            left.append(self._pair(one, other, wanted))
        return self._arranged(self._summed(left[0], kept), kept)

    def _pair(self, one: _Factor, other: _Factor, wanted: tuple[str, ...]) -> _Factor:
        one = self._summed(one, (*wanted, *other.dims))
        other = self._summed(other, (*wanted, *one.dims))
        kept = tuple(name for name in wanted if name in one.dims or name in other.dims)
        inner = tuple(name for name in one.dims if name in other.dims and name not in kept)
        # Case 3.
        if not inner or set(one.dims) == set(other.dims):
            factors = [self._arranged(factor, kept + inner) for factor in (one, other)]
            made = _Factor(self._call(aten.mul.Tensor, *factors), kept + inner, one.held and other.held)
            return self._summed(made, kept)
        return self._matrices(one, other, kept, inner)

    def _matrices(self, one: _Factor, other: _Factor, kept: tuple[str, ...], inner: tuple[str, ...]) -> _Factor:
        """Cases 1 and 2."""
        own = {factor: tuple(name for name in kept if name in factor.dims and name not in also.dims)
               for factor, also in ((one, other), (other, one))}
        batch = [name for name in kept if name in one.dims and name in other.dims]
        if one.held or other.held:
            left, right = (one, other) if other.held else (other, one)
            # Matrices with nothing in their batch take any leading dims on the left.
            rows = {right: own[right], left: own[left] if batch else own[left][-1:]}
        else:
            rows = {factor: tuple(sorted(names, key=self._extent)[-1:]) for factor, names in own.items()}
            left, right = sorted((one, other), key=lambda factor: (
                not rows[factor], [kept.index(name) for name in rows[factor]]))
        lead = tuple(name for name in kept if name not in rows[left] + rows[right])
        first = self._matrix(left, lead, rows[left], inner)
        # Keys have their rows first.
        if rows[right] and tuple(name for name in right.dims if name in rows[right] + inner) == rows[right] + inner:
            second = self._call(aten.transpose.int, self._matrix(right, lead, rows[right], inner), -2, -1)
        else:
            second = self._matrix(right, lead, inner, rows[right])
        product = self._call(aten.matmul.default, first, second)
        for dim, names in ((-1, rows[right]), (len(lead), rows[left])):
            if not names:
                product = self._call(aten.squeeze.dim, product, dim)
            elif len(names) > 1:
                product = self._call(aten.unflatten.int, product, dim, [self._size(name) for name in names])
        return _Factor(product, lead + rows[left] + rows[right], one.held and other.held)

    def _matrix(self, factor: _Factor, lead: tuple[str, ...], rows: tuple[str, ...], columns: tuple[str, ...]
                ) -> torch.fx.Node:
        """A factor with these dims, each of the last two groups flattened."""
        made = self._arranged(factor, lead + rows + columns)
        if len(columns) > 1:
            made = self._call(aten.flatten.using_ints, made, -len(columns), -1)
        elif not columns:
            made = self._call(aten.unsqueeze.default, made, -1)
        if len(rows) > 1:
            made = self._call(aten.flatten.using_ints, made, -len(rows) - 1, -2)
        return made if rows else self._call(aten.unsqueeze.default, made, -2)

    def _arranged(self, factor: _Factor, dims: tuple[str, ...]) -> torch.fx.Node:
        """A factor with its dims in this order, and 1 for those that it lacks behind its first."""
        made, order = factor.node, [factor.dims.index(name) for name in dims if name in factor.dims]
        moved = [place for place, source in enumerate(order) if place != source]
        if len(moved) == 2:
            made = self._call(aten.transpose.int, made, *moved)
        elif moved:
            made = self._call(aten.permute.default, made, order)
        first = next((place for place, name in enumerate(dims) if name in factor.dims), len(dims))
        for place, name in enumerate(dims[first:]):
            if name not in factor.dims:
                made = self._call(aten.unsqueeze.default, made, place)
        return made

    def _summed(self, factor: _Factor, kept: Sequence[str]) -> _Factor:
        gone = [place for place, name in enumerate(factor.dims) if name not in kept]
        if not gone:
            return factor
        return _Factor(self._call(aten.sum.dim_IntList, factor.node, gone),
                       tuple(name for name in factor.dims if name in kept), factor.held)

    def _extent(self, name: str) -> tuple[bool, int]:
        """What sorts sizes: one that varies is the largest."""
        node, place = self.places[name]
        size = dim_expr(node.meta["val"].shape[place])
        return not size.is_number, int(size) if size.is_number else 0

    def _size(self, name: str) -> int | torch.fx.Node:
        node, place = self.places[name]
        size = node.meta["val"].shape[place]
        return size if isinstance(size, int) else self._call(aten.sym_size.int, node, place)

    def _call(self, target: Any, *args: Any) -> torch.fx.Node:
        return call_for(self.node, target, *args)
