"""A constant that a rewrite brings into a graph."""

__all__ = ["add_constant"]

import numpy as np
import onnx_ir as ir


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Makes an array an initializer of the graph; no other may have its name."""
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
