"""Runs AOTInductor packages, by the class that C++ loads them with: the compiler is not imported.

A package is machine code. What is loaded is a private copy whose hash was checked after it was made, so that nobody can
put another file in its place in between.
"""

__all__ = ["ENTRY", "AotiEngine", "load", "open_package"]

import contextlib
import importlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from modcompile.runtimes.aoti.cuda_graph import CudaGraph
from modcompile.runtimes.aoti.target import check_target, find_device

from modcompile.engine import Engine, Tensor, is_torch
from modcompile.errors import ModcompileError, RuntimeUnavailableError, UsageError
from modcompile.manifest import Manifest, TensorSpec, verify_files
from modcompile.spec import dtype_from_name

# The package of every AOTInductor engine folder. It takes the engine's inputs in their order, and gives its outputs.
ENTRY = "model.pt2"
# In the manifest's target, "largest sequence" is the largest size that the compiler allowed for.
LARGEST = "largest "

# Takes and returns tensors in a row.
Model = Callable[[list[torch.Tensor]], list[torch.Tensor]]


class AotiEngine(Engine):
    """An engine of AOTInductor.

    It runs on the caller's current stream, and gives new tensors at every run unless it was loaded with
    ``reuse_outputs``. Inputs on the CPU are copied to the engine's device, and outputs back.

    Attributes:
        device: Where it runs.
    """

    def __init__(self, folder: Path, manifest: Manifest, model: Model, device: torch.device):
        super().__init__(folder, manifest)
        self.device = device
        self._model: Model | None = model

    def close(self) -> None:
        """Frees the engine once the runs under way have ended."""
        super().close()
        self._model = None

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        model = self._model
        if model is None:
            raise UsageError("the engine was closed by another thread", where=self.folder)
        self._check_sizes(inputs)
        tensors = [_as_torch(inputs[spec.name]) for spec in self.inputs]
        home = tensors[0].device
        if home.type != "cpu" and home != self.device:
            raise UsageError("the inputs are on another device than the engine", expected=self.device,
                             found=f"tensors on {home}", where=self.folder, fix=f'move them with .to("{self.device}")')
        try:
            with torch.no_grad():
                outputs = [output.to(home) for output in model(tensors)]
        except Exception as error:
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
            raise ModcompileError("AOTInductor failed to run the engine", expected=", ".join(map(str, self.inputs)),
                                  found=f"{shapes}: {error}", where=self.folder) from error
        give = _same if is_torch(inputs[self.inputs[0].name]) else _as_numpy
        return {spec.name: give(output, spec) for spec, output in zip(self.outputs, outputs, strict=True)}

    def _check_sizes(self, inputs: Mapping[str, Tensor]) -> None:
        """Compares the sizes that may vary with what the compiler allowed for."""
        for spec in self.inputs:
            for axis, dim in enumerate(spec.shape):
                largest = self.manifest.target.get(f"{LARGEST}{dim}")
                size = inputs[spec.name].shape[axis]
                if largest is not None and size > int(largest):
                    raise UsageError(f"input {spec.name} is larger than the engine was compiled for",
                                     expected=f"{dim} <= {largest}", found=f"{dim} = {size}",
                                     where=f"{spec.name}, axis {axis}", fix=f"build the engine for {size} rows")


def load(folder: Path, manifest: Manifest, *, device: str | None = None, cuda_graph: bool | None = None,
         reuse_outputs: bool = False) -> AotiEngine:
    """Opens an engine folder whose files were verified.

    Args:
        folder: The engine folder.
        manifest: Its manifest.
        device: Where to run: "cpu", "cuda" or "cuda:1". By default what the engine was compiled for, as the current
            device.
        cuda_graph: Records a run as a CUDA graph, at the engine's static shapes. By default where that can be done.
        reuse_outputs: Outputs are the graph's own buffers, which the next run overwrites; by default they are copied.
            For CUDA graphs alone.

    Raises:
        UsageError: An option that does not fit the engine.
        RuntimeUnavailableError: Another torch, processor, GPU or CUDA is needed, or the package does not open.
        ModcompileError: The run that is recorded failed.
    """
    if not manifest.runtime_range.contains(torch.__version__):
        raise RuntimeUnavailableError("AOTInductor packages are bound to the release of torch that compiled them",
                                      expected=f"torch{manifest.runtime_range}", found=f"torch {torch.__version__}",
                                      where=folder, fix=f"pip install 'torch{manifest.runtime_range}', or build the "
                                      "engine again")
    place = find_device(device or manifest.target.get("device", "cpu"))
    check_target(manifest.target, place, folder)
    static = all(isinstance(dim, int) for spec in manifest.inputs for dim in spec.shape)
    recordable = place.type == "cuda" and static
    record = recordable if cuda_graph is None else cuda_graph
    if record and not recordable:
        raise UsageError("the engine cannot be recorded as a CUDA graph", expected="static shapes, on a GPU",
                         found=f"{', '.join(map(str, manifest.inputs))} on {place}", where="cuda_graph",
                         fix="leave cuda_graph out, or build the engine for a GPU and with shapes")
    if reuse_outputs and not record:
        raise UsageError("only a CUDA graph has outputs to reuse", expected="cuda_graph=True", where="reuse_outputs",
                         fix="leave reuse_outputs out: without a graph, outputs are not copied")
    with tempfile.TemporaryDirectory(prefix="modcompile-") as private:
        for name in manifest.files:
            copy = Path(private, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, copy, follow_symlinks=False)
        verify_files(Path(private), manifest)
        model = open_package(Path(private, manifest.entry), place, where=folder)
    if record:
        try:
            buffers = [torch.zeros([int(dim) for dim in spec.shape], dtype=dtype_from_name(spec.dtype), device=place)
                       for spec in manifest.inputs]
            model = CudaGraph(model, buffers, reuse_outputs=reuse_outputs)
        except Exception as error:
            raise ModcompileError("a run of the engine cannot be recorded as a CUDA graph", found=error, where=folder,
                                  fix="load it with cuda_graph=False") from error
    return AotiEngine(folder, manifest, model, place)


def open_package(path: Path, device: torch.device, *, where: object = None) -> Model:
    """Opens a package; its file is not needed any more when this returns.

    Args:
        path: The package.
        device: Where it runs.
        where: What is named in messages; by default ``path``.

    Returns:
        What runs it, on the current stream. Threads take turns in launching its work.

    Raises:
        RuntimeUnavailableError: It does not open.
    """
    try:
        # What torch._inductor.aoti_load_package wraps, which would import the compiler, and run it to learn about the
        # processor. By position: the path, the model's name, that there is one caller at a time, so that nothing waits
        # for the run before, how many models, and the GPU's index.
        package = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1,
                                                        -1 if device.index is None else device.index)
    except Exception as error:
        raise RuntimeUnavailableError("torch does not open the package", found=error, where=where or path,
                                      fix="see the message; build the engine again on this machine") from error
    turn = threading.Lock()

    def model(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        # Compiled code takes the strides that it was compiled for.
        given = [tensor.to(device).contiguous() for tensor in tensors]
        with turn, torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return package.boxed_run(given)

    return model


def _as_torch(value: Tensor) -> torch.Tensor:
    if is_torch(value):
        return value
    # torch has no arrays that may not be written, and none of ml_dtypes' elements.
    array = np.require(value, requirements=["C", "A", "W"])
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _same(value: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    return value


def _as_numpy(value: torch.Tensor, spec: TensorSpec) -> np.ndarray:
    if spec.dtype != "bfloat16":
        return value.numpy()
    try:
        dtype = importlib.import_module("ml_dtypes").bfloat16
    except ImportError as error:
        raise RuntimeUnavailableError("numpy has no bfloat16 of its own", expected="the package ml_dtypes",
                                      where=f"output {spec.name}",
                                      fix="pip install ml_dtypes, or pass torch tensors") from error
    return value.contiguous().view(torch.int16).numpy().view(dtype)
