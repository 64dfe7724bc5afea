"""What a value of a graph is computed from."""

__all__ = ["depends_on_inputs", "fits_bias", "summands"]

import onnx_ir as ir


def depends_on_inputs(value: ir.Value) -> bool:
    """Whether a value is computed from what a call brings."""
    pending, seen = [value], set[ir.Value]()
    while pending:
        value = pending.pop()
        if value.is_graph_input():
            return True
        node = value.producer()
        if node is not None and value not in seen:
            pending += [each for each in node.inputs if each is not None]
        seen.add(value)
    return False


def summands(value: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """What a value is the sum of, in either order; nothing if it is none."""
    add = value.producer()
    if add is None or add.op_type != "Add" or add.domain:
        return []
    first, second = add.inputs
    return [] if first is None or second is None else [(first, second), (second, first)]


def fits_bias(value: ir.Value, bias: ir.Value) -> bool:
    """Whether a bias is [N] and a value [..., N]: ONNX Runtime's own operators broadcast neither of the two."""
    weight = None
    if value.shape is None and (product := value.producer()) is not None and product.op_type == "MatMul":
        weight = product.inputs[1]
    shape = value.shape if weight is None else weight.shape
    return bias.shape is not None and len(bias.shape) == 1 and shape is not None and bias.shape[0] == shape[-1]
