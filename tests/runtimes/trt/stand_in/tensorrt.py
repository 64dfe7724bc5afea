"""Stands in for the package of TensorRT 10, which cannot be installed everywhere: the part of its API that we use.

It is strict where TensorRT is, and where it would read memory that is not there. An engine runs on the memory of the
host, by the reference implementation of ONNX, and launches end before they return. ``calls`` holds what was called, in
order. test_run.py compares the signatures with those of TensorRT-RTX.
"""

import ctypes
import enum
import io
import json
import math
import os

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

__version__ = "10.13.0"
# Of the GPU.
COMPUTE_CAPABILITY = "9.0"
# How many execution contexts there is memory for.
memory = {"contexts": 100}
calls = []

# As the package loads TensorRT: for itself.
_nvinfer = ctypes.CDLL(os.environ["STAND_IN_NVINFER"]) if "STAND_IN_NVINFER" in os.environ else None
_MAGIC = b"stand-in plan"
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32, "BOOL": np.bool_}
_ONNX = {1: "FLOAT", 10: "HALF", 7: "INT64", 6: "INT32", 9: "BOOL"}


class ILogger:
    Severity = enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def __init__(self):
        pass


class IProgressMonitor:
    def __init__(self):
        pass


DataType = enum.Enum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4")
TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT", start=0)
BuilderFlag = enum.IntEnum("BuilderFlag", "TF32 REFIT STRICT_NANS")
PreviewFeature = enum.IntEnum("PreviewFeature", "ALIASED_PLUGIN_IO_10_03")
ProfilingVerbosity = enum.IntEnum("ProfilingVerbosity", "LAYER_NAMES_ONLY NONE DETAILED")
NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")


class IPluginRegistry:
    def get_creator(self, type, version, plugin_namespace=""):
        known = _nvinfer is not None and _nvinfer.stand_in_registered(f"{plugin_namespace}/{type}/{version}".encode())
        return object() if known else None


def get_plugin_registry():
    return IPluginRegistry()


class _Tensor:
    def __init__(self, value):
        self.name = value.name
        self.dtype = DataType[_ONNX[value.type.tensor_type.elem_type]]
        self.symbols = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        self.shape = tuple(dim if isinstance(dim, int) else -1 for dim in self.symbols)


class INetworkDefinition:
    def __init__(self, flags):
        assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.model = None

    @property
    def num_layers(self):
        return len(self.model.graph.node)

    @property
    def num_inputs(self):
        return len(self.model.graph.input)

    @property
    def num_outputs(self):
        return len(self.model.graph.output)

    def get_input(self, index):
        return _Tensor(self.model.graph.input[index])

    def get_output(self, index):
        return _Tensor(self.model.graph.output[index])


class _ParserError:
    def __init__(self, index, node, reason):
        self._values = {"node": index, "node_name": node.name, "node_operator": node.op_type, "func": "",
                        "desc": reason}

    def __getattr__(self, name):
        return lambda: self._values[name]


class OnnxParser:
    def __init__(self, network, logger):
        self._network, self._errors = network, []

    def parse(self, model, path=None):
        if "STAND_IN_CRASHES" in os.environ:
            os.abort()
        self._network.model = onnx.load_model_from_string(model)
        for index, node in enumerate(self._network.model.graph.node):
            if node.domain != "modcompile":
                continue
            fields = {field.name: onnx.helper.get_attribute_value(field) for field in node.attribute}
            creator = get_plugin_registry().get_creator(node.op_type, fields["plugin_version"].decode(),
                                                        fields["plugin_namespace"].decode())
            if creator is None:
                self._errors.append(_ParserError(index, node, "Plugin not found"))
        return not self._errors

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return self._errors[index]


class IOptimizationProfile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, input, min, opt, max):
        self.shapes[input] = [list(min), list(opt), list(max)]


class ITimingCache:
    def __init__(self, content):
        self.content = content

    def serialize(self):
        return self.content


class IBuilderConfig:
    def __init__(self):
        self.set, self.previews, self.profile, self._cache = {BuilderFlag.TF32}, [], None, None
        self.profiling_verbosity, self.progress_monitor = ProfilingVerbosity.LAYER_NAMES_ONLY, None

    def set_flag(self, flag):
        self.set.add(flag)

    def clear_flag(self, flag):
        self.set.discard(flag)

    def set_preview_feature(self, feature, enable):
        assert enable
        self.previews.append(feature.name)

    def add_optimization_profile(self, profile):
        self.profile = profile.shapes
        return 0

    def create_timing_cache(self, serialized_timing_cache):
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        self._cache = cache
        return not cache.content.startswith(b"other GPU")

    def get_timing_cache(self):
        return self._cache


class Builder:
    def __init__(self, logger):
        self._log = logger

    def create_network(self, flags=0):
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        if not (monitor.step_complete("Building engine", 0) and monitor.step_complete("Building engine", 1)):
            return None
        monitor.phase_finish("Building engine")
        if config.get_timing_cache() is not None:
            config.get_timing_cache().content += b"+"
        assert config.profiling_verbosity == ProfilingVerbosity.DETAILED
        self._log.log(ILogger.VERBOSE, "Layers:\n" + "\n".join(
            f"Name: {node.name}, LayerType: {node.op_type}, Inputs: [], Outputs: [], TacticName: , StreamId: 0, "
            f"Metadata: [ONNX Layer: {node.name}]" for node in network.model.graph.node))
        head = json.dumps({"version": __version__, "gpu": COMPUTE_CAPABILITY, "profile": config.profile,
                           "flags": sorted(flag.name for flag in config.set), "previews": config.previews}).encode()
        return _MAGIC + len(head).to_bytes(4, "little") + head + network.model.SerializeToString()


class Runtime:
    def __init__(self, logger):
        self._log = logger

    def deserialize_cuda_engine(self, serialized_engine):
        file = io.BytesIO(serialized_engine)
        try:
            assert file.read(len(_MAGIC)) == _MAGIC
            head = json.loads(file.read(int.from_bytes(file.read(4), "little")))
            assert head["version"] == __version__
        except (AssertionError, ValueError):
            self._log.log(ILogger.ERROR,
                          "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (the plan is bad)")
            return None
        if head["gpu"] != COMPUTE_CAPABILITY:
            self._log.log(ILogger.ERROR, "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine "
                          "plan file is generated on an incompatible device, please rebuild.)")
            return None
        return ICudaEngine(self._log, onnx.load_model_from_string(file.read()), head["profile"] or {})


class ICudaEngine:
    device_memory_size_v2 = 5_000_000

    def __init__(self, log, model, profile):
        self._log, self._model, self._profile = log, model, profile
        self._tensors = {value.name: (_Tensor(value), mode) for values, mode in (
            (model.graph.input, TensorIOMode.INPUT), (model.graph.output, TensorIOMode.OUTPUT)) for value in values}
        self.num_io_tensors = len(self._tensors)

    def get_tensor_name(self, index):
        return list(self._tensors)[index]

    def get_tensor_mode(self, name):
        return self._tensors[name][1]

    def get_tensor_dtype(self, name):
        return self._tensors[name][0].dtype

    def get_tensor_shape(self, name):
        return self._tensors[name][0].shape

    def get_tensor_profile_shape(self, name, profile_index):
        assert profile_index == 0
        return [tuple(shape) for shape in self._profile[name]]

    def create_execution_context(self):
        if memory["contexts"] == 0:
            self._log.log(ILogger.ERROR, "IExecutionContext: Error Code 2: OutOfMemory (no memory for 5000000 bytes)")
            return None
        memory["contexts"] -= 1
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine):
        self._engine = engine
        self._given = {name: tensor.shape for name, (tensor, mode) in engine._tensors.items()
                       if mode == TensorIOMode.INPUT}
        self._addresses = {}
        self.running = False

    def set_input_shape(self, name, shape):
        calls.append(("shape", name, tuple(shape)))
        assert isinstance(shape, tuple)
        if name not in self._given or len(shape) != len(self._given[name]):
            return False
        least, _, most = self._engine._profile.get(name, [self._given[name]] * 3)
        if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            return False
        self._given[name] = shape
        return True

    def set_tensor_address(self, name, memory):
        calls.append(("address", name))
        assert name in self._engine._tensors and isinstance(memory, int) and memory > 0
        self._addresses[name] = memory
        return True

    def infer_shapes(self):
        return [name for name, shape in self._given.items() if -1 in shape]

    def get_tensor_shape(self, name):
        if name in self._given:
            return self._given[name]
        sizes = {}
        for given, shape in self._given.items():
            sizes.update(zip(self._engine._tensors[given][0].symbols, shape, strict=True))
        return tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim
                     for dim in self._engine._tensors[name][0].symbols)

    def execute_async_v3(self, stream_handle):
        calls.append(("run", stream_handle))
        # The default stream is 0.
        assert isinstance(stream_handle, int) and stream_handle != 0
        assert not self.running, "one context, two runs at a time"
        if self._addresses.keys() != self._engine._tensors.keys() or self.infer_shapes():
            self._engine._log.log(ILogger.ERROR,
                                  "IExecutionContext::enqueueV3: Error Code 3: API Usage Error (no address)")
            return False
        self.running = True
        values = {}
        for name, (tensor, _) in self._engine._tensors.items():
            shape, dtype = self.get_tensor_shape(name), np.dtype(_NUMPY[tensor.dtype.name])
            data = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(self._addresses[name])
            values[name] = np.frombuffer(data, dtype).reshape(shape)
        results = ReferenceEvaluator(self._engine._model).run(None, {name: values[name] for name in self._given})
        for value, result in zip(self._engine._model.graph.output, results, strict=True):
            assert values[value.name].shape == result.shape and values[value.name].dtype == result.dtype
            values[value.name][...] = result
        self.running = False
        return True
