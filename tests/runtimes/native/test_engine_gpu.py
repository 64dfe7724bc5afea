"""The C++ runtime on a GPU: device memory, streams, threads and CUDA graphs give what host memory gives, and Python.

tests/check_engine_gpu.cc does the work. TensorRT's back end is built where TENSORRT_INCLUDE_DIR and TENSORRT_LIBRARY
name its headers and its library; without a GPU it is only compiled, where there are the headers. TensorRT 8.6, which
this package does not build engines with, needs what builds one: TRT86_RUNNER, a command as trt86_bench.py takes it,
and MODCOMPILE_TRT86, the plugin library for it. CHECK_ENGINE_GPU names a program that was built already.

What the C++ runtime adds to each back end, tests/bench_engine.cc measures. ENGINE_FIGURES names a file for that, one of
all back ends that a call tests, as docs/benchmarks/engine has them.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny
import torch
from modcompile.runtimes.trt.lower import lower
from modcompile.runtimes.trt.profile import bind_profile
from native_driver import command, overhead, words

import modcompile as mc
from modcompile.manifest import write_manifest

# B batch  S rows  D model dim
B, S = 3, 63
RUNS = 100
BENCH_RUNS = 2000
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


@pytest.fixture(scope="module")
def environment():
    """What finds CUDA's libraries in packages, as Python's imports do."""
    found = {path.parent for place in map(Path, sys.path) for path in place.glob("nvidia/**/lib/*.so*")}
    found.add(Path(torch.__file__).parent / "lib")
    known = os.environ.get("LD_LIBRARY_PATH")
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join([*sorted(map(str, found)), *([known] if known else [])])}


@pytest.fixture(scope="module")
def program(configure, tmp_path_factory):
    """Builds check_engine_gpu, or another program, with a back end."""
    def build(*options, name="check_engine_gpu"):
        if given := os.environ.get("CHECK_ENGINE_GPU"):
            return Path(given)
        folder = tmp_path_factory.mktemp("gpu")
        configure(folder, "-DMODCOMPILE_TESTS=ON", *options)
        command("cmake", "--build", folder, "--parallel", os.cpu_count())
        assert (folder / "runtime" / name).exists(), "CMake did not find the CUDA toolkit"
        return folder / "runtime" / name

    return build


@pytest.fixture(scope="module")
def model():
    """A routed model, and two batches of inputs."""
    torch.manual_seed(0)
    example = {"hidden": torch.randn(2, 5, tiny.WIDTH), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    routed = mc.convert(tiny.Stack(*(tiny.Block() for _ in range(2))), example, mc.MoDConfig(capacity_ratio=0.25))
    tiny.randomise_routers(routed)
    mask = np.ones((B, S), np.int64)
    mask[-1, S // 2:] = 0
    batches = [{"hidden": np.random.default_rng(seed).standard_normal((B, S, tiny.WIDTH)).astype(np.float32),
                "attention_mask": mask} for seed in (0, 1)]
    return routed, batches


@pytest.fixture(scope="module")
def measure(environment):
    """Adds what bench_engine says of an engine to the figures, prints them, and writes them where they are wanted."""
    report = {"machine": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "torch": torch.__version__,
              "command": "pytest tests/runtimes/native/test_engine_gpu.py -m gpu -s", "runs": []}

    def add(program, folder, batch, tmp_path):
        model = f"two blocks of width {tiny.WIDTH}, one of them routed, {B} x {S} tokens, float32"
        for figure in overhead(program.with_name("bench_engine"), folder, BENCH_RUNS, batch, tmp_path, env=environment):
            report["runs"].append({"model": model, **figure})
            print(json.dumps(report["runs"][-1]))
        # After each back end, for one of the next may end the process.
        if path := os.environ.get("ENGINE_FIGURES"):
            Path(path).write_text(json.dumps(report, indent=1) + "\n")

    return add


def check(program, environment, folder, batches, tmp_path, in_python=True):
    """Runs the program; what it computed from host memory is Python's as well."""
    tensors = []
    for number, batch in enumerate(batches):
        (tmp_path / str(number)).mkdir()
        tensors += words(batch, tmp_path / str(number))
    done = subprocess.run([program, folder, tmp_path, str(RUNS), *tensors], capture_output=True, text=True, timeout=300,
                          env=environment)
    print(done.stdout)
    assert done.returncode == 0 and done.stdout.endswith("all checks passed\n"), done.stdout + done.stderr
    if in_python:
        with mc.load_engine(folder) as engine:
            for name, array in engine.run(batches[0]).items():
                assert (tmp_path / name).read_bytes() == array.tobytes()


@pytest.mark.gpu
@no_gpu
@pytest.mark.skipif("CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="no onnxruntime-gpu")
def test_onnx_runtime(program, environment, measure, model, tmp_path):
    routed, batches = model
    # A CUDA graph is of nodes that all run on CUDA: with static shapes none is left for the CPU.
    mc.build_engine(routed, tmp_path / "engine", runtime="ort", providers=["CUDAExecutionProvider"],
                    shapes={"hidden": (B, S, tiny.WIDTH)}).close()
    built = program()
    check(built, environment, tmp_path / "engine", batches, tmp_path)
    measure(built, tmp_path / "engine", batches[0], tmp_path)


@pytest.mark.gpu
@no_gpu
def test_tensorrt(program, environment, measure, model, tmp_path):
    pytest.importorskip("tensorrt")
    missing = [name for name in ("TENSORRT_INCLUDE_DIR", "TENSORRT_LIBRARY") if name not in os.environ]
    if missing:
        pytest.skip(f"to build the back end there is no {' and no '.join(missing)}")
    routed, batches = model
    mc.build_engine(routed, tmp_path / "engine", runtime="tensorrt", shapes={"hidden": (B, S, tiny.WIDTH)}).close()
    built = program("-DMODCOMPILE_RUNTIME_TRT=ON", f"-DTENSORRT_INCLUDE_DIR={os.environ['TENSORRT_INCLUDE_DIR']}",
                    f"-DTENSORRT_LIBRARY={os.environ['TENSORRT_LIBRARY']}")
    check(built, environment, tmp_path / "engine", batches, tmp_path)
    measure(built, tmp_path / "engine", batches[0], tmp_path)


@pytest.mark.gpu
@no_gpu
def test_tensorrt_8(program, environment, measure, tmp_path):
    """An engine with our plugins, of a release that has no package for this Python, in a bundle made by hand."""
    needed = ("TRT86_RUNNER", "MODCOMPILE_TRT86", "TENSORRT_INCLUDE_DIR", "TENSORRT_LIBRARY")
    if missing := [name for name in needed if name not in os.environ]:
        pytest.skip(f"there is no {' and no '.join(missing)}")
    torch.manual_seed(0)
    routed = mc.convert(tiny.Stack(*(tiny.Block() for _ in range(2))), {"hidden": torch.randn(2, 5, tiny.WIDTH)},
                        mc.MoDConfig(capacity_ratio=0.25))
    tiny.randomise_routers(routed)
    batches = [{"hidden": np.random.default_rng(seed).standard_normal((B, S, tiny.WIDTH)).astype(np.float32)}
               for seed in (0, 1)]
    shapes = {"hidden": (B, S, tiny.WIDTH)}
    exported = ir.load(mc.export_onnx(routed, tmp_path / "exported.onnx", opset=17, shapes=shapes))
    lowered = lower(exported, bind_profile(exported.graph.inputs, shapes), plugins=True, weakly_typed=True)
    ir.save(lowered, tmp_path / "model.onnx")
    np.savez(tmp_path / "inputs.npz", **batches[0])
    folder = tmp_path / "engine"
    folder.mkdir()
    shutil.copyfile(os.environ["MODCOMPILE_TRT86"], folder / "libmodcompile_trt.so")
    command(*shlex.split(os.environ["TRT86_RUNNER"]), tmp_path / "model.onnx", "--plan", folder / "model.plan",
            "--plugin", folder / "libmodcompile_trt.so", "--inputs", tmp_path / "inputs.npz", "--outputs",
            tmp_path / "outputs.npz")
    major, minor = torch.cuda.get_device_capability()
    (output,) = lowered.graph.outputs
    write_manifest(folder, {
        "runtime": "tensorrt", "runtime_version": "8.6.0", "runtime_range": {"minimum": "8.6.0", "below": "8.6.1"},
        "precision": "fp32", "entry": "model.plan", "target": {"compute_capability": f"{major}.{minor}"},
        "inputs": [{"name": "hidden", "dtype": "float32", "shape": shapes["hidden"]}],
        "outputs": [{"name": output.name, "dtype": "float32", "shape": shapes["hidden"]}]})
    built = program("-DMODCOMPILE_RUNTIME_TRT=ON", "-DMODCOMPILE_RUNTIME_ORT=OFF",
                    f"-DTENSORRT_INCLUDE_DIR={os.environ['TENSORRT_INCLUDE_DIR']}",
                    f"-DTENSORRT_LIBRARY={os.environ['TENSORRT_LIBRARY']}")
    check(built, environment, folder, batches, tmp_path, in_python=False)
    expected = np.load(tmp_path / "outputs.npz")[output.name]
    assert np.isfinite(expected).all() and (tmp_path / output.name).read_bytes() == expected.tobytes()
    measure(built, folder, batches[0], tmp_path)


@pytest.mark.gpu
@no_gpu
def test_aoti(program, environment, measure, model, tmp_path):
    routed, batches = model
    mc.build_engine(routed, tmp_path / "engine", runtime="aoti", device="cuda",
                    shapes={"hidden": (B, S, tiny.WIDTH)}).close()
    built = program("-DMODCOMPILE_RUNTIME_AOTI=ON", f"-DTorch_DIR={torch.utils.cmake_prefix_path}/Torch")
    check(built, environment, tmp_path / "engine", batches, tmp_path)
    measure(built, tmp_path / "engine", batches[0], tmp_path)


@pytest.mark.long
def test_tensorrts_back_end_compiles(configure, tmp_path):
    headers = os.environ.get("TENSORRT_INCLUDE_DIR")
    if not headers or shutil.which("nvcc") is None:
        pytest.skip("there are no headers of TensorRT, or no CUDA toolkit")
    # A static library links nothing: any file stands for TensorRT's.
    (tmp_path / "libnvinfer.so").touch()
    configure(tmp_path, "-DMODCOMPILE_RUNTIME_TRT=ON", "-DMODCOMPILE_RUNTIME_ORT=OFF",
              f"-DTENSORRT_INCLUDE_DIR={headers}", f"-DTENSORRT_LIBRARY={tmp_path / 'libnvinfer.so'}")
    command("cmake", "--build", tmp_path, "--parallel", 2)
