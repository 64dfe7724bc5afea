"""Engines that replay a CUDA graph: what is asked of ONNX Runtime, and fixed memory; on a GPU, the graph itself.

Without a GPU, a session on the CPU stands in for one on CUDA: its memory is then the CPU's.
"""

import threading

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from modcompile.runtimes.ort.cuda_graph import CudaGraphEngine
from modcompile.runtimes.ort.session import CUDA

from modcompile.engine import build_engine, load_engine
from modcompile.errors import ModcompileError, RuntimeUnavailableError, UsageError

# B batch  S rows
TWICE = """<ir_version: 10, opset_import: ["": 18]>
main (float[B, S] x, int64[B, S] n) => (float[B, S] y, bool[B, S] positive)
<int64 zero = {0}>
{ y = Add (x, x) positive = Greater (n, zero) }"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An engine of static shapes and one whose shapes vary."""
    folder = tmp_path_factory.mktemp("engines")
    onnx.save(onnx.parser.parse_model(TWICE), folder / "twice.onnx")
    build_engine(folder / "twice.onnx", folder / "static", shapes={"x": (2, 3)}).close()
    build_engine(folder / "twice.onnx", folder / "varying").close()
    return folder


@pytest.fixture
def as_cuda(monkeypatch):
    """Lets sessions that ask for CUDA run on the CPU, and lists the options they ask for."""
    make = onnxruntime.InferenceSession
    allocate = onnxruntime.OrtValue.ortvalue_from_shape_and_type
    asked = []

    class Session(make):
        def __init__(self, model, options, providers, *, enable_fallback):
            asked.append(providers)
            super().__init__(model, options, ["CPUExecutionProvider"], enable_fallback=enable_fallback)

        def get_providers(self):
            return [CUDA, "CPUExecutionProvider"]

        def get_provider_options(self):
            return {CUDA: {"device_id": "1"}}

    def on_the_cpu(shape, kind, device, index):
        assert (device, index) == ("cuda", 1)
        return allocate(shape, kind, "cpu", 0)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", on_the_cpu)
    return asked


def case(seed=0):
    generator = np.random.default_rng(seed)
    return {"x": generator.standard_normal((2, 3)).astype(np.float32), "n": generator.integers(-2, 3, (2, 3))}


def test_the_provider_is_told_to_record(folders, as_cuda):
    load_engine(folders / "static", providers=[CUDA, "CPUExecutionProvider"], cuda_graph=True)
    load_engine(folders / "static", providers=[(CUDA, {"device_id": 1})], cuda_graph=True)
    load_engine(folders / "static", providers=[(CUDA, {"use_tf32": "1"})])
    usual = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
    assert as_cuda == [[(CUDA, {**usual, "enable_cuda_graph": "1"}), ("CPUExecutionProvider", {})],
                       [(CUDA, {**usual, "device_id": 1, "enable_cuda_graph": "1"})],
                       [(CUDA, {**usual, "use_tf32": "1"})]]


def test_runs_go_through_memory_that_stays(folders, as_cuda):
    with load_engine(folders / "static", providers=[CUDA], cuda_graph=True) as engine:
        assert isinstance(engine, CudaGraphEngine)
        addresses = {name: buffer.data_ptr() for name, buffer in engine._buffers.items()}
        first = engine.run(case(0))
        kept = {name: value.copy() for name, value in first.items()}
        for seed in (1, 2):
            inputs = {**case(seed), "x": case(seed)["x"].T.copy().T}
            outputs = engine.run(inputs)
            np.testing.assert_array_equal(outputs["y"], 2 * inputs["x"])
            np.testing.assert_array_equal(outputs["positive"], inputs["n"] > 0)
        assert {name: buffer.data_ptr() for name, buffer in engine._buffers.items()} == addresses
        # Outputs are the caller's own: later runs leave them alone.
        for name, value in first.items():
            np.testing.assert_array_equal(value, kept[name])
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.run(case())


def test_threads_take_turns(folders, as_cuda):
    wrong = []
    with load_engine(folders / "static", providers=[CUDA], cuda_graph=True) as engine:
        def work(seed):
            inputs = case(seed)
            wrong.extend(seed for _ in range(100) if not np.array_equal(engine.run(inputs)["y"], 2 * inputs["x"]))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_sizes_that_vary(folders, as_cuda):
    with pytest.raises(UsageError) as caught:
        load_engine(folders / "varying", providers=[CUDA], cuda_graph=True)
    assert "x float32 [B, S]" in str(caught.value) and "shapes={...}" in str(caught.value)


def test_an_output_that_is_a_constant(as_cuda, tmp_path):
    text = TWICE.replace("bool[B, S] positive)", "bool[B, S] positive, float[1] kept)").replace(
        "<int64 zero = {0}>", "<int64 zero = {0}, float[1] one = {1}>").replace("{ y =", "{ kept = Neg (one) y =")
    onnx.save(onnx.parser.parse_model(text), tmp_path / "twice.onnx")
    build_engine(tmp_path / "twice.onnx", tmp_path / "engine", shapes={"x": (2, 3)}, fuse=True).close()
    load_engine(tmp_path / "engine", providers=[CUDA]).close()
    with pytest.raises(UsageError, match=r"no constants among its outputs(.|\n)*found: kept"):
        load_engine(tmp_path / "engine", providers=[CUDA], cuda_graph=True)


def test_a_failing_run_names_the_shapes(folders, as_cuda, monkeypatch):
    with load_engine(folders / "static", providers=[CUDA], cuda_graph=True) as engine:
        def fail(binding):
            raise RuntimeError("capture failed")

        monkeypatch.setattr(engine.session, "run_with_iobinding", fail)
        with pytest.raises(ModcompileError, match=r"x \(2, 3\), n \(2, 3\): capture failed"):
            engine.run(case())
        monkeypatch.undo()
        # The engine is not stuck.
        with pytest.raises(ModcompileError):
            engine.run({"x": case()["x"]})


def test_memory_for_inputs_and_outputs_that_is_not_there(folders, as_cuda, monkeypatch):
    def fail(*_):
        raise RuntimeError("Failed to allocate memory for requested buffer of size 4294967296")

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", fail)
    with pytest.raises(ModcompileError, match=r"too little memory(.|\n)*4294967296"):
        load_engine(folders / "static", providers=[CUDA], cuda_graph=True)


def test_other_providers(folders):
    with pytest.raises(UsageError, match="needs the CUDA execution provider") as caught:
        load_engine(folders / "static", cuda_graph=True)
    assert f'providers=["{CUDA}"]' in str(caught.value)
    with pytest.raises(UsageError, match="not a list"):
        load_engine(folders / "static", providers=CUDA, cuda_graph=True)


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="onnxruntime-gpu is here")
def test_no_cuda(folders):
    with pytest.raises(RuntimeUnavailableError, match="onnxruntime-gpu"):
        load_engine(folders / "static", providers=[CUDA], cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="no onnxruntime-gpu")
def test_a_graph_on_a_gpu(folders):
    with load_engine(folders / "static", providers=[CUDA], cuda_graph=True) as engine:
        other = torch.cuda.Stream()
        for seed in range(4):
            inputs = case(seed)
            # What makes the input is still under way when run is called, on whatever stream it is called.
            with torch.cuda.stream(other if seed % 2 else torch.cuda.current_stream()):
                given = {name: torch.from_numpy(value).cuda() * 2 // 2 for name, value in inputs.items()}
                given["x"] = torch.from_numpy(inputs["x"]).cuda() * 3
                outputs = engine.run(given)
                y = outputs["y"] + 0
            torch.cuda.synchronize()
            np.testing.assert_allclose(y.cpu().numpy(), 6 * inputs["x"], rtol=1e-6)
            np.testing.assert_array_equal(outputs["positive"].cpu().numpy(), inputs["n"] > 0)
            np.testing.assert_array_equal(engine.run(inputs)["y"], 2 * inputs["x"])


@pytest.mark.gpu
@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="no onnxruntime-gpu")
def test_bfloat16_on_a_gpu(tmp_path):
    import ml_dtypes

    onnx.save(onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 18]>
        main (bfloat16[2, 3] x) => (bfloat16[2, 3] y) { y = Identity (x) }"""), tmp_path / "same.onnx")
    with build_engine(tmp_path / "same.onnx", tmp_path / "engine", providers=[CUDA], cuda_graph=True) as engine:
        x = case()["x"].astype(ml_dtypes.bfloat16)
        y = engine.run({"x": x})["y"]
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y.view(np.int16), x.view(np.int16))
