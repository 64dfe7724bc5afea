"""Makes an ONNX Runtime engine folder from an ONNX file.

The graph becomes ``model.onnx``, its large weights lie in files beside it. ONNX Runtime then maps them instead of
parsing and copying them: on one core, a session on 96 MB of weights opens in 0.12 s with a peak of 155 MB, where one on
the bytes of a single file takes 0.34 s and 335 MB.
"""

__all__ = ["build"]

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import onnxruntime
from google.protobuf.message import DecodeError, Message
from modcompile.runtimes.ort.custom_ops import DOMAIN, LIBRARY, CustomOps, open_library, read_library
from modcompile.runtimes.ort.fuse import fuse_for_cuda
from modcompile.runtimes.ort.fuse.source import depends_on_inputs
from modcompile.runtimes.ort.session import CONSTANT_OUTPUTS, ENTRY, Provider, open_session, tensor_specs

from modcompile.engine import Shapes
from modcompile.errors import IntegrityError, UnsupportedGraphError, UsageError
from modcompile.files import check_relative_path
from modcompile.manifest import MANIFEST_NAME, METADATA_KEY, ModelMetadata, VersionRange

# The oldest release this package is tested with; the file format is kept within a major version.
_VERSIONS = VersionRange(minimum="1.24", below="2")
# Below this a weight stays in the graph, where constants such as shapes are read early.
_EMBEDDED_BYTES = 1024
_PRECISIONS = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}


def build(onnx_path: Path, folder: Path, *, runtime: str, precision: str | None = None, shapes: Shapes | None = None,
          providers: Sequence[Provider] = ("CPUExecutionProvider",),
          custom_ops: str | os.PathLike | Literal[False] | None = None, fuse: bool | None = None) -> dict[str, Any]:
    """Fills ``folder`` and opens a session on it once, so that an engine that does not load is never kept.

    Args:
        onnx_path: The ONNX file. Below ``folder`` its data files are moved, elsewhere they are copied.
        folder: The engine folder to be.
        runtime: The runtime's name.
        precision: None, or what the file must be.
        shapes: Static shapes by input name; a symbol they give a size to is fixed everywhere.
        providers: Execution providers by name, or pairs of name and options; the names become the engine's default.
        custom_ops: The custom-op library, ``libmodcompile_ort.so``. An engine whose model has our ops gets a copy of it
            and runs them with it; its model keeps their function bodies all the same.
        fuse: Writes the graph with ONNX Runtime's own operators, see ``modcompile.runtimes.ort.fuse``. By default for
            the CUDA provider.

    Returns:
        The manifest's fields.

    Raises:
        UsageError: No such file, a shape or precision that does not fit it, or custom ops for a flattened file.
        IntegrityError: The file or one of its data files is damaged, missing or outside its folder.
        UnsupportedGraphError: ONNX Runtime does not run this graph.
        RuntimeUnavailableError: A provider is missing or does not start, or the custom-op library is not one.
    """
    model = _read(onnx_path)
    metadata = _metadata(model, onnx_path)
    if precision not in (None, metadata.precision):
        raise UsageError("the ONNX file has another precision", expected=precision, found=metadata.precision,
                         where=onnx_path, fix=f"export the model with precision={precision!r}")
    sizes = _fix_shapes(model, shapes or {}, onnx_path)
    names = tuple(p if isinstance(p, str) else p[0] for p in providers)
    target: dict[str, str] = {}
    if "CUDAExecutionProvider" in names if fuse is None else fuse:
        target |= _write_fused(model, onnx_path, folder, custom_ops=bool(custom_ops) and _has_our_ops(model))
    else:
        _place_weights(model, onnx_path, folder)
    library = _place_library(model, metadata, Path(custom_ops), folder) if custom_ops else None
    if library is not None:
        target["custom_ops"] = str(library)
    # In memory, so that what is proved is what is written.
    content = (folder / ENTRY).read_bytes()
    session = open_session(content, folder, where=onnx_path, providers=providers, custom_ops=library)
    return {
        "runtime": runtime,
        "runtime_version": onnxruntime.__version__,
        "runtime_range": _VERSIONS,
        "precision": metadata.precision,
        "entry": ENTRY,
        "inputs": tensor_specs(session.get_inputs(), onnx_path),
        "outputs": tensor_specs(session.get_outputs(), onnx_path),
        "routed_blocks": tuple(block.at(sizes) for block in metadata.routed_blocks),
        "passes": metadata.passes,
        "providers": names,
        "target": target,
        "created_with": {"onnxruntime": onnxruntime.__version__},
    }


def _read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise IntegrityError("the file is not a complete ONNX model", found=error, where=path) from error
    except OSError as error:
        raise UsageError("the ONNX file cannot be read", found=error.strerror or error, where=path) from error
    if not model.graph.output:
        raise IntegrityError("the file is not a complete ONNX model", expected="a graph with outputs",
                             found=f"{len(model.graph.node)} nodes and no output", where=path)
    for value in model.graph.input:
        if not value.type.tensor_type.HasField("shape"):
            raise UnsupportedGraphError("an input of the model has no known rank", expected="sizes and names of dims",
                                        found=f"{value.name} without a shape", where=path,
                                        fix="export the model with the input's shape")
    return model


def _metadata(model: onnx.ModelProto, path: Path) -> ModelMetadata:
    for prop in model.metadata_props:
        if prop.key == METADATA_KEY:
            return ModelMetadata.from_json(prop.value, where=path)
    # A file of another tool's: its precision is that of most of its weights.
    counts = dict.fromkeys(_PRECISIONS, 0)
    for tensor in model.graph.initializer:
        if tensor.data_type in counts:
            counts[tensor.data_type] += math.prod(tensor.dims)
    return ModelMetadata.model_validate({"precision": _PRECISIONS[max(counts, key=lambda kind: counts[kind])]})


def _fix_shapes(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], path: Path) -> dict[str, int]:
    """Puts sizes in the place of symbols, in the whole graph, and returns the symbols' sizes."""
    inputs = {value.name: value for value in model.graph.input}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in inputs:
            raise UsageError("a shape is given for an input the model does not have", expected=", ".join(inputs),
                             found=name, where=path)
        dims = inputs[name].type.tensor_type.shape.dim
        fits = len(dims) == len(shape) and all(
            size > 0 and size == (sizes.setdefault(dim.dim_param, size) if dim.dim_param else dim.dim_value or size)
            for dim, size in zip(dims, shape, strict=True))
        if not fits:
            declared = ", ".join(dim.dim_param or str(dim.dim_value or "?") for dim in dims)
            raise UsageError("a given shape does not fit the model's input", found=tuple(shape),
                             expected=f"[{declared}]" + (f" with {sizes}" if sizes else ""), where=f"shapes[{name!r}]")
        for dim, size in zip(dims, shape, strict=True):
            dim.dim_value = size
    for dim in _find(model, onnx.TensorShapeProto.Dimension):
        if dim.dim_param in sizes:
            dim.dim_value = sizes[dim.dim_param]
    return sizes


def _data_files(model: onnx.ModelProto, path: Path) -> dict[str, int]:
    """The data files that the model names, below its folder, and how many bytes of each it needs."""
    locations: dict[str, int] = {}
    for tensor in _find(model, onnx.TensorProto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            try:
                location = check_relative_path(entries["location"])
                end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
            except (KeyError, ValueError) as error:
                raise IntegrityError("the ONNX file names no proper place for a weight",
                                     expected="a file below the ONNX file's folder, offset and length",
                                     found=f"{tensor.name}: {error}", where=path) from error
            locations[location] = max(locations.get(location, 0), end)
    for location, end in locations.items():
        _check_data(path.parent / location, end, path)
    return locations


def _write_fused(model: onnx.ModelProto, path: Path, folder: Path, *, custom_ops: bool) -> dict[str, str]:
    """Writes ``folder``'s model.onnx with ONNX Runtime's own operators, and its weights into one file beside it.

    Returns:
        What the manifest says of it: the outputs that are the same at every run, if any.
    """
    # Before anything is read from them.
    _data_files(model, path)
    fused = ir.from_proto(model)
    ir.external_data.set_base_dir(fused.graph, path.parent)
    ir.save(fuse_for_cuda(fused, custom_ops=custom_ops), folder / ENTRY, external_data=f"{ENTRY}.data",
            size_threshold_bytes=_EMBEDDED_BYTES)
    constants = [str(output.name) for output in fused.graph.outputs if not depends_on_inputs(output)]
    return {CONSTANT_OUTPUTS: ", ".join(constants)} if constants else {}


def _place_weights(model: onnx.ModelProto, path: Path, folder: Path) -> None:
    """Writes ``folder``'s model.onnx and brings its data files; weights inside the graph move out of it."""
    locations = _data_files(model, path)
    for location in locations:
        if location.split("/")[0] in (ENTRY, MANIFEST_NAME, LIBRARY):
            raise UsageError("a data file has a name that the engine needs itself", found=location, where=path,
                             fix="export the model with another name for its data file")
        _bring(path.parent / location, folder / location, move=folder in path.parents)
    written = folder / ENTRY
    data_name = f"{ENTRY}.data"
    if locations:
        onnx.save_model(model, written)
    else:
        onnx.save_model(model, written, save_as_external_data=True, location=data_name, size_threshold=_EMBEDDED_BYTES)
    for name in [*locations, data_name]:
        # Some writers make data readable by its owner alone.
        if (folder / name).exists():
            (folder / name).chmod(written.stat().st_mode)


def _place_library(model: onnx.ModelProto, metadata: ModelMetadata, source: Path, folder: Path) -> CustomOps | None:
    """Copies the custom-op library into ``folder`` and loads it, if the model has ops that it is for."""
    content = read_library(source)
    library = open_library(content, source)
    if not _has_our_ops(model):
        if metadata.routed_blocks:
            raise UsageError("the model has no ops of ours that custom ops could run",
                             expected=f"nodes of the domain {DOMAIN}", found="a flattened model", where="custom_ops",
                             fix="export the model without inline=True, or leave custom_ops out")
        # A dense model, as benchmarks build one with the same options.
        return None
    (folder / LIBRARY).write_bytes(content)
    return library


def _has_our_ops(model: onnx.ModelProto) -> bool:
    return any(entry.domain == DOMAIN for entry in model.opset_import)


def _check_data(source: Path, size: int, model: Path) -> None:
    if not source.is_file() or source.stat().st_size < size:
        raise IntegrityError("a data file of the ONNX model is missing or truncated", expected=f"{size} bytes or more",
                             found=f"{source.stat().st_size} bytes" if source.is_file() else "no such file",
                             where=source, fix=f"put it beside {model.name}, or export the model again")


def _bring(source: Path, target: Path, *, move: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if move:
        os.replace(source, target)
    else:
        shutil.copyfile(source, target)


def _find(message: Message, kind: type) -> Iterator[Any]:
    """Every message of a kind below a protobuf message: also in sub-graphs, attributes and functions."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for child in [value] if isinstance(value, Message) else value:
            if isinstance(child, kind):
                yield child
            else:
                yield from _find(child, kind)
