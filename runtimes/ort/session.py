"""ONNX Runtime sessions: explicit providers, no fallback, and failures said in this package's errors."""

__all__ = ["CONSTANT_OUTPUTS", "CUDA", "ENTRY", "ONNX_TYPES", "Optimization", "Provider", "open_session",
           "tensor_specs"]

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnxruntime
from modcompile.runtimes.ort.custom_ops import CustomOps
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from modcompile.engine import MORE_MEMORY, is_out_of_memory
from modcompile.errors import (
    IntegrityError,
    ModcompileError,
    RuntimeUnavailableError,
    UnsupportedGraphError,
    UsageError,
)
from modcompile.manifest import TensorSpec

# The ONNX file of every ONNX Runtime engine.
ENTRY = "model.onnx"
CUDA = "CUDAExecutionProvider"
# In a manifest's target: outputs that are the same at every run. ONNX Runtime copies them, which no capture allows, and
# a capture that fails ends the process.
CONSTANT_OUTPUTS = "constant outputs"
_CUDA_DEFAULTS = {
    # float32 products stay in float32: their factors would be rounded to 10 bits.
    "use_tf32": "0",
    # Memory is taken as it is needed, not in powers of two, up to half of which would lie idle.
    "arena_extend_strategy": "kSameAsRequested",
}

Provider = str | tuple[str, Mapping[str, Any]]
Optimization = Literal["all", "extended", "basic", "none"]

_LEVELS = {
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

# onnx.TensorProto's numbers, by numpy's names. The onnx package is not needed to run an engine.
ONNX_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9,
              "float16": 10, "float64": 11, "uint32": 12, "uint64": 13, "bfloat16": 16}
# ONNX Runtime prints C++ names where they differ.
_DTYPES: dict[str, Any] = {f"tensor({name})": name for name in ONNX_TYPES} | {
    "tensor(float)": "float32", "tensor(double)": "float64"}


def open_session(model: bytes, folder: Path, *, where: Path, providers: Sequence[Provider],
                 intra_op_threads: int | None = None, inter_op_threads: int | None = None,
                 optimization: Optimization = "all", session_config: Mapping[str, str] | None = None,
                 custom_ops: CustomOps | None = None, cuda_graph: bool = False) -> onnxruntime.InferenceSession:
    """Opens a session on a model that was read already; its external data files are mapped from ``folder``.

    ``where`` names the model in messages. ``custom_ops`` run in the place of function bodies; with
    ``cuda_graph`` the CUDA provider records its first run.

    Raises:
        UsageError: An option that ONNX Runtime does not have.
        IntegrityError: The bytes are no ONNX model.
        UnsupportedGraphError: ONNX Runtime does not run this graph.
        RuntimeUnavailableError: A provider is not available, did not start, or has no kernels in the custom ops.
        ModcompileError: There is too little memory.
    """
    names = _check_providers(providers)
    providers = _with_defaults(providers)
    if cuda_graph:
        providers = _recording(providers)
    options = onnxruntime.SessionOptions()
    # What goes wrong is raised; by default it is printed as well.
    options.log_severity_level = 4
    options.graph_optimization_level = _LEVELS[_one_of(optimization, "optimization")]
    if intra_op_threads is not None:
        options.intra_op_num_threads = _positive(intra_op_threads, "intra_op_threads")
    if inter_op_threads is not None:
        options.inter_op_num_threads = _positive(inter_op_threads, "inter_op_threads")
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.absolute()))
    config = session_config or {}
    if not isinstance(config, Mapping) or not all(isinstance(text, str) for entry in config.items() for text in entry):
        raise UsageError("session_config does not fit", expected='texts by name, such as {"session.use_mimalloc": "1"}',
                         found=repr(config), where="session_config")
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    if custom_ops is not None:
        _register(custom_ops, options, providers)
    try:
        # A disabled fallback raises where ONNX Runtime would otherwise print and go on with the CPU.
        session = onnxruntime.InferenceSession(
            model, options, [p if isinstance(p, str) else (p[0], dict(p[1])) for p in providers], enable_fallback=False)
    except Exception as error:
        raise _not_opened(error, where, names) from error
    started = session.get_providers()
    if missing := [name for name in names if name not in started]:
        raise RuntimeUnavailableError(f"{missing[0]} did not start", expected=", ".join(names),
                                      found=", ".join(started), where=where,
                                      fix="ONNX Runtime's message above names the library that is missing")
    # The session would keep the model's bytes for a fallback that is disabled.
    session._model_bytes = None
    return session


def tensor_specs(nodes: Sequence[Any], where: Path) -> tuple[TensorSpec, ...]:
    """The inputs or outputs of a session. A dim without a name gets one of its own.

    Raises:
        UnsupportedGraphError: An input or output that is not a tensor of numbers.
    """
    for node in nodes:
        if node.type not in _DTYPES:
            raise UnsupportedGraphError("the model has an input or output that is not a tensor of numbers",
                                        expected=", ".join(ONNX_TYPES), found=f"{node.name}: {node.type}", where=where)
    return tuple(
        TensorSpec(name=node.name, dtype=_DTYPES[node.type],
                   shape=tuple(dim if dim else f"{node.name}_{axis}" for axis, dim in enumerate(node.shape)))
        for node in nodes
    )


def _check_providers(providers: Sequence[Provider]) -> list[str]:
    if isinstance(providers, str) or not providers:
        raise UsageError("providers is not a list of execution providers",
                         expected='["CUDAExecutionProvider", "CPUExecutionProvider"], for example', found=providers)
    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    available = onnxruntime.get_available_providers()
    for name in names:
        if name not in available:
            raise RuntimeUnavailableError("this ONNX Runtime does not have the execution provider",
                                          expected=", ".join(available), found=name,
                                          where=f"onnxruntime {onnxruntime.__version__}",
                                          fix="pip install onnxruntime-gpu, in the place of onnxruntime"
                                          if name.startswith(("CUDA", "Tensorrt")) else None)
    return names


def _with_defaults(providers: Sequence[Provider]) -> list[Provider]:
    """The providers, with our defaults for CUDA's options where the caller names none."""
    pairs = [(provider, {}) if isinstance(provider, str) else provider for provider in providers]
    return [(name, {**_CUDA_DEFAULTS, **options} if name == CUDA else options) for name, options in pairs]


def _recording(providers: Sequence[Provider]) -> list[Provider]:
    """The providers, with CUDA's told to record a graph."""
    pairs = [(provider, {}) if isinstance(provider, str) else provider for provider in providers]
    if CUDA not in dict(pairs):
        raise UsageError("a CUDA graph needs the CUDA execution provider", expected=CUDA,
                         found=", ".join(dict(pairs)), where="cuda_graph", fix=f'pass providers=["{CUDA}"]')
    return [(name, {**options, "enable_cuda_graph": "1"} if name == CUDA else options) for name, options in pairs]


def _register(custom_ops: CustomOps, options: onnxruntime.SessionOptions, providers: Sequence[Provider]) -> None:
    for name, given in (provider for provider in providers if not isinstance(provider, str)):
        if name == CUDA:
            # Others would run on the CPU, between copies there and back.
            custom_ops.check_gpu(int(given.get("device_id", 0)))
    try:
        options.register_custom_ops_library(str(custom_ops.path))
    except Exception as error:
        raise RuntimeUnavailableError("ONNX Runtime does not take the custom-op library",
                                      expected=f"ops for onnxruntime {onnxruntime.__version__}", found=error,
                                      where=str(custom_ops), fix="build the library again") from error


def _one_of(value: str, option: str) -> str:
    if value not in _LEVELS:
        raise UsageError(f"{option} does not fit", expected=", ".join(_LEVELS), found=value, where=option)
    return value


def _positive(value: int, option: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{option} does not fit", expected="a number of threads, at least 1", found=repr(value),
                         where=option)
    return value


def _not_opened(error: Exception, where: Path, providers: list[str]) -> ModcompileError:
    text = str(error).strip()
    if isinstance(error, ort_errors.InvalidProtobuf) or "No graph was found" in text:
        return IntegrityError("the file is not a complete ONNX model", found=text, where=where)
    if is_out_of_memory(error):
        return ModcompileError("there is too little memory for the engine", found=text, where=where, fix=MORE_MEMORY)
    # ONNX Runtime raises a plain Python error where a provider or its options, not the model, is at fault.
    if isinstance(error, ort_errors.EPFail | RuntimeError | ValueError):
        return RuntimeUnavailableError("an execution provider did not start", expected=", ".join(providers), found=text,
                                       where=where)
    fix = "take another precision, or another provider" if isinstance(error, ort_errors.NotImplemented) else None
    return UnsupportedGraphError("ONNX Runtime does not run this model", found=text, where=where, fix=fix)
