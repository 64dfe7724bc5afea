"""The C++ runtime's back end TensorRT, driven through TensorRT's own headers by a stand-in for the libraries.

fake_tensorrt/fake.cc is preloaded in the place of TensorRT and CUDA's runtime. So the calls, their order, addresses,
copies and graphs are tested, in whatever release TENSORRT_INCLUDE_DIR names; TensorRT itself is not.
"""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from native_driver import Driver, command, overhead, words

from modcompile.manifest import MANIFEST_NAME, TensorSpec, write_manifest

# B batch  D width
B, D = 3, 5
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def headers():
    named = os.environ.get("TENSORRT_INCLUDE_DIR")
    if not named or shutil.which("nvcc") is None:
        pytest.skip("there are no headers of TensorRT, or no CUDA toolkit")
    return Path(named)


@pytest.fixture(scope="module")
def version(headers):
    text = (headers / "NvInferVersion.h").read_text()
    numbers = [next(filter(None, re.search(rf"define NV_TENSORRT_{part} (\d+)|define TRT_{part}_ENTERPRISE (\d+)",
                                           text).groups())) for part in ("MAJOR", "MINOR", "PATCH", "BUILD")]
    return [int(number) for number in numbers]


def stubs(headers):
    """Overrides of all pure methods, so that the stand-in writes out those that are called."""
    text = re.sub(r"//[^\n]*", "", (headers / "NvInferImpl.h").read_text())
    made = ["#include <cstdlib>", "namespace nvinfer1 {"]
    names = ("VRuntime", "VCudaEngine", "VExecutionContext")
    for name in names:
        body = re.search(rf"class {name} : public VRoot\s*\{{(.*?)\n\}};", text, re.DOTALL)[1]
        methods = re.findall(r"virtual\s+([^;{}]*?)\s*=\s*0\s*;", body)
        assert len(methods) > 10
        made += [f"class {name}Stub : public apiv::{name} {{", " public:",
                 *(f"  {method} override {{ std::abort(); }}" for method in methods), "};"]
    return "\n".join([*made, "}", *(f"using nvinfer1::{name}Stub;" for name in names), ""])


@pytest.fixture(scope="module")
def programs(configure, headers, tmp_path_factory):
    """The drivers, and the stand-in that is to be preloaded."""
    folder = tmp_path_factory.mktemp("trt")
    (folder / "stubs.h").write_text(stubs(headers))
    # CMake itself knows where the toolkit's headers are.
    (folder / "CMakeLists.txt").write_text(f"""
        cmake_minimum_required(VERSION 3.24)
        project(fake LANGUAGES CXX)
        find_package(CUDAToolkit REQUIRED)
        add_library(nvinfer SHARED {Path(__file__).parent / 'fake_tensorrt' / 'fake.cc'})
        target_compile_features(nvinfer PRIVATE cxx_std_17)
        target_include_directories(nvinfer PRIVATE {folder})
        target_include_directories(nvinfer SYSTEM PRIVATE {headers} ${{CUDAToolkit_INCLUDE_DIRS}})
        """)
    command("cmake", "-S", folder, "-B", folder / "fake")
    command("cmake", "--build", folder / "fake")
    fake = folder / "fake" / "libnvinfer.so"
    configure(folder / "build", "-DMODCOMPILE_RUNTIME_TRT=ON", "-DMODCOMPILE_RUNTIME_ORT=OFF", "-DMODCOMPILE_TESTS=ON",
              f"-DTENSORRT_INCLUDE_DIR={headers}", f"-DTENSORRT_LIBRARY={fake}")
    command("cmake", "--build", folder / "build", "--parallel", 2)
    return folder / "build" / "runtime", fake


@pytest.fixture(scope="module")
def driver(programs):
    folder, fake = programs
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(fake))
        patch.setenv("OWN_THREADS", "1")
        started = Driver(folder / "check_engine")
    yield started
    started.close()


@pytest.fixture
def make(version, tmp_path):
    """Writes an engine folder."""
    def written(plan, batch="batch", files=None, **fields):
        folder = tmp_path / "engine"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "model.engine").write_bytes(plan.encode())
        for name, content in (files or {}).items():
            (folder / name).write_bytes(content)
        told = ".".join(map(str, version))
        write_manifest(folder, {
            "runtime": "tensorrt", "runtime_version": told, "precision": "fp32", "entry": "model.engine",
            "runtime_range": {"minimum": told, "below": ".".join(map(str, [*version[:3], version[3] + 1]))},
            "inputs": [TensorSpec(name="x", dtype="float32", shape=(batch, D))],
            "outputs": [TensorSpec(name="y", dtype="uint8", shape=(batch, D, 4))],
            "target": {"compute_capability": "9.0"}, **fields})
        assert (folder / MANIFEST_NAME).exists()
        return folder

    return written


def rows(count, seed=0):
    return {"x": np.random.default_rng(seed).standard_normal((count, D)).astype(np.float32)}


def test_sizes_that_vary(driver, make, tmp_path):
    folder = make("varying")
    for count in (1, 8, 3):
        inputs = rows(count)
        for ask in ("run", "run-c"):
            assert driver.ask(ask, folder, tmp_path, *words(inputs, tmp_path)) == "ok"
            assert (tmp_path / "y").read_bytes() == (2 * inputs["x"]).tobytes()
        buffer = words({">y": np.zeros((count, D, 4), np.uint8)}, tmp_path)
        assert driver.ask("run", folder, tmp_path, *words(inputs, tmp_path), *buffer) == "ok"
    answer = driver.ask("run", folder, tmp_path, *words(rows(9), tmp_path))
    assert answer.startswith("TensorRT failed to run the engine\n") and "TensorRT refuses the shape of x" in answer
    answer = driver.ask("run", folder, tmp_path, *words(rows(2), tmp_path),
                        *words({">y": np.zeros((2, D, 3), np.uint8)}, tmp_path))
    assert answer.startswith("output y has the wrong size")


def test_threads_with_a_context_each(driver, make, tmp_path):
    assert driver.ask("threads", make("varying"), 8, 200, *words(rows(3), tmp_path)) == "ok"


def test_what_a_context_keeps_between_runs_shows_in_none(driver, make, tmp_path):
    for plan in ("varying", "static"):
        folder = make(plan, batch="batch" if plan == "varying" else B)
        assert driver.ask("again", folder, *words(rows(3), tmp_path)) == "ok"


def test_device_memory_streams_and_graphs(programs, make, tmp_path):
    """What a GPU's test does, see tests/check_engine_gpu.cc."""
    tensors = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        tensors += words(rows(B, seed), tmp_path / str(seed))
    folder, fake = programs
    printed = command(folder / "check_engine_gpu", make("static", batch=B), tmp_path, 50, *tensors,
                      env={**os.environ, "LD_PRELOAD": str(fake)})
    assert printed.splitlines() == ["device memory: ok", "a stream: ok", "8 threads: ok", "a CUDA graph: ok",
                                    "a CUDA graph on a stream: ok", "all checks passed"]


def test_the_benchmark(programs, make, tmp_path):
    folder, fake = programs
    for plan in ("varying", "static"):
        engine = make(plan, batch="batch" if plan == "varying" else B)
        figures = overhead(folder / "bench_engine", engine, 200, rows(B), tmp_path,
                           env={**os.environ, "LD_PRELOAD": str(fake)})
        # A CUDA graph has one size.
        assert [figure["cuda_graph"] for figure in figures] == [False, True][:1 + (plan == "static")]
        for figure in figures:
            assert (figure["runtime"], figure["device"], figure["runs"]) == ("tensorrt", "cuda", 200)
            assert figure["bare_us"] > 0 and figure["modcompile_us"] > 0


def test_what_is_not_there(driver, make, version):
    def refused(folder, *parts):
        answer = driver.ask("load", folder)
        for part in parts:
            assert part in answer

    refused(make("no plan"), "tensorrt does not open the engine", "found: magic tag does not match\n")
    refused(make("varying", batch=3), "inputs or outputs are not those of its manifest", "x: input of type 0 (3, 5)",
            "x: input of type 0 (-1, 5)")
    refused(make("varying", target={"compute_capability": "8.6"}), "the engine was built for another GPU",
            "expected: compute capability 8.6", "found: compute capability 9.0, cuda:0")
    refused(make("varying", runtime_range={"minimum": "7.0", "below": "7.1"}, runtime_version="7.0"),
            "tensorrt opens only engines that it built itself", "expected: tensorrt 7.0", f"tensorrt {version[0]}.")
    assert driver.ask("load", make("varying"), "device=1").startswith("there is no such GPU\n")
    assert driver.ask("load", make("varying"), "graph").startswith("a CUDA graph has one size\n")


def test_the_plugin_library_is_loaded_first(driver, make, version, tmp_path):
    name = "libmodcompile_trt.so"

    def library(text, code=""):
        (tmp_path / "plugins.cc").write_text(f'extern "C" const char* modcompile_trt_version() {{ return "{text}"; }}\n'
                                             + code)
        command("c++", "-shared", "-fPIC", tmp_path / "plugins.cc", "-o", tmp_path / "plugins.so")
        return (tmp_path / "plugins.so").read_bytes()

    def signature(major, minor, plugins="1"):
        return f"modcompile TensorRT plugins: version 0.1.0, plugins {plugins}, TensorRT {major}.{minor};"

    assert "no creator of the plugin Route" in driver.ask("load", make("static plugins", batch=B))
    # Refused by its bytes: what it would do while it is loaded is to end the process.
    ends = "struct Ends { Ends() { __builtin_trap(); } } ends;"
    major, minor = version[:2]
    for text, problem in ((signature(major + 1, 0), "the plugin library is for another TensorRT"),
                          (signature(major, minor + 1), "the plugin library is for another TensorRT"),
                          (signature(major, minor, "2"), "the plugin library has another version of the plugins"),
                          ("something else", "the library is not modcompile's plugin library")):
        folder = make("static plugins", batch=B, files={name: library(text, ends)})
        assert driver.ask("load", folder).split("\n")[0] == problem
    folder = make("static plugins", batch=B, files={name: signature(major, minor).encode()})
    assert driver.ask("load", folder).startswith("the plugin library does not load\n")
    registers = ('extern "C" void fake_tensorrt_register();\n'
                 "struct Registers { Registers() { fake_tensorrt_register(); } } registers;")
    folder = make("static plugins", batch=B, files={name: library(signature(major, minor), registers)})
    assert driver.ask("load", folder) == "ok"
