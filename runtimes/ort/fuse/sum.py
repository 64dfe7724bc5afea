"""The sum before a routed block, its norm, and the block's router and route, in one operator of our own.

    before:  %n, _, _, %s = SkipLayerNormalization(%o, %residual, %g, %d, %c)
             %r, %positions, %filled = RouteRows(%s, %w, %b, %k)
    after:   %n, %s, %r, %positions, %filled = SkipLayerNormRouteRows(%o, %residual, %g, %d, %c, %w, %b, %k)

Why: the router reads the row that the norm has just read. Such a pair is at the border of a dense and a routed block,
where the norm is that of the next dense one (``norm`` put it before the merge). An RMS norm, which has no biases,
becomes SkipRmsNormRouteRows; with a mask either is Masked. All have function bodies in the model. A layer norm's
product without a bias is given zeros; an RMS norm's product with one is left alone.
"""

__all__ = ["fuse_sums"]

import numpy as np
import onnx_ir as ir
from modcompile.runtimes.ort.custom_ops import DOMAIN
from modcompile.runtimes.ort.fuse.edit import add_constant, add_function, take_place

# B batch  S rows  K capacity  D model dim

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Our operator, its parameters, the product as it is added, and the standard norm, by ONNX Runtime's operator.
_FUSED = {
    "SkipLayerNormalization": ("SkipLayerNormRouteRows", "norm_weight, norm_bias, product_bias",
                               "Add (product, product_bias)", "LayerNormalization", "norm_weight, norm_bias"),
    "SkipSimplifiedLayerNormalization": ("SkipRmsNormRouteRows", "norm_weight", "Identity (product)",
                                         "RMSNormalization", "norm_weight"),
}
_BODY = """
{masked}{name} <epsilon> (product, residual, {parameters}, weight, bias, {valid}capacity)
    => (normed, summed, logits, positions, filled)
{{
    added = {added}
    summed = Add (residual, added)
    normed = {norm} <axis = -1, epsilon: float = @epsilon> (summed, {of_norm})
    logits, positions, filled = {domain}.{masked}RouteRows (summed, weight, bias, {valid}capacity)
}}
"""


def fuse_sums(model: ir.Model) -> None:
    """Rewrites a model in place, whose norms and routers are fused."""
    fused = {made for node in list(model.graph) if node.domain == DOMAIN
             and node.op_type in ("RouteRows", "MaskedRouteRows") and (made := _fuse(model.graph, node))}
    for op_type, masked in sorted(fused):
        name, parameters, added, norm, of_norm = _FUSED[op_type]
        add_function(model, _BODY.format(
            name=name, parameters=parameters, added=added, norm=norm, of_norm=of_norm, domain=DOMAIN, masked=masked,
            valid="valid, " if masked else ""))


def _fuse(graph: ir.Graph, route: ir.Node) -> tuple[str, str] | None:
    """What was fused: ONNX Runtime's operator, and "Masked" or nothing."""
    summed, *rest = route.inputs
    skip = summed.producer() if summed is not None else None
    if summed is None or skip is None or skip.op_type not in _FUSED or len(skip.outputs) < 4:
        return None
    normed = skip.outputs[0]
    if summed is not skip.outputs[3] or not (normed.uses() or normed.is_graph_output()):
        return None
    parameters = _FUSED[skip.op_type][1].split(", ")
    product, residual, *given = skip.inputs
    if product is None or residual is None or product.shape is None:
        return None
    if product.shape != residual.shape or len(product.shape) != 3 or product.dtype not in _TYPES:
        return None
    if parameters[-1] == "product_bias" and (len(given) == len(parameters) - 1 or given[-1] is None):
        given[len(parameters) - 1:] = [_zeros(graph, product)]
    if len(given) != len(parameters):
        return None
    if any(value is None or value.dtype != product.dtype for value in (residual, *given)):
        return None
    masked = "Masked" if route.op_type.startswith("Masked") else ""
    # ONNX Runtime's default, which is not the standard norm's.
    epsilon = ir.AttrFloat32("epsilon", skip.attributes.get_float("epsilon", 1e-12))
    made = ir.node(f"{masked}{_FUSED[skip.op_type][0]}", [product, residual, *given, *rest], domain=DOMAIN,
                   attributes={epsilon.name: epsilon}, num_outputs=5, name=f"{route.name}Summed")
    graph.insert_before(route, made)
    take_place(made, (normed, summed, *route.outputs))
    return skip.op_type, masked


def _zeros(graph: ir.Graph, product: ir.Value) -> ir.Value | None:
    """A bias that adds nothing, if the product's width is known."""
    width = product.shape[-1] if product.shape is not None else None
    if not isinstance(width, int) or product.dtype is None:
        return None
    name = f"no_bias_{width}_{product.dtype.name}"
    return graph.initializers.get(name) or add_constant(graph, name, np.zeros(width, product.dtype.numpy()))
