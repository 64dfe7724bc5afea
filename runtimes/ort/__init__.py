"""ONNX Runtime engines: the ``Backend`` of the runtime "ort"."""

__all__ = ["OrtEngine", "build", "load"]

import importlib
from typing import TYPE_CHECKING, Any

from modcompile.runtimes.ort.engine import OrtEngine, load

if TYPE_CHECKING:
    from modcompile.runtimes.ort.builder import build


def __getattr__(name: str) -> Any:
    # Building takes the onnx package; loading and running do without.
    if name == "build":
        return importlib.import_module("modcompile.runtimes.ort.builder").build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
