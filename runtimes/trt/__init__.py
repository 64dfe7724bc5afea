"""TensorRT and TensorRT-RTX engines: the ``Backend`` of the runtimes "tensorrt" and "tensorrt-rtx".

Importing this needs neither package: what is missing is said by the call that needs it.
"""

__all__ = ["Layer", "TrtEngine", "build", "layer_table", "layers", "load", "opset", "takes"]

import importlib
from typing import TYPE_CHECKING, Any, Literal

from modcompile.runtimes.trt.engine import TrtEngine, load
from modcompile.runtimes.trt.report import Layer, layer_table, layers

if TYPE_CHECKING:
    from modcompile.runtimes.trt.builder import build

takes: Literal["onnx", "model"] = "onnx"
# Attention written out, which TensorRT fuses itself in half precision, and takes in float32.
opset = 18


def __getattr__(name: str) -> Any:
    # Building takes the onnx packages; loading does without.
    if name == "build":
        return importlib.import_module("modcompile.runtimes.trt.builder").build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
