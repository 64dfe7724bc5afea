"""What the rewrites of a graph have in common."""

__all__ = ["MICROSOFT", "add_constant", "add_function", "set_inputs", "take_place"]

from collections.abc import Sequence

import numpy as np
import onnx.parser
import onnx_ir as ir
from modcompile.runtimes.ort.custom_ops import DOMAIN, DOMAIN_VERSION

# The domain of ONNX Runtime's own operators.
MICROSOFT = "com.microsoft"


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Makes an array an initializer of the graph; no other may have its name."""
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def add_function(model: ir.Model, text: str) -> None:
    """Adds the body of an operator of our domain: what runs it where our custom-op library is not registered.

    Args:
        model: The model.
        text: The function in ONNX's text form, without a header.
    """
    header = f'<domain: "{DOMAIN}", opset_import: ["": {model.opset_imports[""]}, "{DOMAIN}": {DOMAIN_VERSION}]>'
    body = ir.serde.deserialize_function(onnx.parser.parse_function(header + text))
    model.functions[body.identifier()] = body


def set_inputs(node: ir.Node, values: Sequence[ir.Value | None]) -> None:
    """Gives a node these inputs, in the place of whatever it has."""
    node.resize_inputs(len(values))
    for index, value in enumerate(values):
        node.replace_input_with(index, value)


def take_place(node: ir.Node, values: Sequence[ir.Value | None]) -> None:
    """Has a new node's outputs used in the place of others, of the same types and shapes; where None stands, not."""
    for old, new in zip(values, node.outputs, strict=True):
        if old is None:
            continue
        # One that the graph hands out keeps its name.
        old.name, new.name = f"{old.name}/unfused", old.name
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
