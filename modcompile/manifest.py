"""The manifest of an engine folder: what the engine is, and the hash of every file it consists of.

``manifest.json`` is plain JSON. Its first field is the SHA-256 of the file's own bytes with those 64 digits written as
zeros, so that it is checked before a parser sees the rest, and so that any reader can check it with a string search
and a hash. That digest and the files' notice accidents: a broken download, a truncated copy, an edited file. They are
no signature. Whoever can write to the folder can write a manifest that fits.
"""

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "METADATA_KEY",
    "FileRecord",
    "Manifest",
    "ModelMetadata",
    "PassRecord",
    "RoutedBlock",
    "TensorSpec",
    "VersionRange",
    "extend_manifest",
    "read_manifest",
    "read_verified",
    "verify_files",
    "write_manifest",
]

import hashlib
import json
import platform
import re
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

import modcompile
from modcompile.config import capacity
from modcompile.errors import IntegrityError, RuntimeUnavailableError, UsageError
from modcompile.files import check_relative_path, hash_file, list_files, read_file
from modcompile.spec import Dim, TensorSpec, dim_at

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
# The key of the ONNX metadata property that holds a ``ModelMetadata``.
METADATA_KEY = "modcompile"

_LIMIT_BYTES = 4 * 2**20
_SEAL = re.compile(rb'\{\n  "sha256": "([0-9a-f]{64})",\n')
_DIGEST = slice(15, 15 + 64)
_UNSEALED = "0" * 64

Text = Annotated[str, Field(min_length=1)]
RelativePath = Annotated[str, AfterValidator(check_relative_path)]
Precision = Literal["fp32", "fp16", "bf16"]
Version = Annotated[str, Field(pattern=r"^\d+(\.\d+)*$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoutedBlock(_Record):
    """A routed block of an engine.

    Attributes:
        path: The block's module path in the source model.
        capacity_ratio: K/S as an exact fraction "p/q", q at most 4096.
        multiple: K is rounded up to a multiple of this, never above the number of rows.
        attend_to: What a chosen row attends to: "chosen" rows, or "all".
        gate: The weight of a chosen row's update.
        router: What scores the rows.
        axis: What is routed: "token" (rows of a sequence) or "sequence" (sequences of a batch).
        rows: S, the size of the routed axis: a number, or a symbol where it varies.
        capacity: K where ``rows`` is a number, else None.
    """

    path: Text
    capacity_ratio: Annotated[str, Field(pattern=r"^[1-9]\d{0,3}/[1-9]\d{0,3}$")]
    multiple: Annotated[int, Field(ge=1)] = 1
    attend_to: Literal["chosen", "all"]
    gate: Literal["raw", "sigmoid", "tanh", "straight-through", "scale"]
    router: Literal["linear", "mlp", "depth", "attention", "noise"] = "linear"
    axis: Literal["token", "sequence"] = "token"
    rows: Dim
    capacity: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _capacity_fits(self):
        if Fraction(self.capacity_ratio) > 1 or Fraction(self.capacity_ratio).denominator > 4096:
            raise ValueError(f"capacity_ratio {self.capacity_ratio} is above 1 or finer than 1/4096")
        expected = self.capacity_for(self.rows) if isinstance(self.rows, int) else None
        if self.capacity != expected:
            raise ValueError(f"capacity {self.capacity} of {self.path} should be {expected} for {self.rows} rows")
        return self

    def capacity_for(self, rows: int) -> int:
        """K for a number of rows.

        Example:
            >>> RoutedBlock(path="h.1", capacity_ratio="1/8", attend_to="all", gate="raw", rows="sequence"
            ...             ).capacity_for(63)
            8
        """
        return capacity(Fraction(self.capacity_ratio), rows, self.multiple)

    def with_ratio(self, ratio: Fraction) -> "RoutedBlock":
        """This block at another K/S."""
        fields = self.model_dump(exclude={"capacity_ratio", "capacity"})
        count = capacity(ratio, self.rows, self.multiple) if isinstance(self.rows, int) else None
        return RoutedBlock(**fields, capacity_ratio=f"{ratio.numerator}/{ratio.denominator}", capacity=count)

    def at(self, sizes: Mapping[str, int]) -> "RoutedBlock":
        """This block in an engine whose symbols have these sizes; symbols that are not named stay symbols."""
        rows = dim_at(self.rows, sizes)
        fixed = self.capacity_for(rows) if isinstance(rows, int) else None
        return self.model_copy(update={"rows": rows, "capacity": fixed})


class PassRecord(_Record):
    """A pass that made the graph, with its options, and whether it changed anything."""

    name: Text
    options: dict[str, JsonValue] = {}
    modified: bool = True


class ModelMetadata(_Record):
    """What an ONNX file says of itself, as JSON in its metadata property ``METADATA_KEY``.

    Example:
        >>> ModelMetadata.from_json(ModelMetadata(precision="fp16").to_json()).precision
        'fp16'
    """

    precision: Precision
    routed_blocks: tuple[RoutedBlock, ...] = ()
    passes: tuple[PassRecord, ...] = ()

    def to_json(self) -> str:
        """The text of the metadata property."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str, where: object = None) -> "ModelMetadata":
        """Reads the text of the metadata property.

        Raises:
            IntegrityError: The text is not what ``to_json`` writes. ``where`` names the file in the message.
        """
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            _refuse(error, f"the ONNX file's metadata property {METADATA_KEY!r} is damaged", where)


class VersionRange(_Record):
    """The versions of a runtime that can run an engine: from ``minimum`` on, below ``below`` where it is given.

    Example:
        >>> runnable = VersionRange(minimum="1.24", below="2")
        >>> runnable.contains("1.30.1+cu13"), runnable.contains("1.9")
        (True, False)
    """

    minimum: Version
    below: Version | None = None

    def contains(self, version: str) -> bool:
        """Whether a version lies in the range. Suffixes such as "+cu13" or "rc1" do not count."""
        found = _numbers(version)
        return _numbers(self.minimum) <= found and (self.below is None or found < _numbers(self.below))

    def __str__(self):
        return f">={self.minimum}" + (f",<{self.below}" if self.below else "")


class FileRecord(_Record):
    """A file of an engine folder: its SHA-256 in lower-case hex, and its size in bytes."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


class Manifest(_Record):
    """What an engine folder holds.

    Attributes:
        format_version: The version of this layout.
        modcompile_version: The version of this package that wrote it.
        runtime: The runtime that loads the engine.
        runtime_version: The runtime's version that the engine was built with.
        runtime_range: The versions that can load it.
        precision: The floating-point type of the weights.
        entry: The file that the runtime loads.
        inputs: What ``Engine.run`` takes.
        outputs: What it gives.
        routed_blocks: The routed blocks, in the model's order; empty for a dense model.
        passes: The passes that made the graph, in order.
        providers: ONNX Runtime's execution providers, in order of preference; empty for other runtimes.
        target: What the engine is bound to beyond the runtime, such as "gpu_architecture" or "plugin_abi".
        created_with: Versions of what took part in building it.
        tokenizer: The file of the tokenizer that makes the inputs from text, if the folder has one: what the
            tokenizers package writes, or an ONNX model that takes texts.
        files: Every file of the folder but the manifest, by relative path with forward slashes.
    """

    format_version: Literal[1] = 1
    modcompile_version: Text
    runtime: Literal["ort", "tensorrt", "tensorrt-rtx", "aoti"]
    runtime_version: Text
    runtime_range: VersionRange
    precision: Precision
    entry: RelativePath
    inputs: tuple[TensorSpec, ...]
    outputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]
    routed_blocks: tuple[RoutedBlock, ...] = ()
    passes: tuple[PassRecord, ...] = ()
    providers: tuple[Text, ...] = ()
    target: dict[str, str] = {}
    created_with: dict[str, str] = {}
    tokenizer: RelativePath | None = None
    files: dict[RelativePath, FileRecord]

    @model_validator(mode="after")
    def _consistent(self):
        for role, name in (("entry", self.entry), ("tokenizer", self.tokenizer)):
            if name is not None and name not in self.files:
                raise ValueError(f"{role} {name!r} is not one of the files")
        if MANIFEST_NAME in self.files:
            raise ValueError(f"{MANIFEST_NAME} cannot list itself")
        for specs in (self.inputs, self.outputs):
            if len({spec.name for spec in specs}) != len(specs):
                raise ValueError("two inputs, or two outputs, have the same name")
        return self


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> Manifest:
    """Hashes every file of a folder and writes its manifest.

    Args:
        folder: The engine folder, complete but for the manifest.
        fields: The manifest's fields, without the versions, hashes and sizes that are added here.

    Raises:
        IntegrityError: The folder holds a symbolic link or something else that is not a regular file.
        ValidationError: A field does not fit; a defect of the caller.
    """
    files = _hash_files(folder)
    made_with = {"python": platform.python_version(), "platform": platform.platform()}
    # What took part was imported by now, and nothing is imported here to ask.
    for package in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript"):
        if version := getattr(sys.modules.get(package), "__version__", None):
            made_with[package] = str(version)
    manifest = Manifest(**{"modcompile_version": modcompile.__version__, "files": files, **fields,
                           "created_with": {**made_with, **fields.get("created_with", {})}})
    _write(folder, manifest)
    return manifest


def extend_manifest(folder: Path, manifest: Manifest, **changed: Any) -> Manifest:
    """Writes the manifest of a folder that holds an engine's files, copied, and more of them.

    Args:
        folder: The folder, complete but for the manifest.
        manifest: The engine's.
        changed: Fields that differ from it. The files are what the folder holds.

    Raises:
        IntegrityError: A file of the engine is not in the folder as the manifest describes it.
    """
    files = _hash_files(folder)
    for name, record in manifest.files.items():
        if files.get(name) != record:
            raise _altered(folder / name, f"sha256 {record.sha256}",
                           f"sha256 {files[name].sha256}" if name in files else "no such file")
    # Not model_copy, which validates nothing.
    extended = Manifest(**{**dict(manifest), **changed, "files": files})
    _write(folder, extended)
    return extended


def read_manifest(folder: Path) -> Manifest:
    """Reads a folder's manifest; its own digest is checked before it is parsed.

    Raises:
        UsageError: There is no such folder.
        IntegrityError: The manifest is missing, truncated, edited or too large.
        RuntimeUnavailableError: A newer version of this package wrote it, in a newer format.
    """
    path = Path(folder, MANIFEST_NAME)
    if not path.parent.is_dir():
        raise UsageError("there is no engine folder at this path", expected=f"a folder with {MANIFEST_NAME}",
                         found="a file" if path.parent.exists() else "nothing", where=folder,
                         fix="build one with modcompile.build_engine or `modcompile build`")
    if not path.exists() and any((path.parent / name).exists() for name in ("modcompile.json", "config.json")):
        raise UsageError("the folder holds a model, and no engine", expected=f"a folder with {MANIFEST_NAME}",
                         found=folder, where=folder, fix="build one with modcompile.build_engine or `modcompile build`")
    content = read_file(path, _LIMIT_BYTES)
    seal = _SEAL.match(content)
    if seal is None or _seal(content) != content:
        raise IntegrityError("the manifest is damaged: truncated, edited or not a manifest",
                             expected=f"sha256 {seal[1].decode()}" if seal else 'a file that begins with its "sha256"',
                             found=f"sha256 {_seal(content)[_DIGEST].decode()}" if seal else repr(content[:40]),
                             where=path, fix="copy the engine folder again, or build the engine again")
    try:
        payload = json.loads(content, object_pairs_hook=_unique)
        version = payload["format_version"]
        del payload["sha256"]
    except (ValueError, KeyError, RecursionError) as error:
        raise IntegrityError("the manifest is not one this package wrote", found=repr(error), where=path) from None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise RuntimeUnavailableError("the engine was written in a newer format",
                                      expected=f"format {FORMAT_VERSION} or older", found=f"format {version}",
                                      where=path, fix="pip install --upgrade modcompile, or build the engine again")
    try:
        # Through JSON again: strictly read, only JSON's arrays stand for tuples.
        return Manifest.model_validate_json(json.dumps(payload), strict=True)
    except ValidationError as error:
        _refuse(error, "the manifest is not one this package wrote", path)


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compares every file of a folder with its manifest, sizes first; nothing of them is parsed.

    Raises:
        IntegrityError: A file is missing, truncated, edited or not listed, or is not a regular file. It is named.
    """
    folder = Path(folder)
    present = set(list_files(folder)) - {MANIFEST_NAME}
    for name in sorted(present ^ manifest.files.keys()):
        missing = name in manifest.files
        raise IntegrityError("a file of the engine is missing" if missing else "the engine folder holds a foreign file",
                             expected="the files that the manifest lists, no others", found=repr(name), where=folder,
                             fix="copy the engine folder again" if missing else "move the file out of the folder")
    for name, record in manifest.files.items():
        size = (folder / name).lstat().st_size
        if size != record.size:
            raise _altered(folder / name, f"{record.size} bytes", f"{size} bytes")
    for name, record in manifest.files.items():
        digest, size = hash_file(folder / name)
        if (digest, size) != (record.sha256, record.size):
            raise _altered(folder / name, f"sha256 {record.sha256}", f"sha256 {digest}")


def read_verified(folder: Path, manifest: Manifest, name: str) -> bytes:
    """The contents of a file, which are the very bytes whose hash was checked.

    Raises:
        IntegrityError: The file is not what the manifest describes, or not listed.
    """
    path = Path(folder, name)
    record = manifest.files.get(name)
    if record is None:
        raise IntegrityError("the manifest lists no such file", expected=", ".join(manifest.files), where=path)
    content = read_file(path, record.size)
    digest = hashlib.sha256(content).hexdigest()
    if digest != record.sha256:
        raise _altered(path, f"sha256 {record.sha256}", f"sha256 {digest}")
    return content


def _hash_files(folder: Path) -> dict[str, FileRecord]:
    hashes = {name: hash_file(folder / name) for name in list_files(folder) if name != MANIFEST_NAME}
    return {name: FileRecord(sha256=digest, size=size) for name, (digest, size) in hashes.items()}


def _write(folder: Path, manifest: Manifest) -> None:
    payload = {"sha256": _UNSEALED, **manifest.model_dump(mode="json")}
    (folder / MANIFEST_NAME).write_bytes(_seal(json.dumps(payload, indent=2, allow_nan=False).encode() + b"\n"))


def _seal(content: bytes) -> bytes:
    """The manifest's text with its own digest put in its place."""
    blank = content[:_DIGEST.start] + _UNSEALED.encode() + content[_DIGEST.stop:]
    return content[:_DIGEST.start] + hashlib.sha256(blank).hexdigest().encode() + content[_DIGEST.stop:]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two readers may take different ones of two equal keys.
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _numbers(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else []
    # 1.24 and 1.24.0 are one version.
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _altered(path: Path, expected: str, found: str) -> IntegrityError:
    return IntegrityError("a file of the engine is not the one that was written: truncated or edited",
                          expected=expected, found=found, where=path,
                          fix="copy the engine folder again, or build the engine again")


def _refuse(error: ValidationError, problem: str, where: object) -> NoReturn:
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    found = f"{place}: {first['input']!r}"[:200]
    raise IntegrityError(problem, expected=first["msg"], found=found, where=where) from None
