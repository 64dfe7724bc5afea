"""What a graph or an engine takes and gives: named tensors whose dims are numbers or symbols. Needs no torch."""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

__all__ = ["Dim", "TensorSpec", "dim_at", "dtype_from_name", "dtype_name"]

# A number where the size is fixed, a symbol's name ("batch", "sequence") or an expression of them where it varies.
Dim = Annotated[int, Field(gt=0)] | Annotated[str, Field(min_length=1)]


_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def dim_at(dim: int | str, sizes: Mapping[str, int]) -> int | str:
    """A dim where the symbols have these sizes; itself, where one of them has none.

    Example:
        >>> dim_at("sequence + 1", {"sequence": 8}), dim_at("2*sequence", {}), dim_at(3, {})
        (9, '2*sequence', 3)
    """
    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(int(number)):
                return number
            case ast.Name(name):
                return sizes[name]
            case ast.UnaryOp(ast.USub(), operand):
                return -value(operand)
            case ast.BinOp(left, op, right):
                return _ARITHMETIC[type(op)](value(left), value(right))
        raise KeyError(ast.unparse(node))

    if isinstance(dim, int):
        return dim
    try:
        return value(ast.parse(dim, mode="eval").body)
    except (KeyError, SyntaxError, ZeroDivisionError):
        return dim


def dtype_name(dtype: "torch.dtype") -> str:
    """The NumPy-style name of a torch dtype.

    Example:
        >>> import torch
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> "torch.dtype":
    """The torch dtype of a NumPy-style name."""
    import torch

    return getattr(torch, name)


class TensorSpec(BaseModel):
    """A named tensor of an interface.

    Attributes:
        name: The name in the model's call, in an ONNX file and in ``Engine.run``.
        dtype: NumPy's name for the element type, or "bfloat16".
        shape: Sizes, and symbols where the size varies. One symbol is one size in all inputs of a call.

    Example:
        >>> print(TensorSpec("input_ids", "int64", ("batch", 128)))
        input_ids int64 [batch, 128]
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1)]
    dtype: Literal["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
                   "float16", "bfloat16", "float32", "float64"]
    shape: tuple[Dim, ...]

    def __init__(self, name: Any, dtype: Any, shape: Any, **extra: Any):
        super().__init__(name=name, dtype=dtype, shape=tuple(shape), **extra)

    def __str__(self):
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"
