"""Makes a TensorRT or TensorRT-RTX engine folder from an ONNX file.

TensorRT-RTX builds without a GPU, for GPUs of several kinds at once: the kernels are finished on the machine that runs
them. Its engines are bound to the release that built them.
"""

__all__ = ["build"]

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from google.protobuf.message import DecodeError
from modcompile.runtimes.trt import worker
from modcompile.runtimes.trt.engine import COMPUTE_CAPABILITY, ENTRY
from modcompile.runtimes.trt.lower import lower
from modcompile.runtimes.trt.messages import build_error, crash_error, ended, parse_error
from modcompile.runtimes.trt.package import import_tensorrt
from modcompile.runtimes.trt.plugin_library import CREATORS, LIBRARY, NAMESPACE, identify, load_error, read_library
from modcompile.runtimes.trt.profile import Shapes, bind_profile
from modcompile.runtimes.trt.report import REPORT, BuildReport, parse_layers

from modcompile.errors import IntegrityError, RuntimeUnavailableError, UnsupportedGraphError, UsageError
from modcompile.files import check_relative_path
from modcompile.manifest import METADATA_KEY, ModelMetadata, TensorSpec, VersionRange

# Phase, steps done, steps in all. Phases nest, and may end before their last step.
Progress = Callable[[str, int, int], None]

_PRECISIONS = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32",
           "INT8": "int8", "UINT8": "uint8", "BOOL": "bool"}


def build(onnx_path: Path, folder: Path, *, runtime: str, precision: str | None = None, shapes: Shapes | None = None,
          compute_capabilities: Sequence[str] = (), tf32: bool = False, plugins: str | os.PathLike | None = None,
          timing_cache: str | os.PathLike | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Fills ``folder`` with an engine and the report of its build.

    The types in the graph are the types that are computed with. NaN is taken seriously: a closed gate may stand before
    one.

    Args:
        onnx_path: The ONNX file; it is only read. The engine holds the weights.
        folder: The engine folder to be.
        runtime: "tensorrt-rtx", or "tensorrt", which needs a GPU to build.
        precision: None, or what the file must be.
        shapes: By input name a static shape, (8, 128), or the smallest, usual and largest one,
            ((1, 128), (8, 128), (16, 128)).
        compute_capabilities: The GPUs to build for, such as ["8.6", "8.9"]; TensorRT-RTX alone. By default all but
            Turing, 7.5, which has no float32 matrix product there.
        tf32: Lets float32 matrix products round their inputs to 10 bits of mantissa.
        plugins: The plugin library, ``libmodcompile_trt.so``; TensorRT alone. An engine whose model has our ops gets a
            copy of it and runs them with it. By default they are standard layers.
        timing_cache: A file for what kernels took when they were tried, TensorRT alone. It is made or added to, and
            builds that share it are faster, and have the same kernel for the same layer.
        progress: Called with a phase, its steps done and its steps in all. What it raises stops the build.

    Returns:
        The manifest's fields.

    Raises:
        UsageError: No such file, or an option that does not fit it.
        IntegrityError: The file or one of its data files is damaged, missing or outside its folder.
        UnsupportedGraphError: TensorRT does not take the graph.
        RuntimeUnavailableError: The package or the GPU it needs is missing, or the plugin library is not one for it.
    """
    if runtime == "tensorrt-rtx":
        _refuse_for_rtx(plugins=plugins, timing_cache=timing_cache)
    if timing_cache is not None and not Path(timing_cache).absolute().parent.is_dir():
        raise UsageError("the timing cache cannot be written", expected="a file in a folder that exists",
                         found=timing_cache, where="timing_cache")
    trt = import_tensorrt(runtime)
    content = None if plugins is None else read_library(plugins)
    library = None if content is None else identify(content, trt.__version__, plugins)
    started = time.perf_counter()
    model = _read(onnx_path)
    metadata = _metadata(model, onnx_path)
    if precision not in (None, metadata.precision):
        raise UsageError("the ONNX file has another precision", expected=precision, found=metadata.precision,
                         where=onnx_path, fix=f"export the model with precision={precision!r}")
    profile = bind_profile(model.graph.inputs, shapes or {})
    if library is not None and not _has_our_ops(model, metadata):
        # A dense model, as benchmarks build one with the same options.
        content = library = None
    if content is not None:
        (folder / LIBRARY).write_bytes(content)
    job = {
        "package": trt.__name__,
        "source": str(onnx_path.absolute()),
        "engine": str(folder.absolute() / ENTRY),
        "profile": {name: [[dim[i] for dim in dims] for i in range(3)] for name, dims in profile.dynamic.items()},
        "compute_capabilities": _enum_names(trt, compute_capabilities),
        "tf32": tf32,
        "plugins": None if library is None else str(folder.absolute() / LIBRARY),
        "plugins_source": str(plugins),
        "creators": CREATORS,
        "timing_cache": None if timing_cache is None else str(Path(timing_cache).absolute()),
    }
    lowered = lower(model, profile, metadata.routed_blocks, plugins=library is not None)
    lower_s = time.perf_counter() - started
    result = _run_worker(lowered, job, folder, onnx_path, progress)
    if "no_builder" in result:
        raise RuntimeUnavailableError(f"{runtime} does not start", expected="an NVIDIA GPU and its driver",
                                      found="; ".join(result["no_builder"]), where=trt.__name__,
                                      fix='build on a machine with a GPU, or with runtime="tensorrt-rtx"')
    if "plugins_error" in result:
        raise load_error(result["plugins_error"].replace(f"{job['plugins']}: ", ""), plugins)
    if "timing_cache_error" in result:
        raise UsageError("TensorRT does not take the timing cache", expected="one of this GPU and release, or no file",
                         found="; ".join(result["timing_cache_error"]) or "another one", where=timing_cache,
                         fix="name another file, or remove it")
    if "parse_errors" in result:
        raise parse_error(result["parse_errors"], list(lowered.graph), onnx_path)
    # It warns of sizes that contradict each other, and makes an engine that fails at those sizes.
    inconsistent = [text for text in result["warnings"] if "not self-consistent" in text]
    if "layer_table" not in result or inconsistent:
        raise build_error(result["errors"] + inconsistent, onnx_path)

    report = BuildReport(lower_s=round(lower_s, 3), parse_s=result["parse_s"], build_s=result["build_s"],
                         engine_bytes=(folder / ENTRY).stat().st_size, network_layers=result["network_layers"],
                         layers=parse_layers(result["layer_table"]))
    (folder / REPORT).write_text(report.model_dump_json(indent=1), encoding="utf-8")
    target = {"optimization_profile": str(profile)}
    if library is not None:
        target["plugins"] = str(library)
    if runtime == "tensorrt":
        target[COMPUTE_CAPABILITY] = importlib.import_module("modcompile.runtimes.trt.execution").compute_capability()
    if runtime == "tensorrt-rtx":
        target["compute_capabilities"] = ", ".join(compute_capabilities) or "8.0, 8.6, 8.9, 12.0 and later"
    return {
        "runtime": runtime,
        "runtime_version": trt.__version__,
        "runtime_range": _only(trt.__version__),
        "precision": metadata.precision,
        "entry": ENTRY,
        "inputs": _specs(result["inputs"], lowered.graph.inputs),
        "outputs": _specs(result["outputs"], lowered.graph.outputs),
        "routed_blocks": tuple(block.at(profile.fixed) for block in metadata.routed_blocks),
        "passes": metadata.passes,
        "target": target,
        "created_with": {trt.__name__: trt.__version__},
    }


def _refuse_for_rtx(**options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name} is an option of tensorrt alone", found=value, where=name,
                             fix=f'leave {name} out, or build with runtime="tensorrt"'
                             + (": TensorRT-RTX has no plugins, and runs our ops as standard layers"
                                if name == "plugins" else ""))


def _has_our_ops(model: ir.Model, metadata: ModelMetadata) -> bool:
    if any(node.domain == NAMESPACE for node in model.graph.all_nodes()):
        return True
    if metadata.routed_blocks:
        raise UsageError("the model has no ops of ours that plugins could run",
                         expected=f"nodes of the domain {NAMESPACE}", found="a flattened model", where="plugins",
                         fix="export the model without inline=True, or leave plugins out")
    return False


def _run_worker(model: ir.Model, job: Mapping[str, Any], folder: Path, onnx_path: Path,
                progress: Progress | None) -> dict[str, Any]:
    """Lets the worker build the lowered model; returns its result, or raises for it if it died."""
    with tempfile.TemporaryDirectory(prefix=".build", dir=folder) as scratch, \
            open(Path(scratch, "printed"), "w+", encoding="utf-8", errors="replace") as printed:
        lowered = Path(scratch, "lowered.onnx")
        lowered.write_bytes(ir.to_proto(model).SerializeToString())
        # -P: the folder of the script is no place to import from.
        command = [sys.executable, "-P", str(Path(worker.__file__))]
        phase = worker.READING_PHASE
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed,
                              encoding="utf-8") as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                # It may be dead already.
                with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                    json.dump({**job, "model": str(lowered)}, stdin)
                for kind, content in _messages(process.stdout):
                    if kind == "result":
                        return content
                    if kind == "os_error":
                        raise OSError(*content)
                    phase = content[0]
                    if progress is not None:
                        progress(*content)
                returncode = process.wait()
            finally:
                # After Ctrl-C, or an error of the callback's.
                process.kill()
        printed.seek(0)
        if phase == worker.PLUGIN_PHASE:
            raise load_error(f"{ended(returncode)} while it was loaded", job["plugins_source"])
        raise crash_error(returncode, phase, printed.read(), onnx_path)


def _messages(lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for line in lines:
        # A process that dies may leave half of one.
        if line.endswith("\n"):
            yield from json.loads(line).items()


def _read(path: Path) -> ir.Model:
    """Reads the graph; weights in data files stay there, but must be there."""
    try:
        model = ir.load(path, format="protobuf")
    except DecodeError as error:
        raise IntegrityError("the file is not a complete ONNX model", found=error, where=path) from error
    except OSError as error:
        raise UsageError("the ONNX file cannot be read", found=error.strerror or error, where=path) from error
    if not model.graph.outputs:
        raise IntegrityError("the file is not a complete ONNX model", expected="a graph with outputs",
                             found=f"{len(model.graph)} nodes and no output", where=path)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            _check_external(value.const_value, path)
        # Old files list their weights as inputs with a default. TensorRT takes them as constants.
        if value.is_graph_input():
            model.graph.inputs.remove(value)
    return model


def _check_external(tensor: ir.ExternalTensor, path: Path) -> None:
    location = str(tensor.location)
    try:
        source = path.parent / check_relative_path(location)
    except ValueError as error:
        raise IntegrityError("the ONNX file names no proper place for a weight",
                             expected="a file below the ONNX file's folder", found=f"{tensor.name}: {error}",
                             where=path) from error
    end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
    if not source.is_file() or source.stat().st_size < end:
        raise IntegrityError("a data file of the ONNX model is missing or truncated", expected=f"{end} bytes or more",
                             found=f"{source.stat().st_size} bytes" if source.is_file() else "no such file",
                             where=source, fix=f"put it beside {path.name}, or export the model again")


def _metadata(model: ir.Model, path: Path) -> ModelMetadata:
    if METADATA_KEY in model.metadata_props:
        return ModelMetadata.from_json(model.metadata_props[METADATA_KEY], where=path)
    # A file of another tool's: its precision is that of most of its weights.
    counts = dict.fromkeys(_PRECISIONS, 0)
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in counts:
            counts[value.const_value.dtype] += value.const_value.size
    return ModelMetadata.model_validate({"precision": _PRECISIONS[max(counts, key=lambda dtype: counts[dtype])]})


def _enum_names(trt: Any, wanted: Sequence[str]) -> list[str]:
    """The package's names of compute capabilities: SM86 for 8.6."""
    if not wanted:
        return []
    known = getattr(trt, "ComputeCapability", None)
    if known is None:
        raise UsageError("compute_capabilities is an option of tensorrt-rtx alone", found=wanted, where=trt.__name__,
                         fix="leave it out: TensorRT builds for the GPU it runs on")
    names = {f"{match[1]}.{match[2]}": name for name in known.__members__
             if (match := re.fullmatch(r"SM(\d+)(\d)", name))}
    if isinstance(wanted, str) or len(set(wanted)) != len(wanted) or not names.keys() >= set(wanted):
        raise UsageError("compute_capabilities does not fit", expected=f"a list of some of {', '.join(names)}",
                         found=wanted, where="compute_capabilities")
    return [names[capability] for capability in wanted]


def _specs(tensors: Sequence[Mapping[str, Any]], values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    """Types and sizes are those of the network; a size that varies has its symbol of the ONNX file."""
    specs = []
    for tensor, value in zip(tensors, values, strict=True):
        name, shape = tensor["name"], tensor["shape"]
        if tensor["dtype"] not in _DTYPES:
            raise UnsupportedGraphError("the model has an input or output of a type that engines do not have",
                                        expected=", ".join(_DTYPES.values()), found=tensor["dtype"], where=name)
        symbols = [str(dim) if isinstance(dim, ir.SymbolicDim) and dim.value else f"{name}_{axis}"
                   for axis, dim in enumerate(value.shape or [None] * len(shape))]
        specs.append(TensorSpec(name=name, dtype=_DTYPES[tensor["dtype"]], shape=tuple(
            symbol if size < 0 else size for size, symbol in zip(shape, symbols, strict=True))))
    return tuple(specs)


def _only(version: str) -> VersionRange:
    """The range that holds one version: an engine runs on the release that built it."""
    *rest, last = re.findall(r"\d+", version)
    return VersionRange(minimum=".".join([*rest, last]), below=".".join([*rest, str(int(last) + 1)]))
