"""What a build reports: how long it took, and the layers that the graph became.

An engine can only be opened on a GPU, but the builder writes its layer table to its log on any machine. The table is
read from there and kept in the engine's folder.
"""

__all__ = ["REPORT", "BuildReport", "Layer", "LayerTensor", "layer_table", "layers", "parse_layers", "read_report"]

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from modcompile.errors import IntegrityError, RuntimeUnavailableError
from modcompile.manifest import read_manifest, read_verified

# The report's file in an engine folder.
REPORT = "build.json"

# A list of tensors in braces; "{group}" is the pattern's name for it.
_LIST = r"\[ ?(?P<{group}>(?:\{{[^{{}}]*\}}(?:, )?)*)\]"
_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), "
                    rf"Inputs: {_LIST.format(group='inputs')}, (?:Constants: {_LIST.format(group='constants')}, )?"
                    rf"Outputs: {_LIST.format(group='outputs')}, .*Metadata: (?P<nodes>.*)$")
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<shape>[-\d,]*)\], .*?"
                     r"Datatype: (?P<dtype>\w+), Format: (?:\((?P<format>[^)]*)\)[^{}]*|(?P<text>[^{}]*?)) ?\}")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\[]|$)")
# TensorRT's names where they are not numpy's in another case.
_DTYPES = {"float": "float32", "half": "float16"}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerTensor(_Record):
    """A tensor that a layer reads or writes.

    Attributes:
        name: Its name in the engine; that of the ONNX graph where it was kept.
        dtype: NumPy's name for the element type, or "bfloat16".
        shape: Sizes; -1 where the size varies.
        format: The memory layout, "Linear" or "NHWC" for example, or TensorRT's remark where there is none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    format: str

    def __str__(self):
        return f"{self.dtype} [{', '.join(map(str, self.shape))}] {self.format}"


class Layer(_Record):
    """A layer of an engine: one kernel, after fusion.

    Attributes:
        name: Its name in the engine.
        type: What kind of kernel it is: "gemm", "kgen" (generated), "runtime_fusion", ...
        inputs: The activations it reads.
        constants: The weights and other constants it reads.
        outputs: What it writes.
        nodes: The ONNX nodes it computes, or takes part in computing.
    """

    name: str
    type: str
    inputs: tuple[LayerTensor, ...] = ()
    constants: tuple[LayerTensor, ...] = ()
    outputs: tuple[LayerTensor, ...] = ()
    nodes: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """The element type of the first output, "" where there is none."""
        return self.outputs[0].dtype if self.outputs else ""


class BuildReport(_Record):
    """What ``build`` did.

    Attributes:
        lower_s: Seconds to read and lower the graph.
        parse_s: Seconds TensorRT took to parse it.
        build_s: Seconds TensorRT took to build.
        engine_bytes: The engine's size.
        network_layers: Layers before fusion.
        layers: Layers of the engine; None where the builder did not print a table that this version reads.
    """

    lower_s: float
    parse_s: float
    build_s: float
    engine_bytes: int
    network_layers: int
    layers: tuple[Layer, ...] | None


def parse_layers(text: str) -> tuple[Layer, ...] | None:
    """Reads the layer table of a build log; None if it is not in the known format.

    Example:
        >>> parse_layers("Name: a, LayerType: kgen, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0,"
        ...              " Metadata: [ONNX Layer: h.0/Add]")
        (Layer(name='a', type='kgen', inputs=(), constants=(), outputs=(), nodes=('h.0/Add',)),)
    """
    lines = [line for line in text.splitlines() if line.startswith("Name: ")]
    found = [_LAYER.match(line) for line in lines]
    if not lines or None in found:
        return None
    return tuple(Layer(name=match["name"], type=match["type"], inputs=_tensors(match["inputs"]),
                       constants=_tensors(match["constants"] or ""), outputs=_tensors(match["outputs"]),
                       nodes=tuple(_NODE.findall(match["nodes"]))) for match in found if match)


def read_report(folder: str | os.PathLike) -> BuildReport:
    """Reads the report of a build from its engine folder.

    Raises:
        UsageError: There is no such folder.
        IntegrityError: The manifest or the report is missing or damaged.
    """
    path = Path(folder)
    try:
        return BuildReport.model_validate_json(read_verified(path, read_manifest(path), REPORT))
    except ValidationError as error:
        raise IntegrityError("the build report is not one this package wrote", found=error.errors()[0]["msg"],
                             where=path / REPORT) from error


def layers(folder: str | os.PathLike) -> tuple[Layer, ...]:
    """The layers of an engine, after fusion, in the order they run.

    Raises:
        UsageError: There is no such folder.
        IntegrityError: The manifest or the report is missing or damaged.
        RuntimeUnavailableError: The table was in a format that this version does not read.
    """
    found = read_report(folder).layers
    if found is None:
        raise RuntimeUnavailableError("the engine has no layer table", expected="a builder whose log has one",
                                      found=f"TensorRT {read_manifest(Path(folder)).runtime_version}", where=folder)
    return found


def layer_table(found: Sequence[Layer]) -> str:
    """Layers as a text table: type, name, first output, ONNX nodes."""
    rows = [("type", "layer", "output", "ONNX nodes"),
            *((layer.type, layer.name, str(layer.outputs[0]) if layer.outputs else "-", " ".join(layer.nodes))
              for layer in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def _tensors(text: str) -> tuple[LayerTensor, ...]:
    return tuple(
        LayerTensor(name=match["name"], dtype=_DTYPES.get(match["dtype"].lower(), match["dtype"].lower()),
                    shape=tuple(int(size) for size in match["shape"].split(",") if size),
                    format=match["format"] or match["text"])
        for match in _TENSOR.finditer(text))
