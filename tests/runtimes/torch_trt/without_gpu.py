"""Lets the RTX build of Torch-TensorRT work where there is no GPU. It changes torch: for a process of its own.

Importing the package asks for the GPU's compute capability and for the current device, and loads libraries that are
linked to CUDA; after a build it opens the engine. TensorRT-RTX itself builds without a GPU. So what is answered here is
made up, and what is built is real.
"""

__all__ = ["networks"]

import importlib
import os
import sys

import torch

# What the interpreter built, in order: names, shapes and types of inputs and outputs.
networks: list[dict[str, list[tuple[str, list[int], str]]]] = []


class _Unopened:
    """In the place of an engine: its serialized form is what the builder made."""

    def __init__(self, plan):
        self._plan = bytes(plan)

    def serialize(self):
        return self._plan

    def get_aliased_input_tensor(self, name):
        return None


class _Runtime:
    def __init__(self, log):
        pass

    def deserialize_cuda_engine(self, plan):
        return _Unopened(plan)


def _described(tensor):
    return tensor.name, list(tensor.shape), tensor.dtype.name


def _import():
    torch.cuda.get_device_capability = lambda *_: (8, 6)
    torch.cuda.current_device = lambda: 0
    torch.cuda.mem_get_info = lambda *_: (1 << 34, 1 << 34)
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = object
    is_file = os.path.isfile
    os.path.isfile = lambda path: "libtorchtrt" not in str(path) and is_file(path)
    try:
        package = importlib.import_module("torch_tensorrt")
    finally:
        os.path.isfile = is_file
    sys.modules["tensorrt"].Runtime = _Runtime
    interpreter = importlib.import_module("torch_tensorrt.dynamo.conversion._TRTInterpreter").TRTInterpreter
    construct = interpreter._construct_trt_network_def

    def constructed(self):
        construct(self)
        network = self.ctx.net
        networks.append({
            "inputs": [_described(network.get_input(index)) for index in range(network.num_inputs)],
            "outputs": [_described(network.get_output(index)) for index in range(network.num_outputs)],
        })

    interpreter._construct_trt_network_def = constructed
    return package


_import()
