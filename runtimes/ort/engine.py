"""Runs an ONNX Runtime session by IO binding: inputs are read where they lie, outputs are handed over, not copied."""

__all__ = ["OrtEngine", "load", "to_torch"]

import ctypes
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from modcompile.runtimes.ort.custom_ops import LIBRARY, CustomOps, open_library, read_library
from modcompile.runtimes.ort.session import CUDA, ONNX_TYPES, Optimization, Provider, open_session, tensor_specs

from modcompile.engine import Engine, Tensor, is_torch, numpy_bfloat16
from modcompile.errors import IntegrityError, RuntimeUnavailableError, UsageError
from modcompile.manifest import Manifest, TensorSpec, read_verified

# Providers whose memory is CUDA's.
_CUDA_PROVIDERS = {"CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"}


class OrtEngine(Engine):
    """An engine on ONNX Runtime.

    Attributes:
        session: The session, for profiling and for what this class does not cover; None once closed.
    """

    def __init__(self, folder: Path, manifest: Manifest, session: onnxruntime.InferenceSession):
        super().__init__(folder, manifest)
        self.session: onnxruntime.InferenceSession | None = session

    def close(self) -> None:
        """Frees the session once the runs under way have ended."""
        super().close()
        self.session = None

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        session = self._open_session()
        first = next(iter(inputs.values()), None)
        device, index = self._device(first, session)
        # Bindings hold bare addresses: these references keep the memory alive until the run is over.
        buffers = {spec.name: _contiguous(inputs[spec.name]) for spec in self.inputs}
        # Threads may share a session but not a binding.
        binding = session.io_binding()
        with self._explained(inputs, "ONNX Runtime"):
            for spec in self.inputs:
                buffer = buffers[spec.name]
                binding.bind_input(spec.name, device, index, ONNX_TYPES[spec.dtype], tuple(buffer.shape),
                                   buffer.data_ptr() if is_torch(buffer) else buffer.ctypes.data)
            for spec in self.outputs:
                binding.bind_output(spec.name, device, index)
            session.run_with_iobinding(binding)
        take = to_torch if is_torch(first) else _to_numpy
        return {spec.name: take(value, spec) for spec, value in zip(self.outputs, binding.get_outputs(), strict=True)}

    def _open_session(self) -> onnxruntime.InferenceSession:
        session = self.session
        if session is None:
            raise UsageError("the engine was closed by another thread", where=self.folder)
        return session

    def _device(self, value: Tensor, session: onnxruntime.InferenceSession) -> tuple[str, int]:
        if not is_torch(value) or value.device.type == "cpu":
            return "cpu", 0
        if value.device.type != "cuda" or _CUDA_PROVIDERS.isdisjoint(session.get_providers()):
            raise UsageError("the inputs are on a device that the engine does not run on",
                             expected=", ".join(session.get_providers()), found=f"tensors on {value.device}",
                             where=self.folder, fix='move them with .to("cpu"), or load the engine with '
                             'providers=["CUDAExecutionProvider", "CPUExecutionProvider"]')
        own = {int(options.get("device_id", 0)) for name, options in session.get_provider_options().items()
               if name in _CUDA_PROVIDERS}
        if value.device.index not in own:
            raise UsageError("the inputs are on another GPU than the engine",
                             expected=" or ".join(f"cuda:{index}" for index in sorted(own)),
                             found=f"tensors on {value.device}", where=self.folder,
                             fix="move them, or load the engine with "
                             f'providers=[("{CUDA}", {{"device_id": {value.device.index}}})]')
        # ONNX Runtime reads on a stream of its own: what torch still computes must be there first.
        torch = importlib.import_module("torch")
        torch.cuda.current_stream(value.device).synchronize()
        return "cuda", value.device.index


def load(folder: Path, manifest: Manifest, *, providers: Sequence[Provider] | None = None,
         intra_op_threads: int | None = None, inter_op_threads: int | None = None,
         optimization: Optimization = "all", session_config: Mapping[str, str] | None = None,
         custom_ops: str | os.PathLike | Literal[False] | None = None, cuda_graph: bool = False) -> OrtEngine:
    """Opens an engine folder whose files were verified.

    The graph is parsed from the very bytes whose hash was checked; the weights, which are data and not code, are
    mapped into memory from the file that was verified.

    Args:
        folder: The engine folder.
        manifest: Its manifest.
        providers: Execution providers by name, or pairs of name and options, in order of preference. By default those
            that the engine was built with. One that is missing or does not start is an error.
        intra_op_threads: Threads within an operator; by default one a core.
        inter_op_threads: Threads across operators, which then run in parallel where they can.
        optimization: How far ONNX Runtime rewrites the graph.
        session_config: ONNX Runtime's session configuration entries.
        custom_ops: By default the custom-op library that the engine was built with, if any. Another one's path, such as
            one for this machine; or False, which runs the function bodies.
        cuda_graph: Record the run as a CUDA graph, see ``modcompile.runtimes.ort.cuda_graph``. Needs static shapes and
            the CUDA provider.

    Raises:
        UsageError: An option that does not fit, or a CUDA graph of an engine with a size that varies.
        IntegrityError: The model is damaged, or differs from its manifest.
        UnsupportedGraphError: ONNX Runtime does not run this graph.
        RuntimeUnavailableError: Another version of ONNX Runtime is needed, a provider is missing, or the custom-op
            library does not load here.
    """
    if not manifest.runtime_range.contains(onnxruntime.__version__):
        raise RuntimeUnavailableError("this version of ONNX Runtime cannot load the engine",
                                      expected=f"onnxruntime{manifest.runtime_range}", found=onnxruntime.__version__,
                                      where=folder, fix=f"pip install 'onnxruntime{manifest.runtime_range}'")
    path = folder / manifest.entry
    providers, stream = manifest.providers if providers is None else providers, None
    if cuda_graph:
        graphs = importlib.import_module("modcompile.runtimes.ort.cuda_graph")
        providers, stream = graphs.with_stream(providers)
    session = open_session(read_verified(folder, manifest, manifest.entry), folder, where=path, providers=providers,
                           intra_op_threads=intra_op_threads, inter_op_threads=inter_op_threads,
                           optimization=optimization, session_config=session_config,
                           custom_ops=_custom_ops(folder, manifest, custom_ops), cuda_graph=cuda_graph)
    inputs, outputs = tensor_specs(session.get_inputs(), path), tensor_specs(session.get_outputs(), path)
    # The outputs' shapes are inferred, and each release infers what it can.
    if inputs != manifest.inputs or _types(outputs) != _types(manifest.outputs):
        raise IntegrityError("the model's inputs or outputs are not those of its manifest",
                             expected="; ".join(map(str, manifest.inputs + manifest.outputs)),
                             found="; ".join(map(str, inputs + outputs)), where=path)
    if cuda_graph:
        return graphs.CudaGraphEngine(folder, manifest, session, stream)
    return OrtEngine(folder, manifest, session)


def _custom_ops(folder: Path, manifest: Manifest, given: str | os.PathLike | Literal[False] | None
                ) -> CustomOps | None:
    if given is None and LIBRARY in manifest.files:
        return open_library(read_verified(folder, manifest, LIBRARY), folder / LIBRARY)
    return open_library(read_library(given), given) if given else None


def _types(specs: Sequence[TensorSpec]) -> list[tuple[str, str]]:
    return [(spec.name, spec.dtype) for spec in specs]


def _contiguous(value: Tensor) -> Tensor:
    return value.contiguous() if is_torch(value) else np.require(value, requirements=["C", "A"])


def _to_numpy(value: Any, spec: TensorSpec) -> np.ndarray:
    if spec.dtype != "bfloat16":
        return value.numpy()
    array = np.empty(value.shape(), numpy_bfloat16(spec.name))
    ctypes.memmove(array.ctypes.data, value.data_ptr(), array.nbytes)
    return array


def to_torch(value: Any, spec: TensorSpec) -> Any:
    """A torch tensor on the memory of an OrtValue."""
    torch = importlib.import_module("torch")
    # In release 1.24 only the class that this one wraps speaks DLPack, and hands bools over as bytes.
    tensor = torch.from_dlpack(value if hasattr(value, "__dlpack__") else value._ortvalue)
    return tensor.view(getattr(torch, spec.dtype)) if spec.dtype == "bool" else tensor
