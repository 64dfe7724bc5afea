"""Takes masks off attention that say no more than causality, or nothing at all.

    before:  %keep: bool[B, 1, S, S] = aten.le(%keys, %queries)       numbers of rows, made from S alone
             %kept: bool[B, 1, K, K] = %keep, gathered at %positions along both dims
             %y = aten.scaled_dot_product_attention(%q, %k, %v, %kept)
    after:   %y = aten.scaled_dot_product_attention(%q, %k, %v, None, 0.0, True)

Why: tracing writes out the mask that a model otherwise leaves to the causal flag. A mask costs S * S bytes a sequence,
and keeps runtimes from their kernel for causal attention, which reads none and computes half of the scores.

Each element of a mask is followed as a function of its own indices: a sum of them, or inequalities between such sums;
and so is what is made of these, a triangle of ones or of -inf. That takes no sizes, so what is found holds for all of
them.

1. A mask that is true everywhere goes, or that adds nothing anywhere.
2. One that is true, or adds nothing, only where the key's index is at most the query's becomes the causal flag. The
   rows that ``route`` chose ascend, so their order is that of their positions.
3. Of two masks that must both hold, one that is true everywhere goes. What is left, often of the keys alone, has size 1
   along the queries: nothing is gathered along them then.
4. Any other stays, such as one that depends on an input's values.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.fx
from modcompile.passes.fuse_attention import LOW
from torch.fx import Graph, GraphModule, Node

# Registers the namespace's ops.
import modcompile.ops  # noqa: F401
from modcompile.attention import SDPA, attention_arguments
from modcompile.pass_manager import Pass, PassResult, Skip
from modcompile.shapes import shape_exprs

__all__ = ["SimplifyMasks"]

# B batch  S rows  K capacity

aten, mod = torch.ops.aten, torch.ops.modcompile


@dataclasses.dataclass(frozen=True)
class SimplifyMasks(Pass):
    """Simplifies the mask of every scaled_dot_product_attention in a graph; the sub-graphs it calls are left alone."""

    name: ClassVar[str] = "simplify-masks"

    def call(self, graph_module: GraphModule) -> PassResult:
        """Follows the graph's integers and bools once, then looks at each attention."""
        attentions = graph_module.graph.find_nodes(op="call_function", target=SDPA)
        masked = [node for node in attentions if attention_arguments(node)["attn_mask"] is not None]
        values = _follow(graph_module.graph) if masked else {}
        modified, skips = False, {}
        for node in masked:
            arguments = attention_arguments(node)
            query, key, value, given = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
            mask = _without_true(given, values)
            kept = _kept_by(mask, values)
            causal = _is_causal(kept, mask, query, key)
            if kept != _TRUE and not causal:
                if mask is not given:
                    node.replace_input_with(given, mask)
                    modified = True
                skips[mask] = Skip("the mask is not known to be causal, or true everywhere, at all sizes", mask.name)
                continue
            node.args = (query, key, value, None, arguments["dropout_p"], causal)
            node.kwargs = {name: node.kwargs[name] for name in ("scale", "enable_gqa") if name in node.kwargs}
            modified = True
        return PassResult(graph_module, modified, tuple(skips.values()))


class _Index(NamedTuple):
    """An index of an element: its place along a dim, or what ``positions`` [B, K] holds at that place."""

    dim: int
    positions: Node | None = None


@dataclasses.dataclass(frozen=True)
class _Sum:
    """What each element of an integer tensor is: a constant plus multiples of the element's indices."""

    constant: int = 0
    factors: Mapping[_Index, int] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "_Sum") -> "_Sum":
        factors = {index: self.factors.get(index, 0) + other.factors.get(index, 0)
                   for index in {**self.factors, **other.factors}}
        return _Sum(self.constant + other.constant, {index: factor for index, factor in factors.items() if factor})

    def __sub__(self, other: "_Sum") -> "_Sum":
        return self + other * -1

    def __mul__(self, times: int) -> "_Sum":
        return _Sum(self.constant * times, {index: f * times for index, f in self.factors.items() if times})

    @property
    def gathered(self) -> set[int]:
        """The dims along which rows were chosen."""
        return {index.dim for index in self.factors if index.positions is not None}

    def split(self, dim: int) -> tuple[int, "_Sum"]:
        """The factor of the place along a dim, and the sum without it."""
        rest = {index: factor for index, factor in self.factors.items() if index != (dim, None)}
        return self.factors.get(_Index(dim), 0), _Sum(self.constant, rest)

    def moved(self, to: Callable[[int], int | None]) -> "_Sum":
        """The sum with its dims renamed. Positions belong to a sequence: with them, dim 0 must stay the batch."""
        factors = {}
        for index, factor in self.factors.items():
            dim = to(index.dim)
            if dim is None or (index.positions is not None and to(0) != 0):
                raise _UnknownError
            factors[index._replace(dim=dim)] = factor
        return _Sum(self.constant, factors)


# The sums that are all at least 0 where a bool tensor is true.
_Conditions = tuple[_Sum, ...]
_TRUE: _Conditions = ()
_FALSE = (_Sum(-1),)


@dataclasses.dataclass(frozen=True)
class _Bias:
    """What adds nothing to a score where conditions hold, and elsewhere takes all of its weight."""

    kept: _Conditions


# Of a tensor of numbers, conditions say where it is 1; elsewhere it is 0.
_Value = _Sum | _Conditions | _Bias


class _UnknownError(Exception):
    """The elements are no function of their indices that this file knows."""


def _without_true(mask: Node, values: Mapping[Node, "_Value"]) -> Node:
    """The operand that a mask is, where the other is true everywhere."""
    while _RULES.get(mask.target) is _and:
        left = [operand for operand in mask.args if values.get(operand) != _TRUE]
        if len(left) != 1 or not isinstance(left[0], Node) or len(_shape(left[0])) != len(_shape(mask)):
            break
        mask = left[0]
    return mask


def _kept_by(mask: Node, values: Mapping[Node, "_Value"]) -> _Conditions | None:
    """Where a mask keeps scores; None if that is not known."""
    value = values.get(mask)
    if isinstance(value, _Bias):
        return value.kept
    return value if isinstance(value, tuple) and mask.meta["val"].dtype == torch.bool else None


def _is_causal(kept: _Conditions | None, mask: Node, query: Node, key: Node) -> bool:
    if kept is None or len(kept) != 1 or len(kept[0].factors) != 2 or kept[0].constant != 0:
        return False
    shape, rows, columns = _shape(mask), _shape(query)[-2], _shape(key)[-2]
    (one, factor), (other, opposite) = sorted(kept[0].factors.items(), key=lambda item: item[0].dim)
    return (shape[-2:] == (rows, columns) and rows == columns
            and (one.dim, other.dim) == (len(shape) - 2, len(shape) - 1)
            and one.positions is other.positions and factor == -opposite and factor > 0)


def _follow(graph: Graph) -> dict[Node, _Value]:
    """What is known of the graph's integers and bools, and of the numbers that masks are made of."""
    values: dict[Node, _Value] = {}
    for node in graph.nodes:
        result = node.meta.get("val")
        rule = _RULES.get(node.target) if isinstance(result, torch.Tensor) else None
        if rule is None:
            continue
        try:
            value = rule(_Call(node, values))
        except _UnknownError:
            continue
        # A cast to bool, or to a dtype that may not hold a sum, is followed of conditions alone.
        if (isinstance(value, tuple) or (isinstance(value, _Bias) and result.dtype.is_floating_point)
                or (isinstance(value, _Sum) and result.dtype in (torch.int32, torch.int64))):
            values[node] = _settled(value, _shape(node))
    return values


def _settled(value: _Value, shape: tuple) -> _Value:
    """Leaves out the place along a dim of size 1, which is 0, and conditions that always hold."""
    if isinstance(value, _Sum):
        return _Sum(value.constant, {index: factor for index, factor in value.factors.items()
                                     if index.positions is not None or shape[index.dim] != 1})
    if isinstance(value, _Bias):
        return _Bias(_conditions(_settled(value.kept, shape)))
    kept: list[_Sum] = []
    for condition in value:
        lowest = _lowest(condition, shape)
        if lowest is not None and lowest >= 0:
            continue
        if not condition.factors:
            return _FALSE
        if condition not in kept:
            kept.append(condition)
    return tuple(kept)


def _lowest(value: _Sum, shape: tuple) -> int | None:
    """The least that an element is; None if a size would have to be known for it."""
    lowest = value.constant
    for index, factor in value.factors.items():
        if factor < 0:
            if index.positions is not None or not shape[index.dim].is_number:
                return None
            lowest += factor * (int(shape[index.dim]) - 1)
    return lowest


def _shape(node: Node) -> tuple:
    return shape_exprs(node) or ()


class _Call:
    """A node, with what is known of its operands."""

    def __init__(self, node: Node, values: Mapping[Node, _Value]):
        self.node, self.values, self.rank = node, values, len(_shape(node))
        self.op = getattr(node.target, "_opname", "")

    def argument(self, position: int, default: Any = None) -> Any:
        return self.node.args[position] if len(self.node.args) > position else default

    def integer(self, position: int, default: int | None = None) -> int:
        value = self.argument(position, default)
        if not isinstance(value, int):
            raise _UnknownError
        return value

    def value(self, operand: Any = None) -> _Value:
        """What is known of an operand, by default the first."""
        operand = self.node.args[0] if operand is None else operand
        if isinstance(operand, int):
            return _Sum(operand)
        if operand not in self.values:
            raise _UnknownError
        return self.values[operand]

    def conditions(self, operand: Any = None) -> _Conditions:
        """Where an operand, by default the first, is true or 1."""
        return _conditions(self.value(operand))

    def sum(self, operand: Any) -> _Sum:
        value = self.value(operand)
        if not isinstance(value, _Sum):
            raise _UnknownError
        return value

    def each(self, change: Callable[[_Sum], _Sum]) -> _Value:
        """What is known of the first operand, its sum or its conditions changed."""
        value = self.value()
        if isinstance(value, _Bias):
            return _Bias(tuple(map(change, value.kept)))
        return change(value) if isinstance(value, _Sum) else tuple(map(change, value))

    def broadcast(self, operand: Any) -> Callable[[_Sum], _Sum]:
        """Names the dims of an operand's sums as the result's."""
        before = _shape(operand) if isinstance(operand, Node) else ()
        after = _shape(self.node)
        shift = len(after) - len(before)

        def change(value: _Sum) -> _Sum:
            if value.gathered and any(before[dim] != after[dim + shift] for dim in {0, *value.gathered}):
                raise _UnknownError
            return value.moved(functools.partial(operator.add, shift))

        return change

    def pair(self) -> tuple[_Sum, _Sum]:
        """The two integer operands of an elementwise op."""
        if self.node.kwargs:
            raise _UnknownError
        first, second = self.node.args
        return self.broadcast(first)(self.sum(first)), self.broadcast(second)(self.sum(second))


def _arange(call: _Call) -> _Value:
    start = call.integer(0) if len(call.node.args) > 1 else 0
    return _Sum(start, {_Index(0): call.integer(2, 1)})


def _conditions(value: _Value) -> _Conditions:
    if value in (_Sum(0), _Sum(1)):
        return _TRUE if value == _Sum(1) else _FALSE
    if not isinstance(value, tuple):
        raise _UnknownError
    return value


def _negated(conditions: _Conditions) -> _Conditions:
    if conditions == _TRUE:
        return _FALSE
    if len(conditions) != 1:
        raise _UnknownError
    return (conditions[0] * -1 - _Sum(1),)


def _filled(call: _Call) -> _Value:
    """A tensor of one number, which the name of the op says, or its second argument."""
    value = {"ones": 1, "zeros": 0}.get(call.op.removeprefix("new_").removesuffix("_like"))
    return _number(call.argument(1) if value is None else value, call.node.meta["val"].dtype)


def _number(value: Any, dtype: torch.dtype) -> _Value:
    if not isinstance(value, int | float):
        raise _UnknownError
    if dtype.is_floating_point and value != 1:
        if value != 0 and not value <= LOW:
            raise _UnknownError
        return _Bias(_FALSE if value else _TRUE)
    if dtype in (torch.int32, torch.int64):
        return _Sum(int(value))
    return _TRUE if value else _FALSE


def _not(call: _Call) -> _Value:
    # Of numbers a bitwise not is no condition's.
    if call.op == "bitwise_not" and call.node.meta["val"].dtype != torch.bool:
        raise _UnknownError
    return _negated(call.conditions())


def _triangle(call: _Call) -> _Value:
    above = _Sum(call.integer(1, 0), {_Index(call.rank - 2): 1, _Index(call.rank - 1): -1})  # at least 0 in tril
    band = above if call.op == "tril" else above * -1
    value = call.value()
    if isinstance(value, _Bias):
        # What is cut off becomes 0, and adds nothing.
        if value.kept not in (_TRUE, _FALSE):
            raise _UnknownError
        return _Bias(_TRUE if value.kept == _TRUE else _negated((band,)))
    return (*call.conditions(), band)


def _where(call: _Call) -> _Value:
    """Nothing is added where a condition holds, or where it does not, and all weight is taken elsewhere."""
    dtype = call.node.meta["val"].dtype
    kept, (first, second) = call.conditions(), (
        call.value(branch) if isinstance(branch, Node) else _number(branch, dtype) for branch in call.node.args[1:])
    kept = tuple(map(call.broadcast(call.node.args[0]), kept))
    if (first, second) == (_Bias(_FALSE), _Bias(_TRUE)):
        kept, first, second = _negated(kept), second, first
    if (first, second) != (_Bias(_TRUE), _Bias(_FALSE)):
        raise _UnknownError
    return _Bias(kept)


def _masked_fill(call: _Call) -> _Value:
    value, mask, fill = call.value(), call.node.args[1], call.argument(2)
    filled = tuple(map(call.broadcast(mask), call.conditions(mask)))
    number = _number(fill, call.node.meta["val"].dtype)
    if (value, number) == (_Bias(_FALSE), _Bias(_TRUE)):
        return _Bias(filled)
    if isinstance(value, _Bias) and number == _Bias(_FALSE):
        return _Bias((*tuple(map(call.broadcast(call.node.args[0]), value.kept)), *_negated(filled)))
    raise _UnknownError


def _scaled(call: _Call) -> _Value:
    """Ones times a number, and one less ones: (1 - keep) * -1e9."""
    number = call.argument(1)
    if call.op == "rsub":
        if number != 1 or len(call.node.args) > 2:
            raise _UnknownError
        return _negated(call.conditions())
    if not isinstance(number, int | float) or not number <= LOW or number == -float("inf"):
        # 0 * -inf is NaN.
        raise _UnknownError
    return _Bias(_negated(call.conditions()))


def _copy(call: _Call) -> _Value:
    return call.value()


def _add(call: _Call) -> _Value:
    first, second = call.pair()
    return first - second if call.op == "sub" else first + second


def _compare(call: _Call) -> _Value:
    if isinstance(call.value(), tuple):
        # Ones and zeros, with a number.
        known = {("eq", 1): True, ("ne", 0): True, ("gt", 0): True, ("ge", 1): True,
                 ("eq", 0): False, ("ne", 1): False, ("lt", 1): False, ("le", 0): False}
        holds = known.get((call.op, call.argument(1)))
        if holds is None:
            raise _UnknownError
        return call.conditions() if holds else _negated(call.conditions())
    first, second = call.pair()
    above = first - second  # at least 0 where first >= second
    if call.op == "ne":
        if above.factors:
            raise _UnknownError
        return _TRUE if above.constant else _FALSE
    return {"ge": (above,), "gt": (above - _Sum(1),), "le": (above * -1,), "lt": (above * -1 - _Sum(1),),
            "eq": (above, above * -1)}[call.op]


def _and(call: _Call) -> _Value:
    conditions: list[_Sum] = []
    for operand in call.node.args:
        value = call.value(operand)
        if not isinstance(value, tuple):
            raise _UnknownError
        conditions += map(call.broadcast(operand), value)
    return tuple(conditions)


def _expand(call: _Call) -> _Value:
    return call.each(call.broadcast(call.node.args[0]))


def _unsqueeze(call: _Call) -> _Value:
    at = call.integer(1) % call.rank
    return call.each(lambda value: value.moved(lambda dim: dim + (dim >= at)))


def _transpose(call: _Call) -> _Value:
    one, other = call.integer(1) % call.rank, call.integer(2) % call.rank
    return call.each(lambda value: value.moved(lambda dim: {one: other, other: one}.get(dim, dim)))


def _select(call: _Call) -> _Value:
    at, place = call.integer(1) % (call.rank + 1), call.integer(2)

    def select(value: _Sum) -> _Sum:
        factor, rest = value.split(at)
        if place < 0:
            raise _UnknownError
        return _Sum(factor * place) + rest.moved(lambda dim: None if dim == at else dim - (dim > at))

    return call.each(select)


def _slice(call: _Call) -> _Value:
    at, step = call.integer(1, 0) % call.rank, call.integer(4, 1)
    start = 0 if call.argument(2) is None else call.integer(2)

    def cut(value: _Sum) -> _Sum:
        factor, rest = value.split(at)
        if start < 0 or ((start, step) != (0, 1) and value.gathered):
            raise _UnknownError
        return rest + _Sum(start, {_Index(at): step}) * factor

    return call.each(cut)


def _diff(call: _Call) -> _Value:
    value, prepend = call.sum(call.node.args[0]), call.argument(3)
    factor, rest = value.split(call.integer(2, -1) % call.rank)
    # What is put before the first element must be one step below it.
    if (call.integer(1, 1) != 1 or call.node.kwargs or call.argument(4) is not None or value.gathered
            or (prepend is not None and call.sum(prepend) != rest - _Sum(factor))):
        raise _UnknownError
    return _Sum(factor)


def _cumsum(call: _Call) -> _Value:
    value = call.value()
    # Of a bool tensor, the ones are counted.
    term = value if isinstance(value, _Sum) else _Sum(int(value == _TRUE))
    if term.factors or value not in (term, _TRUE, _FALSE):
        raise _UnknownError
    return _Sum(1, {_Index(call.integer(1) % call.rank): 1}) * term.constant


def _index(call: _Call) -> _Value:
    indices = call.node.args[1]
    if None in indices:
        raise _UnknownError
    sums = [call.sum(index) for index in indices]
    rank = max(len(_shape(index)) for index in indices)
    places = []
    for index, value in zip(indices, sums, strict=True):
        # A negative index would count from the end.
        if value.constant < 0 or any(factor < 0 for factor in value.factors.values()):
            raise _UnknownError
        if any(_shape(index)[dim] != _shape(call.node)[dim] for dim in {0, *value.gathered} if value.gathered):
            raise _UnknownError
        places.append(value.moved(functools.partial(operator.add, rank - len(_shape(index)))))

    def look_up(value: _Sum) -> _Sum:
        if value.gathered:
            raise _UnknownError
        found = _Sum(value.constant)
        for index, factor in value.factors.items():
            dim = index.dim - len(places)
            found += (places[index.dim] if dim < 0 else _Sum(0, {_Index(rank + dim): 1})) * factor
        return found

    return call.each(look_up)


def _gather_rows(call: _Call) -> _Value:
    def gather(value: _Sum) -> _Sum:
        factor, rest = value.split(1)
        if 1 in value.gathered:
            raise _UnknownError
        return rest + call.sum(call.node.args[1]) * factor if factor else rest

    return call.each(gather)


def _getitem(call: _Call) -> _Value:
    routed, output = call.node.args
    if routed.target is not mod.route.default or output != 0:
        raise _UnknownError
    return _Sum(0, {_Index(1, call.node): 1})


_RULES: dict[Any, Callable[[_Call], _Value]] = {
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
    aten.__and__.Tensor: _and, aten.bitwise_and.Tensor: _and, aten.logical_and.default: _and,
    aten.expand.default: _expand, aten.unsqueeze.default: _unsqueeze, aten.transpose.int: _transpose,
    aten.select.int: _select, aten.slice.Tensor: _slice,
    aten.diff.default: _diff, aten.cumsum.default: _cumsum, aten.index.Tensor: _index,
    mod.gather_rows.default: _gather_rows, operator.getitem: _getitem,
}
