"""Follows what the elements of a graph's integers, bools and masks are, from operation to operation."""

__all__ = ["BOTH", "follow"]

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

# Registers the namespace's ops.
import modcompile.ops  # noqa: F401
from modcompile.mask_elements import (
    ALWAYS,
    NEVER,
    Bias,
    Conditions,
    Elements,
    Index,
    Sum,
    UnknownError,
    as_conditions,
    negated,
    settled,
)
from modcompile.passes.fuse_attention import LOW
from modcompile.shapes import shape_exprs

# B batch  S rows  K capacity

aten, mod = torch.ops.aten, torch.ops.modcompile
# What is true where both of its operands are.
BOTH = frozenset({aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default})


def follow(graph: Graph) -> dict[Node, Elements]:
    """What is known of the graph's integers and bools, and of the numbers that masks are made of."""
    values: dict[Node, Elements] = {}
    for node in graph.nodes:
        result = node.meta.get("val")
        rule = _RULES.get(node.target) if isinstance(result, torch.Tensor) else None
        if rule is None:
            continue
        try:
            value = rule(_Call(node, values))
        except UnknownError:
            continue
        # A cast to bool, or to a dtype that may not hold a sum, is followed of conditions alone.
        if (isinstance(value, tuple) or (isinstance(value, Bias) and result.dtype.is_floating_point)
                or (isinstance(value, Sum) and result.dtype in (torch.int32, torch.int64))):
            values[node] = settled(value, _shape(node))
    return values


def _shape(node: Node) -> tuple:
    return shape_exprs(node) or ()


class _Call:
    """A node, with what is known of its operands."""

    def __init__(self, node: Node, values: Mapping[Node, Elements]):
        self.node, self.values, self.rank = node, values, len(_shape(node))
        self.op = getattr(node.target, "_opname", "")

    def argument(self, position: int, default: Any = None) -> Any:
        return self.node.args[position] if len(self.node.args) > position else default

    def integer(self, position: int, default: int | None = None) -> int:
        value = self.argument(position, default)
        if not isinstance(value, int):
            raise UnknownError
        return value

    def value(self, operand: Any = None) -> Elements:
        """What is known of an operand, by default the first."""
        operand = self.node.args[0] if operand is None else operand
        if isinstance(operand, int):
            return Sum(operand)
        if operand not in self.values:
            raise UnknownError
        return self.values[operand]

    def conditions(self, operand: Any = None) -> Conditions:
        """Where an operand, by default the first, is true or 1."""
        return as_conditions(self.value(operand))

    def sum(self, operand: Any) -> Sum:
        value = self.value(operand)
        if not isinstance(value, Sum):
            raise UnknownError
        return value

    def each(self, change: Callable[[Sum], Sum]) -> Elements:
        """What is known of the first operand, its sum or its conditions changed."""
        value = self.value()
        if isinstance(value, Bias):
            return Bias(tuple(map(change, value.kept)))
        return change(value) if isinstance(value, Sum) else tuple(map(change, value))

    def broadcast(self, operand: Any) -> Callable[[Sum], Sum]:
        """Names the dims of an operand's sums as the result's."""
        before = _shape(operand) if isinstance(operand, Node) else ()
        after = _shape(self.node)
        shift = len(after) - len(before)

        def change(value: Sum) -> Sum:
            if value.gathered and any(before[dim] != after[dim + shift] for dim in {0, *value.gathered}):
                raise UnknownError
            return value.moved(functools.partial(operator.add, shift))

        return change

    def pair(self) -> tuple[Sum, Sum]:
        """The two integer operands of an elementwise op."""
        if self.node.kwargs:
            raise UnknownError
        first, second = self.node.args
        return self.broadcast(first)(self.sum(first)), self.broadcast(second)(self.sum(second))


def _arange(call: _Call) -> Elements:
    start = call.integer(0) if len(call.node.args) > 1 else 0
    return Sum(start, {Index(0): call.integer(2, 1)})


def _filled(call: _Call) -> Elements:
    """A tensor of one number, which the name of the op says, or its second argument."""
    value = {"ones": 1, "zeros": 0}.get(call.op.removeprefix("new_").removesuffix("_like"))
    return _number(call.argument(1) if value is None else value, call.node.meta["val"].dtype)


def _number(value: Any, dtype: torch.dtype) -> Elements:
    if not isinstance(value, int | float):
        raise UnknownError
    if dtype.is_floating_point and value != 1:
        if value != 0 and not value <= LOW:
            raise UnknownError
        return Bias(NEVER if value else ALWAYS)
    if dtype in (torch.int32, torch.int64):
        return Sum(int(value))
    return ALWAYS if value else NEVER


def _not(call: _Call) -> Elements:
    # Of numbers a bitwise not is no condition's.
    if call.op == "bitwise_not" and call.node.meta["val"].dtype != torch.bool:
        raise UnknownError
    return negated(call.conditions())


def _triangle(call: _Call) -> Elements:
    above = Sum(call.integer(1, 0), {Index(call.rank - 2): 1, Index(call.rank - 1): -1})  # at least 0 in tril
    band = above if call.op == "tril" else above * -1
    value = call.value()
    if isinstance(value, Bias):
        # What is cut off becomes 0, and adds nothing.
        if value.kept not in (ALWAYS, NEVER):
            raise UnknownError
        return Bias(ALWAYS if value.kept == ALWAYS else negated((band,)))
    return (*call.conditions(), band)


def _where(call: _Call) -> Elements:
    """Nothing is added where a condition holds, or where it does not, and all weight is taken elsewhere."""
    dtype = call.node.meta["val"].dtype
    kept, (first, second) = call.conditions(), (
        call.value(branch) if isinstance(branch, Node) else _number(branch, dtype) for branch in call.node.args[1:])
    kept = tuple(map(call.broadcast(call.node.args[0]), kept))
    if (first, second) == (Bias(NEVER), Bias(ALWAYS)):
        kept, first, second = negated(kept), second, first
    if (first, second) != (Bias(ALWAYS), Bias(NEVER)):
        raise UnknownError
    return Bias(kept)


def _masked_fill(call: _Call) -> Elements:
    value, mask, fill = call.value(), call.node.args[1], call.argument(2)
    filled = tuple(map(call.broadcast(mask), call.conditions(mask)))
    number = _number(fill, call.node.meta["val"].dtype)
    if (value, number) == (Bias(NEVER), Bias(ALWAYS)):
        return Bias(filled)
    if isinstance(value, Bias) and number == Bias(NEVER):
        return Bias((*tuple(map(call.broadcast(call.node.args[0]), value.kept)), *negated(filled)))
    raise UnknownError


def _scaled(call: _Call) -> Elements:
    """Ones times a number, and one less ones: (1 - keep) * -1e9."""
    number = call.argument(1)
    if call.op == "rsub":
        if number != 1 or len(call.node.args) > 2:
            raise UnknownError
        return negated(call.conditions())
    if not isinstance(number, int | float) or not number <= LOW or number == -float("inf"):
        # 0 * -inf is NaN.
        raise UnknownError
    return Bias(negated(call.conditions()))


def _copy(call: _Call) -> Elements:
    return call.value()


def _add(call: _Call) -> Elements:
    first, second = call.pair()
    return first - second if call.op == "sub" else first + second


def _compare(call: _Call) -> Elements:
    if isinstance(call.value(), tuple):
        # Ones and zeros, with a number.
        known = {("eq", 1): True, ("ne", 0): True, ("gt", 0): True, ("ge", 1): True,
                 ("eq", 0): False, ("ne", 1): False, ("lt", 1): False, ("le", 0): False}
        holds = known.get((call.op, call.argument(1)))
        if holds is None:
            raise UnknownError
        return call.conditions() if holds else negated(call.conditions())
    first, second = call.pair()
    above = first - second  # at least 0 where first >= second
    if call.op == "ne":
        if above.factors:
            raise UnknownError
        return ALWAYS if above.constant else NEVER
    return {"ge": (above,), "gt": (above - Sum(1),), "le": (above * -1,), "lt": (above * -1 - Sum(1),),
            "eq": (above, above * -1)}[call.op]


def _and(call: _Call) -> Elements:
    conditions: list[Sum] = []
    for operand in call.node.args:
        value = call.value(operand)
        if not isinstance(value, tuple):
            raise UnknownError
        conditions += map(call.broadcast(operand), value)
    return tuple(conditions)


def _expand(call: _Call) -> Elements:
    return call.each(call.broadcast(call.node.args[0]))


def _unsqueeze(call: _Call) -> Elements:
    at = call.integer(1) % call.rank
    return call.each(lambda value: value.moved(lambda dim: dim + (dim >= at)))


def _transpose(call: _Call) -> Elements:
    one, other = call.integer(1) % call.rank, call.integer(2) % call.rank
    return call.each(lambda value: value.moved(lambda dim: {one: other, other: one}.get(dim, dim)))


def _select(call: _Call) -> Elements:
    at, place = call.integer(1) % (call.rank + 1), call.integer(2)

    def select(value: Sum) -> Sum:
        factor, rest = value.split(at)
        if place < 0:
            raise UnknownError
        return Sum(factor * place) + rest.moved(lambda dim: None if dim == at else dim - (dim > at))

    return call.each(select)


def _slice(call: _Call) -> Elements:
    at, step = call.integer(1, 0) % call.rank, call.integer(4, 1)
    start = 0 if call.argument(2) is None else call.integer(2)

    def cut(value: Sum) -> Sum:
        factor, rest = value.split(at)
        if start < 0 or ((start, step) != (0, 1) and value.gathered):
            raise UnknownError
        return rest + Sum(start, {Index(at): step}) * factor

    return call.each(cut)


def _diff(call: _Call) -> Elements:
    value, prepend = call.sum(call.node.args[0]), call.argument(3)
    factor, rest = value.split(call.integer(2, -1) % call.rank)
    # What is put before the first element must be one step below it.
    if (call.integer(1, 1) != 1 or call.node.kwargs or call.argument(4) is not None or value.gathered
            or (prepend is not None and call.sum(prepend) != rest - Sum(factor))):
        raise UnknownError
    return Sum(factor)


def _cumsum(call: _Call) -> Elements:
    value = call.value()
    # Of a bool tensor, the ones are counted.
    term = value if isinstance(value, Sum) else Sum(int(value == ALWAYS))
    if term.factors or value not in (term, ALWAYS, NEVER):
        raise UnknownError
    return Sum(1, {Index(call.integer(1) % call.rank): 1}) * term.constant


def _index(call: _Call) -> Elements:
    indices = call.node.args[1]
    if None in indices:
        raise UnknownError
    sums = [call.sum(index) for index in indices]
    rank = max(len(_shape(index)) for index in indices)
    places = []
    for index, value in zip(indices, sums, strict=True):
        # A negative index would count from the end.
        if value.constant < 0 or any(factor < 0 for factor in value.factors.values()):
            raise UnknownError
        if any(_shape(index)[dim] != _shape(call.node)[dim] for dim in {0, *value.gathered} if value.gathered):
            raise UnknownError
        places.append(value.moved(functools.partial(operator.add, rank - len(_shape(index)))))

    def look_up(value: Sum) -> Sum:
        if value.gathered:
            raise UnknownError
        found = Sum(value.constant)
        for index, factor in value.factors.items():
            dim = index.dim - len(places)
            found += (places[index.dim] if dim < 0 else Sum(0, {Index(rank + dim): 1})) * factor
        return found

    return call.each(look_up)


def _gather_rows(call: _Call) -> Elements:
    def gather(value: Sum) -> Sum:
        factor, rest = value.split(1)
        if 1 in value.gathered:
            raise UnknownError
        return rest + call.sum(call.node.args[1]) * factor if factor else rest

    return call.each(gather)


def _getitem(call: _Call) -> Elements:
    routed, output = call.node.args
    if routed.target is not mod.route.default or output != 0:
        raise UnknownError
    return Sum(0, {Index(1, call.node): 1})


_RULES: dict[Any, Callable[[_Call], Elements]] = {
    aten.arange.default: _arange, aten.arange.start: _arange, aten.arange.start_step: _arange,
    aten.new_ones.default: _filled, aten.ones.default: _filled, aten.zeros.default: _filled,
    aten.new_zeros.default: _filled, aten.full.default: _filled,
    aten.ones_like.default: _filled, aten.zeros_like.default: _filled, aten.full_like.default: _filled,
    aten.tril.default: _triangle, aten.triu.default: _triangle,
    aten.logical_not.default: _not, aten.bitwise_not.default: _not,
    aten.where.ScalarOther: _where, aten.where.Scalar: _where, aten.where.ScalarSelf: _where, aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill, aten.rsub.Scalar: _scaled, aten.mul.Tensor: _scaled,
    aten.to.dtype: _copy, aten.to.device: _copy, aten.alias.default: _copy, aten.clone.default: _copy,
    aten.contiguous.default: _copy,
    aten.add.Tensor: _add, aten.sub.Tensor: _add,
    **{getattr(getattr(aten, op), kind): _compare for op in ("ge", "gt", "le", "lt", "eq", "ne")
       for kind in ("Tensor", "Scalar")},
    **dict.fromkeys(BOTH, _and),
    aten.expand.default: _expand, aten.unsqueeze.default: _unsqueeze, aten.transpose.int: _transpose,
    aten.select.int: _select, aten.slice.Tensor: _slice,
    aten.diff.default: _diff, aten.cumsum.default: _cumsum, aten.index.Tensor: _index,
    mod.gather_rows.default: _gather_rows, operator.getitem: _getitem,
}
