"""An ONNX graph loses what is constant, repeated or undone by the next node, and gives the same numbers."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from modcompile.export.simplify import simplify


def graph_of(body, inputs="float[B, S, 8] x", outputs="float[B, S, 8] y", initializers="", values=""):
    """A model from text; ``values`` are intermediate ones, with types."""
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 18]>
        graph ({inputs}) => ({outputs}) <{", ".join(filter(None, [initializers, values]))}> {{ {body} }}""")


def simplified(proto):
    model = ir.from_proto(proto)
    simplify(model)
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    again = ir.from_proto(made)
    simplify(again)
    assert ops(ir.to_proto(again)) == ops(made)
    return made


def ops(proto):
    return [node.op_type for node in proto.graph.node]


def run(proto, *values):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {spec.name: value for spec, value in zip(session.get_inputs(), values, strict=True)})


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = numbers(3, 63, 8)


def assert_same(before, after, *values):
    for actual, expected in zip(run(after, *values or [X]), run(before, *values or [X]), strict=True):
        np.testing.assert_array_equal(actual, expected)


def constants(proto):
    return {tensor.name: onnx.numpy_helper.to_array(tensor).tolist() for tensor in proto.graph.initializer}


# Case 1

COMPUTED_SIZES = """
    shape = Shape (x)
    rows = Slice (shape, zero, two)
    sizes = Concat <axis = 0> (rows, heads)
    split = Reshape (x, sizes)
    y = Relu (split)"""
SIZES = "int64[1] zero = {0}, int64[1] two = {2}, int64[2] heads = {2, 4}"


def test_case_1_sizes_of_the_input_become_relative():
    before = graph_of(COMPUTED_SIZES, outputs="float[B, S, 2, 4] y", initializers=SIZES,
                      values="float[B, S, 2, 4] split")
    after = simplified(before)
    assert ops(after) == ["Reshape", "Relu"]
    assert constants(after)[after.graph.node[0].input[1]] == [0, 0, 2, 4]
    assert_same(before, after)


def test_case_1_one_size_may_be_left_out():
    before = graph_of("""
        shape = Shape (x)
        b = Slice (shape, zero, one)
        s = Slice (shape, one, two)
        n = Mul (b, s)
        sizes = Concat <axis = 0> (n, width)
        flat = Reshape (x, sizes)
        y = Relu (flat)""", outputs="float[N, 8] y", values="float[N, 8] flat",
                      initializers="int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] width = {8}")
    after = simplified(before)
    assert ops(after) == ["Reshape", "Relu"] and [-1, 8] in constants(after).values()
    assert_same(before, after)


def test_case_1_two_sizes_that_are_not_the_inputs_stay_computed():
    before = graph_of("""
        shape = Shape (x)
        b = Slice (shape, zero, one)
        s = Slice (shape, one, two)
        sizes = Concat <axis = 0> (s, b, width)
        other = Reshape (x, sizes)
        y = Relu (other)""", outputs="float[S, B, 8] y", values="float[S, B, 8] other",
                      initializers="int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] width = {8}")
    after = simplified(before)
    assert "Shape" in ops(after)
    assert_same(before, after)


def test_case_1_sizes_without_a_name_are_not_known_to_be_equal():
    proto = graph_of(COMPUTED_SIZES, outputs="float[B, S, 2, 4] y", initializers=SIZES,
                     values="float[B, S, 2, 4] split")
    for value in (proto.graph.input[0], proto.graph.value_info[0], proto.graph.output[0]):
        for dim in value.type.tensor_type.shape.dim[:2]:
            dim.ClearField("dim_param")
    after = simplified(proto)
    assert [0, 0, 2, 4] not in constants(after).values()
    assert_same(proto, after)


def test_case_1_where_a_zero_means_zero_sizes_stay_computed():
    before = graph_of(COMPUTED_SIZES.replace("Reshape (", "Reshape <allowzero = 1> ("), outputs="float[B, S, 2, 4] y",
                      initializers=SIZES, values="float[B, S, 2, 4] split")
    after = simplified(before)
    assert "Shape" in ops(after)
    assert_same(before, after)
    assert_same(before, after, numbers(0, 63, 8))


# Case 2


def test_case_2_a_reshape_that_undoes_the_one_before_goes():
    before = graph_of("""
        heads = Reshape (x, split)
        whole = Reshape (heads, back)
        y = Relu (whole)""", initializers="int64[4] split = {0, 0, 2, 4}, int64[3] back = {0, 0, 8}",
                      values="float[B, S, 2, 4] heads, float[B, S, 8] whole")
    after = simplified(before)
    assert ops(after) == ["Relu"]
    assert_same(before, after)


def test_case_2_of_reshapes_in_a_row_the_last_counts():
    before = graph_of("""
        heads = Reshape (x, split)
        more = Reshape (heads, again)
        y = Relu (more)""", outputs="float[B, S, 4, 2] y",
                      initializers="int64[4] split = {0, 0, 2, 4}, int64[4] again = {0, 0, 4, 2}",
                      values="float[B, S, 2, 4] heads, float[B, S, 4, 2] more")
    after = simplified(before)
    assert ops(after) == ["Reshape", "Relu"]
    assert_same(before, after)


@pytest.mark.parametrize(("first", "second", "left"), [
    ([0, 2, 1], [0, 2, 1], []), ([1, 2, 0], [2, 0, 1], []), ([1, 0, 2], [2, 0, 1], [2, 1, 0]),
    ([0, 1, 2], [0, 1, 2], [])])
def test_case_2_transposes_in_a_row_are_one_or_none(first, second, left):
    sizes = {0: "B", 1: "S", 2: "8"}
    shape = ", ".join(sizes[first[axis]] for axis in second)
    before = graph_of(f"""
        one = Transpose <perm = {first}> (x)
        two = Transpose <perm = {second}> (one)
        y = Relu (two)""", outputs=f"float[{shape}] y")
    after = simplified(before)
    assert ops(after) == (["Transpose", "Relu"] if left else ["Relu"])
    assert not left or list(after.graph.node[0].attribute[0].ints) == left
    assert_same(before, after)


def test_case_2_one_that_others_read_too_stays():
    before = graph_of("""
        one = Transpose <perm = [0, 2, 1]> (x)
        two = Transpose <perm = [0, 2, 1]> (one)
        y = Relu (two)
        z = Relu (one)""", outputs="float[B, S, 8] y, float[B, 8, S] z")
    after = simplified(before)
    assert sorted(ops(after)) == ["Relu", "Relu", "Transpose"]
    assert_same(before, after)


def test_case_2_what_the_graph_returns_stays_apart_from_what_it_is_given():
    before = graph_of("y = Transpose <perm = [0, 1, 2]> (x)")
    after = simplified(before)
    assert len(after.graph.node) == 1
    assert_same(before, after)


# Case 3

LINEAR = """
    turned = Transpose <perm = [1, 0]> (weight)
    y = MatMul (x, turned)"""


def with_weight(body, inputs="float[B, S, 8] x", outputs="float[B, S, 5] y"):
    proto = graph_of(body, inputs, outputs)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(numbers(5, 8, seed=1), "weight"))
    return proto


def test_case_3_a_weight_that_is_used_transposed_is_stored_so():
    before = with_weight(LINEAR)
    after = simplified(before)
    assert ops(after) == ["MatMul"]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(after.graph.initializer[0]), numbers(5, 8, seed=1).T)
    assert_same(before, after)


def test_case_3_one_that_is_used_as_it_is_too_stays():
    before = with_weight(f"""{LINEAR}
        z = MatMul (other, weight)""", "float[B, S, 8] x, float[B, S, 5] other", "float[B, S, 5] y, float[B, S, 8] z")
    after = simplified(before)
    (node,) = [node for node in after.graph.node if "other" in node.input]
    assert np.array_equal(constants(after)[node.input[1]], numbers(5, 8, seed=1))
    assert_same(before, after, X, numbers(3, 63, 5, seed=2))


# Case 4


def test_case_4_constants_are_folded_and_repeated_and_unused_nodes_go():
    before = graph_of("""
        four = Mul (two, two)
        one = Mul (x, four)
        again = Mul (x, four)
        unused = Relu (x)
        y = Add (one, again)""", initializers="float two = {2.0}")
    after = simplified(before)
    assert ops(after) == ["Mul", "Add"] and constants(after) == {after.graph.node[0].input[1]: 4.0}
    assert_same(before, after)


def test_case_4_equal_constants_are_one():
    before = graph_of("""
        a = Add (x, one)
        b = Relu (a)
        y = Mul (b, other)""", initializers="float one = {1.5}, float other = {1.5}")
    after = simplified(before)
    assert list(constants(after).values()) == [1.5]
    assert_same(before, after)


def test_functions_are_flattened():
    proto = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18, "mine": 1]>
        graph (float[B, S, 8] x) => (float[B, S, 8] y) { y = mine.Twice (x) }
        <domain: "mine", opset_import: ["": 18]>
        Twice (x) => (y) { y = Add (x, x) }""")
    after = simplified(proto)
    assert ops(after) == ["Add"] and not after.functions
    assert_same(proto, after)
