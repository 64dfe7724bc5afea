"""Engines of TensorRT that are built and run: on the host's memory, by the package in stand_in/, which is strict."""

import ctypes
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from modcompile.runtimes.trt import execution, layers
from modcompile.runtimes.trt.plugin_library import CREATORS

from modcompile.engine import build_engine, load_engine
from modcompile.errors import (
    IntegrityError,
    ModcompileError,
    RuntimeUnavailableError,
    UnsupportedGraphError,
    UsageError,
)
from modcompile.manifest import METADATA_KEY, ModelMetadata, RoutedBlock, read_manifest, write_manifest

# B batch  S rows  D width
STAND_IN = Path(__file__).with_name("stand_in")
DYNAMIC = """(float[B, 4] x, float[B, 4] z) => (float[B, 4] sum, float[B, B] square) {
    sum = Add (x, z) t = Transpose (z) square = MatMul (x, t)
}"""
STATIC = DYNAMIC.replace("B", "3")
BATCHES = {"x": ((1, 4), (2, 4), (8, 4))}


class Stream:
    """A stream that runs what it is given at once, and tells who waited for whom."""

    handles = iter(range(1, 1000))

    def __init__(self, device=None, handle=None):
        self.cuda_stream = next(self.handles) if handle is None else handle
        self.waited = []

    def wait_event(self, event):
        self.waited.append(event.stream)

    def wait_stream(self, stream):
        self.waited.append(stream)


class Event:
    stream = None

    def record(self, stream):
        self.stream = stream


class Cuda:
    """What the code asks of torch.cuda, for one GPU whose memory is the host's."""

    def __init__(self, monkeypatch):
        self.default = Stream(handle=0)
        self.current = self.default
        self.capturing = False
        self.capability = (9, 0)
        self.count = 1
        for name, value in {
                "device_count": lambda: self.count, "get_device_capability": lambda device: self.capability,
                "get_device_name": lambda device: "a GPU", "device": lambda device: self, "Event": Event,
                "Stream": Stream, "current_stream": lambda device=None: self.current,
                "default_stream": lambda device=None: self.default,
                "is_current_stream_capturing": lambda: self.capturing,
                "mem_get_info": lambda device: (1_000_000, 80_000_000)}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(execution, "find_device", lambda name: torch.device("cpu"))

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


@pytest.fixture
def trt(cuda, monkeypatch):
    """The stand-in, for this process and for the one that builds."""
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    yield importlib.import_module("tensorrt")
    sys.modules.pop("tensorrt", None)


@pytest.fixture
def build(trt, write, tmp_path):
    def build_text(text, **options):
        return build_engine(write(text), tmp_path / "engine", runtime="tensorrt", **options)

    return build_text


def random(*shape):
    return np.random.default_rng().standard_normal(shape).astype(np.float32)


def check(engine, x, z):
    outputs = engine.run({"x": x, "z": z})
    assert list(outputs) == ["sum", "square"]
    np.testing.assert_array_equal(np.asarray(outputs["sum"]), np.asarray(x) + np.asarray(z))
    np.testing.assert_allclose(np.asarray(outputs["square"]), np.asarray(x) @ np.asarray(z).T, rtol=1e-5, atol=1e-5)
    return outputs


# The stand-in itself

_OURS = {"IExecutionContext", "ICudaEngine", "Runtime", "Builder", "IBuilderConfig", "ITimingCache", "OnnxParser",
         "IOptimizationProfile", "IPluginRegistry", "INetworkDefinition"}


@pytest.mark.parametrize("name", sorted(_OURS))
def test_the_stand_in_has_the_real_signatures(trt, name):
    real = getattr(pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed"), name)
    for method, function in vars(getattr(trt, name)).items():
        if method.startswith("_") or not inspect.isfunction(function):
            continue
        parameters = list(inspect.signature(function).parameters)
        signatures = [re.findall(r"[(,] ?(\w+):", line.partition(" -> ")[0])
                      for line in getattr(real, method).__doc__.splitlines() if f"{method}(self" in line]
        # Keywords that have a default may be left out.
        assert any(given[:len(parameters)] == parameters for given in signatures), (method, parameters, signatures)
    for attribute in ("num_io_tensors", "device_memory_size_v2") if name == "ICudaEngine" else ():
        assert hasattr(real, attribute)


# Running


@pytest.mark.parametrize(("text", "shapes"), [(STATIC, {}), (DYNAMIC, BATCHES)])
def test_numpy_and_torch_in_and_out(build, text, shapes):
    engine = build(text, shapes=shapes)
    outputs = check(engine, random(3, 4), random(3, 4))
    assert all(isinstance(value, np.ndarray) for value in outputs.values())
    x, z = torch.randn(3, 4), torch.randn(3, 4)
    outputs = check(engine, x, z)
    assert all(isinstance(value, torch.Tensor) for value in outputs.values())
    # Not a row of them begins where memory was allocated, and they are not in one piece.
    check(engine, torch.randn(4, 4)[1:], torch.randn(4, 3).T)
    # Outputs are the caller's: later runs leave them alone.
    kept = {name: value.clone() for name, value in outputs.items()}
    check(engine, torch.randn(3, 4), torch.randn(3, 4))
    assert all(torch.equal(kept[name], outputs[name]) for name in kept)


def test_sizes_vary_within_the_profile(build, trt):
    engine = build(DYNAMIC, shapes=BATCHES)
    for size in (1, 8, 2):
        outputs = check(engine, random(size, 4), random(size, 4))
        assert outputs["square"].shape == (size, size)
    trt.calls.clear()
    with pytest.raises(UsageError) as error:
        engine.run({"x": random(9, 4), "z": random(9, 4)})
    assert "1 <= B <= 8" in str(error.value) and "shape (9, 4)" in str(error.value) and not trt.calls


def test_tensorrt_is_told_everything_before_it_runs(build, trt, cuda):
    engine = build(DYNAMIC, shapes=BATCHES)
    cuda.current = Stream()
    trt.calls.clear()
    check(engine, random(2, 4), random(2, 4))
    assert trt.calls == [("shape", "x", (2, 4)), ("address", "x"), ("shape", "z", (2, 4)), ("address", "z"),
                         ("address", "sum"), ("address", "square"), ("run", cuda.current.cuda_stream)]


def test_runs_are_ordered_whatever_their_stream(build, trt, cuda):
    engine = build(STATIC)
    first, second = Stream(), Stream()
    for stream in (first, second):
        cuda.current = stream
        check(engine, random(3, 4), random(3, 4))
    # The context's memory may still be in use on the first.
    assert second.waited == [first]
    # The default stream is not TensorRT's: a side stream waits for it, and it for that.
    cuda.current = cuda.default
    trt.calls.clear()
    check(engine, random(3, 4), random(3, 4))
    (side,) = cuda.default.waited
    assert trt.calls[-1] == ("run", side.cuda_stream) and side.waited == [second, cuda.default]


def test_threads_share_an_engine(build, trt, monkeypatch):
    engine = build(DYNAMIC, shapes=BATCHES, contexts=2)
    run = trt.IExecutionContext.execute_async_v3
    at_once, most = [0], [0]

    def slow(context, stream_handle):
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.01)
        done = run(context, stream_handle)
        at_once[0] -= 1
        return done

    monkeypatch.setattr(trt.IExecutionContext, "execute_async_v3", slow)
    failures = []

    def work(size):
        try:
            for _ in range(5):
                check(engine, random(size, 4), random(size, 4))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(size,)) for size in (1, 2, 3, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and most[0] == 2


def test_a_cuda_graph_is_recorded_without_events_of_outside(build, cuda, monkeypatch):
    recorded = []

    class Graph:
        """Records at once, and runs instead of a replay."""

        def __init__(self, model, inputs, *, reuse_outputs=False):
            self.model, self.reuse_outputs = model, reuse_outputs
            cuda.current, cuda.capturing = Stream(), True
            model(list(inputs))
            recorded.append((cuda.current.waited, [tuple(value.shape) for value in inputs], reuse_outputs))
            cuda.current, cuda.capturing = cuda.default, False

        def __call__(self, tensors):
            return self.model(tensors)

    monkeypatch.setattr(execution, "CudaGraph", Graph)
    engine = build(STATIC, cuda_graph=True)
    assert recorded == [([], [(3, 4), (3, 4)], False)]
    check(engine, random(3, 4), random(3, 4))
    load_engine(engine.folder, cuda_graph=True, reuse_outputs=True)
    assert recorded[1][2] is True


def test_a_closed_engine(build):
    engine = build(STATIC)
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.run({"x": random(3, 4), "z": random(3, 4)})
    with pytest.raises(UsageError, match="closed"):
        engine.open()


# What is refused


@pytest.mark.parametrize(("options", "part"), [
    ({"cuda_graph": True}, "a CUDA graph has one size"),
    ({"contexts": 0}, "at least 1"),
    ({"contexts": 2, "cuda_graph": True}, "one run at a time"),
    ({"reuse_outputs": True}, "cuda_graph=True"),
    ({"device": "cpu"}, "TensorRT runs on a GPU"),
])
def test_options_that_do_not_fit(build, options, part):
    engine = build(DYNAMIC, shapes=BATCHES)
    with pytest.raises(UsageError, match=part):
        load_engine(engine.folder, **options)


def test_tensors_that_do_not_fit(build):
    engine = build(STATIC)
    x = torch.randn(3, 4)
    for z, part in ((torch.randn(2, 4), "wrong size"), (torch.randn(3, 4).half(), "wrong dtype"),
                    (torch.randn(12), "wrong rank")):
        with pytest.raises(UsageError, match=part):
            engine.run({"x": x, "z": z})
    meta = {name: torch.empty(3, 4, device="meta") for name in ("x", "z")}
    with pytest.raises(UsageError) as error:
        engine.run(meta)
    assert "another device than the engine" in str(error.value) and "tensors on meta" in str(error.value)


def test_another_gpu(build, cuda, trt):
    engine = build(STATIC)
    assert engine.manifest.target["compute_capability"] == "9.0"
    cuda.capability = (8, 6)
    with pytest.raises(RuntimeUnavailableError) as error:
        load_engine(engine.folder)
    assert "another GPU" in str(error.value) and "9.0" in str(error.value) and "8.6" in str(error.value)
    # What TensorRT itself finds out.
    cuda.capability, trt.COMPUTE_CAPABILITY = (9, 0), "9.1"
    with pytest.raises(RuntimeUnavailableError) as error:
        load_engine(engine.folder)
    assert "incompatible device" in str(error.value) and "a GPU, compute capability 9.0" in str(error.value)


def test_no_gpu(build, cuda):
    engine = build(STATIC)
    cuda.count = 0
    with pytest.raises(RuntimeUnavailableError, match="no GPU") as error:
        load_engine(engine.folder)
    assert error.value.exit_code == 5 and "compute capability 9.0" in str(error.value)


def test_another_release(build, trt, monkeypatch):
    engine = build(STATIC)
    monkeypatch.setattr(trt, "__version__", "10.14.0")
    with pytest.raises(RuntimeUnavailableError) as error:
        load_engine(engine.folder)
    assert "tensorrt 10.13.0" in str(error.value) and "tensorrt 10.14.0" in str(error.value)


def sealed(folder, **fields):
    """Writes a folder's manifest anew, as if the files had been so from the beginning."""
    manifest = read_manifest(folder)
    kept = {name: getattr(manifest, name) for name in type(manifest).model_fields
            if name not in ("files", "modcompile_version", "format_version")}
    write_manifest(folder, {**kept, **fields})


def test_a_damaged_plan(build):
    engine = build(STATIC)
    plan = engine.folder / "model.engine"
    plan.write_bytes(plan.read_bytes()[:5])
    with pytest.raises(IntegrityError, match="truncated or edited"):
        load_engine(engine.folder)
    sealed(engine.folder)
    with pytest.raises(RuntimeUnavailableError) as error:
        load_engine(engine.folder)
    assert "does not open the engine" in str(error.value) and "the plan is bad" in str(error.value)


def test_a_plan_of_another_model(build):
    engine = build(STATIC)
    (first, second), outputs = engine.inputs, engine.outputs
    for inputs in ((first,), (first, second.model_copy(update={"shape": (5, 4)})),
                   (first, second.model_copy(update={"dtype": "float16"}))):
        sealed(engine.folder, inputs=inputs)
        with pytest.raises(IntegrityError, match="not those of its manifest") as error:
            load_engine(engine.folder)
        assert "input z FLOAT [3, 4]" in str(error.value)
    sealed(engine.folder, inputs=(first, second), outputs=outputs[:1])
    with pytest.raises(IntegrityError, match="not those of its manifest"):
        load_engine(engine.folder)


def test_too_little_memory(build, trt):
    engine = build(STATIC)
    for left, contexts in ((0, 1), (2, 3)):
        trt.memory["contexts"] = left
        with pytest.raises(RuntimeUnavailableError, match="too little memory") as error:
            load_engine(engine.folder, contexts=contexts)
        message = str(error.value)
        assert "5 MB of GPU memory" in message and "1 of 80 MB are free" in message and "no memory for" in message
    # Nothing was lost.
    check(engine, random(3, 4), random(3, 4))


def test_a_run_that_fails_says_why_and_the_next_one_runs(build, trt, monkeypatch):
    engine = build(STATIC)

    def fail(context, stream_handle):
        context._engine._log.log(trt.ILogger.ERROR, "IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (busy)")
        return False

    with monkeypatch.context() as patch:
        patch.setattr(trt.IExecutionContext, "execute_async_v3", fail)
        with pytest.raises(ModcompileError, match="failed to run the engine") as error:
            engine.run({"x": random(3, 4), "z": random(3, 4)})
    assert "x (3, 4)" in str(error.value) and "busy" in str(error.value)

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(execution.torch, "empty", exhausted)
        with pytest.raises(ModcompileError, match="out of memory"):
            engine.run({"x": random(3, 4), "z": random(3, 4)})
    check(engine, random(3, 4), random(3, 4))


# Building


def plan_of(engine):
    return (engine.folder / "model.engine").read_bytes()


def test_the_report_and_the_flags(build):
    told = []
    engine = build(STATIC, progress=lambda *step: told.append(step))
    assert told == [("Building engine", 0, 2), ("Building engine", 1, 2), ("Building engine", 2, 2)]
    assert [layer.type for layer in layers(engine.folder)] == ["Add", "Transpose", "MatMul"]
    # No refit, no TF32, no preview.
    assert b'"flags": ["STRICT_NANS"], "previews": []' in plan_of(engine)


def test_builds_share_a_timing_cache(build, tmp_path):
    cache = tmp_path / "caches.bin"
    for count in (1, 2):
        build(STATIC, timing_cache=cache, overwrite=True)
        assert cache.read_bytes() == b"+" * count
    cache.write_bytes(b"other GPU")
    with pytest.raises(UsageError, match="timing cache"):
        build(STATIC, timing_cache=cache, overwrite=True)
    assert cache.read_bytes() == b"other GPU"
    with pytest.raises(UsageError, match="timing cache cannot be written"):
        build(STATIC, timing_cache=tmp_path / "nowhere" / "cache", overwrite=True)


# Plugins


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """A library in the place of TensorRT's, and one that registers plugins with it as ours does: while it is loaded."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "nvinfer.c").write_text("""
        #include <string.h>
        static const char* names[32];
        static int count = 0;
        void stand_in_register(const char* name) { names[count++] = name; }
        int stand_in_registered(const char* name) {
          for (int i = 0; i < count; ++i) if (strcmp(names[i], name) == 0) return 1;
          return 0;
        }""")
    calls = "".join(f'stand_in_register("{namespace}/{name}/{version}");' for name, version, namespace in CREATORS)
    source = """
        void stand_in_register(const char* name);
        const char* modcompile_trt_version() {
          return "modcompile TensorRT plugins: version 0.1.0, plugins 1, TensorRT 10.07;";
        }
        __attribute__((constructor)) static void registers() { CALLS }"""
    (folder / "plugins.c").write_text(source.replace("CALLS", calls))
    (folder / "silent.c").write_text(source.replace("CALLS", ""))
    for name, target, *options in (("nvinfer", "libnvinfer.so.10", "-Wl,-soname,libnvinfer.so.10"),
                                   ("plugins", "plugins.so"), ("silent", "silent.so")):
        subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / target, folder / f"{name}.c", *options], check=True)
    return folder


@pytest.fixture
def build_routed(libraries, cuda, monkeypatch, routed_model, write, tmp_path):
    """Builds a routed model with the stand-in, which knows the library of ``libraries`` as TensorRT's."""
    monkeypatch.setenv("STAND_IN_NVINFER", str(libraries / "libnvinfer.so.10"))
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    # As the stand-in does when it is imported: not for others.
    ctypes.CDLL(str(libraries / "libnvinfer.so.10"))

    def build(plugins, model=None, **options):
        return build_engine(write(model or routed_model()), tmp_path / "engine", runtime="tensorrt",
                            shapes={"x": (2, 17, 32)}, plugins=plugins, **options)

    yield build
    sys.modules.pop("tensorrt", None)


def test_an_engine_with_plugins(build_routed, libraries):
    engine = build_routed(libraries / "plugins.so")
    assert (engine.folder / "libmodcompile_trt.so").read_bytes() == (libraries / "plugins.so").read_bytes()
    assert "libmodcompile_trt.so" in engine.manifest.files
    assert engine.manifest.target["plugins"] == "0.1.0 for TensorRT 10.7"
    assert b'"previews": ["ALIASED_PLUGIN_IO_10_03"]' in plan_of(engine)
    assert {"Route", "GatherRows", "MergeRows"} <= {layer.type for layer in layers(engine.folder)}
    load_engine(engine.folder)
    with (engine.folder / "libmodcompile_trt.so").open("ab") as file:
        file.write(b"!")
    with pytest.raises(IntegrityError):
        load_engine(engine.folder)
    (engine.folder / "libmodcompile_trt.so").unlink()
    with pytest.raises(IntegrityError, match="missing"):
        load_engine(engine.folder)


def test_a_dense_model_needs_no_plugins(build_routed, libraries, parse):
    dense = parse("(float[2, 17, 32] x) => (float[2, 17, 32] y) { y = Neg (x) }")
    engine = build_routed(libraries / "plugins.so", dense)
    assert set(engine.manifest.files) == {"model.engine", "build.json"} and "plugins" not in engine.manifest.target


def test_without_plugins_our_ops_are_standard_ones(build_routed):
    engine = build_routed(None)
    assert {"TopK", "ScatterND"} <= {layer.type for layer in layers(engine.folder)}


def edited(libraries, tmp_path, old, new):
    content = (libraries / "plugins.so").read_bytes()
    assert old in content and len(old) == len(new)
    path = tmp_path / "edited.so"
    path.write_bytes(content.replace(old, new))
    return path


@pytest.mark.parametrize(("old", "new", "parts"), [
    (b"TensorRT 10.07;", b"TensorRT 8.600;", ("another TensorRT", "TensorRT 10, 10.13.0 or older", "TensorRT 8.600")),
    (b"TensorRT 10.07;", b"TensorRT 11.10;", ("another TensorRT", "TensorRT 11.10")),
    (b"TensorRT 10.07;", b"TensorRT 10.14;", ("another TensorRT", "TensorRT 10.14")),
    (b"plugins 1,", b"plugins 2,", ("another version of the plugins", "version 1", "version 2, of modcompile 0.1.0")),
    (b"modcompile TensorRT plugins", b"another library of plugins.", ("not modcompile's plugin library",)),
])
def test_another_library(build_routed, libraries, tmp_path, old, new, parts):
    path = edited(libraries, tmp_path, old, new)
    with pytest.raises(RuntimeUnavailableError) as error:
        build_routed(path)
    message = str(error.value)
    assert all(part in message for part in (*parts, str(path), "fix:")), message
    assert not (tmp_path / "engine").exists()


def test_a_library_that_does_not_load(build_routed, libraries, tmp_path):
    with pytest.raises(RuntimeUnavailableError, match="cannot be read"):
        build_routed(tmp_path / "nowhere.so")
    with pytest.raises(RuntimeUnavailableError) as error:
        build_routed(libraries / "silent.so")
    assert "not registered: Route, MaskedRoute" in str(error.value) and "silent.so" in str(error.value)
    # Its signature is there, and it is cut short: the process that loads it may die.
    content = (libraries / "plugins.so").read_bytes()
    for end in (content.index(b"TensorRT 10.07;") + 20, len(content) // 2 + 2000):
        (tmp_path / "cut.so").write_bytes(content[:end])
        with pytest.raises(RuntimeUnavailableError, match="does not load") as error:
            build_routed(tmp_path / "cut.so")
        assert f"where: {tmp_path / 'cut.so'}" in str(error.value)
    assert not (tmp_path / "engine").exists()


def test_a_crash_after_the_library_was_loaded_is_not_its(build_routed, libraries, monkeypatch):
    monkeypatch.setenv("STAND_IN_CRASHES", "1")
    with pytest.raises(UnsupportedGraphError, match="SIGABRT while reading the graph"):
        build_routed(libraries / "plugins.so")


def test_plugins_are_for_ops_of_ours(build_routed, libraries, parse):
    flat = parse("(float[S, 17, 32] x) => (float[S, 17, 32] y) { y = Neg (x) }")
    metadata = ModelMetadata(precision="fp32", routed_blocks=[RoutedBlock(
        path="layers.1", capacity_ratio="5/17", attend_to="all", gate="raw", rows="S")])
    onnx.helper.set_model_props(flat, {METADATA_KEY: metadata.to_json()})
    with pytest.raises(UsageError, match="no ops of ours"):
        build_routed(libraries / "plugins.so", flat)


def test_a_capacity_that_varies(build_routed, libraries, parse, write, tmp_path):
    with pytest.raises(UnsupportedGraphError, match="capacity"):
        build_engine(write("""(float[B, S] logits) => (int64[B, K] positions) {
            first = Constant <value = int64 {1}> ()
            sizes = Shape (logits)
            capacity = Gather (sizes, first)
            positions, filled = modcompile.Route (logits, capacity) }"""), tmp_path / "engine", runtime="tensorrt",
            shapes={"logits": ((1, 8), (1, 16), (1, 32))}, plugins=libraries / "plugins.so")


@pytest.mark.parametrize("name", ["plugins", "timing_cache"])
def test_tensorrt_rtx_takes_neither(routed_model, write, tmp_path, name):
    # Refused before anything is looked at: the file is not there, and the package need not be.
    with pytest.raises(UsageError) as error:
        build_engine(write(routed_model()), tmp_path / "engine", runtime="tensorrt-rtx", **{name: tmp_path / "no.file"})
    assert f"{name} is an option of tensorrt alone" in str(error.value) and os.listdir(tmp_path) == ["model.onnx"]
