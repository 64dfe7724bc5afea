"""What the elements of a tensor are, as a function of their own indices: of numbers of rows, and masks made of them.

A sum of the element's indices, or inequalities between such sums, and what is made of these: a triangle of ones or of
-inf. That takes no sizes, so what is known holds for all of them.
"""

__all__ = ["ALWAYS", "NEVER", "Bias", "Conditions", "Elements", "Index", "Sum", "UnknownError", "as_conditions",
           "negated", "settled"]

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch.fx import Node

# B batch  K capacity


class Index(NamedTuple):
    """An index of an element: its place along a dim, or what ``positions`` [B, K] holds at that place."""

    dim: int
    positions: Node | None = None


@dataclasses.dataclass(frozen=True)
class Sum:
    """What each element of an integer tensor is: a constant plus multiples of the element's indices."""

    constant: int = 0
    factors: Mapping[Index, int] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Sum") -> "Sum":
        factors = {index: self.factors.get(index, 0) + other.factors.get(index, 0)
                   for index in {**self.factors, **other.factors}}
        return Sum(self.constant + other.constant, {index: factor for index, factor in factors.items() if factor})

    def __sub__(self, other: "Sum") -> "Sum":
        return self + other * -1

    def __mul__(self, times: int) -> "Sum":
        return Sum(self.constant * times, {index: f * times for index, f in self.factors.items() if times})

    @property
    def gathered(self) -> set[int]:
        """The dims along which rows were chosen."""
        return {index.dim for index in self.factors if index.positions is not None}

    def split(self, dim: int) -> tuple[int, "Sum"]:
        """The factor of the place along a dim, and the sum without it."""
        rest = {index: factor for index, factor in self.factors.items() if index != (dim, None)}
        return self.factors.get(Index(dim), 0), Sum(self.constant, rest)

    def moved(self, to: Callable[[int], int | None]) -> "Sum":
        """The sum with its dims renamed. Positions belong to a sequence: with them, dim 0 must stay the batch."""
        factors = {}
        for index, factor in self.factors.items():
            dim = to(index.dim)
            if dim is None or (index.positions is not None and to(0) != 0):
                raise UnknownError
            factors[index._replace(dim=dim)] = factor
        return Sum(self.constant, factors)


# The sums that are all at least 0 where a bool tensor is true.
Conditions = tuple[Sum, ...]
ALWAYS: Conditions = ()
NEVER = (Sum(-1),)


@dataclasses.dataclass(frozen=True)
class Bias:
    """What adds nothing to a score where conditions hold, and elsewhere takes all of its weight."""

    kept: Conditions


# Of a tensor of numbers, conditions say where it is 1; elsewhere it is 0.
Elements = Sum | Conditions | Bias


class UnknownError(Exception):
    """The elements are no function of their indices that this file knows."""


def as_conditions(value: Elements) -> Conditions:
    """Where numbers are 1, of which it is known that they are 0 elsewhere."""
    if value in (Sum(0), Sum(1)):
        return ALWAYS if value == Sum(1) else NEVER
    if not isinstance(value, tuple):
        raise UnknownError
    return value


def negated(conditions: Conditions) -> Conditions:
    """Where one condition does not hold."""
    if conditions == ALWAYS:
        return NEVER
    if len(conditions) != 1:
        raise UnknownError
    return (conditions[0] * -1 - Sum(1),)


def settled(value: Elements, shape: tuple) -> Elements:
    """Leaves out the place along a dim of size 1, which is 0, and conditions that always hold."""
    if isinstance(value, Sum):
        return Sum(value.constant, {index: factor for index, factor in value.factors.items()
                                     if index.positions is not None or shape[index.dim] != 1})
    if isinstance(value, Bias):
        return Bias(as_conditions(settled(value.kept, shape)))
    kept: list[Sum] = []
    for condition in value:
        lowest = _lowest(condition, shape)
        if lowest is not None and lowest >= 0:
            continue
        if not condition.factors:
            return NEVER
        if condition not in kept:
            kept.append(condition)
    return tuple(kept)


def _lowest(value: Sum, shape: tuple) -> int | None:
    """The least that an element is; None if a size would have to be known for it."""
    lowest = value.constant
    for index, factor in value.factors.items():
        if factor < 0:
            if index.positions is not None or not shape[index.dim].is_number:
                return None
            lowest += factor * (int(shape[index.dim]) - 1)
    return lowest
