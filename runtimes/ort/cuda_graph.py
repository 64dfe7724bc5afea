"""Runs a session as one CUDA graph: its kernels are recorded once, and a run launches all of them at a time.

ONNX Runtime records the first run and replays it afterwards. A graph reads and writes fixed memory, so every size is
static, inputs are copied into the engine's own memory and outputs out of it, and callers take turns. All nodes must run
on the CUDA provider: where one does not, the session is refused.

Where torch is there, the session computes on a stream of torch's, and a run on tensors of the GPU waits for nothing:
the caller's stream and this one wait for each other on the device. Otherwise ONNX Runtime's own stream is waited for.
"""

__all__ = ["CudaGraphEngine", "with_stream"]

import importlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from modcompile.runtimes.ort.engine import OrtEngine, to_torch
from modcompile.runtimes.ort.session import CONSTANT_OUTPUTS, CUDA, ONNX_TYPES, Provider

from modcompile.engine import MORE_MEMORY, Tensor, as_numpy, as_torch, is_out_of_memory, is_torch
from modcompile.errors import ModcompileError, UsageError
from modcompile.manifest import Manifest


def with_stream(providers: Sequence[Provider]) -> tuple[Sequence[Provider], Any]:
    """The providers, CUDA's told to compute on a stream of torch's, and the stream.

    They are given back as they are, with None, where torch or its GPU is missing, or the caller names a stream.
    """
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return providers, None
    # What is no list is refused with the other options.
    if isinstance(providers, str) or not torch.cuda.is_available():
        return providers, None
    pairs = [(given, {}) if isinstance(given, str) else (given[0], dict(given[1])) for given in providers]
    options = dict(pairs).get(CUDA)
    if options is None or "user_compute_stream" in options:
        return providers, None
    stream = torch.cuda.Stream(int(options.get("device_id", 0)))
    options["user_compute_stream"] = str(stream.cuda_stream)
    return pairs, stream


class CudaGraphEngine(OrtEngine):
    """An engine whose runs replay a CUDA graph. Memory of its inputs and outputs is allocated once, on one device.

    Args:
        folder: The engine's folder; ``manifest``: its manifest.
        session: A session that records.
        stream: The torch stream that it computes on, if it is one.

    Raises:
        UsageError: The engine has a size that varies, or an output that is a constant.
        ModcompileError: There is too little memory.
    """

    def __init__(self, folder: Path, manifest: Manifest, session: onnxruntime.InferenceSession, stream: Any = None):
        super().__init__(folder, manifest, session)
        self._stream = stream
        self._without_waiting = onnxruntime.RunOptions()
        self._without_waiting.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if varying := [str(spec) for spec in self.inputs + self.outputs if any(isinstance(d, str) for d in spec.shape)]:
            raise UsageError("a CUDA graph has one size", expected="an engine of static shapes",
                             found=", ".join(varying), where=folder,
                             fix="build the engine with shapes={...} for every input, or leave cuda_graph out")
        if CONSTANT_OUTPUTS in manifest.target:
            raise UsageError("a CUDA graph has no constants among its outputs", where=folder,
                             expected="outputs that follow from inputs", found=manifest.target[CONSTANT_OUTPUTS],
                             fix="leave them out of the model, or leave cuda_graph out")
        device_id = int(session.get_provider_options()[CUDA].get("device_id", 0))
        self._turn = threading.Lock()
        try:
            self._buffers = {
                spec.name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                    list(spec.shape), ONNX_TYPES[spec.dtype], "cuda", device_id)
                for spec in self.inputs + self.outputs}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ModcompileError("there is too little memory for the engine's inputs and outputs",
                                  expected=", ".join(map(str, self.inputs + self.outputs)), found=error, where=folder,
                                  fix=MORE_MEMORY) from error
        # Torch tensors on the same memory, made when one is first needed.
        self._views: dict[str, Any] = {}
        self._binding: Any = session.io_binding()
        for spec in self.inputs:
            self._binding.bind_ortvalue_input(spec.name, self._buffers[spec.name])
        for spec in self.outputs:
            self._binding.bind_ortvalue_output(spec.name, self._buffers[spec.name])

    def close(self) -> None:
        """Frees the session, its graph and its memory once the runs under way have ended."""
        super().close()
        with self._turn:
            self._binding, self._buffers, self._views = None, {}, {}

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self._turn:
            session = self._open_session()
            with self._explained(inputs, "ONNX Runtime"):
                if is_torch(next(iter(inputs.values()), None)):
                    return self._replay_torch(session, inputs)
                if all(spec.dtype != "bfloat16" for spec in self.inputs + self.outputs):
                    return self._replay_numpy(session, inputs)
                # An OrtValue has no arrays of bfloat16.
                outputs = self._replay_torch(session, {name: as_torch(value) for name, value in inputs.items()})
                return {name: as_numpy(value, name) for name, value in outputs.items()}

    def _replay_numpy(self, session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for spec in self.inputs:
            self._buffers[spec.name].update_inplace(np.require(inputs[spec.name], requirements=["C", "A"]))
        session.run_with_iobinding(self._binding)
        # A copy, even of memory that the host may read in place.
        return {spec.name: np.array(self._buffers[spec.name].numpy()) for spec in self.outputs}

    def _replay_torch(self, session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        torch = importlib.import_module("torch")
        if not self._views:
            self._views = {spec.name: to_torch(self._buffers[spec.name], spec) for spec in self.inputs + self.outputs}
        memory = next(iter(self._views.values())).device
        device = next(iter(inputs.values())).device
        with torch.cuda.device(memory):
            caller, own = torch.cuda.current_stream(), self._stream
            if own is None:
                self._copy_in(inputs)
                # ONNX Runtime reads on a stream of its own, and returns when its stream is done.
                caller.synchronize()
                session.run_with_iobinding(self._binding)
                outputs = self._copies_out(device)
                # The next caller may write to this memory from another stream.
                caller.synchronize()
                return outputs
            own.wait_stream(caller)
            with torch.cuda.stream(own):
                self._copy_in(inputs)
                session.run_with_iobinding(self._binding, self._without_waiting)
                outputs = self._copies_out(device)
            caller.wait_stream(own)
            for tensor, stream in (*((value, own) for value in inputs.values()),
                                   *((value, caller) for value in outputs.values())):
                # Memory of one stream that another uses is not to be given away before that is done.
                if tensor.is_cuda:
                    tensor.record_stream(stream)
            return outputs

    def _copy_in(self, inputs: Mapping[str, Tensor]) -> None:
        for spec in self.inputs:
            self._views[spec.name].copy_(inputs[spec.name])

    def _copies_out(self, device: Any) -> dict[str, Tensor]:
        return {spec.name: self._views[spec.name].to(device, copy=True) for spec in self.outputs}
