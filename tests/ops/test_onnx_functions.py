import onnx
import onnx.checker
import onnx.inliner
import onnx.parser
import onnx.shape_inference
import pytest
from onnx import TensorProto

from modcompile.errors import UsageError
from modcompile.ops import ONNX_DOMAIN, ONNX_DOMAIN_VERSION, ONNX_OPSETS, onnx_functions

D = 16


def routed_model(element, opset, masked, capacity=None):
    """All ops in one graph; K is a constant, or ceil(S / 8) when ``capacity`` is None."""
    constant = f"capacity = Constant <value = int64 {{{capacity}}}> ()"
    one_in_eight = """
        rows = Shape <start = 1, end = 2> (logits)
        seven = Constant <value = int64[1] {7}> ()
        eight = Constant <value = int64[1] {8}> ()
        axis = Constant <value = int64[1] {0}> ()
        rounded = Add (rows, seven)
        quotient = Div (rounded, eight)
        capacity = Squeeze (quotient, axis)
    """
    kind = {TensorProto.FLOAT: "float", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}[element]
    route = "MaskedRoute (logits, valid, capacity)" if masked else "Route (logits, capacity)"
    mask = ", bool[B, S] valid" if masked else ""
    model = onnx.parser.parse_model(f"""
    <ir_version: 10, opset_import: ["": {opset}, "{ONNX_DOMAIN}": {ONNX_DOMAIN_VERSION}]>
    routed (float[B, S] logits, {kind}[B, S, {D}] x{mask}) => ({kind}[B, S, {D}] merged)
    {{
        {one_in_eight if capacity is None else constant}
        positions, filled = {ONNX_DOMAIN}.{route}
        chosen = {ONNX_DOMAIN}.GatherRows (x, positions)
        y = Tanh (chosen)
        score = {ONNX_DOMAIN}.GatherRows (logits, positions)
        filled_float = Cast <to = 1> (filled)
        gate = Mul (score, filled_float)
        merged = {ONNX_DOMAIN}.MergeRows (x, y, positions, gate)
    }}
    """)
    model.functions.extend(onnx_functions(opset))
    return model


@pytest.mark.parametrize("element", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
@pytest.mark.parametrize("opset", ONNX_OPSETS)
def test_bodies_are_valid_and_infer_shapes(opset, element):
    for masked in (False, True):
        model = routed_model(element, opset, masked, capacity=5)
        onnx.checker.check_model(model, full_check=True)
        inlined = onnx.inliner.inline_local_functions(model)
        assert {node.domain for node in inlined.graph.node} == {""}
        # Nothing declared: the shape of the residual stream must follow from the body alone.
        inlined.graph.output[0].type.tensor_type.ClearField("shape")
        inferred = onnx.shape_inference.infer_shapes(inlined, strict_mode=True, data_prop=True)
        output = inferred.graph.output[0].type.tensor_type
        assert output.elem_type == element
        assert [dim.dim_param or dim.dim_value for dim in output.shape.dim] == ["B", "S", D]


def test_bodies_hold_only_what_tensorrt_takes():
    for function in onnx_functions(18):
        for node in function.node:
            # Its parser rejects reductions in ScatterND; control flow would leave the static engine.
            assert node.domain == "" and node.op_type not in {"If", "Loop", "Scan"}
            assert "Sequence" not in node.op_type
            assert "reduction" not in {attribute.name for attribute in node.attribute}


def test_each_opset_is_imported_and_no_other_is_taken():
    for opset in ONNX_OPSETS:
        functions = onnx_functions(opset)
        assert [function.name for function in functions] == ["Route", "MaskedRoute", "GatherRows", "MergeRows"]
        for function in functions:
            assert function.domain == ONNX_DOMAIN
            assert [(entry.domain, entry.version) for entry in function.opset_import] == [("", opset)]
    for opset in (16, 24):
        with pytest.raises(UsageError) as raised:
            onnx_functions(opset)
        assert raised.value.details["expected"] == "17 <= opset <= 23"
        assert raised.value.details["found"] == f"opset = {opset}"


@pytest.mark.tensorrt
@pytest.mark.parametrize("capacity", [5, None], ids=["K constant", "K from S"])
@pytest.mark.parametrize("masked", [False, True], ids=["Route", "MaskedRoute"])
@pytest.mark.parametrize("element", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_bodies_build_in_tensorrt_rtx(element, masked, capacity):
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    model = routed_model(element, 18, masked, capacity)
    for form in (model, onnx.inliner.inline_local_functions(model)):
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        assert parser.parse(form.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            trailing = tuple(tensor.shape)[2:]
            profile.set_shape(tensor.name, *((batch, rows, *trailing) for batch, rows in ((1, 33), (2, 64), (4, 129))))
        config.add_optimization_profile(profile)
        assert builder.build_serialized_network(network, config) is not None
