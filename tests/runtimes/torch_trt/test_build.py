"""The runtime "torch-tensorrt": what it says where the package is missing, and what it builds where it is installed.

With its RTX build installed, the package works without a GPU, in a process of its own: ``without_gpu.py`` says how. It
asks for one release of torch, but its Python part, which is what builds, takes the one before as well:
``pip install --no-deps torch-tensorrt-rtx`` beside ``tensorrt-rtx`` is enough for these tests.
"""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from modcompile.runtimes.torch_trt import package
from tiny import Mlp, Stack, randn
from tolerances import TOLERANCES

import modcompile as mc
from modcompile.engine import build_engine, load_engine
from modcompile.errors import RuntimeUnavailableError, UnsupportedGraphError, UsageError
from modcompile.manifest import read_manifest

INSTALLED = importlib.util.find_spec("torch_tensorrt") is not None
WITHOUT_GPU = [
    pytest.mark.tensorrt,
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED or importlib.util.find_spec("tensorrt_rtx") is None,
                       reason="no torch-tensorrt-rtx"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU"),
]


@pytest.fixture(scope="module")
def model():
    return mc.convert(Stack(Mlp(), Mlp()), {"hidden": randn(2, 5, 8)}, mc.MoDConfig(capacity_ratio=0.25))


# What is said where something is missing


def test_a_missing_package_is_named_with_the_command_that_installs_it(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(RuntimeUnavailableError, match="Torch-TensorRT is not installed") as missing:
        build_engine(model, tmp_path / "engine", runtime="torch-tensorrt", shapes={"hidden": (2, 63, 8)})
    assert 'pip install "modcompile[torch-tensorrt]"' in missing.value.details["fix"]
    assert missing.value.exit_code == 5
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("error", [
    AssertionError("Torch not compiled with CUDA enabled"),
    RuntimeError("Found no NVIDIA driver on your system"),
    OSError("Could not load this library: libtorchtrt.so"),
    ModuleNotFoundError("No module named 'dllist'", name="dllist"),
], ids=lambda error: type(error).__name__)
def test_a_package_that_does_not_load_says_why(error, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(package.importlib, "import_module", fail)
    with pytest.raises(RuntimeUnavailableError, match="installed but does not load") as broken:
        package.import_torch_tensorrt()
    assert str(error) in broken.value.details["found"]
    assert "NVIDIA GPU" in broken.value.details["expected"]


@pytest.mark.parametrize(("version", "fits"), [("2.13.0", False), ("2.14.0", True), ("2.14.0+cu130", True),
                                               ("2.15.1", True)])
def test_an_old_release_is_refused(version, fits, monkeypatch):
    old = types.SimpleNamespace(__version__=version)
    monkeypatch.setattr(package.importlib, "import_module", lambda name: old)
    if fits:
        assert package.import_torch_tensorrt() is old
    else:
        with pytest.raises(RuntimeUnavailableError, match="too old") as refused:
            package.import_torch_tensorrt()
        assert refused.value.details["found"] == version


def test_an_onnx_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="made from a model"):
        build_engine(tmp_path / "model.onnx", tmp_path / "engine", runtime="torch-tensorrt")


def test_what_the_package_raises_is_an_unsupported_graph(model, tmp_path, monkeypatch):
    def fail(program, **_):
        raise RuntimeError("TensorRT build_serialized_network returned None")

    stand_in = types.SimpleNamespace(
        __version__="2.14.0", Input=lambda shape, dtype: shape,
        dynamo=types.SimpleNamespace(convert_exported_program_to_serialized_trt_engine=fail))
    for name in ("torch_tensorrt", "tensorrt"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    with pytest.raises(UnsupportedGraphError, match="does not build the graph") as refused:
        build_engine(model, tmp_path / "engine", runtime="torch-tensorrt", shapes={"hidden": (2, 63, 8)})
    assert "build_serialized_network returned None" in refused.value.details["found"]
    assert not (tmp_path / "engine").exists()


# With the package


def run(folder, *arguments):
    """What the script printed last, read."""
    script = Path(__file__).with_name("build_without_gpu.py")
    done = subprocess.run([sys.executable, script, folder, *arguments], capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "precision", "attend_to"), [
    pytest.param(*case, marks=WITHOUT_GPU) for case in [
        ("stack", "fp32", "chosen"), ("gpt2", "fp32", "chosen"), ("gpt2", "fp16", "all"), ("bert", "fp32", "all"),
        ("bert", "fp16", "chosen"), ("llama", "fp32", "chosen")]])
def test_every_op_of_a_model_has_a_converter(name, precision, attend_to, tmp_path):
    result = run(tmp_path, name, precision, attend_to, "--convert")
    assert {"aten.topk.default", "aten.scatter.src", "aten.index_select.default"} <= set(result["ops"])
    assert result["without_converter"] == []
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    assert result["deviation"] <= TOLERANCES["eager"][dtype]


@pytest.mark.parametrize(("name", "precision", "attend_to", "capacities"), [
    pytest.param(*case, marks=WITHOUT_GPU) for case in [
        ("stack", "fp32", "chosen", [9]), ("gpt2", "fp32", "chosen", [5, 5]), ("bert", "fp16", "all", [5, 5])]])
def test_an_engine_folder_is_built(name, precision, attend_to, capacities, tmp_path):
    folder = tmp_path / "engine"
    result = run(folder, name, precision, attend_to)
    assert (result["runtime"], result["type"], result["capacities"]) == ("tensorrt-rtx", "TrtEngine", capacities)
    assert {"tensorrt-rtx", "torch_tensorrt"} <= result["created_with"].keys()
    # The network has the names, shapes and types that the manifest tells.
    names = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}
    for side in ("inputs", "outputs"):
        assert result["network"][side] == [[tensor, shape, names[dtype]] for tensor, shape, dtype in result[side]]
    # No more is needed to load it than to load any other engine of TensorRT-RTX.
    manifest = read_manifest(folder)
    assert (manifest.precision, sorted(manifest.files)) == (precision, ["model.engine"])
    with load_engine(folder) as engine, pytest.raises(RuntimeUnavailableError, match="GPU"):
        engine.run({spec.name: torch.zeros([int(dim) for dim in spec.shape], dtype=getattr(torch, spec.dtype))
                    for spec in engine.inputs})
