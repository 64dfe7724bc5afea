"""What a model is captured with: example inputs as arguments of its forward, of sizes that can be told apart."""

__all__ = ["bind_example", "call_arguments", "defaults_of", "distinct_sizes"]

import collections
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from modcompile.errors import UnsupportedGraphError, UsageError


def call_arguments(example_inputs: dict | tuple | torch.Tensor) -> tuple[tuple, dict[str, Any]]:
    """Positional arguments, and those by name."""
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, Mapping | tuple | list):
        raise UsageError("example_inputs are not the arguments of a call", found=type(example_inputs).__name__,
                         expected="a dict of arguments by name, or a tuple of positional ones", where="example_inputs")
    return ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})


def bind_example(model: nn.Module, example_inputs: dict | tuple | torch.Tensor) -> tuple[tuple[str, ...], dict]:
    """The names of a forward's parameters, and the arguments that an example gives, by name.

    Raises:
        UsageError: Example inputs that do not fit the forward's signature, or hold no tensor.
        UnsupportedGraphError: A forward that takes arguments without names.
    """
    signature = inspect.signature(model.forward)
    args, kwargs = call_arguments(example_inputs)
    parameters = tuple(p.name for p in signature.parameters.values()
                       if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError("example_inputs do not fit the model's forward", expected=f"forward{signature}",
                         found=f"{error}; given {', '.join(kwargs) or len(args)}", where="example_inputs") from None
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise UnsupportedGraphError("the model's forward takes arguments without names", expected="named arguments",
                                        found=f"forward{signature}", where=name, fix="wrap the model in a module")
        else:
            arguments[name] = value
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(arguments)):
        kinds = ", ".join(f"{name} {type(value).__name__}" for name, value in arguments.items())
        raise UsageError("example_inputs hold no tensor", expected="at least one tensor of torch",
                         found=kinds or "nothing", where="example_inputs", fix="torch.as_tensor(value) for an array")
    return parameters, arguments


def defaults_of(model: nn.Module) -> dict[str, bool | int | float | str]:
    """The defaults of a forward's parameters, those that are constants."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, bool | int | float | str)}


def distinct_sizes(arguments: dict, dynamic: bool) -> dict:
    """Repeats a batch of 1, whose size torch.export would fix, or of another dim's size, which it would take for it."""
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    for tensor in tensors:
        if 0 in tensor.shape:
            raise UsageError("an example input is empty", expected="sizes of at least 1", found=tuple(tensor.shape),
                             where="example_inputs")
    # What most inputs begin with, but for a 1 that is broadcast, and of two such the one of more dims: others may be
    # tables of all sequences.
    rows = [tensor for tensor in tensors if tensor.dim() > 1] or tensors
    rows = [tensor for tensor in rows if tensor.shape[0] > 1] or rows
    counts = collections.Counter(tensor.shape[0] for tensor in rows)
    batch = max(rows, key=lambda tensor: (counts[tensor.shape[0]], tensor.dim())).shape[0] if rows else 1
    others = {size for tensor in tensors for size in tensor.shape[1:]}
    if not dynamic or (batch > 1 and batch not in others):
        return arguments
    times = next(n for n in range(2, 99) if batch * n not in others)

    def repeat(value):
        batched = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == batch
        return value.repeat(times, *[1] * (value.dim() - 1)) if batched else value

    return pytree.tree_map(repeat, arguments)
