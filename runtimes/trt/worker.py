"""The process in which TensorRT parses and builds: run as a script, with a job on its standard input.

A process of its own, because TensorRT ends the process it is in on some graphs: a float32 ``Attention`` whose query and
key are one tensor is a segmentation fault in TensorRT-RTX 1.7. It imports nothing of modcompile, and so it starts in
0.2 s. It writes one JSON object a line: ``{"progress": [phase, done, steps]}`` any number of times, and as the last
``{"result": ...}`` or ``{"os_error": [errno, text]}``.
"""

__all__ = ["PLUGIN_PHASE", "READING_PHASE", "load_plugins", "make_log"]

import ctypes
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLUGIN_PHASE, READING_PHASE = "loading the plugin library", "reading the graph"


def make_log(trt: Any) -> Any:
    """A logger that prints nothing and keeps ``errors``, ``warnings`` and ``layer_table``."""
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.layer_table = ""

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(text)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(text)
            # Only in the log does a build without a GPU say what layers it made.
            elif text.startswith("Layers:\n"):
                self.layer_table = text

    return Log()


def load_plugins(trt: Any, path: str, creators: list[list[str]]) -> str | None:
    """Loads a plugin library, which registers its plugins; returns what went wrong, if something did.

    Args:
        trt: The package of TensorRT.
        path: The library.
        creators: Name, version and namespace of every plugin that it must have registered.
    """
    try:
        # The package has loaded it for itself, and the plugin library looks for the registry among global symbols.
        ctypes.CDLL(f"libnvinfer.so.{trt.__version__.split('.')[0]}", mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(path)
    except OSError as error:
        return str(error)
    registry = trt.get_plugin_registry()
    missing = [name for name, *key in creators if registry.get_creator(name, *key) is None]
    return f"loaded, but not registered: {', '.join(missing)}" if missing else None


def _make_monitor(trt: Any, say: Callable[[str, Any], None]) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            say("progress", [phase, 0, steps])

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                say("progress", [phase, step + 1, self._steps[phase]])
            except OSError:
                # Nobody is there any more to take the engine.
                return False
            return True

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


def _run(job: dict[str, Any], say: Callable[[str, Any], None]) -> dict[str, Any]:
    """Parses ``model``, builds ``engine``, and returns what was said and found on the way."""
    trt = importlib.import_module(job["package"])
    log = make_log(trt)
    started = time.perf_counter()
    if job["plugins"]:
        # A library that is cut short ends this process, and the last phase tells why.
        say("progress", [PLUGIN_PHASE, 0, 1])
        if problem := load_plugins(trt, job["plugins"], job["creators"]):
            return {"plugins_error": problem}
        say("progress", [READING_PHASE, 0, 1])
    try:
        builder = trt.Builder(log)
    except TypeError as error:
        # How the bindings say that there is none: without a GPU, for TensorRT.
        return {"no_builder": log.errors or [str(error)]}
    # Ignored from 11.0 on, where every network is strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    # Holds the weights that the network refers to, until the engine is built.
    parser = trt.OnnxParser(network, log)
    # Weights in data files lie beside the source.
    if not parser.parse(Path(job["model"]).read_bytes(), job["source"]):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        return {"parse_errors": [{"node": error.node(), "name": error.node_name(), "operator": error.node_operator(),
                                  "function": error.func(), "reason": error.desc()} for error in found]}
    config = _config(trt, builder, job)
    if not _use_timing_cache(config, job["timing_cache"]):
        return {"timing_cache_error": log.errors + log.warnings}
    monitor = _make_monitor(trt, say)
    config.progress_monitor = monitor
    parsed = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    built = time.perf_counter()
    result = {"errors": log.errors, "warnings": log.warnings}
    if plan is None:
        return result
    Path(job["engine"]).write_bytes(plan)
    if job["timing_cache"]:
        # Whole or not at all: several builds may share it.
        partial = Path(f"{job['timing_cache']}.{os.getpid()}.partial")
        partial.write_bytes(config.get_timing_cache().serialize())
        partial.replace(job["timing_cache"])
    return {**result, "layer_table": log.layer_table, "network_layers": network.num_layers,
            "parse_s": round(parsed - started, 3), "build_s": round(built - parsed, 3),
            "inputs": [_described(network.get_input(index)) for index in range(network.num_inputs)],
            "outputs": [_described(network.get_output(index)) for index in range(network.num_outputs)]}


def _config(trt: Any, builder: Any, job: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    # Without it the builder does not log its layer table.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # By default 0 * x is taken to be 0 and x - x too, whatever x is.
    config.set_flag(trt.BuilderFlag.STRICT_NANS)
    if not job["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    if job["plugins"] and hasattr(trt.PreviewFeature, "ALIASED_PLUGIN_IO_10_03"):
        # Merged rows take the memory of what they are merged into.
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if job["compute_capabilities"]:
        config.num_compute_capabilities = len(job["compute_capabilities"])
        for index, name in enumerate(job["compute_capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    if job["profile"]:
        profile = builder.create_optimization_profile()
        for name, shapes in job["profile"].items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    return config


def _use_timing_cache(config: Any, path: str | None) -> bool:
    """Gives the builder what kernels took in builds before; False for times of another GPU or release."""
    if path is None:
        return True
    known = Path(path).read_bytes() if Path(path).exists() else b""
    cache = config.create_timing_cache(known)
    return cache is not None and config.set_timing_cache(cache, False)


def _described(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}


def _main() -> None:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What the libraries print by themselves is kept apart.
    os.dup2(2, 1)

    def say(kind: str, content: Any) -> None:
        channel.write(json.dumps({kind: content}) + "\n")
        channel.flush()

    try:
        say("result", _run(json.load(sys.stdin), say))
    except OSError as error:
        say("os_error", [error.errno, error.strerror])


if __name__ == "__main__":
    _main()
