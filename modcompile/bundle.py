"""Packs an engine into a bundle: one folder to ship, or a model of a Triton Inference Server repository.

A bundle is an engine folder: ``load_engine`` and the C++ runtime take one as they take what ``build_engine`` wrote. All
that an engine runs with is in its folder already, with a custom-op or plugin library if it has one; a bundle adds the
tokenizer. The manifest has the hash of every file.

    bundle     models/minilm for Triton
      manifest.json    config.pbtxt
      model.onnx       1/           a bundle
      tokenizer.json

Triton loads engines of ONNX Runtime and TensorRT. It reads neither the manifest nor its hashes.
"""

__all__ = ["Bundle", "package"]

import dataclasses
import json
import os
import re
import shlex
import shutil
from pathlib import Path

from modcompile.errors import UsageError
from modcompile.files import new_folder, read_file
from modcompile.manifest import MANIFEST_NAME, Manifest, extend_manifest, read_manifest, verify_files
from modcompile.spec import TensorSpec

# Forms of a tokenizer, by their names in a bundle: what the tokenizers package writes, and an ONNX model that takes
# texts.
TOKENIZER, TOKENIZER_MODEL = "tokenizer.json", "tokenizer.onnx"
# Of Triton: the file that describes a model, and the folder of the model's only version.
CONFIG, VERSION = "config.pbtxt", "1"

_LIMIT_BYTES = 256 * 2**20
# Runtime: Triton's backend, and our library for it. TensorRT-RTX and AOTInductor have no backend that takes an engine.
_TRITON = {"ort": ("onnxruntime", "libmodcompile_ort.so"), "tensorrt": ("tensorrt", "libmodcompile_trt.so")}
# As the enum DataType of Triton's model_config.proto says it.
_TRITON_TYPES = {"bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32",
                 "uint64": "TYPE_UINT64", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32",
                 "int64": "TYPE_INT64", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64",
                 "bfloat16": "TYPE_BF16"}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What was written.

    Attributes:
        folder: The bundle.
        manifest: The bundle's.
        triton_command: How Triton is started on the repository, for a model of Triton's; else None.
    """

    folder: Path
    manifest: Manifest
    triton_command: str | None = None


def package(engine: str | os.PathLike, path: str | os.PathLike, *, tokenizer: str | os.PathLike | None = None,
            triton: bool = False, overwrite: bool = False) -> Bundle:
    """Packs an engine folder into a bundle, which appears complete or not at all. The engine is not loaded.

    Args:
        engine: The engine folder; its hashes are checked, and those of the copies.
        path: The bundle's folder; for Triton the model's folder, which is named like the model and lies in a model
            repository.
        tokenizer: The ``tokenizer.json`` that the tokenizers package and transformers write; or an ONNX model that
            takes texts, with a name that ends in ``.onnx``.
        triton: Write a model for Triton Inference Server.
        overwrite: Replace a bundle, or a model of Triton's, that is there already.

    Raises:
        UsageError: No such folder or file, a tokenizer of another form, or an engine that Triton has no backend for.
        IntegrityError: A file of the engine is missing, truncated, edited or foreign.

    Example:
        >>> package("engines/minilm", "minilm", tokenizer="all-MiniLM-L6-v2/tokenizer.json")  # doctest: +SKIP
    """
    source, target = Path(engine), Path(os.path.realpath(path))
    manifest = read_manifest(source)
    if Path(os.path.realpath(source)) in target.parents:
        raise UsageError("the bundle would lie inside the engine's folder", expected="a folder elsewhere",
                         found=target, where="path")
    config = _triton_config(manifest, target.name) if triton else None
    name = TOKENIZER_MODEL if Path(tokenizer or "").suffix == ".onnx" else TOKENIZER
    text = None if tokenizer is None else _read_tokenizer(Path(tokenizer), name)
    if text is not None and (manifest.tokenizer is not None or name in manifest.files):
        raise UsageError("the engine has a tokenizer already", found=manifest.tokenizer or name, where=source,
                         fix="leave the tokenizer out, or start from the engine that build wrote")
    verify_files(source, manifest)
    with new_folder(target, marker=MANIFEST_NAME if config is None else CONFIG, overwrite=overwrite) as folder:
        bundle = folder if config is None else folder / VERSION
        for file in manifest.files:
            (bundle / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, bundle / file)
        if text is not None:
            (bundle / name).write_bytes(text)
        manifest = extend_manifest(bundle, manifest, tokenizer=name if text is not None else manifest.tokenizer)
        if config is not None:
            (folder / CONFIG).write_text(config, encoding="utf-8")
    if config is None:
        return Bundle(target, manifest)
    return Bundle(target / VERSION, manifest, _triton_command(manifest, target))


def _read_tokenizer(path: Path, name: str) -> bytes:
    if not path.is_file():
        raise UsageError("there is no such tokenizer file", expected=name, found="a folder" if path.is_dir()
                         else "nothing", where=path, fix=f"give the file {name} itself")
    # In a cache of models it is a link.
    content = read_file(path.resolve(), _LIMIT_BYTES)
    if name == TOKENIZER_MODEL:
        _check_takes_text(content, path)
        return content
    try:
        described = json.loads(content)
        fits = isinstance(described, dict) and isinstance(described.get("model"), dict)
    except (ValueError, RecursionError):
        fits = False
    if not fits:
        raise UsageError("the file is no tokenizer that the tokenizers package reads", where=path,
                         expected='a JSON object with "model"', found=repr(content[:40]),
                         fix="save it with tokenizer.save(...) of tokenizers, or save_pretrained of transformers")
    return content


def _check_takes_text(content: bytes, path: Path) -> None:
    """Raises unless the bytes are an ONNX model whose inputs are texts."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        inputs = onnx.load_model_from_string(content).graph.input
        types = [onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) for value in inputs]
    except DecodeError as error:
        raise UsageError("the file is no ONNX model", found=repr(content[:40]), where=path) from error
    if types != ["STRING"]:
        raise UsageError("the model is no tokenizer", expected="one input of texts",
                         found=", ".join(types) or "no inputs", where=path)


def _triton_config(manifest: Manifest, name: str) -> str:
    """The model's ``config.pbtxt``, as Triton's model_config.proto defines it."""
    if manifest.runtime not in _TRITON:
        raise UsageError("Triton has no backend for engines of this runtime", expected=" or ".join(_TRITON),
                         found=manifest.runtime, where="triton", fix="build the engine for one of these")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UsageError("a model of Triton's cannot have this name", expected="letters, digits, '_', '.' and '-'",
                         found=repr(name), where="path", fix="the folder's name is the model's: choose another")
    backend, library = _TRITON[manifest.runtime]
    lines = [
        f"# A Mixture-of-Depths engine of modcompile {manifest.modcompile_version}, {manifest.runtime} "
        f"{manifest.runtime_version}.",
        f"name: {_quoted(name)}",
        f"backend: {_quoted(backend)}",
        f"default_model_filename: {_quoted(manifest.entry)}",
        "# Shapes are whole: the capacities of the routed blocks belong to the batch that the engine was built for.",
        "max_batch_size: 0",
    ]
    for role, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        for spec in specs:
            lines += [f"{role} {{", *_triton_tensor(spec), "}"]
    # Without a word Triton takes every GPU that is there.
    kind = "KIND_CPU" if manifest.providers == ("CPUExecutionProvider",) else "KIND_GPU"
    lines += ["instance_group {", f"  kind: {kind}", "  count: 1", "}"]
    if library in manifest.files:
        lines += [f"# Start Triton with {_preload(manifest, 'THIS_FOLDER')}"]
        if manifest.runtime == "ort":
            # Triton gives the name to the system's loader as it is.
            lines += ["model_operations {", f"  op_library_filename: {_quoted(library)}", "}"]
    return "\n".join(lines) + "\n"


def _triton_tensor(spec: TensorSpec) -> list[str]:
    sizes = [size if isinstance(size, int) else -1 for size in spec.shape]
    # Triton's dims are one at least; a scalar is reshaped on the way to the engine and back.
    reshape = [] if sizes else ["  reshape { shape: [] }"]
    return [f"  name: {_quoted(spec.name)}", f"  data_type: {_TRITON_TYPES[spec.dtype]}", f"  dims: {sizes or [1]}",
            *reshape]


def _triton_command(manifest: Manifest, folder: Path) -> str:
    command = f"tritonserver --model-repository={shlex.quote(str(folder.parent))}"
    preload = _preload(manifest, shlex.quote(str(folder)))
    return f"{preload} {command}" if preload else command


def _preload(manifest: Manifest, folder: str) -> str | None:
    """The setting of the environment in which Triton finds our library, if the engine has one."""
    library = _TRITON[manifest.runtime][1]
    if library not in manifest.files:
        return None
    # ONNX Runtime is told of the library by the config and looks for it; TensorRT knows plugins that are loaded.
    return (f"LD_LIBRARY_PATH={folder}/{VERSION}" if manifest.runtime == "ort"
            else f"LD_PRELOAD={folder}/{VERSION}/{library}")


def _quoted(text: str) -> str:
    # JSON's escapes are among those of protobuf's text format.
    return json.dumps(text, ensure_ascii=False)
