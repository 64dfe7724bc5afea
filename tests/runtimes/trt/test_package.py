"""Without the package there is a command that installs it, and nothing else breaks."""

import importlib
import subprocess
import sys

import pytest
from modcompile.runtimes.trt.package import import_tensorrt

from modcompile.engine import build_engine
from modcompile.errors import RuntimeUnavailableError

MATMUL = "(float[8, 4] x) => (float[8, 8] y) { t = Transpose (x) y = MatMul (x, t) }"


@pytest.mark.parametrize(("runtime", "package"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_a_missing_package_is_said_with_the_command_that_installs_it(write, tmp_path, monkeypatch, runtime, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeUnavailableError) as error:
        build_engine(write(MATMUL), tmp_path / "engine", runtime=runtime)
    assert f'pip install "modcompile[{runtime}]"' in str(error.value)
    assert not (tmp_path / "engine").exists()


def test_a_library_that_does_not_load_is_not_called_missing(monkeypatch):
    def fail(name):
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(RuntimeUnavailableError) as error:
        import_tensorrt("tensorrt")
    assert "does not load" in str(error.value) and "libnvinfer.so.10" in str(error.value)


def test_importing_the_backend_imports_no_tensorrt():
    code = ("import sys, modcompile.runtimes.trt; "
            "print([m for m in ('tensorrt', 'tensorrt_rtx', 'onnx', 'onnx_ir', 'torch') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
