"""Simplifies an ONNX IR model: what is constant, repeated, or undone by the next node.

    before:  %s = Concat(Unsqueeze(%batch), Unsqueeze(%sequence), [12], [32]);  %y = Reshape(%x, %s)
             %w = Transpose(weight)
    after:   %y = Reshape(%x, [0, 0, 12, 32])
             the weight, transposed where it is stored

Why: sizes that are computed at run time hide a graph's structure from a runtime's own fusions, and cost a node each.
torch's optimizer does the like, but its search is quadratic in the graph (minutes for 30 blocks) and its fusions do
not check the shapes their operators take.

1. A Reshape's sizes that its input has at the same place become 0, one that is left -1.
2. A Reshape or Transpose that undoes the one before goes, as does one that changes nothing.
3. A weight that is used transposed is stored transposed, unless it is used as it is too.
4. A Cast of a bool to two types in turn is one Cast.
5. Constants are folded, nodes that compute the same are one, nodes without use go.
"""

__all__ = ["simplify"]

import functools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common


def simplify(model: ir.Model) -> None:
    """Simplifies the model in place."""
    common.InlinePass()(model)
    _store_transposed(model.graph)
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=False)
    for node in list(model.graph):
        if node.op_type in _RULES and not node.domain:
            _RULES[node.op_type](model.graph, node)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)


def _store_transposed(graph: ir.Graph) -> None:
    for weight in list(graph.initializers.values()):
        users = [node for node, _ in weight.uses()]
        tensor = weight.const_value
        if tensor is None or len(tensor.shape) != 2 or not users or not all(map(_swaps, users)):
            continue
        # An output of the graph is a use as well, of the weight as it is or of a Transpose that stays.
        if weight.is_graph_output() or any(node.outputs[0].is_graph_output() for node in users):
            continue
        weight.shape = ir.Shape(tuple(reversed(tensor.shape.numpy())))
        # Evaluated when the file is written, one weight at a time.
        weight.const_value = ir.LazyTensor(functools.partial(_transposed, tensor), dtype=tensor.dtype,
                                           shape=weight.shape, name=weight.name)
        for node in users:
            _replace(graph, node, weight)


def _swaps(node: ir.Node) -> bool:
    """Whether a node swaps the dims of a matrix. Without an order it does."""
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]


def _transposed(tensor: ir.TensorProtocol) -> ir.Tensor:
    return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype)


def _reshape(graph: ir.Graph, node: ir.Node) -> None:
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    before = _origin(source, "Reshape")
    if result.shape is None or node.attributes.get_int("allowzero", False):
        return
    if before.shape is not None and _same(before.shape, result.shape):
        _replace(graph, node, before)
        return
    if before is not source:
        # Only the last of several in a row counts, if its sizes can be had from the first one's input.
        source = before if _relative_sizes(before.shape, result.shape) else source
    sizes = _relative_sizes(source.shape, result.shape)
    if sizes is not None:
        node.replace_input_with(0, source)
        node.replace_input_with(1, _constant(graph, node, sizes))


def _transpose(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    before = source.producer()
    order = list(node.attributes.get_ints("perm"))
    if before is not None and before.op_type == "Transpose" and not before.domain:
        first = before.attributes.get_ints("perm")
        order = [first[axis] for axis in order]
        source = before.inputs[0]
        node.replace_input_with(0, source)
        node.attributes["perm"] = ir.AttrInt64s("perm", order)
    if order == sorted(order):
        assert source is not None
        _replace(graph, node, source)


def _cast(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0]
    before = source.producer() if source is not None else None
    if before is None or before.op_type != "Cast" or before.domain:
        return
    first = before.inputs[0]
    if first is not None and first.dtype == ir.DataType.BOOL:
        node.replace_input_with(0, first)


_RULES: dict[str, Callable[[ir.Graph, ir.Node], None]] = {"Reshape": _reshape, "Transpose": _transpose, "Cast": _cast}


def _origin(value: ir.Value, op_type: str) -> ir.Value:
    """The input of the first of the nodes of this type, in a row, that lead to a value."""
    producer = value.producer()
    while producer is not None and producer.op_type == op_type and not producer.domain:
        value = producer.inputs[0]  # type: ignore[assignment]
        producer = value.producer()
    return value


def _relative_sizes(before: ir.Shape | None, after: ir.Shape | None) -> list[int] | None:
    """The sizes a Reshape takes: numbers, 0 for the input's own at this place, at most one -1; None if that fails."""
    if after is None:
        return None
    sizes = []
    for axis, dim in enumerate(after):
        if isinstance(dim, int):
            sizes.append(dim)
        else:
            sizes.append(0 if before is not None and axis < len(before) and _equal(before[axis], dim) else -1)
    return sizes if sizes.count(-1) <= 1 else None


def _same(one: ir.Shape, other: ir.Shape) -> bool:
    return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))


def _equal(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    """Whether two dims are known to be of one size: a symbolic dim without a name equals none."""
    return one == other and not (isinstance(one, ir.SymbolicDim) and one.value is None)


def _constant(graph: ir.Graph, before: ir.Node, sizes: list[int]) -> ir.Value:
    node = ir.node("Constant", [], attributes={"value": ir.tensor(sizes, dtype=ir.DataType.INT64)})
    graph.insert_before(before, node)
    return node.outputs[0]


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Uses a value in the place of a node's output, also where that is an output of the graph."""
    output = node.outputs[0]
    if output.is_graph_output():
        return
    output.replace_all_uses_with(value)
