"""Rewrites dense transformers into Mixture-of-Depths form and compiles them into engines.

    import modcompile as mc

    blocks = mc.find_blocks(model, example_inputs)
    mod = mc.convert(model, example_inputs, mc.MoDConfig(blocks="every-other", capacity_ratio=0.125))
    engine = mc.build_engine(mod, "engine", runtime="ort")
    mc.verify(mod, engine, inputs)

Every name below is imported at its first use, so that ``import modcompile`` costs nothing before torch is needed.
"""

__all__ = [
    "Engine",
    "GraphModel",
    "MoDConfig",
    "MoDModel",
    "__version__",
    "benchmark",
    "build_engine",
    "calibrate",
    "capture",
    "convert",
    "errors",
    "export_onnx",
    "find_blocks",
    "load",
    "load_engine",
    "package",
    "trace_routing",
    "verify",
]

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from modcompile import errors

if TYPE_CHECKING:
    from modcompile.bench import benchmark
    from modcompile.blocks import find_blocks
    from modcompile.bundle import package
    from modcompile.calibration import calibrate
    from modcompile.capture import capture
    from modcompile.config import MoDConfig
    from modcompile.convert import convert
    from modcompile.engine import Engine, build_engine, load_engine
    from modcompile.export import export_onnx
    from modcompile.model import GraphModel, MoDModel
    from modcompile.saving import load
    from modcompile.trace import trace_routing
    from modcompile.verify import verify

    __version__: str

_HOMES = {
    "Engine": "modcompile.engine",
    "GraphModel": "modcompile.model",
    "MoDConfig": "modcompile.config",
    "MoDModel": "modcompile.model",
    "benchmark": "modcompile.bench",
    "build_engine": "modcompile.engine",
    "calibrate": "modcompile.calibration",
    "capture": "modcompile.capture",
    "convert": "modcompile.convert",
    "export_onnx": "modcompile.export",
    "find_blocks": "modcompile.blocks",
    "load": "modcompile.saving",
    "load_engine": "modcompile.engine",
    "package": "modcompile.bundle",
    "trace_routing": "modcompile.trace",
    "verify": "modcompile.verify",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = importlib.import_module("importlib.metadata").version("modcompile")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'modcompile' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(types.ModuleType):
    """Keeps ``modcompile.convert`` the function: importing the module of that name would put the module there."""

    def __setattr__(self, name, value):
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
