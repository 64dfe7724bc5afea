"""Gathered rows and their norm in one operator of our own, for one kernel that reads the rows once.

    before:  %rows: [B, K, D] = GatherRows(%x, %positions);  %n = LayerNormalization(%rows, %g, %d)
    after:   %rows, %n = GatherLayerNorm(%x, %positions, %g, %d)

So a routed block begins whose norm comes first. An RMS norm becomes GatherRmsNorm. Both have function bodies in the
model.
"""

__all__ = ["fuse_gathers"]

import onnx_ir as ir
from modcompile.runtimes.ort.custom_ops import DOMAIN
from modcompile.runtimes.ort.fuse.edit import add_function, take_place

# B batch  K capacity  D model dim

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# The operator, what it takes, and the standard norm, by ONNX Runtime's name of the norm.
_FUSED = {"LayerNormalization": ("GatherLayerNorm", "weight, bias", "LayerNormalization"),
          "SimplifiedLayerNormalization": ("GatherRmsNorm", "weight", "RMSNormalization")}
_BODY = """
{name} <epsilon> (x, positions, {parameters}) => (rows, normed)
{{
    rows = {domain}.GatherRows (x, positions)
    normed = {norm} <axis = -1, epsilon: float = @epsilon> (rows, {parameters})
}}
"""


def fuse_gathers(model: ir.Model) -> None:
    """Rewrites a model in place."""
    fused = {node.op_type for node in list(model.graph)
             if not node.domain and node.op_type in _FUSED and _fuse(model.graph, node)}
    for op_type in sorted(fused):
        name, parameters, norm = _FUSED[op_type]
        add_function(model, _BODY.format(name=name, domain=DOMAIN, norm=norm, parameters=parameters))


def _fuse(graph: ir.Graph, norm: ir.Node) -> bool:
    rows, *parameters = norm.inputs
    gather = rows.producer() if rows is not None else None
    if rows is None or gather is None or gather.domain != DOMAIN or gather.op_type != "GatherRows":
        return False
    name, wanted, _ = _FUSED[norm.op_type]
    if len(parameters) != len(wanted.split(", ")) or len(norm.outputs) != 1 or rows.dtype not in _TYPES:
        return False
    if rows.shape is None or len(rows.shape) != 3 or norm.attributes.get_int("axis", -1) not in (-1, 2):
        return False
    if any(value is None or value.dtype != rows.dtype for value in parameters):
        return False
    epsilon = ir.AttrFloat32("epsilon", norm.attributes.get_float("epsilon", 1e-5))
    made = ir.node(name, [*gather.inputs, *parameters], attributes={epsilon.name: epsilon}, domain=DOMAIN,
                   num_outputs=2, name=f"{norm.name}Gathered")
    graph.insert_before(gather, made)
    take_place(made, (rows, norm.outputs[0]))
    return True
