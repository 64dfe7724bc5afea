"""TensorRT engines that were built. Running them is not part of this version: ``run`` says what is missing."""

__all__ = ["ENTRY", "TrtEngine", "load"]

from collections.abc import Mapping
from pathlib import Path

from modcompile.runtimes.trt.package import import_tensorrt
from modcompile.runtimes.trt.worker import make_log

from modcompile.engine import Engine, Tensor
from modcompile.errors import RuntimeUnavailableError
from modcompile.manifest import Manifest, read_verified

# The serialized engine of every TensorRT engine folder.
ENTRY = "model.engine"


class TrtEngine(Engine):
    """An engine of TensorRT or TensorRT-RTX."""

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise RuntimeUnavailableError(
            "TensorRT engines cannot be run yet",
            expected=f"an NVIDIA GPU of compute capability {self.manifest.target.get('compute_capabilities', '?')}",
            found=self._why_not(), where=self.folder, fix='build the model with runtime="ort" to run it here')

    def _why_not(self) -> str:
        """Why this machine does not open the engine."""
        trt = import_tensorrt(self.runtime)
        log = make_log(trt)
        plan = read_verified(self.folder, self.manifest, self.manifest.entry)
        if trt.Runtime(log).deserialize_cuda_engine(plan) is None:
            return "; ".join(log.errors)
        return "a GPU that opens the engine, and no code that runs it"


def load(folder: Path, manifest: Manifest) -> TrtEngine:
    """Opens an engine folder whose files were verified. A missing GPU is reported by ``run``.

    Raises:
        RuntimeUnavailableError: The package is missing, or is not the release that built the engine.
    """
    trt = import_tensorrt(manifest.runtime)
    if not manifest.runtime_range.contains(trt.__version__):
        name = manifest.runtime
        raise RuntimeUnavailableError(f"{name} opens only engines that it built itself",
                                      expected=f"{name} {manifest.runtime_version}", found=f"{name} {trt.__version__}",
                                      where=folder, fix=f'pip install "{name}=={manifest.runtime_version}", or build '
                                      "the engine again")
    return TrtEngine(folder, manifest)
