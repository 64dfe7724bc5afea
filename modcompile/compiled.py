"""A model under ``torch.compile``: what a user of PyTorch has without an engine, as an engine to compare with.

The graph is the one that AOTInductor's engines are made from, after the same passes but those that compute activations
in another way. On a GPU the mode is ``max-autotune``, which records CUDA graphs; on a CPU it is the default one.
"""

__all__ = ["CompiledModel"]

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

import modcompile
from modcompile.engine import Engine, Tensor
from modcompile.errors import ModcompileError
from modcompile.export.flatten import flatten
from modcompile.export.lift import lift
from modcompile.manifest import Manifest
from modcompile.model import GraphModel
from modcompile.pass_manager import PassManager
from modcompile.spec import TensorSpec, dtype_name

# The first run compiles, the next ones warm up, record the CUDA graph, and replay it.
_FIRST_RUNS = 4


class CompiledModel(Engine):
    """Runs a compiled model, on the current stream. No folder holds it.

    Outputs are torch tensors on the model's device, without a copy: the next run overwrites those of a CUDA graph.

    Args:
        model: Has none of our ops: a dense or a pruned one. It is left as it is.
        precision: "fp32", "fp16" or "bf16".
        shapes: A static shape for every input.

    Raises:
        ModcompileError: On a GPU, torch records no CUDA graph: this would not be what it claims to be.

    Attributes:
        weight_bytes: The size of the weights.
        activation_bytes: What else of the GPU's memory a run takes, at its peak; None on a CPU.
    """

    def __init__(self, model: GraphModel, precision: str, shapes: Mapping[str, Sequence[int]]):
        # It imports the compiler.
        from modcompile.runtimes.aoti.builder import lowering_passes

        # Without a device, so without what engines do about GELU: here it is compiled as the model writes it.
        flat = PassManager(lowering_passes(precision))(flatten(model.eval(), shapes))
        inputs = flat.graph.find_nodes(op="placeholder")
        outputs = flat.graph.output_node().args[0]
        # Nothing is read from a file here, so there is nothing to validate.
        super().__init__(Path("torch.compile"), Manifest.model_construct(
            modcompile_version=modcompile.__version__, runtime="torch.compile", runtime_version=torch.__version__,
            precision=precision, inputs=_specs(model.inputs, inputs), outputs=_specs(model.outputs, outputs)))
        program = lift(flat, opaque=False)
        tensors = [*program.state_dict.values(), *program.constants.values()]
        self._device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
        mode = "max-autotune" if self._device.type == "cuda" else "default"
        self._model: Any = torch.compile(program.module(check_guards=False), mode=mode, fullgraph=True, dynamic=False)
        self.activation_bytes = self._first_runs([
            torch.zeros(tuple(map(int, spec.shape)), dtype=node.meta["val"].dtype, device=self._device)
            for spec, node in zip(self.inputs, inputs, strict=True)])

    def close(self) -> None:
        """Frees the model; what was compiled stays with torch until its caches are reset."""
        super().close()
        self._model = None

    def _first_runs(self, tensors: list[torch.Tensor]) -> int | None:
        skipped = _graphs_skipped()
        self._call(tensors)
        if self._device.type != "cuda":
            return None
        if _graphs_skipped() > skipped:
            raise ModcompileError("torch.compile records no CUDA graph of the model", where="torch.compile",
                                  expected="tensors on the GPU alone, and none that is written to",
                                  fix="TORCH_LOGS=cudagraphs shows torch's reason")
        # Choosing kernels, in the first run, took memory that no other run takes.
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        for _ in range(1, _FIRST_RUNS):
            self._call(tensors)
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = [torch.as_tensor(inputs[spec.name]).to(self._device) for spec in self.inputs]
        return {spec.name: value for spec, value in zip(self.outputs, self._call(tensors), strict=True)}

    def _call(self, tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        # Outputs of the run before may be overwritten from here on.
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return self._model(*tensors)


def _graphs_skipped() -> int:
    """How often torch compiled something and then recorded no CUDA graph of it, with a line in its log."""
    return counters["inductor"]["cudagraph_skips"]


def _specs(specs: Sequence[TensorSpec], nodes: Sequence[Any]) -> tuple[TensorSpec, ...]:
    """The model's specs with the dtypes and sizes of the graph's values."""
    return tuple(TensorSpec(spec.name, dtype_name(node.meta["val"].dtype), tuple(map(int, node.meta["val"].shape)))
                 for spec, node in zip(specs, nodes, strict=True))
