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
from modcompile.runtimes.ort.fuse.source import depends_on_inputs, fits_bias, summands

# Of a sequence, up to which one product of three is faster on an H100.
_FEW_ROWS = 256


def fuse_attention(model: ir.Model) -> None:
    """Rewrites a model in place."""
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "Attention" and _contrib_attention(model.graph, node):
            _take_biases(model.graph, node)


def _contrib_attention(graph: ir.Graph, node: ir.Node) -> bool:
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
    if mask is not None and not _is_whole(mask, query, key):
        return False
    made = [ir.AttrInt64("num_heads", heads)]
    if attributes.get_int("is_causal", 0):
        made.append(ir.AttrInt64("unidirectional", 1))
    if (scale := attributes.get_float("scale")) is not None:
        made.append(ir.AttrFloat32("scale", scale))
    attributes.clear()
    attributes.update({attribute.name: attribute for attribute in made})
    node.op_type, node.domain = "MultiHeadAttention", MICROSOFT
    if mask is not None and mask.shape is not None and len(mask.shape) < 4:
        mask = _of_four_dims(graph, node, mask)
    # query, key, value, bias, key_padding_mask, attention_bias
    set_inputs(node, [query, key, value, *([None, None, mask] if mask is not None else [])])
    node.resize_outputs(1)
    return True


def _is_whole(mask: ir.Value, query: ir.Value | None, key: ir.Value | None) -> bool:
    """Whether a mask is added, and has all queries and all keys: it may broadcast over sequences and heads alone."""
    if mask.shape is None or len(mask.shape) < 2 or query is None or key is None or mask.dtype != query.dtype:
        return False
    rows = [value.shape[1] if value.shape is not None else None for value in (query, key)]
    return not any(size == 1 and count != 1 for size, count in zip(mask.shape[-2:], rows, strict=True))


def _of_four_dims(graph: ir.Graph, node: ir.Node, mask: ir.Value) -> ir.Value:
    """[S, S] or [H, S, S] as [1, 1, S, S] or [1, H, S, S], once for all attentions."""
    assert mask.shape is not None
    known = [user for user, _ in mask.uses() if user.name == f"{mask.name}/dims"]
    if not known:
        axes = list(range(4 - len(mask.shape)))
        sizes = add_constant(graph, f"{mask.name}/axes", np.array(axes, np.int64))
        known = [ir.node("Unsqueeze", [mask, sizes], name=f"{mask.name}/dims")]
        made = known[0].outputs[0]
        made.shape, made.type = ir.Shape([*[1 for _ in axes], *mask.shape]), mask.type
        graph.insert_before(node, known[0])
    return known[0].outputs[0]


def _take_biases(graph: ir.Graph, node: ir.Node) -> None:
    """Adds the projections' biases inside of the attention; a fused projection becomes three, or stays one."""
    operands = [value for value in node.inputs[:3] if value is not None]
    split = operands[0].producer()
    widths = {value.shape[-1] if value.shape else None for value in operands}
    # The values' heads may have another width.
    same_width = len(widths) == 1 and isinstance(widths.pop(), int)
    if split is not None and split.op_type == "Split" and list(split.outputs) == operands:
        fused = _biased_product(split.inputs[0])
        if fused is None or fused.weight.const_value is None or not same_width:
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
        if same_width and _has_few_rows(found[0].x) and all(
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
        if fits_bias(product, bias):
            return _Projection(x, weight, bias)
    return None


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()
