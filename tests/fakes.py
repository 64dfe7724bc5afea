"""Engines that are a model in PyTorch, for tests of what is done with engines."""

__all__ = ["FakeEngine"]

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modcompile.engine import Engine, as_torch, is_torch
from modcompile.manifest import Manifest
from modcompile.model import GraphModel
from modcompile.spec import TensorSpec


class FakeEngine(Engine):
    """Runs a model, and lets ``tamper`` change its outputs, by name, in place.

    Args:
        model: What it computes.
        tamper: Called with the outputs as numpy arrays.
        precision: What it says of itself.
        input_dtypes: What it takes in the place of the model's dtypes.
    """

    def __init__(self, model: GraphModel, tamper: Callable[[dict[str, Any]], Any] | None = None,
                 precision: str = "fp32", input_dtypes: Mapping[str, str] | None = None):
        inputs = tuple(TensorSpec(spec.name, (input_dtypes or {}).get(spec.name, spec.dtype), spec.shape)
                       for spec in model.inputs)
        super().__init__(Path("fake-engine"), Manifest.model_construct(
            runtime="ort", runtime_version="0", precision=precision, inputs=inputs, outputs=model.outputs,
            providers=("CPUExecutionProvider",)))
        self.model, self.tamper, self.runs = model, tamper, 0

    def _run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.runs += 1
        tensors = [as_torch(inputs[spec.name]).to(getattr(torch, spec.dtype)) for spec in self.model.inputs]
        with torch.no_grad():
            values = self.model.run_graph(tensors)
        outputs: dict[str, np.ndarray] = {spec.name: value.numpy().copy()
                                          for spec, value in zip(self.model.outputs, values, strict=True)}
        if self.tamper is not None:
            self.tamper(outputs)
        torch_in = all(map(is_torch, inputs.values()))
        return {name: torch.from_numpy(value) for name, value in outputs.items()} if torch_in else outputs
