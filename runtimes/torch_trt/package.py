"""Finds Torch-TensorRT, which asks for a GPU when it is imported."""

__all__ = ["import_torch_tensorrt"]

import importlib
from typing import Any

from modcompile.errors import RuntimeUnavailableError
from modcompile.manifest import VersionRange

_NAME = "torch_tensorrt"
# From here on inputs and outputs of an engine have the names they are given.
_RELEASES = VersionRange(minimum="2.14")
_INSTALL = 'pip install "modcompile[torch-tensorrt]", or for TensorRT-RTX "torch-tensorrt-rtx>=2.14"'


def import_torch_tensorrt() -> Any:
    """The package ``torch_tensorrt``, of either build: for TensorRT, or for TensorRT-RTX.

    Raises:
        RuntimeUnavailableError: It is not installed, is too old, or does not load.
    """
    try:
        package = importlib.import_module(_NAME)
    # Without a GPU, or beside another torch, it raises whatever its first use of them raises.
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == _NAME
        raise RuntimeUnavailableError(
            "Torch-TensorRT is not installed" if missing else "Torch-TensorRT is installed but does not load",
            expected=f"the package {_NAME}, made for the torch that is installed, and an NVIDIA GPU",
            found=f"{type(error).__name__}: {error}",
            fix=_INSTALL if missing else 'see the message; or build from ONNX, with runtime="tensorrt" or '
            '"tensorrt-rtx"') from error
    if not _RELEASES.contains(package.__version__):
        raise RuntimeUnavailableError("Torch-TensorRT is too old", expected=f"torch-tensorrt{_RELEASES}",
                                      found=package.__version__, where=_NAME, fix=_INSTALL)
    return package
