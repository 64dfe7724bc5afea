"""Opset 18 as opset 17 has it: the same numbers, or a reason."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from modcompile.errors import UnsupportedGraphError
from modcompile.export.downgrade import REDUCTIONS, to_opset_17


def model_of(body, inputs="float[3, 6] x", outputs="float[A, B] y", axes=(-1,)):
    """A model from text, in which ``axes`` are an initializer, as the translator leaves them."""
    values = ", ".join(map(str, axes))
    return onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 18]>
        graph ({inputs}) => ({outputs}) <int64[{len(axes)}] axes = {{{values}}}> {{ {body} }}""")


def downgraded(proto):
    model = ir.from_proto(proto)
    to_opset_17(model)
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    assert made.opset_import[0].version == 17
    return made


def run(proto, *values):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {spec.name: value for spec, value in zip(session.get_inputs(), values, strict=True)})


X = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32) ** 2 + 0.5


def assert_same(proto):
    made = downgraded(proto)
    for actual, expected in zip(run(made, X), run(proto, X), strict=True):
        np.testing.assert_array_equal(actual, expected)
    return {node.op_type: node for node in made.graph.node}


@pytest.mark.parametrize("op", sorted(REDUCTIONS))
def test_axes_become_an_attribute(op):
    (node,) = [node for node in assert_same(model_of(f"y = {op} (x, axes)")).values() if node.op_type == op]
    assert list(node.input) == ["x"]
    assert {a.name: list(a.ints) or a.i for a in node.attribute}["axes"] == [-1]


def test_what_no_axes_would_mean_is_not_said_beside_axes():
    node = assert_same(model_of("y = ReduceMean <keepdims = 1, noop_with_empty_axes = 1> (x, axes)",
                                axes=(0, 1)))["ReduceMean"]
    assert {a.name: list(a.ints) or a.i for a in node.attribute} == {"keepdims": 1, "axes": [0, 1]}


def test_a_reduction_over_everything_has_no_axes():
    node = assert_same(model_of("y = ReduceMax (x)"))["ReduceMax"]
    assert list(node.input) == ["x"]


def test_a_sum_has_axes_as_an_input_since_13():
    node = assert_same(model_of("y = ReduceSum (x, axes)"))["ReduceSum"]
    assert list(node.input) == ["x", "axes"]


@pytest.mark.parametrize("axis", [1, -1, None])
def test_a_split_into_equal_parts(axis):
    attributes = "num_outputs = 3" if axis is None else f"axis = {axis}, num_outputs = 3"
    proto = model_of(f"a, b, y = Split <{attributes}> (x)", outputs="float[A, B] a, float[A, B] b, float[A, B] y")
    node = assert_same(proto)["Split"]
    assert "num_outputs" not in {attribute.name for attribute in node.attribute}


def test_a_split_by_sizes_stays():
    node = assert_same(model_of("sizes = Constant <value = int64[2] {2, 4}> ()\n a, y = Split <axis = 1> (x, sizes)",
                                outputs="float[A, B] a, float[A, B] y"))["Split"]
    assert list(node.input) == ["x", "sizes"]


@pytest.mark.parametrize(("body", "inputs", "problem", "found"), [
    ("y = ReduceMean (x, given)", "float[3, 6] x, int64[1] given", "ReduceMean has no form in opset 17",
     "axes that are computed"),
    ("a, y = Split <axis = 1, num_outputs = 2> (x)", "float[3, 7] x", "Split has no form in opset 17", "7 in 2 parts"),
    ("a, y = Split <axis = 1, num_outputs = 2> (x)", "float[3, S] x", "Split has no form in opset 17", "S in 2 parts"),
])
def test_what_has_no_form(body, inputs, problem, found):
    outputs = "float[A, B] a, float[A, B] y" if "Split" in body else "float[A, B] y"
    with pytest.raises(UnsupportedGraphError) as caught:
        to_opset_17(ir.from_proto(model_of(body, inputs, outputs)))
    assert caught.value.problem == problem and found in caught.value.details["found"]
    assert caught.value.details["fix"] == "export with opset 18 or later"


def test_other_domains_are_no_business_of_ours():
    model = ir.from_proto(onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 18, "other": 1]>
        graph (float[3, 6] x) => (float[A, B] y) <int64[1] axes = {-1}> { y = other.ReduceMean (x, axes) }"""))
    to_opset_17(model)
    assert len(model.graph[-1].inputs) == 2 and model.opset_imports == {"": 17, "other": 1}
