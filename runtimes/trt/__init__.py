"""TensorRT and TensorRT-RTX engines: the ``Backend`` of the runtimes "tensorrt" and "tensorrt-rtx".

Importing this needs neither package: what is missing is said by the call that needs it.
"""

__all__ = ["Layer", "TrtEngine", "build", "layer_table", "layers", "load"]

import importlib
from typing import TYPE_CHECKING, Any

from modcompile.runtimes.trt.engine import TrtEngine, load
from modcompile.runtimes.trt.report import Layer, layer_table, layers

if TYPE_CHECKING:
    from modcompile.runtimes.trt.builder import build


def __getattr__(name: str) -> Any:
    # Building takes the onnx packages; loading does without.
    if name == "build":
        return importlib.import_module("modcompile.runtimes.trt.builder").build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
