"""Engines: one interface over every runtime, how they are built and how they are loaded.

An engine is a folder: what the runtime loads, and a manifest. Loading imports no torch and no compiler: numpy and the
runtime are enough.
"""

__all__ = ["MORE_MEMORY", "Backend", "Engine", "as_numpy", "as_torch", "build_engine", "is_out_of_memory", "is_torch",
           "load_engine", "load_options", "numpy_bfloat16"]

import contextlib
import difflib
import functools
import importlib
import inspect
import os
import re
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from modcompile.errors import ModcompileError, RuntimeUnavailableError, UsageError
from modcompile.files import new_folder
from modcompile.manifest import (
    MANIFEST_NAME,
    Manifest,
    TensorSpec,
    read_manifest,
    verify_files,
    write_manifest,
)

Shapes = Mapping[str, Sequence[int]]
# A numpy array or a torch tensor.
Tensor = Any

# Runtime: the module with its Backend functions, and the pip command that installs what that imports.
_BACKENDS = {
    "ort": ("modcompile.runtimes.ort", "pip install onnxruntime"),
    "tensorrt": ("modcompile.runtimes.trt", "pip install 'modcompile[tensorrt]'"),
    "tensorrt-rtx": ("modcompile.runtimes.trt", "pip install 'modcompile[tensorrt-rtx]'"),
    "torch-tensorrt": ("modcompile.runtimes.torch_trt", "pip install 'modcompile[torch-tensorrt]'"),
    "aoti": ("modcompile.runtimes.aoti", "pip install torch"),
}


# How torch, ONNX Runtime, CUDA and C++ say, each in its words, that memory ran out.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "failed to allocate memory", "smaller than requested bytes",
                  "alloc_failed", "bad_alloc")
# What to do about it.
MORE_MEMORY = "run fewer or shorter sequences at a time, or free memory: close the engines that are not in use"


class Backend(Protocol):
    """What a runtime's module has. The keyword-only parameters of its two functions are the runtime's options.

    Attributes:
        takes: What engines are made from: an ONNX file, or the model itself.
        opset: The opset that a model is exported with, if the caller names no other: the one that runs fastest.
    """

    takes: Literal["onnx", "model"]
    opset: int

    def build(self, source: Any, folder: Path, *, runtime: str, precision: str | None, shapes: Shapes | None,
              **options: Any) -> dict[str, Any]:
        """Fills ``folder`` with an engine, proves as far as this machine can that it loads.

        Args:
            source: The ONNX file's path, or the model. A file below ``folder`` is the backend's to move.
            folder: An empty folder, or one that holds just the ONNX file in a sub-folder, which is removed later.
            runtime: The runtime's name in the manifest.
            precision: What the caller asked for; None takes the file as it is.
            shapes: Static shapes by input name.
            options: The runtime's own.

        Returns:
            The manifest's fields, but for those that ``write_manifest`` adds.
        """

    def load(self, folder: Path, manifest: Manifest, **options: Any) -> "Engine":
        """Opens an engine whose files were verified just now. A missing device may wait for ``run`` to be reported."""


class Engine(ABC):
    """A compiled model. Close it, or use it as a context manager, to free its memory early.

    Attributes:
        folder: Where it was loaded from.
        manifest: What it is.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self._closed = False

    @property
    def name(self) -> str:
        """The name of the engine's folder."""
        return self.folder.name

    @property
    def runtime(self) -> str:
        """The runtime's name: "ort", "tensorrt", ..."""
        return self.manifest.runtime

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` takes."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` gives."""
        return self.manifest.outputs

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs the engine once. Safe to call from several threads at a time.

        Args:
            inputs: Every input by name: all numpy arrays, or all torch tensors of one device.

        Returns:
            Every output by name, as numpy arrays or as torch tensors of the inputs' device.

        Raises:
            UsageError: Inputs that the engine does not take, or an engine that was closed.
            ModcompileError: The runtime failed; the message holds its reason and the inputs' shapes.
        """
        if self._closed:
            raise UsageError("the engine is closed", where=self.folder, fix="load it again with load_engine")
        self._check(inputs)
        return self._run(inputs)

    def close(self) -> None:
        """Frees the engine. Closing it twice does nothing."""
        self._closed = True

    def __enter__(self):
        return self

    def __exit__(self, *_: object):
        self.close()

    def __repr__(self):
        inputs, outputs = (", ".join(map(str, specs)) for specs in (self.inputs, self.outputs))
        return f"<{type(self).__name__} {self.name}: {inputs} -> {outputs}>"

    @abstractmethod
    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs on inputs that were checked."""

    def _check(self, inputs: Mapping[str, Tensor]) -> None:
        if not isinstance(inputs, Mapping):
            raise UsageError("the engine's inputs are given by name", expected=f"a dict of {self._names()}",
                             found=type(inputs).__name__)
        names = {spec.name for spec in self.inputs}
        for name in inputs:
            if name not in names:
                raise UsageError("the engine has no input of this name", expected=self._names(), found=name,
                                 fix=_nearest(str(name), names - inputs.keys()))
        kinds: dict[str, str] = {}
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self.inputs:
            if spec.name not in inputs:
                raise UsageError(f"input {spec.name} is missing", expected=self._names(),
                                 found=", ".join(inputs) or "no inputs", fix=f"pass {spec}")
            value = inputs[spec.name]
            kinds[_kind(spec.name, value)] = spec.name
            _check_dtype(spec, value)
            _check_shape(spec, tuple(value.shape), sizes)
        if len(kinds) > 1:
            raise UsageError("the inputs are of different kinds or on different devices",
                             expected="all numpy arrays, or all torch tensors of one device",
                             found=", ".join(f"{name}: {kind}" for kind, name in kinds.items()),
                             fix="convert or move all of them to one")

    @contextlib.contextmanager
    def _explained(self, inputs: Mapping[str, Tensor], runtime: str) -> Iterator[None]:
        """Says what the engine was given when its runtime fails, and whether memory ran out."""
        try:
            yield
        except ModcompileError:
            raise
        except Exception as error:
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
            if memory := self._ran_out(error):
                raise ModcompileError(f"there is too little memory for a run of the engine on {runtime}",
                                      found=f"{shapes}: {memory}", where=self.folder, fix=MORE_MEMORY) from error
            if _BEYOND.search(str(error)):
                raise UsageError("an input holds an index that the model has nothing for", found=f"{shapes}: {error}",
                                 expected="words of the vocabulary, and no more rows than the model has positions",
                                 where=self.folder) from error
            raise ModcompileError(f"{runtime} failed to run the engine", expected=", ".join(map(str, self.inputs)),
                                  found=f"{shapes}: {error}", where=self.folder) from error

    def _ran_out(self, error: Exception) -> str | None:
        """How much memory was missing, as far as it is known, if that is why a run failed."""
        return str(error) or "no memory is left" if is_out_of_memory(error) else None

    def _names(self) -> str:
        return ", ".join(spec.name for spec in self.inputs)


def load_engine(path: str | os.PathLike, **options: Any) -> Engine:
    """Loads an engine folder. The manifest and the hash of every file are checked before anything is parsed.

    Args:
        path: The folder.
        options: The runtime's own: see ``modcompile.runtimes.ort.load`` and its siblings.

    Raises:
        UsageError: No such folder, or an option the runtime does not have.
        IntegrityError: A file is missing, truncated, edited, foreign or not a regular file.
        RuntimeUnavailableError: The runtime, its version, a provider or a device is missing; or the folder was
            written by a newer version of this package.

    Example:
        >>> engine = load_engine("engines/minilm", intra_op_threads=2)  # doctest: +SKIP
        >>> engine.run({"input_ids": ids, "attention_mask": mask})["last_hidden_state"].shape  # doctest: +SKIP
        (8, 256, 384)
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    backend = _backend(manifest.runtime)
    _split(options, load=backend.load)
    verify_files(folder, manifest)
    return backend.load(folder, manifest, **options)


def build_engine(mod_or_onnx: Any, path: str | os.PathLike, *, runtime: str = "ort", precision: str | None = None,
                 shapes: Shapes | None = None, overwrite: bool = False, **options: Any) -> Engine:
    """Builds an engine folder and loads it. The folder appears complete or not at all.

    Args:
        mod_or_onnx: A model, which is exported first where the runtime takes ONNX, or the path of an ONNX file, which
            is taken as it is with its external data files.
        path: The folder to make.
        runtime: "ort", "tensorrt", "tensorrt-rtx", "torch-tensorrt" or "aoti".
        precision: "fp32", "fp16" or "bf16". By default what ``export_onnx`` takes, or what the file has.
        shapes: Static shapes by input name. The symbols they give a size to are fixed everywhere.
        overwrite: Replace an engine that is in the folder already; it stays until the new one is complete.
        options: Of the runtime's ``build`` and ``load``, and for a model those of ``export_onnx``.

    Raises:
        UsageError: An option, shape or precision that does not fit; a folder that exists or cannot be written.
        IntegrityError: The ONNX file is damaged or incomplete.
        UnsupportedGraphError: The runtime does not take the graph.
        RuntimeUnavailableError: The runtime, a provider or a device is missing.

    Example:
        >>> engine = build_engine(mod, "engines/minilm", shapes={"input_ids": (8, 256)})  # doctest: +SKIP
    """
    backend = _backend(runtime)
    stages: dict[str, Callable] = {"load": backend.load, "build": backend.build}
    source = Path(mod_or_onnx) if isinstance(mod_or_onnx, str | os.PathLike) else mod_or_onnx
    if isinstance(source, Path) and backend.takes == "model":
        raise UsageError("engines of this runtime are made from a model, not from an ONNX file", expected="a model",
                         found=source, where=runtime, fix="pass the model that the file was exported from")
    exports = backend.takes == "onnx" and not isinstance(source, Path)
    if exports:
        stages["export"] = export_onnx = importlib.import_module("modcompile.export").export_onnx
    chosen = _split(options, **stages)
    is_there = Path(path, MANIFEST_NAME).exists()
    with new_folder(path, marker=MANIFEST_NAME, overwrite=overwrite) as folder:
        exported = folder / ".export"
        if exports:
            exported.mkdir()
            source = exported / "model.onnx"
            asked = {"opset": backend.opset, **chosen["export"], **({"precision": precision} if precision else {})}
            # Weights in a file of their own are moved and mapped, not parsed.
            export_onnx(mod_or_onnx, source, shapes=shapes, external_data=True, **asked)
        fields = backend.build(source, folder, runtime=runtime, precision=precision, shapes=shapes, **chosen["build"])
        if exports:
            shutil.rmtree(exported)
        write_manifest(folder, fields)
        if is_there and chosen["load"]:
            # What is asked for may not be had: better said before an engine that is there is replaced.
            load_engine(folder, **chosen["load"]).close()
    try:
        return load_engine(path, **chosen["load"])
    except BaseException:
        if not is_there:
            shutil.rmtree(os.path.realpath(path))
        raise


def load_options(runtime: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options of ``build_engine`` that ``load_engine`` takes too."""
    known = inspect.signature(_backend(runtime).load).parameters
    return {name: value for name, value in options.items() if name in known}


def is_torch(value: object) -> bool:
    """Whether a value is a torch tensor; torch is not imported to ask."""
    return _is_a(value, "torch", "Tensor")


def as_torch(value: Tensor) -> Tensor:
    """A tensor as torch has it: itself, or one on an array's memory where torch can have that."""
    if is_torch(value):
        return value
    torch, np = (importlib.import_module(name) for name in ("torch", "numpy"))
    # torch has no arrays that may not be written, and none of ml_dtypes' elements.
    array = np.require(value, requirements=["C", "A", "W"])
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_numpy(value: Tensor, name: str) -> Tensor:
    """A torch tensor as a numpy array, on its memory if that is the CPU's.

    Args:
        value: The tensor.
        name: The output's, for messages.

    Raises:
        RuntimeUnavailableError: It is of bfloat16, and the package that numpy needs for that is missing.
    """
    value = value.cpu()
    if _dtype_name(value.dtype) != "bfloat16":
        return value.numpy()
    torch = importlib.import_module("torch")
    return value.contiguous().view(torch.int16).numpy().view(numpy_bfloat16(name))


def numpy_bfloat16(name: str) -> Any:
    """The dtype of bfloat16 arrays.

    Args:
        name: The output that needs it, for messages.

    Raises:
        RuntimeUnavailableError: The package that has it is missing.
    """
    try:
        return importlib.import_module("ml_dtypes").bfloat16
    except ImportError as error:
        raise RuntimeUnavailableError("numpy has no bfloat16 of its own", expected="the package ml_dtypes",
                                      where=f"output {name}", fix="pip install ml_dtypes, or pass torch tensors"
                                      ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of any runtime says that memory ran out."""
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def _backend(runtime: str) -> Backend:
    if runtime not in _BACKENDS:
        raise RuntimeUnavailableError("this runtime is not known here", expected=", ".join(_BACKENDS), found=runtime,
                                      fix=_nearest(runtime, _BACKENDS))
    module, command = _BACKENDS[runtime]
    try:
        backend = importlib.import_module(module)
    except ImportError as error:
        raise RuntimeUnavailableError(f"the runtime {runtime} is not installed", expected=f"{module} can be imported",
                                      found=error, fix=command) from error
    return cast(Backend, backend)


# How runtimes say that a table has no row of an index.
_BEYOND = re.compile(r"out of (data )?bounds|index out of range", re.IGNORECASE)
# Parameters of the stages that are no options: build_engine gives them.
_FIXED = {"model", "path", "onnx_path", "folder", "manifest", "runtime", "precision", "shapes", "external_data"}


def _split(options: Mapping[str, Any], **stages: Callable) -> dict[str, dict[str, Any]]:
    """Gives each stage the options that its function has parameters for."""
    taken = {stage: inspect.signature(function).parameters.keys() - _FIXED for stage, function in stages.items()}
    known = set().union(*taken.values())
    for name in options:
        if name not in known:
            raise UsageError("there is no such option", expected=", ".join(sorted(known)), found=name,
                             where=" or ".join(f"{f.__module__}.{f.__qualname__}" for f in stages.values()),
                             fix=_nearest(name, known))
    return {stage: {name: options[name] for name in options if name in names} for stage, names in taken.items()}


def _nearest(name: str, names: Any) -> str | None:
    near = difflib.get_close_matches(name, sorted(names), 1)
    return f"did you mean {near[0]}?" if near else None


def _is_a(value: object, package: str, name: str) -> bool:
    module = sys.modules.get(package)
    return module is not None and isinstance(value, getattr(module, name))


def _kind(name: str, value: Tensor) -> str:
    if is_torch(value):
        return f"torch on {value.device}"
    if _is_a(value, "numpy", "ndarray"):
        return "numpy"
    raise UsageError(f"input {name} is not a tensor", expected="a numpy array or a torch tensor",
                     found=f"{type(value).__module__}.{type(value).__name__}", where=name,
                     fix="numpy.asarray(value, dtype=...)")


@functools.cache
def _dtype_name(dtype: Any) -> str:
    # Both libraries print an element type by the same name, "torch." apart; a swapped byte order prints ">f4".
    return str(dtype).removeprefix("torch.")


def _check_dtype(spec: TensorSpec, value: Tensor) -> None:
    found = _dtype_name(value.dtype)
    if found != spec.dtype:
        convert = f"{spec.name}.to(torch.{spec.dtype})" if is_torch(value) else f'{spec.name}.astype("{spec.dtype}")'
        raise UsageError(f"input {spec.name} has the wrong dtype", expected=spec.dtype, found=found, where=spec.name,
                         fix=f"pass {convert}")


def _check_shape(spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
    if len(shape) != len(spec.shape):
        raise UsageError(f"input {spec.name} has the wrong rank", expected=spec, found=f"shape {shape}",
                         where=spec.name, fix=f"give it {len(spec.shape)} dims")
    for axis, (dim, size) in enumerate(zip(spec.shape, shape, strict=True)):
        if size == 0:
            raise UsageError(f"input {spec.name} is empty", expected=spec, found=f"shape {shape}",
                             where=f"{spec.name}, axis {axis}", fix="pass at least one row")
        if isinstance(dim, int):
            if size != dim:
                raise UsageError(f"input {spec.name} has the wrong size", expected=spec, found=f"shape {shape}",
                                 where=f"{spec.name}, axis {axis}",
                                 fix=f"pad or cut it to {dim}, or build the engine for {size}")
        else:
            known, source = sizes.setdefault(dim, (size, spec.name))
            if size != known:
                raise UsageError(f"two inputs disagree about {dim!r}", expected=f"{dim} = {known}, as in {source}",
                                 found=f"{dim} = {size}, shape {shape}", where=f"{spec.name}, axis {axis}",
                                 fix=f"give {source} and {spec.name} the same {dim}" if source != spec.name
                                 else f"all axes of {spec.name} that are {dim} have one size")
