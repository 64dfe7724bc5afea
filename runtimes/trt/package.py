"""Finds the Python package of a TensorRT runtime. Both packages have the same classes."""

__all__ = ["import_tensorrt"]

import importlib
from typing import Any

from modcompile.errors import RuntimeUnavailableError

_PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def import_tensorrt(runtime: str) -> Any:
    """The package of a runtime, "tensorrt" or "tensorrt-rtx".

    Raises:
        RuntimeUnavailableError: It is not installed, or one of its libraries does not load.
    """
    name = _PACKAGES[runtime]
    try:
        return importlib.import_module(name)
    # What loads a shared library raises OSError where an import would raise ImportError.
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        raise RuntimeUnavailableError(f"the runtime {runtime} is not installed" if missing
                                      else f"the runtime {runtime} is installed but does not load",
                                      expected=f"the package {name}", found=error,
                                      fix=f'pip install "modcompile[{runtime}]"') from error
