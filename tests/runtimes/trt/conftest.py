"""Graphs written as ONNX text, and files of them."""

import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from modcompile.ops import onnx_functions

# S rows  K capacity  B batch  D model dim
ROUTED = """
(float[B, S, 32] x) => (float[B, S, 32] out)
<float[32, 1] router, float[32, 32] w, int64 capacity, int64[1] last = {-1}>
{
    scores = MatMul (x, router)
    logits = Squeeze (scores, last)
    positions, filled = modcompile.Route (logits, capacity)
    rows = modcompile.GatherRows (x, positions)
    y = MatMul (rows, w)
    gate = Cast <to = 1> (filled)
    out = modcompile.MergeRows (x, y, positions, gate)
}
"""


def _parse(text, opset=23, functions=False):
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1, "modcompile": 1]> main {text}')
    if functions:
        model.functions.extend(onnx_functions(opset))
    return model


def _routed_model(capacity=5):
    text = (ROUTED.replace("int64 capacity", f"int64 capacity = {{{capacity}}}")
            .replace("router,", f"router = {{{', '.join(['0.25'] * 32)}}},")
            .replace("w,", f"w = {{{', '.join(['0.5'] * 1024)}}},"))
    model = _parse(text, opset=18, functions=True)
    for tensor in model.graph.initializer:
        # As exporters write weights; only such ones go to a data file.
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    for node in model.graph.node:
        node.name = f"layers.1/{node.output[0]}/{node.op_type}"
    return model


@pytest.fixture
def parse():
    """Makes a model from the text of its graph."""
    return _parse


@pytest.fixture
def routed_model():
    """Makes a model of one routed block, whose calls have names as the exporter gives them."""
    return _routed_model


@pytest.fixture
def write(tmp_path):
    """Writes a model, or the text of a graph, to a file."""
    def write_model(model, name="model.onnx", **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save_model(_parse(model) if isinstance(model, str) else model, path, **options)
        return path

    return write_model
