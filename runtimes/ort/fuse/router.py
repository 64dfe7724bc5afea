"""A linear router and its route in one operator of our own, for one kernel that reads the hidden state once.

    before:  %f = Cast(%x: [B, S, D], to=float);  %r: [B, S] = Squeeze(Add(MatMul(%f, %w: [D, 1]), %b), [-1])
             %positions, %filled = Route(%r, %k)
    after:   %r, %positions, %filled = RouteRows(%x, %w, %b, %k)

A route with a mask becomes MaskedRouteRows. Both have function bodies in the model, which say the same in standard
operators and the route's own.
"""

__all__ = ["fuse_routers"]

import onnx_ir as ir
from modcompile.runtimes.ort.custom_ops import DOMAIN
from modcompile.runtimes.ort.fuse.edit import add_function, take_place

# B batch  S rows  K capacity  D model dim

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_BODY = """
{masked}RouteRows (x, weight, bias, {valid}capacity) => (logits, positions, filled)
{{
    last = Constant <value = int64[1] {{-1}}> ()
    rows = Cast <to = 1> (x)
    products = MatMul (rows, weight)
    biased = Add (products, bias)
    logits = Squeeze (biased, last)
    positions, filled = {domain}.{masked}Route (logits, {valid}capacity)
}}
"""


def fuse_routers(model: ir.Model) -> None:
    """Rewrites a model in place."""
    fused = {node.op_type for node in list(model.graph) if node.domain == DOMAIN
             and node.op_type in ("Route", "MaskedRoute") and _fuse(model.graph, node)}
    for op_type in sorted(fused):
        masked, valid = ("Masked", "valid, ") if op_type == "MaskedRoute" else ("", "")
        add_function(model, _BODY.format(domain=DOMAIN, masked=masked, valid=valid))


def _fuse(graph: ir.Graph, route: ir.Node) -> bool:
    logits, *rest = route.inputs
    squeeze = _producer(logits, "Squeeze")
    add = squeeze and _producer(squeeze.inputs[0], "Add")
    product = add and _producer(add.inputs[0], "MatMul")
    if not squeeze or not add or not product or logits is None:
        return False
    x, weight = product.inputs
    bias, axes = add.inputs[1], squeeze.inputs[1] if len(squeeze.inputs) > 1 else None
    if not x or not weight or not bias or not axes or logits.shape is None or len(logits.shape) != 2:
        return False
    tensors = weight.const_value, bias.const_value, axes.const_value
    if tensors[0] is None or tensors[1] is None or tensors[2] is None:
        return False
    if tensors[0].shape[1:] != (1,) or tensors[1].shape != (1,) or tensors[2].numpy().tolist() not in ([-1], [2]):
        return False
    cast = _producer(x, "Cast")
    x = cast.inputs[0] if cast else x
    if x is None or x.dtype not in _TYPES:
        return False
    made = ir.node(f"{route.op_type}Rows", [x, weight, bias, *rest], domain=DOMAIN, num_outputs=3,
                   name=f"{route.name}Rows")
    graph.insert_before(route, made)
    take_place(made, (logits, *route.outputs))
    return True


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and not node.domain else None
