"""TensorRT engines that were built: opened on a GPU, and run there.

An engine of TensorRT-RTX may be built where there is no GPU; one that is loaded there is opened by its first run, which
says what is missing.
"""

__all__ = ["COMPUTE_CAPABILITY", "ENTRY", "TrtEngine", "load"]

import importlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modcompile.runtimes.trt.package import import_tensorrt
from modcompile.runtimes.trt.plugin_library import LIBRARY, open_library

from modcompile.engine import Engine, Tensor
from modcompile.errors import RuntimeUnavailableError, UsageError
from modcompile.manifest import Manifest, read_verified

if TYPE_CHECKING:
    from modcompile.runtimes.trt.execution import Execution

# The serialized engine of every TensorRT engine folder.
ENTRY = "model.engine"
# In the manifest's target: the GPU's that TensorRT built for.
COMPUTE_CAPABILITY = "compute_capability"


class TrtEngine(Engine):
    """An engine of TensorRT or TensorRT-RTX.

    It runs on the caller's current stream, and gives new tensors at every run unless it was loaded with
    ``reuse_outputs``. Inputs on the CPU are copied to the engine's GPU, and outputs back.
    """

    def __init__(self, folder: Path, manifest: Manifest, options: Mapping[str, Any]):
        super().__init__(folder, manifest)
        self._options = options
        self._turn = threading.Lock()
        self._execution: Execution | None = None

    def open(self) -> "Execution":
        """Reads the engine and makes what runs it, unless that was done.

        Raises:
            IntegrityError: Its file was changed, or is another engine than the manifest says.
            RuntimeUnavailableError: There is no GPU that it runs on, or too little memory.
            UsageError: A CUDA graph of an engine with a size that varies, or an engine that was closed.
        """
        with self._turn:
            if self._closed:
                raise UsageError("the engine was closed by another thread", where=self.folder)
            if self._execution is None:
                plan = read_verified(self.folder, self.manifest, self.manifest.entry)
                make = importlib.import_module("modcompile.runtimes.trt.execution").Execution
                self._execution = make(import_tensorrt(self.runtime), plan, self.folder, self.manifest, **self._options)
            return self._execution

    def close(self) -> None:
        """Frees the engine once the runs under way have ended."""
        super().close()
        with self._turn:
            self._execution = None

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return (self._execution or self.open()).run(inputs)


def load(folder: Path, manifest: Manifest, *, device: str | None = None, contexts: int = 1, cuda_graph: bool = False,
         reuse_outputs: bool = False) -> TrtEngine:
    """Opens an engine folder whose files were verified. A GPU that TensorRT-RTX lacks is reported by ``run``.

    An engine that was built with the plugin library holds it, and runs with it.

    Args:
        folder: The engine folder.
        manifest: Its manifest.
        device: The GPU: "cuda" or "cuda:1". By default the current one.
        contexts: How many runs may be under way at a time; each has its own memory. Threads wait for one another.
        cuda_graph: Records a run as a CUDA graph, at the engine's static shapes.
        reuse_outputs: Outputs are the graph's own buffers, which the next run overwrites; by default they are copied.
            For CUDA graphs alone.

    Raises:
        UsageError: An option that does not fit the engine.
        IntegrityError: The engine is not the one that the manifest describes.
        RuntimeUnavailableError: The package is missing or is not the release that built the engine; there is no GPU
            that the engine runs on, or too little memory; or the plugin library does not load here.
    """
    trt = import_tensorrt(manifest.runtime)
    if not manifest.runtime_range.contains(trt.__version__):
        name = manifest.runtime
        raise RuntimeUnavailableError(f"{name} opens only engines that it built itself",
                                      expected=f"{name} {manifest.runtime_version}", found=f"{name} {trt.__version__}",
                                      where=folder, fix=f'pip install "{name}=={manifest.runtime_version}", or build '
                                      "the engine again")
    if contexts < 1:
        raise UsageError("contexts does not fit", expected="a number of runs at a time, at least 1", found=contexts,
                         where="contexts")
    if cuda_graph and contexts > 1:
        raise UsageError("a CUDA graph is one run at a time", expected="contexts=1", found=contexts, where="contexts",
                         fix="leave contexts or cuda_graph out")
    if reuse_outputs and not cuda_graph:
        raise UsageError("only a CUDA graph has outputs to reuse", expected="cuda_graph=True", where="reuse_outputs",
                         fix="leave reuse_outputs out: without a graph, outputs are not copied")
    if LIBRARY in manifest.files:
        open_library(trt, read_verified(folder, manifest, LIBRARY), folder / LIBRARY)
    engine = TrtEngine(folder, manifest, {"device": device, "contexts": contexts, "cuda_graph": cuda_graph,
                                          "reuse_outputs": reuse_outputs})
    if manifest.runtime == "tensorrt":
        engine.open()
    return engine
