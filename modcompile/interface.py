"""The source model's call and output type, kept beside a flat graph of tensors.

A graph takes tensors in a row and gives tensors in a row. An ``Interface`` binds a call such as
``model(ids, attention_mask=mask)`` to that row, and puts the results back into the source's output type.
"""

import dataclasses
import difflib
import keyword
import re
import sys
from typing import Any

import torch

from modcompile.errors import UnsupportedGraphError, UsageError
from modcompile.spec import TensorSpec, dtype_name

__all__ = ["Interface", "Outputs", "graph_name", "pack_tree", "unpack_tree"]

# A tree is JSON: {"leaf": i}, {"const": value}, {"list" | "tuple": [tree, ...]}, {"dict": {key: tree}} or
# {"class": "module.Name", "fields": {key: tree}} for dict-like and named-tuple types.
Tree = dict[str, Any]
CONSTANTS = (type(None), bool, int, float, str)


class Outputs(dict):
    """Outputs by name, as attributes, or by position: stands in for an output class that is not imported.

    Example:
        >>> out = Outputs(logits=1, loss=None)
        >>> out.logits, out["logits"], out[0]
        (1, 1, 1)
    """

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key):
        return list(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)


def pack_tree(value: Any, leaves: list, names: list[str], name: str = "") -> Tree:
    """Encodes nested containers; tensors (or graph nodes) are appended to ``leaves``, their names to ``names``.

    Raises:
        UnsupportedGraphError: A container that is neither list, tuple, dict, named tuple nor a dict-like class.
    """
    def children(items):
        return {str(key): pack_tree(item, leaves, names, f"{name}.{key}" if name else str(key)) for key, item in items}

    if isinstance(value, torch.Tensor | torch.fx.Node):
        leaves.append(value)
        names.append(name or "output")
        return {"leaf": len(leaves) - 1}
    if isinstance(value, CONSTANTS):
        return {"const": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: list(children((i if name else f"output_{i}", v)
                                                    for i, v in enumerate(value)).values())}
    if type(value) is dict:
        return {"dict": children(value.items())}
    path = f"{type(value).__module__}.{type(value).__qualname__}"
    if path == "numpy.ndarray":
        raise UsageError("an array is given for a tensor", expected="a tensor of torch", found=path, where=name,
                         fix=f"torch.as_tensor({name or 'value'})")
    if isinstance(value, dict):
        return {"class": path, "fields": children((k, v) for k, v in value.items() if v is not None)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"class": path, "fields": children(zip(value._fields, value, strict=True))}
    raise UnsupportedGraphError("a value of the model's interface has a type that cannot be kept",
                                expected="tensors in lists, tuples, dicts, named tuples or dict-like classes",
                                found=path, where=name, fix="return tensors in one of these from the model's forward")


def graph_name(name: str) -> str:
    """What the graph calls an input, which has to be an identifier there.

    Example:
        >>> graph_name("pair.0"), graph_name("class")
        ('pair_0', 'class_')
    """
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    return f"{plain}_" if keyword.iskeyword(plain) else plain


def unpack_tree(tree: Tree, leaves: list) -> Any:
    """Decodes what ``pack_tree`` encoded. A class that is not imported becomes ``Outputs``; nothing is imported."""
    (kind, content), *rest = tree.items()
    if kind == "leaf":
        return leaves[content]
    if kind == "const":
        return content
    if kind in ("list", "tuple"):
        items = [unpack_tree(item, leaves) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {key: unpack_tree(item, leaves) for key, item in content.items()}
    fields = {key: unpack_tree(item, leaves) for key, item in rest[0][1].items()}
    module, _, name = content.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found(**fields) if isinstance(found, type) and issubclass(found, dict | tuple) else Outputs(fields)


@dataclasses.dataclass(frozen=True)
class Interface:
    """How the source model is called and what it returns.

    Attributes:
        parameters: The names that the source's forward takes, in order.
        arguments: The arguments of the captured call, as trees whose leaves count the graph's inputs.
        inputs: The graph's tensor inputs, in order.
        result: The output's tree, whose leaves count the graph's outputs.
        outputs: The graph's tensor outputs, in order.
    """

    parameters: tuple[str, ...]
    arguments: dict[str, Tree]
    inputs: tuple[TensorSpec, ...]
    result: Tree
    outputs: tuple[TensorSpec, ...]

    def bind(self, args: tuple, kwargs: dict) -> list[torch.Tensor]:
        """The graph's inputs, in order, for a call of the source model.

        Raises:
            UsageError: Unknown, missing or repeated arguments; a wrong dtype, rank or size; an argument that was fixed
                when the model was captured and now differs.
        """
        if len(args) > len(self.parameters):
            raise UsageError("too many positional arguments", expected=f"at most {len(self.parameters)}: "
                             f"{', '.join(self.parameters)}", found=len(args), where="forward")
        given = dict(zip(self.parameters, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise UsageError(f"argument {name} was given twice", expected="once", where="forward")
            given[name] = value
        tensors: list[torch.Tensor] = []
        for name, tree in self.arguments.items():
            if name not in given and "const" not in tree:
                raise UsageError(f"input {name} is missing", expected=self.summary(),
                                 found=", ".join(given) or "no arguments", where="forward")
            if name in given:
                self._match(name, tree, given.pop(name), tensors)
        for name, value in given.items():
            if value is None and name in self.parameters:
                continue
            near = difflib.get_close_matches(name, self.arguments, 1)
            raise UsageError(f"unexpected input {name}", expected=self.summary(), found=name, where="forward",
                             fix=f"did you mean {near[0]}?" if near else
                             "capture the model again with this input in example_inputs")
        self._check(tensors)
        return tensors

    def summary(self) -> str:
        """The inputs in one line."""
        return ", ".join(map(str, self.inputs))

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """The source's output type, filled with the graph's outputs."""
        return unpack_tree(self.result, outputs)

    def cast(self, before: torch.dtype, after: torch.dtype) -> "Interface":
        """The interface of the model in another precision: what was of one dtype is of the other."""
        def cast(specs):
            return tuple(spec.model_copy(update={"dtype": dtype_name(after)})
                         if spec.dtype == dtype_name(before) else spec for spec in specs)

        return dataclasses.replace(self, inputs=cast(self.inputs), outputs=cast(self.outputs))

    @staticmethod
    def _match(name: str, tree: Tree, value: Any, tensors: list) -> None:
        leaves: list = []
        found = pack_tree(value, leaves, [], name)
        if _structure(found) != _structure(tree):
            raise UsageError(f"argument {name} is not what the model was captured with", expected=_structure(tree),
                             found=_structure(found), where="forward",
                             fix="capture the model again with this value in example_inputs")
        tensors.extend(leaves)

    def _check(self, tensors: list[torch.Tensor]) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for spec, tensor in zip(self.inputs, tensors, strict=True):
            if dtype_name(tensor.dtype) != spec.dtype:
                raise UsageError(f"input {spec.name} has the wrong dtype", expected=spec.dtype,
                                 found=dtype_name(tensor.dtype), where=spec.name,
                                 fix=f"{spec.name}.to(torch.{spec.dtype})")
            if tensor.dim() != len(spec.shape):
                raise UsageError(f"input {spec.name} has the wrong rank", expected=str(spec),
                                 found=f"shape {tuple(tensor.shape)}", where=spec.name)
            for dim, (want, size) in enumerate(zip(spec.shape, tensor.shape, strict=True)):
                expected, by = (want, spec.name) if isinstance(want, int) else sizes.setdefault(want, (size, spec.name))
                if size != expected:
                    raise UsageError(f"dim {dim} of input {spec.name} does not fit",
                                     expected=f"{expected} ({want}, from {by})" if by != spec.name else expected,
                                     found=f"shape {tuple(tensor.shape)}", where=spec.name)

    def to_json(self) -> dict:
        """A JSON-ready form; ``from_json`` reads it back."""
        return {"parameters": list(self.parameters), "arguments": self.arguments, "result": self.result,
                "inputs": [spec.model_dump(mode="json") for spec in self.inputs],
                "outputs": [spec.model_dump(mode="json") for spec in self.outputs]}

    @classmethod
    def from_json(cls, data: dict) -> "Interface":
        """Reads what ``to_json`` wrote."""
        def specs(items):
            return tuple(TensorSpec(**item) for item in items)

        return cls(tuple(data["parameters"]), data["arguments"], specs(data["inputs"]), data["result"],
                   specs(data["outputs"]))


def _structure(tree: Tree) -> Any:
    """A tree with its leaves unnumbered, for comparing two calls."""
    (kind, content), *rest = tree.items()
    if kind == "leaf":
        return "tensor"
    if kind == "const":
        return repr(content)
    if kind in ("list", "tuple"):
        return [_structure(item) for item in content]
    return {key: _structure(item) for key, item in (rest[0][1] if rest else content).items()}

