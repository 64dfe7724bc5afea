"""ONNX Runtime's own attention, which takes the projections' biases, and for few rows the projections too.

    before:  %q, %k, %v = Split(Add(MatMul(%x, %w), %b));  %a = Attention(%q, %k, %v, is_causal=1)
    after:   %q, %k, %v = MatMul(%x, %w[:, 0:D]), ...;  %a = MultiHeadAttention(%q, %k, %v, %b, unidirectional=1)
    or:      %a = com.microsoft.Attention(%x, %w, %b, unidirectional=1)

The latter makes one product of three, and adds the biases in one kernel: for a routed block, whose kernels take some
microseconds each, launches count.
"""

__all__ = ["fuse_attention"]

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from modcompile.runtimes.ort.fuse.edit import MICROSOFT, add_constant, set_inputs
from modcompile.runtimes.ort.fuse.source import depends_on_inputs, summands

# Of a sequence, up to which one product of three is faster on an H100.
_FEW_ROWS = 256


def fuse_attention(model: ir.Model) -> None:
    """Rewrites a model in place."""
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "Attention" and _contrib_attention(node):
            _take_biases(model.graph, node)


def _contrib_attention(node: ir.Node) -> bool:
    """MultiHeadAttention, where heads are packed, [B, S, H * d], and as many for keys as for queries."""
    attributes = node.attributes
    heads, softcap = attributes.get_int("q_num_heads"), attributes.get_float("softcap")
    if heads is None or heads != attributes.get_int("kv_num_heads") or softcap:
        return False
    query, key, value, *rest = node.inputs
    mask = rest[0] if rest else None
    if any(rest[1:]) or any(output.uses() for output in node.outputs[1:]):
        return False
    # Of more keys than queries it lets the last query see all, where ONNX lets the first one see one.
    rows = [value.shape[1] if value is not None and value.shape is not None else None for value in (query, key)]
    named = [row.value if isinstance(row, ir.SymbolicDim) else row for row in rows]
    if attributes.get_int("is_causal", 0) and None not in named and named[0] != named[1]:
        return False
    made = [ir.AttrInt64("num_heads", heads)]
    if attributes.get_int("is_causal", 0):
        made.append(ir.AttrInt64("unidirectional", 1))
    if (scale := attributes.get_float("scale")) is not None:
        made.append(ir.AttrFloat32("scale", scale))
    attributes.clear()
    attributes.update({attribute.name: attribute for attribute in made})
    node.op_type, node.domain = "MultiHeadAttention", MICROSOFT
    # query, key, value, bias, key_padding_mask, attention_bias
    set_inputs(node, [query, key, value, *([None, None, mask] if mask is not None else [])])
    node.resize_outputs(1)
    return True


def _take_biases(graph: ir.Graph, node: ir.Node) -> None:
    """Adds the projections' biases inside of the attention; a fused projection becomes three, or stays one."""
    operands = [value for value in node.inputs[:3] if value is not None]
    split = operands[0].producer()
    if split is not None and split.op_type == "Split" and list(split.outputs) == operands:
        fused = _biased_product(split.inputs[0])
        widths = {value.shape[-1] if value.shape else None for value in operands}
        if fused is None or fused.weight.const_value is None or len(widths) != 1 or not isinstance(widths.pop(), int):
            return
        if _has_few_rows(fused.x):
            _project_inside(graph, node, fused)
            return
        parts = np.split(_array(fused.weight), 3, axis=1)
        made = [(fused.x, add_constant(graph, f"{node.name}/weight_{name}", part))
                for name, part in zip("qkv", parts, strict=True)]
        bias = fused.bias
    else:
        found = [product for value in operands if (product := _biased_product(value)) is not None]
        if len(found) != 3:
            return
        bias = add_constant(graph, f"{node.name}/bias", np.concatenate([_array(product.bias) for product in found]))
        if _has_few_rows(found[0].x) and all(
                product.x is found[0].x and product.weight.const_value is not None for product in found):
            weights = np.concatenate([_array(product.weight) for product in found], axis=1)
            _project_inside(graph, node,
                            _Projection(found[0].x, add_constant(graph, f"{node.name}/weight", weights), bias))
            return
        made = [(product.x, product.weight) for product in found]
    for index, (operand, (x, weight)) in enumerate(zip(operands, made, strict=True)):
        product_node = ir.node("MatMul", [x, weight], name=f"{node.name}/MatMul_{index}")
        product_node.outputs[0].shape, product_node.outputs[0].type = operand.shape, operand.type
        graph.insert_before(node, product_node)
        node.replace_input_with(index, product_node.outputs[0])
    if len(node.inputs) < 4:
        node.resize_inputs(4)
    node.replace_input_with(3, bias)


def _has_few_rows(x: ir.Value) -> bool:
    return x.shape is not None and len(x.shape) == 3 and isinstance(x.shape[1], int) and x.shape[1] <= _FEW_ROWS


def _project_inside(graph: ir.Graph, node: ir.Node, projection: "_Projection") -> None:
    """Makes a MultiHeadAttention without biases the operator that projects as well."""
    mask = node.inputs[5] if len(node.inputs) > 5 else None
    node.op_type = "Attention"
    # input, weights, bias, mask_index, past, attention_bias
    set_inputs(node, [*projection, *([None, None, mask] if mask is not None else [])])


class _Projection(NamedTuple):
    """x @ weight + bias [N]."""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value


def _biased_product(value: ir.Value | None) -> _Projection | None:
    """The product with a weight, and the bias that is added to it, that a value is; each used once."""
    if value is None or len(value.uses()) != 1:
        return None
    for product, bias in summands(value):
        matmul = product.producer()
        if matmul is None or matmul.op_type != "MatMul" or len(product.uses()) != 1:
            continue
        x, weight = matmul.inputs
        # A weight may be a slice of one, as where rows that pass by offer keys and values.
        if x is None or weight is None or bias.const_value is None or depends_on_inputs(weight):
            continue
        if len(bias.const_value.shape) == 1:
            return _Projection(x, weight, bias)
    return None


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()
