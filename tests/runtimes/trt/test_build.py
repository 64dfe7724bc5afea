"""Engines that TensorRT-RTX really builds, on the CPU, and everything that must be refused with a reason."""

import os
import sys

import numpy as np
import onnx
import pytest
from modcompile.runtimes.trt import layers, load, worker
from modcompile.runtimes.trt.report import read_report

from modcompile.engine import build_engine, load_engine
from modcompile.errors import (
    IntegrityError,
    ModcompileError,
    RuntimeUnavailableError,
    UnsupportedGraphError,
    UsageError,
)
from modcompile.manifest import METADATA_KEY, ModelMetadata, RoutedBlock, TensorSpec

pytestmark = pytest.mark.tensorrt
tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

# B batch  S rows  D model dim
MATMUL = "(float[8, 4] x) => (float[8, 8] y) { t = Transpose (x) y = MatMul (x, t) }"
HALF = """(float16[B, 16] x, float16[B, 16] z) => (float16[B, B] y) {
    a = Add (x, z) t = Transpose (a) y = MatMul (a, t)
}"""
BATCHES = ((1, 16), (4, 16), (8, 16))
# As the exporter writes a masked attention out, 16 numbers a head.
ATTENTION = """(DTYPE[2, 4, 33, 16] q, DTYPE[2, 4, 33, 16] k, DTYPE[2, 4, 33, 16] v, bool[2, 1, 1, 33] mask)
               => (DTYPE[2, 4, 33, 16] y) <float[3] numbers = {0.5, 0.0, -10000.0}> {
    typed = CastLike (numbers, q)
    half, zero, low = Split <axis = 0, num_outputs = 3> (typed)
    [a] scaled = Mul (q, half)
    [b] turned = Transpose <perm = [0, 1, 3, 2]> (k)
    [c] scaled_k = Mul (turned, half)
    [d] scores = MatMul (scaled, scaled_k)
    [e] bias = Where (mask, zero, low)
    [f] biased = Add (scores, bias)
    [g] weights = Softmax <axis = -1> (biased)
    [h] empty = IsNaN (weights)
    [i] clean = Where (empty, zero, weights)
    [j] y = MatMul (clean, v)
}"""


def build(source, folder, **options):
    return build_engine(source, folder, runtime="tensorrt-rtx", **options)


def refused(error, write, tmp_path, text, **options):
    """The message with which a graph is refused; nothing is left behind."""
    with pytest.raises(error) as caught:
        build(write(text), tmp_path / "engine", **options)
    assert os.listdir(tmp_path) == ["model.onnx"]
    return str(caught.value)


# What is built


def test_an_engine_with_a_dynamic_batch(write, tmp_path):
    engine = build(write(HALF), tmp_path / "engine", shapes={"x": BATCHES})
    assert [str(spec) for spec in (*engine.inputs, *engine.outputs)] == [
        "x float16 [B, 16]", "z float16 [B, 16]", "y float16 [B, B]"]
    assert engine.manifest.target["optimization_profile"] == "x [1..4..8, 16]; z [1..4..8, 16]"
    assert engine.manifest.precision == "fp32"  # no weights, so no half ones


def test_a_static_engine(write, tmp_path):
    engine = build(write(HALF), tmp_path / "engine", shapes={"x": (4, 16)})
    assert engine.outputs == (TensorSpec(name="y", dtype="float16", shape=(4, 4)),)
    assert set(engine.manifest.files) == {"model.engine", "build.json"}
    assert engine.manifest.runtime_range.contains(tensorrt_rtx.__version__)
    assert not engine.manifest.runtime_range.contains("1.8")


def test_a_routed_model_and_its_report(routed_model, write, tmp_path):
    model = routed_model()
    metadata = ModelMetadata(precision="fp32", routed_blocks=[RoutedBlock(
        path="layers.1", capacity_ratio="5/17", attend_to="all", gate="raw", rows="S")])
    onnx.helper.set_model_props(model, {METADATA_KEY: metadata.to_json()})
    folder = tmp_path / "engine"
    engine = build(write(model), folder, shapes={"x": ((1, 17, 32), (2, 17, 32), (4, 17, 32))})
    assert [(block.rows, block.capacity) for block in engine.manifest.routed_blocks] == [(17, 5)]

    report = read_report(folder)
    assert report.engine_bytes == (folder / "model.engine").stat().st_size
    assert report.build_s > 0 and report.network_layers > len(report.layers)
    nodes = {node for layer in layers(folder) for node in layer.nodes}
    # Every choice and the merge are layers of the engine, under the name of their block.
    assert {"layers.1/positions/Route/TopK", "layers.1/positions/Route/TopK_1", "layers.1/positions/Route/TopK_2",
            "layers.1/out/MergeRows/ScatterND"} <= nodes


def test_half_types_are_computed_in_half(write, tmp_path):
    for text, dtype in ((HALF, "float16"), (HALF.replace("float16", "float"), "float32")):
        folder = tmp_path / dtype
        build(write(text), folder, shapes={"x": BATCHES})
        products = [layer for layer in layers(folder) if "MatMul" in " ".join(layer.nodes) or layer.type == "gemm"]
        tensors = [tensor for layer in products for tensor in (*layer.inputs, *layer.outputs)]
        assert tensors and {tensor.dtype for tensor in tensors} == {dtype}


def test_attention_without_a_fused_kernel_is_built(write, tmp_path):
    # float32, and heads of 5, have no kernel: without the attribute that lowering sets the build fails.
    for dtype, heads in (("float", 16), ("float16", 5)):
        tensor = f"{dtype}[2, 4, 9, {heads}]"
        build(write(f"({tensor} q, {tensor} k) => ({tensor} y) {{ y = Attention (q, k, k) }}"), tmp_path / dtype)


@pytest.mark.parametrize(("dtype", "fused"), [("float16", True), ("float", False)])
def test_attention_written_out_is_one_kernel_in_half(write, tmp_path, dtype, fused):
    build(write(ATTENTION.replace("DTYPE", dtype)), tmp_path / "engine")
    kernels = [layer for layer in layers(tmp_path / "engine") if {"d", "g", "j"} <= set(layer.nodes)]
    assert len(kernels) == fused


def test_weights_in_a_data_file_under_an_odd_path(routed_model, write, tmp_path):
    path = write(routed_model(), "a folder/mödel.onnx", save_as_external_data=True, location="wéights.data",
                 size_threshold=0)
    folder = tmp_path / "an engine ü"
    build(path, folder, shapes={"x": (2, 17, 32)})
    assert not (folder / "wéights.data").exists()
    (path.parent / "wéights.data").unlink()
    # The engine holds its weights.
    load_engine(folder)


def test_compute_capabilities_are_set(write, tmp_path):
    engine = build(write(MATMUL), tmp_path / "engine", compute_capabilities=["8.6", "12.0"])
    assert engine.manifest.target["compute_capabilities"] == "8.6, 12.0"


def test_progress_is_told(write, tmp_path):
    told = []
    build(write(MATMUL), tmp_path / "engine", progress=lambda *step: told.append(step))
    assert any(phase == "Building engine" for phase, _, _ in told)
    assert all(0 <= done <= steps for _, done, steps in told)


# What is refused


def test_what_progress_raises_stops_the_build(write, tmp_path):
    def interrupt(phase, done, steps):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(write(MATMUL), tmp_path / "engine", progress=interrupt)
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize(("text", "parts"), [
    ("(int32[8] x) => (int32[8] y, int32[8] z) { [first] y = BitwiseAnd (x, x) [second] z = BitwiseOr (x, x) }",
     ["first (BitwiseAnd): TensorRT has no operator BitwiseAnd", "second (BitwiseOr)"]),
    ("""(float[8, 4] x, int64[3, 1] i, float[3, 4] u) => (float[8, 4] y) {
         [add] y = ScatterND <reduction = "add"> (x, i, u) }""",
     ["add (ScatterND): ScatterND with reduction is not supported.", "overwriting scatter"]),
    ("""(float[8, 4] x, int64[3, 4] i, float[3, 4] u) => (float[8, 4] y) {
         y = ScatterElements <reduction = "add"> (x, i, u) }""",
     ["(ScatterElements): Unsupported reduction type"]),
    ("(float[8, 4] x) => (float[8, 4] y) { [fast] y = com.microsoft.FastGelu (x) }",
     ["fast (FastGelu)", "standard ONNX operators"]),
    ("(float[2, 64] x) => (int64[2, N] y) { [where] y = NonZero (x) }", ["where (NonZero)"]),
    ("(float16[2, 4, 9, 16] q) => (float16[2, 4, 9, 16] y) { [capped] y = Attention <softcap = 30.0> (q, q, q) }",
     ["capped (Attention): Setting softcap is not supported in TensorRT Attention.", "opset 22"]),
    ("(float[8, 4] x, float16[8, 4] h) => (float[8, 4] y) { [mixed] y = Add (x, h) }",
     ["mixed (Add): ", "they are of types Float and Half", "in one precision"]),
    ("""(float[2, 80] x) => (float[2, 90] y) {
         k = Constant <value = int64[1] {90}> () [best] y, i = TopK <axis = 1> (x, k) }""",
     ["length of reduction axis (80) is smaller than K (90)"]),
    ("(float[2, 80] x, int64[1] k) => (float[2, K] y) { [best] y, i = TopK <axis = 1> (x, k) }", ["constant"]),
])
def test_graphs_that_tensorrt_does_not_take(write, tmp_path, text, parts):
    message = refused(UnsupportedGraphError, write, tmp_path, text)
    assert all(part in message for part in parts), message
    # Its source's lines, its conditions and the GPU that nobody asked for help nobody.
    assert "/_src/" not in message and "Assertion" not in message and "cudaError" not in message and "fix:" in message


def test_turing_has_no_float32_product(write, tmp_path):
    message = refused(UnsupportedGraphError, write, tmp_path, MATMUL, compute_capabilities=["7.5", "8.6"])
    assert "FP32 GEMM is not supported" in message and "leave 7.5 out" in message


def test_sizes_that_contradict_each_other_are_no_engine(write, tmp_path):
    # A batch that is baked into the graph. TensorRT warns, and would make an engine that fails at its largest size.
    text = """(float[B, 4] x) => (float[2, 8] y) {
        shape = Constant <value = int64[2] {2, 8}> () y = Reshape (x, shape) }"""
    message = refused(UnsupportedGraphError, write, tmp_path, text, shapes={"x": ((4, 4), (4, 4), (8, 4))})
    assert "Profile kMAX values are not self-consistent" in message


@pytest.mark.parametrize(("ending", "problem", "part"), [
    ("os.abort()", UnsupportedGraphError, "SIGABRT while testing"),
    ("os.kill(os.getpid(), 9)", RuntimeUnavailableError, "lack of memory"),
    ("raise ValueError('no such flag')", UnsupportedGraphError, "ValueError: no such flag"),
    ("""print('{"resu', end='')""", UnsupportedGraphError, "exit status 0 while testing"),
    ("""print('{"os_error": [28, "No space left on device"]}')""", UsageError, "No space left on device"),
])
def test_the_end_of_the_building_process_is_an_error(write, tmp_path, tmp_path_factory, monkeypatch, ending, problem,
                                                      part):
    script = tmp_path_factory.mktemp("script") / "worker.py"
    script.write_text(f"""import os, sys
sys.stdin.read()
print('{{"progress": ["testing", 0, 1]}}', flush=True)
{ending}""")
    monkeypatch.setattr(worker, "__file__", str(script))
    assert part in refused(problem, write, tmp_path, MATMUL)


def test_a_builder_that_does_not_start(write, tmp_path, tmp_path_factory, monkeypatch):
    # TensorRT without a GPU, as its bindings behave; the package itself is not to be had here.
    packages = tmp_path_factory.mktemp("packages")
    (packages / "tensorrt.py").write_text("""
__version__ = "10.7.0"

class ILogger:
    def __init__(self):
        pass

def Builder(log):
    raise TypeError("pybind11::init(): factory function returned nullptr")
""")
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(RuntimeUnavailableError, match="tensorrt does not start") as error:
        build_engine(write(MATMUL), tmp_path / "engine", runtime="tensorrt")
    assert "an NVIDIA GPU and its driver" in str(error.value) and "nullptr" in str(error.value)
    monkeypatch.delitem(sys.modules, "tensorrt")


def test_old_files_that_list_weights_as_inputs(write, tmp_path):
    model = onnx.parser.parse_model('''<ir_version: 3, opset_import: ["": 13]> main
        (float[2, 4] x, float[4] w) => (float[2, 4] y) <float[4] w = {1.0, 2.0, 3.0, 4.0}> { y = Mul (x, w) }''')
    engine = build(write(model), tmp_path / "engine")
    assert [spec.name for spec in engine.inputs] == ["x"]


@pytest.mark.parametrize(("options", "part"), [
    ({"shapes": {"x": (9, 4)}}, "does not fit the model's input"),
    ({"precision": "fp16"}, "export the model with precision='fp16'"),
    ({"compute_capabilities": ["9.0"]}, "8.6, 8.9, 12.0"),
    ({"compute_capabilities": "8.6"}, "compute_capabilities does not fit"),
    ({"compute_capabilities": ["8.6", "8.6"]}, "compute_capabilities does not fit"),
    ({"providers": []}, "there is no such option"),
])
def test_options_that_do_not_fit(write, tmp_path, options, part):
    assert part in refused(UsageError, write, tmp_path, MATMUL, **options)


def test_damaged_files(routed_model, write, tmp_path):
    path = write(routed_model(), save_as_external_data=True, location="w.data", size_threshold=0)

    def message(error):
        with pytest.raises(error) as caught:
            build(path, tmp_path / "engine", shapes={"x": (2, 17, 32)})
        return str(caught.value)

    os.truncate(tmp_path / "w.data", 100)
    assert "missing or truncated" in message(IntegrityError)
    (tmp_path / "w.data").unlink()
    assert "no such file" in message(IntegrityError)
    path.write_bytes(path.read_bytes()[:300])
    assert "not a complete ONNX model" in message(IntegrityError)
    path.write_bytes(b"")
    assert "not a complete ONNX model" in message(IntegrityError)
    path.unlink()
    assert "cannot be read" in message(UsageError)


def test_data_outside_the_folder_is_not_read(routed_model, write, tmp_path):
    path = write(routed_model(), save_as_external_data=True, location="w.data", size_threshold=0)
    folder = tmp_path / "model"
    folder.mkdir()
    path = path.replace(folder / path.name)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../w.data"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match="no proper place"):
        build(path, tmp_path / "engine", shapes={"x": (2, 17, 32)})


# Loading


def test_running_without_a_fitting_gpu_says_what_is_needed(write, tmp_path):
    engine = build(write(MATMUL), tmp_path / "engine")
    with pytest.raises(RuntimeUnavailableError) as error:
        engine.run({"x": np.zeros((8, 4), "float32")})
    assert "8.0, 8.6, 8.9, 12.0 and later" in str(error.value) and "found:" in str(error.value)
    assert error.value.exit_code == 5


def test_another_release_does_not_open_the_engine(write, tmp_path, monkeypatch):
    engine = build(write(MATMUL), tmp_path / "engine")
    monkeypatch.setattr(tensorrt_rtx, "__version__", "1.8.0.5")
    with pytest.raises(RuntimeUnavailableError) as error:
        load(engine.folder, engine.manifest)
    assert "1.8.0.5" in str(error.value) and engine.manifest.runtime_version in str(error.value)


def test_an_edited_engine_is_refused_before_it_is_opened(write, tmp_path):
    engine = build(write(MATMUL), tmp_path / "engine")
    plan = engine.folder / "model.engine"
    content = bytearray(plan.read_bytes())
    content[1000] ^= 1
    plan.write_bytes(content)
    with pytest.raises(IntegrityError):
        load_engine(engine.folder)
    # It may change after it was verified.
    with pytest.raises(ModcompileError, match="truncated or edited"):
        engine.run({"x": np.zeros((8, 4), "float32")})
