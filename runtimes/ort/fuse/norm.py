"""The sum of a residual, a product and its bias, and the norm that follows, in one operator.

    before:  %s: [B, S, D] = Add(%residual, Add(%o, %c));  %n = LayerNormalization(%s, %g, %d)
    after:   %n, _, _, %s = SkipLayerNormalization(%o, %residual, %g, %d, %c)

Between the sum and the norm there may be a routed block. A norm takes every row by itself, so it may come before the
merge, on the K rows and on the others apart:

    before:  %s = Add(...);  %m: [B, S, D] = MergeRows(%s, %y: [B, K, D], %positions, %gate)
             %n = LayerNormalization(%m, %g, %d)
    after:   %s = Add(...);  %m = MergeRows(%s, %y, %positions, %gate)
             %rows: [B, K, D] = GatherRows(%m, %positions);  %n_rows = LayerNormalization(%rows, %g, %d)
             %n_s = LayerNormalization(%s, %g, %d);  %n = MergeRows(%n_s, %n_rows, %positions, 1)

Then the norm of all rows is fused with the sum that made them, and both merges write K rows in place. Where the gate is
known to be 0 or 1, a merged row is %s's or %y's, and so is its norm. Then the norm of %y is fused too, and both merges
are one operator of our own:

    after:   %s = Add(...);  %n_s = LayerNormalization(%s, %g, %d);  %n_y = LayerNormalization(%y, %g, %d)
             %m, %n = MergeRowPairs(%s, %y, %positions, %gate, %n_s, %n_y)

The fused norms are onnxscript's own rewrites. They see a bias in the first operand alone, and no sum of words and their
places, [B, S, D] and [1, S, D], which begins a model; both are taken care of here.

A norm that is left alone, such as one of gathered rows, becomes a fused one with nothing to add: for 1024 rows of 1024
ONNX Runtime's kernel for the norm alone takes 11 us on an H100, the other 3.
"""

__all__ = ["fuse_lone_norms", "fuse_norms"]

import numpy as np
import onnx_ir as ir
from modcompile.runtimes.ort.custom_ops import DOMAIN
from modcompile.runtimes.ort.fuse.edit import MICROSOFT, add_constant, add_function, set_inputs, take_place
from modcompile.runtimes.ort.fuse.source import fits_bias, summands
from onnxscript.rewriter.ort_fusions.skip_normalization import (
    fuse_skip_layer_normalization,
    fuse_skip_rms_normalization,
)

# B batch  S rows  K capacity  D model dim

_NORMS = ("LayerNormalization", "SimplifiedLayerNormalization")
# Which input of the fused norms is the product's bias.
_BIAS_AT = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}
# K of S rows at most, above which a norm of its own for them is not worth its launch.
_MOST_ROWS = 0.5

_PAIRS = f"""
MergeRowPairs (x, y, positions, gate, other_x, other_y) => (merged, other_merged)
{{
    merged = {DOMAIN}.MergeRows (x, y, positions, gate)
    other_merged = {DOMAIN}.MergeRows (other_x, other_y, positions, gate)
}}
"""


def fuse_norms(model: ir.Model) -> None:
    """Rewrites the norms of sums in place."""
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "RMSNormalization":
            # ONNX Runtime's own name for it, by which the next rewrites know it.
            node.op_type = "SimplifiedLayerNormalization"
        if node.domain == "" and node.op_type in _NORMS:
            _norm_before_merge(model.graph, node)
    if any(node.op_type == "MergeRowPairs" for node in model.graph):
        add_function(model, _PAIRS)
    fuse_skip_layer_normalization(model)
    fuse_skip_rms_normalization(model)
    for node in list(model.graph):
        if node.domain == MICROSOFT and node.op_type in _BIAS_AT:
            _take_bias(node)


def fuse_lone_norms(model: ir.Model) -> None:
    """Rewrites the norms that are left in place."""
    for node in list(model.graph):
        if node.domain == "" and node.op_type in _NORMS:
            _skip_nothing(model.graph, node)


def _norm_before_merge(graph: ir.Graph, norm: ir.Node) -> None:
    merged = norm.inputs[0]
    merge = merged.producer() if merged is not None else None
    if merged is None or merge is None or merge.op_type != "MergeRows" or len(norm.outputs) != 1:
        return
    x, y, positions, gate = merge.inputs
    if x is None or y is None or positions is None or gate is None or merged.dtype is None:
        return
    summed = x.producer()
    if summed is None or summed.op_type != "Add" or norm.attributes.get_int("axis", -1) not in (-1, 2):
        return
    if x.shape is None or positions.shape is None:
        return
    sizes = [size for size in (*x.shape, *positions.shape) if isinstance(size, int)]
    if len(sizes) != 5:
        return
    batch, rows, _, _, capacity = sizes
    if capacity > _MOST_ROWS * rows:
        return
    def added(after: ir.Node, node: ir.Node, like: ir.Value) -> ir.Value:
        graph.insert_after(after, node)
        node.outputs[0].shape, node.outputs[0].type = like.shape, like.type
        return node.outputs[0]

    def normed(value: ir.Value, after: ir.Node, what: str) -> ir.Value:
        copy = ir.node(norm.op_type, [value, *norm.inputs[1:]], attributes=dict(norm.attributes),
                       name=f"{norm.name}/{what}")
        return added(after, copy, value)

    normed_x = normed(x, summed, "all")
    if _is_switch(gate):
        pair = ir.node("MergeRowPairs", [*merge.inputs, normed_x, normed(y, merge, "rows")], domain=DOMAIN,
                       num_outputs=2, name=f"{merge.name}Pairs")
        graph.insert_before(norm, pair)
        take_place(pair, (merged, norm.outputs[0]))
        return
    gather = ir.node("GatherRows", [merged, positions], domain=DOMAIN, name=f"{norm.name}/GatherRows")
    normed_rows = normed(added(merge, gather, y), gather, "rows")
    one = add_constant(graph, f"{norm.name}/ones", np.ones((batch, capacity), merged.dtype.numpy()))
    # The norm's node becomes the merge, for its output may be one of the graph's.
    norm.op_type, norm.domain = merge.op_type, merge.domain
    norm.attributes.clear()
    set_inputs(norm, [normed_x, normed_rows, positions, one])


def _take_bias(skip: ir.Node) -> None:
    """Makes the bias of either operand the norm's own."""
    place = _BIAS_AT[skip.op_type]
    if len(skip.inputs) > place and skip.inputs[place] is not None:
        return
    for value, other in ((skip.inputs[0], skip.inputs[1]), (skip.inputs[1], skip.inputs[0])):
        if value is None or len(value.uses()) != 1 or value.is_graph_output():
            continue
        for product, bias in summands(value):
            if fits_bias(value, bias) and fits_bias(product, bias):
                further = [*skip.inputs[2:place], *[None] * (place - len(skip.inputs))]
                set_inputs(skip, [product, other, *further, bias])
                return


def _skip_nothing(graph: ir.Graph, norm: ir.Node) -> None:
    x = norm.inputs[0]
    if x is None or x.dtype is None or x.shape is None or len(x.shape) != 3 or len(norm.outputs) != 1:
        return
    rows, width = x.shape[1:]
    if not isinstance(rows, int) or not isinstance(width, int) or norm.attributes.get_int("axis", -1) not in (-1, 2):
        return
    epsilon = ir.AttrFloat32("epsilon", norm.attributes.get_float("epsilon", 1e-5))
    if summed := _with_places(x):
        skip = ir.node(f"Skip{norm.op_type}", [*summed, *norm.inputs[1:]], attributes={epsilon.name: epsilon},
                       domain=MICROSOFT, num_outputs=4, name=f"{norm.name}/skip")
        graph.insert_before(norm, skip)
        take_place(skip, (norm.outputs[0], None, None, x))
        return
    name = f"nothing_{rows}x{width}_{x.dtype.name}"
    nothing = graph.initializers.get(name) or add_constant(graph, name, np.zeros((1, rows, width), x.dtype.numpy()))
    norm.op_type, norm.domain = f"Skip{norm.op_type}", MICROSOFT
    norm.attributes.clear()
    norm.attributes[epsilon.name] = epsilon
    set_inputs(norm, [x, nothing, *norm.inputs[1:]])


def _with_places(x: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """What x [B, S, D] is the sum of, if that is a tensor of its shape and one of [1, S, D]."""
    for words, places in summands(x):
        if x.shape is not None and places.shape is not None and words.shape == x.shape and \
                list(places.shape) == [1, *x.shape[1:]]:
            return words, places
    return None


def _is_switch(gate: ir.Value) -> bool:
    """Whether all of a gate is known to be 0 or 1: ones, or what says which slots are filled."""
    if gate.const_value is not None:
        return bool((gate.const_value.numpy() == 1).all())
    cast = gate.producer()
    switch = cast.inputs[0] if cast is not None and cast.op_type == "Cast" and not cast.domain else None
    return switch is not None and switch.dtype == ir.DataType.BOOL
