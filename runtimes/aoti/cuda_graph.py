"""Records one run of a model at static shapes as a CUDA graph, and replays it: one launch in the place of hundreds."""

__all__ = ["CudaGraph"]

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Kernels are loaded, and libraries take their working memory, in the first run of a model and not in a recorded one.
WARMUP_RUNS = 2


class CudaGraph:
    """A recorded run. It is called like the model that was recorded, on the caller's current stream.

    What the graph reads and writes are buffers of its own. Inputs are copied into them, wherever they are. Outputs are
    copied out of them, so that each call gives new tensors that are the caller's; or with ``reuse_outputs`` they are
    the buffers themselves, which the next call overwrites.

    Calls from several threads take turns; on several streams, each waits on the GPU for the one before.

    Args:
        model: Takes and returns lists of tensors on the device, and launches work on the current stream.
        inputs: Tensors like those that it takes; they become the buffers.
        reuse_outputs: Outputs are not copied.
    """

    def __init__(self, model: Callable[[list[Tensor]], list[Tensor]], inputs: Sequence[Tensor], *,
                 reuse_outputs: bool = False):
        self._device, self._inputs, self._reuse_outputs = inputs[0].device, list(inputs), reuse_outputs
        # The recorded run reads the model's weights, which go with it.
        self._model = model
        self._lock = threading.Lock()
        with torch.cuda.device(self._device):
            caller, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(caller)
            with torch.cuda.stream(side):
                for _ in range(WARMUP_RUNS):
                    model(list(self._inputs))
            caller.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = model(list(self._inputs))
            # Memory that cuBLAS took in the recorded run is the graph's, and goes with it once nothing else names it.
            torch._C._cuda_clearCublasWorkspaces()
            self._done = torch.cuda.Event()

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Replays the run on these inputs."""
        with self._lock, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            # The call before may still be under way, on another stream.
            stream.wait_event(self._done)
            for buffer, tensor in zip(self._inputs, tensors, strict=True):
                buffer.copy_(tensor)
            self._graph.replay()
            outputs = list(self._outputs) if self._reuse_outputs else [output.clone() for output in self._outputs]
            self._done.record(stream)
        return outputs
