"""Runs AOTInductor packages, by the class that C++ loads them with: the compiler is not imported.

A package is machine code. What is loaded is a private copy whose hash was checked after it was made, so that nobody can
put another file in its place in between.
"""

__all__ = ["ELEMENTS", "ENTRY", "LARGEST", "AotiEngine", "load", "open_package"]

import contextlib
import math
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from modcompile.runtimes.aoti.cuda_graph import CudaGraph
from modcompile.runtimes.aoti.target import check_target, find_device

from modcompile.engine import MORE_MEMORY, Engine, Tensor, as_numpy, as_torch, is_out_of_memory, is_torch
from modcompile.errors import ModcompileError, RuntimeUnavailableError, UsageError
from modcompile.manifest import Manifest, verify_files
from modcompile.spec import dtype_from_name

# The package of every AOTInductor engine folder. It takes the engine's inputs in their order, and gives its outputs.
ENTRY = "model.pt2"
# In the manifest's target, "largest sequence" is the largest size that the compiler allowed for.
LARGEST = "largest "
# How many elements tensors have at most: "4096 batch sequence, 16 batch sequence sequence".
ELEMENTS = "elements"
MOST_ELEMENTS = 2**31 - 1

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
        self._elements = [product.split() for product in manifest.target.get(ELEMENTS, "").split(",") if product]
        self._ooms = _ooms(device)

    def close(self) -> None:
        """Frees the engine once the runs under way have ended."""
        super().close()
        self._model = None

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        model = self._model
        if model is None:
            raise UsageError("the engine was closed by another thread", where=self.folder)
        self._check_sizes(inputs)
        tensors = [as_torch(inputs[spec.name]) for spec in self.inputs]
        home = tensors[0].device
        if home.type != "cpu" and home != self.device:
            raise UsageError("the inputs are on another device than the engine", expected=self.device,
                             found=f"tensors on {home}", where=self.folder, fix=f'move them with .to("{self.device}")')
        with self._explained(inputs, "AOTInductor"), torch.no_grad():
            outputs = [output.to(home) for output in model(tensors)]
        named = {spec.name: output for spec, output in zip(self.outputs, outputs, strict=True)}
        if is_torch(inputs[self.inputs[0].name]):
            return named
        return {name: as_numpy(output, name) for name, output in named.items()}

    def _ran_out(self, error: Exception) -> str | None:
        # A package says which call failed, and not why; torch counts what it could not allocate.
        before, self._ooms = self._ooms, _ooms(self.device)
        why = super()._ran_out(error)
        return f"{why or 'an allocation failed'}; {_free(self.device)}" if why or self._ooms > before else None

    def _check_sizes(self, inputs: Mapping[str, Tensor]) -> None:
        """Compares the sizes that may vary with what the compiler allowed for."""
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            for axis, dim in enumerate(spec.shape):
                largest = self.manifest.target.get(f"{LARGEST}{dim}")
                size = inputs[spec.name].shape[axis]
                sizes[str(dim)] = size
                if largest is not None and size > int(largest):
                    raise UsageError(f"input {spec.name} is larger than the engine was compiled for",
                                     expected=f"{dim} <= {largest}", found=f"{dim} = {size}",
                                     where=f"{spec.name}, axis {axis}", fix=f"build the engine for {size} rows")
        for product in self._elements:
            count = math.prod(int(factor) if factor.isdigit() else sizes[factor] for factor in product)
            if count > MOST_ELEMENTS:
                raise UsageError("the inputs are larger than the engine's 32-bit indices reach",
                                 expected=f"{' * '.join(product)} <= {MOST_ELEMENTS}", found=count, where=self.folder,
                                 fix="run fewer or shorter sequences at a time, or build the engine with shapes={...}")


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
        ModcompileError: The run that is recorded failed, or the GPU has too little memory.
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
        before = _ooms(place)
        try:
            buffers = [torch.zeros([int(dim) for dim in spec.shape], dtype=dtype_from_name(spec.dtype), device=place)
                       for spec in manifest.inputs]
            model = CudaGraph(model, buffers, reuse_outputs=reuse_outputs)
        except Exception as error:
            if is_out_of_memory(error) or _ooms(place) > before:
                raise ModcompileError("there is too little GPU memory to record a run of the engine",
                                      found=f"{error}; {_free(place)}", where=folder, fix=MORE_MEMORY) from error
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
        ModcompileError: The GPU has too little memory for its weights.
    """
    try:
        # What torch._inductor.aoti_load_package wraps, which would import the compiler, and run it to learn about the
        # processor. By position: the path, the model's name, that there is one caller at a time, so that nothing waits
        # for the run before, how many models, and the GPU's index.
        package = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1,
                                                        -1 if device.index is None else device.index)
    except Exception as error:
        # Weights are not allocated by torch's allocator, and what that keeps for later is no use to them.
        if device.type == "cuda" and (size := path.stat().st_size) > torch.cuda.mem_get_info(device)[0]:
            raise ModcompileError("there is too little GPU memory to load the engine",
                                  expected=f"{size / 2**20:.0f} MiB", found=_free(device), where=where or path,
                                  fix="close the engines that are not in use, and call torch.cuda.empty_cache()"
                                  ) from error
        raise RuntimeUnavailableError("torch does not open the package", found=error, where=where or path,
                                      fix="see the message; build the engine again on this machine") from error
    turn = threading.Lock()

    def model(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        # Compiled code takes the strides that it was compiled for.
        given = [tensor.to(device).contiguous() for tensor in tensors]
        with turn, torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return package.boxed_run(given)

    return model


def _ooms(device: torch.device) -> int:
    """How often torch has found too little memory on a GPU."""
    return torch.cuda.memory_stats(device).get("num_ooms", 0) if device.type == "cuda" else 0


def _free(device: torch.device) -> str:
    if device.type == "cpu":
        return "on the CPU"
    free, total = (size / 2**20 for size in torch.cuda.mem_get_info(device))
    return f"{free:.0f} of {total:.0f} MiB are free on {device}"
