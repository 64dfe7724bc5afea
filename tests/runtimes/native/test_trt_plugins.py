"""TensorRT plugins: how the graph is lowered to them, in nodes and in numbers; and the libraries, where there are
TensorRT's headers and nvcc to build them: the objects of TensorRT 10 and 11 are driven without TensorRT."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import tiny
import torch
from modcompile.runtimes.trt.lower import TOPK_LIMIT, lower
from modcompile.runtimes.trt.plugin_library import identify
from modcompile.runtimes.trt.profile import bind_profile
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import modcompile as mc
from modcompile.errors import RuntimeUnavailableError, UnsupportedGraphError
from modcompile.ops import gather_rows, merge_rows, onnx_functions, route

# B batch  S rows  K capacity  D width
NATIVE = Path(__file__).parents[3] / "runtimes" / "native"
PLAIN = """
main (float[B, S, 4] x) => (float[B, S, 4] out)
<int64 capacity = {5}, int64[1] last = {-1}>
{
    logits = ReduceSum <keepdims = 0> (x, last)
    ["block.route"] positions, filled = modcompile.Route (logits, capacity)
    ["block.rows"] rows = modcompile.GatherRows (x, positions)
    y = Tanh (rows)
    gate = Cast <to = 1> (filled)
    ["block.merge"] out = modcompile.MergeRows (x, y, positions, gate)
}
"""
# K is a function of S; the gathered mask is of bools.
MASKED = """
main (float[B, S, 4] x, bool[B, S] valid) => (float[B, S, 4] out, bool[B, K] chosen)
<int64[1] seven = {7}, int64[1] eight = {8}, int64[1] first = {0}, int64[1] last = {-1}>
{
    count = Shape <start = 1, end = 2> (x)
    more = Add (count, seven)
    rounded = Div (more, eight)
    capacity = Squeeze (rounded, first)
    logits = ReduceSum <keepdims = 0> (x, last)
    ["block.route"] positions, filled = modcompile.MaskedRoute (logits, valid, capacity)
    ["block.rows"] rows = modcompile.GatherRows (x, positions)
    y = Tanh (rows)
    ["block.mask"] chosen = modcompile.GatherRows (valid, positions)
    gate = Cast <to = 1> (filled)
    ["block.merge"] out = modcompile.MergeRows (x, y, positions, gate)
}
"""
# A linear router in float32 on rows of half precision, as the exporter writes it; the gate is its logit.
ROUTER = """
main (float16[B, S, 4] x, bool[B, S] valid) => (float16[B, S, 4] out)
<float[4, 1] weight = {0.5, -1.0, 0.25, 2.0}, float[1] bias = {1.0}, int64 capacity = {5}, int64[1] last = {-1},
 float zero = {0.0}>
{
    wide = Cast <to = 1> (x)
    scores = MatMul (wide, weight)
    moved = Add (scores, bias)
    logits = Squeeze (moved, last)
    gate_all = Sigmoid (logits)
    ["block.route"] positions, filled = modcompile.Route (logits, capacity)
    ["block.rows"] rows = modcompile.GatherRows (x, positions)
    y = Tanh (rows)
    picked = GatherElements <axis = 1> (gate_all, positions)
    open = Where (filled, picked, zero)
    gate = Cast <to = 10> (open)
    ["block.merge"] out = modcompile.MergeRows (x, y, positions, gate)
}
"""
MASKED_ROUTER = ROUTER.replace("modcompile.Route (logits,", "modcompile.MaskedRoute (logits, valid,")


def parsed(text):
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18, "modcompile": 1]> {text}')
    model.functions.extend(onnx_functions(18))
    return onnx.shape_inference.infer_shapes(model)


def lowered(model, shapes, plugins=True):
    model = ir.from_proto(model)
    return lower(model, bind_profile(model.graph.inputs, shapes), plugins=plugins)


def listing(model):
    """A line a node: its name, op, fields, inputs and outputs."""
    lines = []
    for node in model.graph:
        if node.name and node.name.startswith("block"):
            fields = {name: attribute.value for name, attribute in node.attributes.items() if name != "axis"}
            values = [", ".join(f"{value.name} {value.dtype}" for value in values)
                      for values in (node.inputs, node.outputs)]
            lines.append(f"{node.name} {node.op_type} {fields}: {values[0]} -> {values[1]}")
    return lines


FIELDS = {"plugin_namespace": "modcompile", "plugin_version": "1"}


# The lowering


def test_a_route_without_a_mask():
    assert listing(lowered(parsed(PLAIN), {"x": (2, 17, 4)})) == [
        f"block.route Route { {**FIELDS, 'capacity': 5} }: logits FLOAT -> positions INT64",
        "block.route/Equal Equal {}: positions INT64, positions INT64 -> filled BOOL",
        f"block.rows GatherRows {FIELDS}: x FLOAT, positions INT64 -> rows FLOAT",
        f"block.merge MergeRows {FIELDS}: x FLOAT, y FLOAT, positions INT64, gate FLOAT -> out FLOAT",
    ]


def test_masks_go_through_int32_and_filled_is_the_mask_at_positions():
    model = lowered(parsed(MASKED), {"x": (2, 17, 4)})
    names = {value: node.outputs[0].name for node in model.graph for value in [node.name] if value}
    valid, chosen = names["block.route/Cast.int32"], names["block.route/GatherElements"]
    wide, rows = names["block.mask/Cast.int32"], names["block.mask"]
    assert listing(model) == [
        f"block.route/Cast.int32 Cast {{'to': 6}}: valid BOOL -> {valid} INT32",
        f"block.route MaskedRoute { {**FIELDS, 'capacity': 3} }: logits FLOAT, {valid} INT32 -> positions INT64",
        f"block.route/GatherElements GatherElements {{}}: {valid} INT32, positions INT64 -> {chosen} None",
        f"block.route/Cast.bool Cast {{'to': 9}}: {chosen} None -> filled BOOL",
        f"block.rows GatherRows {FIELDS}: x FLOAT, positions INT64 -> rows FLOAT",
        f"block.mask/Cast.int32 Cast {{'to': 6}}: valid BOOL -> {wide} INT32",
        f"block.mask GatherRows {FIELDS}: {wide} INT32, positions INT64 -> {rows} None",
        f"block.mask/Cast.bool Cast {{'to': 9}}: {rows} None -> chosen BOOL",
        f"block.merge MergeRows {FIELDS}: x FLOAT, y FLOAT, positions INT64, gate FLOAT -> out FLOAT",
    ]
    assert not model.functions
    ours = [node.name for node in model.graph if node.name and node.name.startswith("block")]
    assert len(set(ours)) == len(ours)


def test_filled_that_nobody_reads_is_not_computed():
    for text, count in ((PLAIN, 1), (MASKED, 2)):
        text = text.replace("gate = Cast <to = 1> (filled)", "gate = modcompile.GatherRows (logits, positions)")
        names = [node.name for node in lowered(parsed(text), {"x": (2, 17, 4)}).graph if node.name]
        assert len([name for name in names if name.startswith("block.route")]) == count


def test_lowering_twice_changes_nothing():
    for text in (PLAIN, MASKED):
        once = lowered(parsed(text), {"x": (2, 17, 4)})
        again = lower(once, bind_profile(once.graph.inputs, {}), plugins=True)
        assert ir.to_proto(again) == ir.to_proto(once)


def test_the_users_model_stays_as_it_is():
    model = ir.from_proto(parsed(MASKED))
    before = ir.to_proto(model).SerializeToString()
    lower(model, bind_profile(model.graph.inputs, {"x": (2, 17, 4)}), plugins=True)
    assert ir.to_proto(model).SerializeToString() == before


def test_a_batch_may_vary_and_a_capacity_may_not():
    range_of_batches = {"x": ((1, 17, 4), (2, 17, 4), (4, 17, 4))}
    assert "'capacity': 3" in listing(lowered(parsed(MASKED), range_of_batches))[1]
    with pytest.raises(UnsupportedGraphError) as caught:
        lowered(parsed(MASKED), {"x": ((1, 9, 4), (1, 17, 4), (1, 33, 4))})
    message = str(caught.value)
    assert "a capacity that varies" in message and "where: block.route" in message and "without plugins" in message


def test_plugins_choose_more_rows_than_topk():
    text = PLAIN.replace("{5}", f"{{{TOPK_LIMIT + 1}}}")
    assert f"'capacity': {TOPK_LIMIT + 1}" in listing(lowered(parsed(text), {"x": (1, 5000, 4)}))[0]
    with pytest.raises(UnsupportedGraphError, match="TopK"):
        lowered(parsed(text), {"x": (1, 5000, 4)}, plugins=False)


def test_an_op_without_a_plugin():
    text = PLAIN.replace("y = Tanh (rows)", "y = modcompile.Twice (rows)")
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18, "modcompile": 1]> {text}')
    with pytest.raises(UnsupportedGraphError, match="no plugin for this op"):
        lowered(model, {"x": (1, 17, 4)})


def test_a_linear_router_is_part_of_its_route():
    fields = {**FIELDS, "capacity": 5}
    model = lowered(parsed(ROUTER), {"x": (2, 17, 4)})
    # No choice by `filled`, and the gate reads the logits that the plugin gives.
    assert [node.op_type for node in model.graph] == [
        "RouteRows", "Sigmoid", "GatherRows", "Tanh", "GatherElements", "Cast", "MergeRows"]
    assert listing(model)[0] == (f"block.route RouteRows {fields}: x FLOAT16, weight/vector FLOAT, bias/vector FLOAT"
                                 " -> logits FLOAT, positions INT64")
    assert model.graph.initializers["weight/vector"].const_value.numpy().tolist() == [0.5, -1.0, 0.25, 2.0]
    masked = listing(lowered(parsed(MASKED_ROUTER), {"x": (2, 17, 4)}))
    assert masked[1] == (f"block.route MaskedRouteRows {fields}: x FLOAT16, weight/vector FLOAT, bias/vector FLOAT,"
                         " positions/Cast.int32 INT32 -> logits FLOAT, positions INT64")
    for text in (ROUTER, MASKED_ROUTER):
        once = lowered(parsed(text), {"x": (2, 17, 4)})
        again = lower(once, bind_profile(once.graph.inputs, {}), plugins=True)
        assert ir.to_proto(again) == ir.to_proto(once)


@pytest.mark.parametrize(("old", "new"), [
    # The logits are an output, and stay those of the layers.
    ("(float16[B, S, 4] out)", "(float16[B, S, 4] out, float[B, S] logits)"),
    # A bias of every row.
    ("moved = Add (scores, bias)", "row = Neg (scores) moved = Add (scores, row)"),
    ("moved = Add (scores, bias)", "moved = Sub (scores, bias)"),
    # One sequence, whose rows are the batch.
    ("logits = Squeeze (moved, last)",
     "first = Constant <value = int64[1] {0}> () logits = Squeeze (moved, first)"),
    ("scores = MatMul (wide, weight)", "hidden = Tanh (wide) scores = ReduceSum <keepdims = 1> (hidden, last)"),
    # A weight that is computed.
    ("scores = MatMul (wide, weight)", "other = Gather (valid, last) typed = Cast <to = 1> (other)"
     " few = ReduceMax (typed) computed = Mul (weight, few) scores = MatMul (wide, computed)"),
])
def test_other_routers_stay_layers(old, new):
    assert old in ROUTER
    model = lowered(parsed(ROUTER.replace(old, new)), {"x": (2, 17, 4)})
    ours = [node.op_type for node in model.graph if node.domain == "modcompile"]
    assert ours == ["Route", "GatherRows", "MergeRows"]


def test_names_that_are_made_are_no_others():
    # As the graph names values itself.
    for text in (MASKED, MASKED_ROUTER):
        for index in range(4):
            model = lowered(parsed(text.replace("last", f"val_{index}")), {"x": (2, 17, 4)})
            names = [*model.graph.initializers, *(value.name for node in model.graph for value in node.outputs)]
            assert len(set(names)) == len(names)


class Plugin(OpRun):
    """A plugin as the lowered graph sees one: no bool, one output, its fields."""

    op_domain = "modcompile"

    def __init_subclass__(cls):
        cls.__name__ = cls.__qualname__ = cls.__name__.removesuffix("Plugin")

    def _run(self, *arrays, capacity=None, plugin_namespace=None, plugin_version=None):
        assert (plugin_namespace, plugin_version) == ("modcompile", "1")
        assert all(array.dtype != np.bool_ for array in arrays)
        results = self.compute(*map(torch.tensor, arrays), *([] if capacity is None else [capacity]))
        return tuple(result.numpy() for result in (results if isinstance(results, tuple) else (results,)))


class RoutePlugin(Plugin):
    @staticmethod
    def compute(logits, capacity):
        return route(logits, None, capacity)[0]


class MaskedRoutePlugin(Plugin):
    @staticmethod
    def compute(logits, valid, capacity):
        assert valid.dtype == torch.int32
        return route(logits, valid != 0, capacity)[0]


def scores(x, weight, bias):
    assert weight.shape == x.shape[2:] and bias.shape == (1,) and weight.dtype == bias.dtype == torch.float32
    return x.float() @ weight + bias


class RouteRowsPlugin(Plugin):
    @staticmethod
    def compute(x, weight, bias, capacity):
        logits = scores(x, weight, bias)
        return logits, route(logits, None, capacity)[0]


class MaskedRouteRowsPlugin(Plugin):
    @staticmethod
    def compute(x, weight, bias, valid, capacity):
        assert valid.dtype == torch.int32
        logits = scores(x, weight, bias)
        return logits, route(logits, valid != 0, capacity)[0]


class GatherRowsPlugin(Plugin):
    compute = staticmethod(gather_rows)


class MergeRowsPlugin(Plugin):
    compute = staticmethod(merge_rows)


PLUGINS = [RoutePlugin, MaskedRoutePlugin, RouteRowsPlugin, MaskedRouteRowsPlugin, GatherRowsPlugin, MergeRowsPlugin]


def test_the_numbers_stay_the_same():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 17, 4)).astype(np.float32)
    # In the second batch row fewer rows are valid than the 3 that are chosen.
    feeds = {"x": x, "valid": np.stack([generator.random(17) < 0.5, np.arange(17) == 11])}
    for text in (PLAIN, MASKED, ROUTER, MASKED_ROUTER):
        model = parsed(text)
        given = {value.name: feeds[value.name] for value in model.graph.input}
        if "float16" in text:
            given["x"] = x.astype(np.float16)
        expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, given)
        with_plugins = ir.to_proto(lowered(model, {"x": x.shape}))
        results = ReferenceEvaluator(with_plugins, new_ops=PLUGINS).run(None, given)
        for actual, wanted in zip(results, expected, strict=True):
            assert actual.dtype == wanted.dtype
            tolerance = 2e-3 if actual.dtype == np.float16 else 1e-6
            np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance)


# What the parser of TensorRT 8.6 imports, of what a transformer may hold.
IMPORTED_BY_8_6 = set("""
    Abs Add And ArgMax Cast Ceil Clip Concat Constant ConstantOfShape Conv Cos CumSum Div Einsum Equal Erf Exp Expand
    Flatten Floor Gather GatherElements GatherND Gemm Greater GreaterOrEqual Identity InstanceNormalization IsInf IsNaN
    LayerNormalization Less LessOrEqual Log MatMul Max Min Mod Mul Neg Not OneHot Or Pad Pow Range Reciprocal ReduceMax
    ReduceMean ReduceMin ReduceSum Relu Reshape Round ScatterElements ScatterND Shape Sigmoid Sign Sin Size Slice
    Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor""".split())


@pytest.mark.parametrize("plugins", [False, True])
def test_a_file_of_opset_17_is_one_for_tensorrt_8_6(opset_17, plugins):
    model = lowered(onnx.load(opset_17), {"hidden": (2, 63, tiny.WIDTH), "attention_mask": (2, 63)}, plugins)
    ours = {node.op_type for node in model.graph.all_nodes() if node.domain == "modcompile"}
    assert ours == ({"MaskedRouteRows", "GatherRows", "MergeRows"} if plugins else set())
    assert {node.op_type for node in model.graph.all_nodes()} - ours <= IMPORTED_BY_8_6
    assert model.opset_imports[""] == 17 and not model.functions


@pytest.fixture(scope="module")
def opset_17(tmp_path_factory):
    model = tiny.Stack(*(tiny.Block(causal=True) for _ in range(2)))
    inputs = {"hidden": torch.randn(2, 5, tiny.WIDTH), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    mod = tiny.randomise_routers(mc.convert(model, inputs, mc.MoDConfig(capacity_ratio=0.25)))
    path = tmp_path_factory.mktemp("onnx") / "mod.onnx"
    return mc.export_onnx(mod, path, opset=17, precision="fp16", shapes={"hidden": (2, 63, tiny.WIDTH)})


# The libraries


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The build folder of the plugins, for the TensorRT whose headers TENSORRT_INCLUDE_DIR names."""
    headers = os.environ.get("TENSORRT_INCLUDE_DIR")
    missing = [tool for tool in ("cmake", "c++", "nvcc") if shutil.which(tool) is None]
    missing += [] if headers else ["TENSORRT_INCLUDE_DIR"]
    if missing:
        pytest.skip(f"to build the plugins there is no {' and no '.join(missing)}")
    folder = tmp_path_factory.mktemp("plugins")
    for command in (["cmake", "-S", NATIVE, "-B", folder, "-DMODCOMPILE_TRT=ON", "-DCMAKE_CUDA_ARCHITECTURES=90",
                     f"-DTENSORRT_INCLUDE_DIR={headers}"], ["cmake", "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "trt"


def drive(build, *arguments):
    program = build / "test_plugins_v3"
    if not program.exists():
        pytest.skip("TENSORRT_INCLUDE_DIR is of TensorRT 8, whose plugins need TensorRT to be driven")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_objects_of_interface_v3(build):
    assert "checks passed, none of them of enqueue" in drive(build, "--without-gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_objects_of_interface_v3_on_a_gpu(build):
    assert drive(build).strip().endswith("checks passed")


def test_the_library_says_what_it_is_before_it_is_loaded(build):
    content = (build / "libmodcompile_trt.so").read_bytes()
    headers = Path(os.environ["TENSORRT_INCLUDE_DIR"], "NvInferVersion.h").read_text()
    major, minor = (int(next(filter(None, re.search(
        rf"define NV_TENSORRT_{part} (\d+)|define TRT_{part}_ENTERPRISE (\d+)", headers).groups())))
        for part in ("MAJOR", "MINOR"))
    library = identify(content, f"{major}.{minor}.0", "the library")
    assert (library.version, library.tensorrt) == (mc.__version__, (major, minor))
    with pytest.raises(RuntimeUnavailableError, match="for another TensorRT"):
        identify(content, f"{major + 1}.0.0", "the library")


def test_a_process_without_tensorrt_survives_the_library(build):
    with pytest.raises(OSError, match=r"undefined symbol|cannot open shared object"):
        ctypes.CDLL(str(build / "libmodcompile_trt.so"))
