"""What a value of a graph is computed from."""

__all__ = ["depends_on_inputs", "summands"]

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
