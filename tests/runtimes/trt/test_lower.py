"""The graph that TensorRT's parser sees: inlined, with sizes, the same numbers, and nothing that it cannot take."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from modcompile.runtimes.trt.lower import TOPK_LIMIT, lower
from modcompile.runtimes.trt.profile import bind_profile

from modcompile.config import as_fraction
from modcompile.errors import UnsupportedGraphError
from modcompile.manifest import RoutedBlock

ATTENTION = "(float[2, 4, 9, 8] q) => (float[2, 4, 9, 8] y) { y = Attention (q, q, q) }"
# K is a function of the sequence: ceil(S / 8).
COMPUTED_K = """(float[B, S] x) => (float[B, K] y) {
    seven = Constant <value = int64[1] {7}> ()
    eight = Constant <value = int64[1] {8}> ()
    rows = Shape <start = 1> (x)
    more = Add (rows, seven)
    k = Div (more, eight)
    hidden = Neg (x)
    y, index = TopK <axis = 1> (hidden, k)
}"""
# The same from the shape of an intermediate value, in floats.
FLOAT_K = """(float[B, S] x) => (float[K] y) {
    ratio = Constant <value = float {0.125}> ()
    flat = Constant <value = int64[1] {-1}> ()
    row = Constant <value = int64 {0}> ()
    hidden = Gather (x, row)
    rows = Shape (hidden)
    rows_float = Cast <to = 1> (rows)
    scaled = Mul (rows_float, ratio)
    up = Ceil (scaled)
    k_float = Reshape (up, flat)
    k = Cast <to = 7> (k_float)
    y, index = TopK <axis = 0> (hidden, k)
}"""
NESTED_K = """(float[B, S] x, bool some) => (float[B, K] y) {
    y = If (some) <
        then_branch = chosen () => (float[B, K] t) {
            k = Constant <value = int64[1] {4000}> ()
            t, index = TopK <axis = 1> (x, k)
        },
        else_branch = all () => (float[B, S] e) { e = Identity (x) }
    >
}"""
UNKNOWN_K = "(float[B, S] x, int64[1] k) => (float[B, K] y) { y, index = TopK <axis = 1> (x, k) }"


# Softmax and the cube as the exporter writes them in half precision.
TYPED = """(float16[2, 8] x) => (float16[2, 8] y) <float three = {3.0}> {
    cube = Pow (x, three)
    scores = Add (x, cube)
    wide = Cast <to = 1> (scores)
    weights = Softmax <axis = -1> (wide)
    y = Cast <to = 10> (weights)
}"""


def lowered(model, shapes, routed_blocks=(), **options):
    model = ir.from_proto(model)
    return lower(model, bind_profile(model.graph.inputs, shapes), routed_blocks, **options)


def run(model, feeds):
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)


def test_calls_are_inlined_under_the_name_of_their_call(routed_model):
    model = lowered(routed_model(), {"x": ((1, 17, 32), (2, 17, 32), (4, 17, 32))})
    assert not model.functions and set(model.opset_imports) == {"", "com.microsoft"}
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert [name for name in names if "TopK" in name] == [
        f"layers.1/positions/Route/TopK{count}" for count in ("", "_1", "_2")]


def test_the_users_model_stays_as_it_is(routed_model, parse):
    for proto, shapes in ((routed_model(), {"x": (2, 17, 32)}), (parse(ATTENTION), {})):
        model = ir.from_proto(proto)
        before = ir.to_proto(model).SerializeToString()
        lower(model, bind_profile(model.graph.inputs, shapes))
        assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("shapes", [{"x": (3, 17, 32)}, {"x": ((1, 17, 32), (3, 17, 32), (4, 17, 32))}])
def test_the_numbers_stay_the_same(routed_model, shapes):
    model = routed_model()
    x = np.random.default_rng(0).standard_normal((3, 17, 32)).astype(np.float32)
    np.testing.assert_array_equal(run(lowered(model, shapes), {"x": x}), run(ir.from_proto(model), {"x": x}))


def test_lowering_twice_changes_nothing(routed_model):
    once = lowered(routed_model(), {"x": (2, 17, 32)})
    twice = lower(once, bind_profile(once.graph.inputs, {}))
    assert ir.to_proto(twice) == ir.to_proto(once)


def test_sizes_are_written_where_they_do_not_vary(routed_model):
    model = lowered(routed_model(), {"x": ((1, 17, 32), (2, 17, 32), (4, 17, 32))})
    assert [list(map(str, value.shape)) for value in (*model.graph.inputs, *model.graph.outputs)] == [
        ["B", "17", "32"], ["B", "17", "32"]]


def test_attention_may_be_written_out_everywhere(parse):
    nested = ATTENTION.replace("y = Attention (q, q, q)", """
        some = Constant <value = bool {1}> ()
        y = If (some) <then_branch = a () => (float[2, 4, 9, 8] t) { t = Attention (q, q, q) },
                       else_branch = b () => (float[2, 4, 9, 8] e) { e = Attention (q, q, q) }>""")
    for text, count in ((ATTENTION, 1), (nested, 2)):
        nodes = [n for n in lowered(parse(text), {}).graph.all_nodes() if n.op_type == "Attention"]
        assert [n.attributes["TRT_decomposable"].as_int() for n in nodes] == [1] * count


def test_a_builder_that_chooses_types_is_not_told_them(parse):
    def ops(model):
        return [node.op_type for node in model.graph]

    model = parse(TYPED, opset=17)
    typed, weak = lowered(model, {}), lowered(model, {}, weakly_typed=True)
    assert ops(typed) == ["Pow", "Add", "Cast", "Softmax", "Cast"]
    assert ops(weak) == ["Pow", "Add", "Softmax"]
    assert [value.dtype for value in weak.graph[0].inputs] == [ir.DataType.FLOAT16] * 2
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float16)
    np.testing.assert_allclose(run(weak, {"x": x}), run(typed, {"x": x}), atol=2e-3)
    twice = lower(weak, bind_profile(weak.graph.inputs, {}), weakly_typed=True)
    assert ir.to_proto(twice) == ir.to_proto(weak)


@pytest.mark.parametrize(("old", "new"), [
    # Somebody reads the sum in float32, or gives it so.
    ("y = Cast <to = 10> (weights)", "more = Neg (weights) y = Cast <to = 10> (more)"),
    ("float16[2, 8] y)", "float16[2, 8] y, float[2, 8] weights)"),
    # The scores are float32 themselves.
    ("scores = Add (x, cube)", "half = Add (x, cube) scores = Cast <to = 1> (half)"),
    ("wide = Cast <to = 1> (scores)", "fine = Cast <to = 1> (scores) wide = Neg (fine)"),
])
def test_other_casts_around_a_softmax_stay(parse, old, new):
    assert old in TYPED
    model = parse(TYPED.replace(old, new), opset=17)
    onnx.checker.check_model(model)
    model = onnx.shape_inference.infer_shapes(model)
    casts = [sum(node.op_type == "Cast" for node in graph.graph.node) for graph in (
        model, ir.to_proto(lowered(model, {}, weakly_typed=True)))]
    assert casts[0] == casts[1]


@pytest.mark.parametrize(("text", "rows", "k"), [(COMPUTED_K, 40_000, 5000), (FLOAT_K, 40_000, 5000),
                                                (NESTED_K, 5000, 4000)])
def test_a_k_above_the_limit_is_refused(parse, text, rows, k):
    with pytest.raises(UnsupportedGraphError) as error:
        lowered(parse(text), {"x": ((1, 16), (1, 512), (2, rows))})
    message = str(error.value)
    assert f"K = {k} at B = 2, S = {rows}" in message and f"K <= {TOPK_LIMIT}" in message
    assert "TopK" in message and "fix:" in message


@pytest.mark.parametrize(("text", "rows"), [(COMPUTED_K, 8 * TOPK_LIMIT), (FLOAT_K, 8 * TOPK_LIMIT)])
def test_a_k_at_the_limit_is_taken(parse, text, rows):
    lowered(parse(text), {"x": (2, rows)})
    with pytest.raises(UnsupportedGraphError, match=f"K = {TOPK_LIMIT + 1} at"):
        lowered(parse(text), {"x": (2, rows + 1)})


def test_a_k_inside_a_function_is_found_by_the_name_of_its_call(routed_model):
    with pytest.raises(UnsupportedGraphError, match=r"layers\.1/positions/Route/TopK"):
        lowered(routed_model(capacity=3841), {"x": (1, 5000, 32)})


def test_a_k_that_only_the_run_decides_is_bounded_by_the_rows(parse):
    lowered(parse(UNKNOWN_K), {"x": (2, TOPK_LIMIT)})
    with pytest.raises(UnsupportedGraphError, match="only the run decides, of 3841 rows at B = 2"):
        lowered(parse(UNKNOWN_K), {"x": (2, TOPK_LIMIT + 1)})


def test_the_routed_block_is_named(routed_model):
    def block(ratio):
        return RoutedBlock(path="layers.1", capacity_ratio=ratio, attend_to="all", gate="raw", rows="S")

    shapes = {"x": ((1, 8, 32), (1, 64, 32), (1, 7682, 32))}
    with pytest.raises(UnsupportedGraphError) as error:
        lowered(routed_model(), shapes, [block("1/2")])
    message = str(error.value)
    assert "routed block layers.1" in message and "K = 3841 at 7682 rows" in message
    assert "a capacity_ratio of at most 0.4998" in message
    ratio = as_fraction(0.4998)
    lowered(routed_model(), shapes, [block(f"{ratio.numerator}/{ratio.denominator}")])


@pytest.mark.parametrize(("text", "where"), [
    ("(double[2] x) => (double[2] y) { y = Neg (x) }", "input x"),
    ("(int16[2] x) => (float[2] y) { y = Cast <to = 1> (x) }", "input x"),
    ("(float[2] x) => (float[2] y) { d = Cast <to = 11> (x) y = Cast <to = 1> (d) }", "(Cast)"),
    ('(float[2] x) => (string[1] y) { y = Constant <value_strings = ["a"]> () }', "(Constant)"),
])
def test_element_types_that_tensorrt_lacks_are_refused(parse, text, where):
    with pytest.raises(UnsupportedGraphError, match="element type") as error:
        lowered(parse(text), {})
    assert where in str(error.value)


def test_old_files_are_refused(parse):
    with pytest.raises(UnsupportedGraphError, match="opset 13 or later"):
        lowered(parse("(float[2, 8] x) => (float[2, 3] y) { y, i = TopK <k = 3> (x) }", opset=9), {})


def test_functions_that_call_each_other_are_refused(parse):
    model = parse("(float[2] x) => (float[2] y) { y = modcompile.Twice (x) }")
    twice = parse("(float[2] x) => (float[2] y) { y = modcompile.Twice (x) }").graph
    function = model.functions.add(name="Twice", domain="modcompile", input=["x"], output=["y"], node=twice.node)
    function.opset_import.extend(model.opset_import)
    with pytest.raises(UnsupportedGraphError, match="cannot be inlined"):
        lowered(model, {})
