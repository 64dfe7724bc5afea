"""Random inputs that a model or an engine takes: words of the vocabulary, masks that hide nothing, normal floats."""

__all__ = ["index_limits", "sample_inputs", "shapes_with", "symbol_sizes"]

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modcompile.errors import UsageError

if TYPE_CHECKING:
    import torch.fx

    from modcompile.model import GraphModel

# Sizes that are not asked for: of dim 0, which is the batch, and of any other.
BATCH, ROWS = 2, 16

RESHAPES = {f"aten.{op}" for op in ("view.default", "reshape.default", "expand.default", "slice.Tensor", "to.dtype",
                                    "unsqueeze.default", "clone.default", "_to_copy.default")}


def sample_inputs(specs: Iterable[Any], shapes: Mapping[str, Sequence[int]] | None = None, *,
                  limits: Mapping[str, int] | None = None, padding_mask: str | None = None,
                  seed: int = 0, given: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Random arrays by input name, but for those that are given.

    Args:
        specs: The inputs, with ``name``, ``dtype`` and ``shape``: of a model, an engine or a manifest.
        shapes: Shapes by input name. A symbol that gets a size from one input has it in all of them.
        limits: For integer inputs, the least integer that is too large: see ``index_limits``. By default 2.
        padding_mask: The input that is nonzero at valid tokens, with a leading "~" zero there: it hides nothing.
        seed: The same seed gives the same arrays.
        given: Arrays by input name that are taken as they are; their symbols have their sizes.

    Returns:
        Integers from 0 on, normally distributed floats; all ones for a boolean input and for an integer one that
        indexes nothing and is called a mask.

    Raises:
        UsageError: A shape or an array of no input, or one that does not fit.

    Example:
        >>> from modcompile.manifest import TensorSpec
        >>> spec = TensorSpec(name="ids", dtype="int64", shape=("batch", "rows"))
        >>> sample_inputs([spec], {"ids": (2, 3)}, limits={"ids": 9})["ids"]
        array([[7, 5, 4],
               [2, 2, 0]])
    """
    specs, limits, given = list(specs), limits or {}, given or {}
    sizes = symbol_sizes(specs, shapes_with(shapes, given))
    generator = np.random.default_rng(seed)
    arrays = {}
    for spec in specs:
        shape = tuple(dim if isinstance(dim, int) else sizes.setdefault(dim, ROWS if axis else BATCH)
                      for axis, dim in enumerate(spec.shape))
        arrays[spec.name] = _array(generator, spec, shape, limits.get(spec.name))
    if padding_mask is not None:
        name = padding_mask.removeprefix("~")
        arrays[name] = np.full_like(arrays[name], name == padding_mask)
    for name, array in given.items():
        if array.dtype != arrays[name].dtype:
            raise UsageError("an input has another dtype", expected=arrays[name].dtype, found=array.dtype, where=name)
        arrays[name] = array
    return arrays


def shapes_with(shapes: Mapping[str, Sequence[int]] | None, given: Mapping[str, np.ndarray]
                ) -> dict[str, Sequence[int]]:
    """Shapes by input name, with those of arrays that are given."""
    return {**(shapes or {}), **{name: array.shape for name, array in given.items()}}


def symbol_sizes(specs: Iterable[Any], shapes: Mapping[str, Sequence[int]] | None) -> dict[str, int]:
    """The sizes that shapes by input name give to the symbols of the inputs.

    Raises:
        UsageError: A shape of no input, or one that does not fit.

    Example:
        >>> from modcompile.manifest import TensorSpec
        >>> symbol_sizes([TensorSpec(name="ids", dtype="int64", shape=("batch", 128))], {"ids": (8, 128)})
        {'batch': 8}
    """
    declared = {spec.name: spec for spec in specs}
    sizes: dict[str, int] = {}
    for name, shape in (shapes or {}).items():
        if name not in declared:
            raise UsageError("there is no input of this name", expected=", ".join(map(str, declared.values())),
                             found=name, where="shapes")
        dims = declared[name].shape
        if len(shape) != len(dims) or any(size != (dim if isinstance(dim, int) else sizes.setdefault(dim, size))
                                          for dim, size in zip(dims, shape, strict=True)):
            raise UsageError(f"the shape of input {name} does not fit", expected=declared[name], found=tuple(shape),
                             where="shapes")
    return sizes


def index_limits(model: "GraphModel") -> dict[str, int]:
    """For every input that is looked up in a table, the number of the table's rows."""
    graph_module = model.graph_module
    limits: dict[str, int] = {}
    # Blocks are sub-graphs of their own, but what looks words up comes before them.
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and str(node.target) == "aten.embedding.default":
            source = _source(node.args[1])
            if source is not None:
                rows = node.args[0].meta["val"].shape[0]
                limits[source] = min(rows, limits.get(source, rows))
    names = [node.name for node in graph_module.graph.find_nodes(op="placeholder")]
    return {spec.name: limits[name] for name, spec in zip(names, model.inputs, strict=True) if name in limits}


def _source(node: "torch.fx.Node") -> str | None:
    """The placeholder whose values, reshaped at most, these are."""
    while str(node.target) in RESHAPES:
        node = node.args[0]
    return node.name if node.op == "placeholder" else None


def _array(generator: np.random.Generator, spec: Any, shape: tuple[int, ...], limit: int | None) -> np.ndarray:
    if spec.dtype == "bool":
        return np.ones(shape, bool)
    if "int" in spec.dtype:
        if limit is None and "mask" in spec.name:
            return np.ones(shape, spec.dtype)
        return generator.integers(0, limit or 2, shape, spec.dtype)
    values = generator.standard_normal(shape, np.float32)
    if spec.dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16)
    return values.astype(spec.dtype)
