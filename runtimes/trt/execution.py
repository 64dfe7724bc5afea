"""An engine on a GPU: what TensorRT opens, and runs on torch's memory and streams."""

__all__ = ["Execution", "compute_capability"]

import contextlib
import queue
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from modcompile.runtimes.aoti.cuda_graph import CudaGraph
from modcompile.runtimes.aoti.target import find_device
from modcompile.runtimes.trt.engine import COMPUTE_CAPABILITY
from modcompile.runtimes.trt.messages import plain
from modcompile.runtimes.trt.worker import make_log

from modcompile.engine import Tensor, as_numpy, as_torch, is_torch
from modcompile.errors import IntegrityError, ModcompileError, RuntimeUnavailableError, UsageError
from modcompile.manifest import Manifest, TensorSpec
from modcompile.spec import dtype_from_name

# TensorRT's names of element types, by ours.
DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "int8": "INT8",
          "uint8": "UINT8", "bool": "BOOL"}
# Kernels may read so much at once that a tensor must begin at a multiple of it. What torch allocates does.
ALIGNMENT_BYTES = 256


def compute_capability(device: torch.device | None = None) -> str:
    """A GPU's compute capability, "9.0" for example; by default the first one's, which TensorRT builds for."""
    major, minor = torch.cuda.get_device_capability(torch.device("cuda", 0) if device is None else device)
    return f"{major}.{minor}"


class Execution:
    """An opened engine and its execution contexts.

    Args:
        trt: The package of TensorRT.
        plan: The serialized engine, verified.
        folder: Where it was loaded from.
        manifest: What it is.
        device: The GPU, "cuda" or "cuda:1"; None for the current one.
        contexts: How many runs may be under way at a time.
        cuda_graph: Record a run as a CUDA graph.
        reuse_outputs: Outputs are the graph's own buffers.

    Raises:
        UsageError: A CUDA graph of an engine with a size that varies.
        IntegrityError: The engine is another one than the manifest says.
        RuntimeUnavailableError: There is no GPU that it runs on, or too little memory.
    """

    def __init__(self, trt: Any, plan: bytes, folder: Path, manifest: Manifest, *, device: str | None, contexts: int,
                 cuda_graph: bool, reuse_outputs: bool):
        self._trt, self._folder, self._manifest = trt, folder, manifest
        self._log = make_log(trt)
        if varying := [str(spec) for spec in (*manifest.inputs, *manifest.outputs) if _varies(spec)]:
            if cuda_graph:
                raise UsageError("a CUDA graph has one size", expected="an engine of static shapes",
                                 found=", ".join(varying), where=folder,
                                 fix="build the engine with one shape for every input, or leave cuda_graph out")
        self.device = self._find_gpu(device)
        with torch.cuda.device(self.device):
            # Each of them keeps the one before alive.
            runtime = trt.Runtime(self._log)
            self._engine = runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise RuntimeUnavailableError(f"{manifest.runtime} does not open the engine",
                                              expected=f"an engine for {self._gpu()}", found=self._reasons(),
                                              where=folder, fix="build the engine again on this machine")
            self._check_tensors()
            self._ranges = {spec.name: self._engine.get_tensor_profile_shape(spec.name, 0)
                            for spec in manifest.inputs if _varies(spec)}
            # Idle ones. Memory is taken when a context is made, and not by a run.
            self._idle: queue.SimpleQueue[_Context] = queue.SimpleQueue()
            for _ in range(contexts):
                self._idle.put(_Context(self._make_context(), self.device))
        self._graph: CudaGraph | None = None
        if cuda_graph:
            self._graph = self._record(reuse_outputs)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs on inputs whose names, types and ranks were checked."""
        specs = self._manifest.inputs
        self._check_sizes(inputs)
        tensors = [as_torch(inputs[spec.name]) for spec in specs]
        home = tensors[0].device if tensors else torch.device("cpu")
        if home.type != "cpu" and home != self.device:
            raise UsageError("the inputs are on another device than the engine", expected=self.device,
                             found=f"tensors on {home}", where=self._folder,
                             fix=f'move them with .to("{self.device}"), or load the engine with device="{home}"')
        with self._explained(inputs), torch.no_grad(), torch.cuda.device(self.device):
            outputs = [output.to(home) for output in (self._graph or self._launch)(tensors)]
        given_torch = bool(specs) and is_torch(inputs[specs[0].name])
        return {spec.name: output if given_torch else as_numpy(output, spec.name)
                for spec, output in zip(self._manifest.outputs, outputs, strict=True)}

    def _launch(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Launches a run on the current stream of the current device, which is the engine's."""
        given = [_aligned(tensor.to(self.device).contiguous()) for tensor in tensors]
        context = self._idle.get()
        try:
            return context.launch(self._manifest, given)
        finally:
            self._idle.put(context)

    def _record(self, reuse_outputs: bool) -> CudaGraph:
        try:
            buffers = [torch.zeros([int(dim) for dim in spec.shape], dtype=dtype_from_name(spec.dtype),
                                   device=self.device) for spec in self._manifest.inputs]
            return CudaGraph(self._launch, buffers, reuse_outputs=reuse_outputs)
        except Exception as error:
            raise ModcompileError("a run of the engine cannot be recorded as a CUDA graph",
                                  found=self._reasons(error), where=self._folder,
                                  fix="load it without cuda_graph") from error

    def _find_gpu(self, name: str | None) -> torch.device:
        target = self._manifest.target
        built_for = target.get(COMPUTE_CAPABILITY) or target.get("compute_capabilities", "?")
        if torch.cuda.device_count() == 0:
            raise RuntimeUnavailableError("there is no GPU to run the engine on", where=self._folder,
                                          expected=f"an NVIDIA GPU of compute capability {built_for}",
                                          found=f"none that torch {torch.__version__} sees",
                                          fix='build the model with runtime="ort" to run it here')
        if not (name or "cuda").startswith("cuda"):
            raise UsageError("TensorRT runs on a GPU", expected='"cuda" or "cuda:1"', found=repr(name), where="device")
        device = find_device(name or "cuda")
        # TensorRT-RTX finishes its kernels on the machine, and knows itself what it can run on.
        if COMPUTE_CAPABILITY in target and compute_capability(device) != built_for:
            raise RuntimeUnavailableError("the engine was built for another GPU",
                                          expected=f"compute capability {built_for}",
                                          found=f"compute capability {compute_capability(device)}, {device}",
                                          where=self._folder, fix="build the engine again on this machine")
        return device

    def _check_tensors(self) -> None:
        """Compares the engine's inputs and outputs with the manifest's."""
        engine, mode = self._engine, self._trt.TensorIOMode
        found = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == mode.INPUT
            # An output's sizes are what could be inferred, and more may be known of the engine than of the network.
            found[name] = (is_input, engine.get_tensor_dtype(name).name,
                           tuple(engine.get_tensor_shape(name)) if is_input else ())
        expected = {spec.name: (True, DTYPES.get(spec.dtype, spec.dtype),
                                tuple(dim if isinstance(dim, int) else -1 for dim in spec.shape))
                    for spec in self._manifest.inputs}
        expected |= {spec.name: (False, DTYPES.get(spec.dtype, spec.dtype), ()) for spec in self._manifest.outputs}
        if found != expected:
            raise IntegrityError("the engine's inputs or outputs are not those of its manifest",
                                 expected=_tensor_list(expected), found=_tensor_list(found), where=self._folder,
                                 fix="copy the engine folder again, or build the engine again")

    def _make_context(self) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            free, total = torch.cuda.mem_get_info(self.device)
            raise RuntimeUnavailableError(
                "there is too little memory to run the engine", where=self._folder,
                expected=f"{self._engine.device_memory_size_v2 / 1e6:.0f} MB of GPU memory for each run at a time",
                found=f"{free / 1e6:.0f} of {total / 1e6:.0f} MB are free on {self.device}: {self._reasons()}",
                fix="free memory of the GPU, load the engine with fewer contexts, or build it for smaller shapes")
        return context

    def _check_sizes(self, inputs: Mapping[str, Tensor]) -> None:
        """Compares the sizes that may vary with the optimization profile."""
        for spec in self._manifest.inputs:
            if spec.name not in self._ranges:
                continue
            least, _, most = self._ranges[spec.name]
            for axis, (size, low, high) in enumerate(zip(inputs[spec.name].shape, least, most, strict=True)):
                if not low <= size <= high:
                    raise UsageError(f"input {spec.name} has a size that the engine was not built for",
                                     expected=f"{low} <= {spec.shape[axis]} <= {high}",
                                     found=f"shape {tuple(inputs[spec.name].shape)}",
                                     where=f"{spec.name}, axis {axis}", fix="build the engine with shapes that hold it")

    @contextlib.contextmanager
    def _explained(self, inputs: Mapping[str, Tensor]) -> Iterator[None]:
        """Says what the engine was given when TensorRT or CUDA fails."""
        self._log.errors.clear()
        try:
            yield
        except Exception as error:
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
            raise ModcompileError(f"{self._manifest.runtime} failed to run the engine",
                                  expected=", ".join(map(str, self._manifest.inputs)),
                                  found=f"{shapes}: {self._reasons(error)}", where=self._folder) from error

    def _reasons(self, error: Exception | None = None) -> str:
        told = [plain(text) for text in self._log.errors]
        return "; ".join(filter(None, [*([] if error is None else [str(error)]), *told])) or "no reason given"

    def _gpu(self) -> str:
        return f"{torch.cuda.get_device_name(self.device)}, compute capability {compute_capability(self.device)}"


class _Context:
    """An execution context: memory for one run at a time, on whatever stream."""

    def __init__(self, context: Any, device: torch.device):
        self._context, self._device = context, device
        self._done = torch.cuda.Event()
        # On the default stream TensorRT would wait for the GPU before and after its work.
        self._side = torch.cuda.Stream(device)

    def launch(self, manifest: Manifest, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Launches a run on the current stream, whose work so far it comes after; outputs are new tensors."""
        current = torch.cuda.current_stream(self._device)
        stream = current if current != torch.cuda.default_stream(self._device) else self._side
        for spec, tensor in zip(manifest.inputs, inputs, strict=True):
            if _varies(spec):
                self._accept(self._context.set_input_shape(spec.name, tuple(tensor.shape)), f"the shape of {spec.name}")
            self._accept(self._context.set_tensor_address(spec.name, tensor.data_ptr()), f"the address of {spec.name}")
        if unknown := self._context.infer_shapes():
            raise RuntimeError(f"the shapes of {', '.join(unknown)} are not known")
        outputs = []
        for spec in manifest.outputs:
            output = torch.empty(tuple(self._context.get_tensor_shape(spec.name)), dtype=dtype_from_name(spec.dtype),
                                 device=self._device)
            self._accept(self._context.set_tensor_address(spec.name, output.data_ptr()), f"the address of {spec.name}")
            outputs.append(output)
        # The run before may still be under way, on another stream.
        if not torch.cuda.is_current_stream_capturing():
            stream.wait_event(self._done)
        if stream is not current:
            stream.wait_stream(current)
        self._accept(self._context.execute_async_v3(stream.cuda_stream), "the run")
        if not torch.cuda.is_current_stream_capturing():
            self._done.record(stream)
        if stream is not current:
            # What the caller does next, on inputs and outputs, comes after.
            current.wait_stream(stream)
        return outputs

    def _accept(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise RuntimeError(f"TensorRT refuses {what}")


def _varies(spec: TensorSpec) -> bool:
    return any(isinstance(dim, str) for dim in spec.shape)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of one that begins in the middle of another."""
    return tensor if tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()


def _tensor_list(tensors: Mapping[str, tuple[bool, str, tuple[int, ...]]]) -> str:
    return "; ".join(f"input {name} {dtype} {list(shape)}" if is_input else f"output {name} {dtype}"
                     for name, (is_input, dtype, shape) in sorted(tensors.items()))
