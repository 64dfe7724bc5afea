"""The sizes an engine is built for: one for a static dim; a smallest, a usual and a largest for a dynamic one."""

__all__ = ["Profile", "Range", "Shapes", "bind_profile"]

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import onnx_ir as ir

from modcompile.errors import UsageError

# By input name: (8, 128), or three of them: the smallest, the usual and the largest shape.
Shapes = Mapping[str, Sequence[Any]]


class Range(NamedTuple):
    """The sizes of a dim: the smallest, the one that kernels are chosen for, and the largest."""

    min: int
    opt: int
    max: int

    def __str__(self):
        return str(self.max) if self.min == self.max else f"{self.min}..{self.opt}..{self.max}"


@dataclasses.dataclass(frozen=True)
class Profile:
    """An optimization profile.

    Attributes:
        shapes: The ranges of every input's dims, by the input's name.
        symbols: The ranges of the symbols that those dims have in the ONNX file.
    """

    shapes: Mapping[str, tuple[Range, ...]]
    symbols: Mapping[str, Range]

    @property
    def dynamic(self) -> dict[str, tuple[Range, ...]]:
        """The inputs with a dim that varies."""
        return {name: dims for name, dims in self.shapes.items() if any(dim.min != dim.max for dim in dims)}

    @property
    def fixed(self) -> dict[str, int]:
        """The symbols with one size."""
        return {symbol: dim.max for symbol, dim in self.symbols.items() if dim.min == dim.max}

    @property
    def largest(self) -> dict[str, int]:
        """Every symbol's largest size."""
        return {symbol: dim.max for symbol, dim in self.symbols.items()}

    def __str__(self):
        return "; ".join(f"{name} [{', '.join(map(str, dims))}]" for name, dims in self.shapes.items())


def bind_profile(inputs: Sequence[ir.Value], shapes: Shapes) -> Profile:
    """Gives every dim of every input its range.

    Args:
        inputs: The graph's inputs.
        shapes: By input name, a static shape or the smallest, usual and largest one. A symbol has one range in all
            inputs, so an input whose symbols are known from the others may be left out.

    Raises:
        UsageError: An unknown input, a shape that does not fit its input or another shape, or a dim without a size.

    Example:
        >>> ids = ir.Value(name="ids", shape=ir.Shape(["batch", 128]))
        >>> print(bind_profile([ids], {"ids": ((1, 128), (8, 128), (16, 128))}))
        ids [1..8..16, 128]
    """
    declared = {str(value.name): _dims(value) for value in inputs}
    symbols: dict[str, Range] = {}
    for name, shape in shapes.items():
        if name not in declared:
            raise UsageError("a shape is given for an input the model does not have", expected=", ".join(declared),
                             found=name)
        dims = declared[name]
        ranges = _ranges(name, shape)
        fits = len(ranges) == len(dims) and all(
            all(isinstance(size, int) for size in given) and 0 < given.min <= given.opt <= given.max
            and given == (symbols.setdefault(dim, given) if isinstance(dim, str) else Range(dim, dim, dim))
            for dim, given in zip(dims, ranges, strict=True))
        if not fits:
            known = ", ".join(f"{dim} = {symbols[dim]}" for dim in dims if dim in symbols)
            raise UsageError("a given shape does not fit the model's input",
                             expected=f"[{', '.join(map(str, dims))}]" + (f" with {known}" if known else ""),
                             found=tuple(shape), where=f"shapes[{name!r}]",
                             fix="sizes are integers from 1, smallest <= usual <= largest, and equal for equal symbols")
    for name, dims in declared.items():
        if missing := [dim for dim in dims if isinstance(dim, str) and dim not in symbols]:
            raise UsageError("TensorRT needs a size for every dim", expected=f"sizes of {', '.join(missing)}",
                             found="none", where=f"input {name} [{', '.join(map(str, dims))}]",
                             fix=f"pass shapes={{{name!r}: (...)}}, or the smallest, usual and largest shape: "
                             f"{{{name!r}: ((...), (...), (...))}}")
    return Profile({name: tuple(symbols[dim] if isinstance(dim, str) else Range(dim, dim, dim) for dim in dims)
                    for name, dims in declared.items()}, symbols)


def _dims(value: ir.Value) -> list[int | str]:
    """An input's sizes and symbols; a dim without a name gets one of its own."""
    if value.shape is None:
        raise UsageError("an input of the model has no known rank", expected="sizes and names of dims",
                         found=f"{value.name} without a shape", fix="export the model with the input's shape")
    return [dim if isinstance(dim, int) else dim.value or f"{value.name}_{axis}"
            for axis, dim in enumerate(value.shape)]


def _ranges(name: str, shape: Sequence[Any]) -> list[Range]:
    """Ranges by axis, from one shape or from three."""
    nested = [item for item in shape if isinstance(item, Sequence)]
    three = shape if nested else (shape, shape, shape)
    if len(three) != 3 or len(nested) not in (0, 3) or len({len(item) for item in three}) != 1:
        raise UsageError("a shape is neither one shape nor three of one rank",
                         expected="(8, 128), or ((1, 128), (8, 128), (16, 128)): smallest, usual and largest",
                         found=tuple(shape), where=f"shapes[{name!r}]")
    return [Range(*sizes) for sizes in zip(*three, strict=True)]
