"""The light runtime, imported as ``modcompile.runtimes``: loads engines and runs them, and compiles nothing.

It imports neither torch nor the compiler. What an engine needs to run is numpy, pydantic and the engine's own runtime,
as ``pip install --no-deps modcompile`` and ``pip install numpy pydantic onnxruntime`` give them.

    from modcompile.runtimes import load_engine

    with load_engine("bundle") as engine:
        outputs = engine.run({"input_ids": ids, "attention_mask": mask})
"""

__all__ = ["Engine", "load_engine"]

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "modcompile.runtimes":
    raise ImportError("import modcompile.runtimes: this folder is part of the modcompile package")

if TYPE_CHECKING:
    from modcompile.engine import Engine, load_engine


def __getattr__(name: str) -> Any:
    # At their first use: the import of this package stays a matter of milliseconds.
    if name in __all__:
        return getattr(importlib.import_module("modcompile.engine"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
