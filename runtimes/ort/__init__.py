"""ONNX Runtime engines: the ``Backend`` of the runtime "ort"."""

__all__ = ["OrtEngine", "build", "load", "opset", "takes"]

import importlib
from typing import TYPE_CHECKING, Any, Literal

from modcompile.runtimes.ort.engine import OrtEngine, load

if TYPE_CHECKING:
    from modcompile.runtimes.ort.builder import build

takes: Literal["onnx", "model"] = "onnx"
# Attention and rotary embedding as one operator each: SmolLM2-135M of 1 x 512 tokens on 2 cores takes 847 ms, and 923
# from opset 18; routed 544 and 624.
opset = 23


def __getattr__(name: str) -> Any:
    # Building takes the onnx package; loading and running do without.
    if name == "build":
        return importlib.import_module("modcompile.runtimes.ort.builder").build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
