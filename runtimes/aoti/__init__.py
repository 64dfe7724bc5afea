"""AOTInductor engines: the ``Backend`` of the runtime "aoti". They are made from a model, and take no Python to run."""

__all__ = ["AotiEngine", "build", "load", "takes"]

import importlib
from typing import TYPE_CHECKING, Any, Literal

from modcompile.runtimes.aoti.engine import AotiEngine, load

if TYPE_CHECKING:
    from modcompile.runtimes.aoti.builder import build

takes: Literal["onnx", "model"] = "model"


def __getattr__(name: str) -> Any:
    # Building takes the compiler; loading and running do without.
    if name == "build":
        return importlib.import_module("modcompile.runtimes.aoti.builder").build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
