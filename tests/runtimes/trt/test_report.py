"""The layer table is read from the builder's words as they are, and kept as it was read."""

import pytest
from modcompile.runtimes.trt.report import BuildReport, layer_table, parse_layers

# As TensorRT-RTX 1.7 writes it, shortened.
TEXT = (
    "Layers:\n"
    "Name: __mye93_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0,"
    " Metadata: \n"
    "Name: h.0/MatMul+h.0/MatMul_1_myl0_4, LayerType: gemm, Inputs: [ { Name: x_myl0, Dimensions: [-1,64], Strides: "
    "[64,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [ { Name: w, "
    "Dimensions: [64,192], Strides: [192,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear "
    "format }, { Name: alpha, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row "
    "major linear format }], Outputs: [ { Name: y, Dimensions: [-1,17,16], Strides: [16,-1,1], StrideOrder: [1,2,0], "
    "Datatype: Half, Format: (Arbitrary) Format with stride order = [1,2,0] }], TacticName: __myelin_CASK_STUB, "
    "StreamId: 0, Metadata: [ONNX Layer: h.0/MatMul]\x1f[ONNX Layer: h.0/MatMul_1]\n"
    "Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Outputs: [ { Name: k, Location: "
    "Device, Dimensions: [], Datatype: Int64, Format: Format not available due to dynamic shapes }], ParameterType: "
    "ShapeH2D, shapeValues0: [-6], TacticValue: 0x0000000000000000, StreamId: 0, Metadata: \n"
    "\nI/O Tensors:\n Name: x, IOMode: Input, DataType: Half\n"
)


def test_layers_are_read_with_types_shapes_formats_and_nodes():
    empty, gemm, copy = parse_layers(TEXT)
    assert (empty.type, empty.precision, empty.nodes) == ("shape_call", "", ())
    assert (gemm.name, gemm.type, gemm.precision) == ("h.0/MatMul+h.0/MatMul_1_myl0_4", "gemm", "float16")
    assert gemm.nodes == ("h.0/MatMul", "h.0/MatMul_1")
    assert [str(tensor) for tensor in (*gemm.inputs, *gemm.constants, *gemm.outputs)] == [
        "float16 [-1, 64] Linear", "float16 [64, 192] Linear", "float32 [1] Linear", "float16 [-1, 17, 16] Arbitrary"]
    # What TensorRT runs outside its compiler has another form.
    assert (copy.name, copy.type, copy.nodes) == ("[ShapeHostToDeviceCopy 0]", "ShapeHostToDevice", ())
    assert list(map(str, copy.outputs)) == ["int64 [] Format not available due to dynamic shapes"]


@pytest.mark.parametrize("text", ["", "Layers:\n", TEXT.replace("LayerType", "Kind")])
def test_another_format_is_no_table(text):
    assert parse_layers(text) is None


def test_the_report_is_kept_as_it_is():
    report = BuildReport(lower_s=0.2, parse_s=0.1, build_s=0.5, engine_bytes=9, network_layers=7,
                         layers=parse_layers(TEXT))
    assert BuildReport.model_validate_json(report.model_dump_json()) == report


def test_the_table_has_a_line_for_each_layer():
    lines = layer_table(parse_layers(TEXT)).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["type", "layer", "output", "ONNX", "nodes"]
    assert lines[2].split() == ["gemm", "h.0/MatMul+h.0/MatMul_1_myl0_4", "float16", "[-1,", "17,", "16]", "Arbitrary",
                                "h.0/MatMul", "h.0/MatMul_1"]
