"""Opset 18 to 17: what the translator writes, as older readers (TensorRT 8.6) take it.

    before:  ReduceMean(x, axes=[-1])          axes are an input
             Split(x, num_outputs=3)
    after:   ReduceMean(x) with attribute axes
             Split(x)                          into equal parts, by the number of outputs

Why: the translator writes opset 18 at the least.
"""

__all__ = ["to_opset_17"]

import onnx_ir as ir

from modcompile.errors import UnsupportedGraphError

# Reductions whose axes became an input in opset 18; ReduceSum's are one since 13.
REDUCTIONS = frozenset({"ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
                        "ReduceLogSumExp", "ReduceSumSquare"})


def to_opset_17(model: ir.Model) -> None:
    """Rewrites a model of opset 18 in place. The checker has the last word on ops that opset 17 lacks.

    Raises:
        UnsupportedGraphError: A reduction over axes that are computed, or a split into unequal parts.
    """
    for node in model.graph.all_nodes():
        if node.domain == "" and node.op_type in REDUCTIONS:
            axes = node.inputs[1] if len(node.inputs) > 1 else None
            if axes is not None:
                if axes.const_value is None:
                    raise _unsupported(node, "axes that are numbers", "axes that are computed")
                node.attributes["axes"] = ir.AttrInt64s("axes", axes.const_value.numpy().tolist())
            node.resize_inputs(1)
            # It says what no axes mean; without it they mean all.
            if axes is not None or not node.attributes.get_int("noop_with_empty_axes", 0):
                node.attributes.pop("noop_with_empty_axes", None)
        elif node.domain == "" and node.op_type == "Split" and "num_outputs" in node.attributes:
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
            size = node.inputs[0].shape[axis] if node.inputs[0] is not None and node.inputs[0].shape else None
            if not isinstance(size, int) or size % len(node.outputs):
                raise _unsupported(node, "a split into equal parts", f"{size} in {len(node.outputs)} parts")
            node.attributes.pop("num_outputs")
    model.opset_imports[""] = 17


def _unsupported(node: ir.Node, expected: str, found: str) -> UnsupportedGraphError:
    return UnsupportedGraphError(f"{node.op_type} has no form in opset 17", expected=expected, found=found,
                                 where=node.name, fix="export with opset 18 or later")
