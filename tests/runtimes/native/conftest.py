"""The kernels' C API for tests: built for the GPU, and compiled for the CPU by the emulation beside this file; and the
C++ runtime's driver.

The emulated kernels are the same source, run thread by thread: what a kernel computes, and where it writes, is tested
without a GPU too; what only a GPU shows (races, CUDA graphs, time) is not.
"""

import ctypes
import os
import secrets
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest
import torch
from native_driver import NATIVE, Driver, command

import modcompile
from modcompile.doctor import find_ort_headers

# B batch  S rows  K capacity  D width

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "modcompile_kernels_version": (ctypes.c_char_p, []),
    "modcompile_kernels_run_here": (_INT, []),
    "modcompile_route": (_INT, [_POINTER] * 3 + [_INT, _POINTER] + [_SIZE] * 3 + [_POINTER]),
    "modcompile_route_rows_workspace": (ctypes.c_size_t, [_SIZE] * 2),
    "modcompile_route_rows": (
        _INT, [_POINTER, _INT] + [_POINTER] * 5 + [_INT, _POINTER] + [_SIZE] * 4 + [_POINTER] * 2),
    "modcompile_sum_norm_route_rows": (
        _INT, [_POINTER] * 3 + [_INT] + [_POINTER] * 2 + [ctypes.c_float, _INT] + [_POINTER] * 7 + [_INT, _POINTER]
        + [_SIZE] * 4 + [_POINTER] * 2),
    "modcompile_gather_rows": (_INT, [_POINTER] * 2 + [_INT, _POINTER] + [_SIZE] * 4 + [_POINTER]),
    "modcompile_gather_norm_rows": (
        _INT, [_POINTER, _INT, _POINTER, _INT] + [_POINTER] * 2 + [ctypes.c_float, _INT] + [_POINTER] * 2 + [_SIZE] * 4
        + [_POINTER]),
    "modcompile_merge_rows": (_INT, [_POINTER] * 3 + [_INT] + [_POINTER] * 2 + [_INT] + [_SIZE] * 4 + [_POINTER] * 2),
    "modcompile_merge_row_pairs": (
        _INT, [_POINTER] * 5 + [_INT] + [_POINTER] * 3 + [_INT] + [_SIZE] * 4 + [_POINTER]),
}


class KernelError(Exception):
    """A call returned this cudaError_t."""


class Kernels:
    """A library of the kernels; tensors in, tensors filled, on PyTorch's current stream."""

    def __init__(self, path: Path, device: str):
        self.device = device
        self.library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments

    def _call(self, name, *arguments):
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None
        pointers = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
        error = getattr(self.library, name)(*pointers, stream)
        if error != 0:
            raise KernelError(error)

    def version(self):
        return self.library.modcompile_kernels_version().decode()

    def route(self, logits, valid, positions, filled):
        batch, rows = logits.shape
        self._call("modcompile_route", logits, valid, positions, positions.itemsize, filled, batch, rows,
                   positions.shape[1])

    def workspace(self, batch, rows):
        size = self.library.modcompile_route_rows_workspace(batch, rows)
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def route_rows(self, x, weight, bias, valid, logits, positions, filled, workspace):
        batch, rows, width = x.shape
        self._call("modcompile_route_rows", x, DTYPES[x.dtype], weight, bias, valid, logits, positions,
                   positions.itemsize, filled, batch, rows, width, positions.shape[1], workspace)

    def sum_norm_route_rows(self, residual, product, product_bias, norm_weight, norm_bias, epsilon, centered, weight,
                            bias, valid, summed, normed, logits, positions, filled, workspace):
        batch, rows, width = residual.shape
        self._call("modcompile_sum_norm_route_rows", residual, product, product_bias, DTYPES[residual.dtype],
                   norm_weight, norm_bias, epsilon, centered, weight, bias, valid, summed, normed, logits, positions,
                   positions.itemsize, filled, batch, rows, width, positions.shape[1], workspace)

    def gather_rows(self, x, positions, out):
        batch, rows = x.shape[:2]
        self._call("modcompile_gather_rows", x, positions, positions.itemsize, out, batch, rows, positions.shape[1],
                   x[0, 0].numel() * x.itemsize)

    def gather_norm_rows(self, x, positions, weight, bias, epsilon, centered, out, normed):
        batch, rows, width = x.shape
        self._call("modcompile_gather_norm_rows", x, DTYPES[x.dtype], positions, positions.itemsize, weight, bias,
                   epsilon, centered, out, normed, batch, rows, positions.shape[1], width)

    def merge_rows(self, x, y, positions, gate, out):
        batch, rows, width = x.shape
        self._call("modcompile_merge_rows", x, y, positions, positions.itemsize, gate, out, DTYPES[x.dtype], batch,
                   rows, positions.shape[1], width, None)

    def merge_row_pairs(self, x, y, other_x, other_y, positions, gate, out, other_out):
        batch, rows, width = x.shape
        self._call("modcompile_merge_row_pairs", x, y, other_x, other_y, positions, positions.itemsize, gate, out,
                   other_out, DTYPES[x.dtype], batch, rows, positions.shape[1], width)


def build_for_gpu(folder: Path) -> Path:
    """The shared library that CMake builds for the GPU of this machine, or $MODCOMPILE_KERNELS."""
    if given := os.environ.get("MODCOMPILE_KERNELS"):
        return Path(given).resolve()
    major, minor = torch.cuda.get_device_capability()
    configure = ["cmake", "-S", NATIVE, "-B", folder, f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}"]
    for words in (configure, ["cmake", "--build", folder, "--parallel", "--target", "modcompile_kernels"]):
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "libmodcompile_kernels.so"


def build_for_cpu(folder: Path) -> Path:
    """The kernels as a C++ compiler sees them through ``emulation/``, with its checks for undefined behaviour."""
    path = folder / "emulated_kernels.so"
    kernels = NATIVE / "kernels"
    done = subprocess.run(
        ["g++", "-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Wshadow",
         "-Wno-unknown-pragmas", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=undefined",
         f'-DMODCOMPILE_VERSION="{modcompile.__version__}"', "-I", Path(__file__).parent / "emulation", "-I", kernels,
         "-x", "c++", *sorted(kernels.glob("*.cu")), *sorted(kernels.glob("*.cc")), "-o", path],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def emulated_kernels(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels for the CPU")
    return Kernels(build_for_cpu(tmp_path_factory.mktemp("emulated")), "cpu")


@pytest.fixture(scope="session")
def gpu_kernels(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    return Kernels(build_for_gpu(tmp_path_factory.mktemp("native")), "cuda")


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request):
    return request.getfixturevalue(f"{request.param}_kernels")


@pytest.fixture
def seed():
    """Another one every time; MODCOMPILE_SEED repeats a run, whose seed pytest shows when it fails."""
    chosen = int(os.environ.get("MODCOMPILE_SEED", secrets.randbits(31)))
    print(f"MODCOMPILE_SEED={chosen}")
    torch.manual_seed(chosen)
    return chosen


# The C++ runtime


@pytest.fixture(scope="session")
def ort_library(tmp_path_factory):
    """The Python package's library, under the name that programs look for."""
    found = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*"), None)
    if found is None:
        pytest.skip("the package onnxruntime has its library elsewhere on this system")
    folder = tmp_path_factory.mktemp("onnxruntime")
    # Its providers lie beside it.
    for library in found.parent.glob("libonnxruntime_*.so"):
        (folder / library.name).symlink_to(library)
    (folder / "libonnxruntime.so.1").symlink_to(found)
    return folder / "libonnxruntime.so.1"


@pytest.fixture(scope="session")
def configure(ort_library):
    """Runs CMake on runtimes/native, for the runtime alone."""
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    missing += [] if find_ort_headers() else ["headers of ONNX Runtime"]
    if missing:
        pytest.skip(f"to build the C++ runtime there is no {' and no '.join(missing)}")

    def run(folder, *options):
        words = ["cmake", "-S", NATIVE, "-B", folder, "-DMODCOMPILE_CUDA=OFF", "-DMODCOMPILE_RUNTIME=ON",
                 f"-DONNXRUNTIME_INCLUDE_DIR={find_ort_headers()}", f"-DONNXRUNTIME_LIBRARY={ort_library}", *options]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
        if done.returncode != 0 and "nlohmann_json" in done.stderr:
            pytest.skip("to build the C++ runtime there is no nlohmann_json")
        assert done.returncode == 0, done.stdout + done.stderr
        return folder

    return run


@pytest.fixture(scope="session")
def drivers(configure, tmp_path_factory):
    """Builds and starts drivers: with the sanitizers that are named, or as users build it."""
    started = {}

    def start(sanitizers=""):
        if sanitizers not in started:
            folder = tmp_path_factory.mktemp("driver")
            flags = [f"-DCMAKE_CXX_FLAGS=-fsanitize={sanitizers} -fno-sanitize-recover=all -g -O1",
                     "-DCMAKE_BUILD_TYPE=None"] if sanitizers else []
            configure(folder, "-DMODCOMPILE_TESTS=ON", *flags)
            command("cmake", "--build", folder, "--parallel", 2, "--target", "check_engine")
            started[sanitizers] = Driver(folder / "runtime" / "check_engine")
        return started[sanitizers]

    yield start
    for driver in started.values():
        driver.close()
