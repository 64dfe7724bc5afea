"""The ``Backend`` of the runtime "torch-tensorrt": TensorRT engines that Torch-TensorRT builds from a model.

Its converters are another way to the same thing that ``modcompile.runtimes.trt`` builds from ONNX: a serialized engine
of TensorRT, or of TensorRT-RTX where its RTX build is installed. So the folder's manifest names that runtime, and the
one class of TensorRT engines runs it; Torch-TensorRT is needed to build, and not to load.
"""

__all__ = ["TrtEngine", "build", "load", "takes"]

import importlib
from typing import TYPE_CHECKING, Any, Literal

from modcompile.runtimes.trt.engine import TrtEngine, load

if TYPE_CHECKING:
    from modcompile.runtimes.torch_trt.builder import build

takes: Literal["onnx", "model"] = "model"


def __getattr__(name: str) -> Any:
    # Building takes the compiler; loading and running do without.
    if name == "build":
        return importlib.import_module("modcompile.runtimes.torch_trt.builder").build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
