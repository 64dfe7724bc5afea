"""``export_onnx``: a dense or routed model to one ONNX file."""

__all__ = ["export_onnx"]

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from torch import nn

from modcompile.capture import capture
from modcompile.errors import UnsupportedGraphError, UsageError
from modcompile.export.downgrade import to_opset_17
from modcompile.export.flatten import bind_shapes, flatten
from modcompile.export.fuse_rotary import FuseRotary
from modcompile.export.lift import lift
from modcompile.export.lower_attention import LowerAttention
from modcompile.export.lowerings import DOMAIN, ONNX_FUSED_OPSET
from modcompile.export.translate import LOWEST_TRANSLATED_OPSET, translate
from modcompile.export.unflatten_products import UnflattenProducts
from modcompile.manifest import METADATA_KEY, ModelMetadata, PassRecord, Precision
from modcompile.model import GraphModel
from modcompile.pass_manager import Pass, PassManager
from modcompile.passes.cast_precision import CastPrecision
from modcompile.passes.fold_filled import FoldFilled
from modcompile.passes.fold_straight_through import FoldStraightThrough
from modcompile.passes.fuse_attention import FuseAttention
from modcompile.passes.fuse_gelu import FuseGelu
from modcompile.passes.fuse_rms_norm import FuseRmsNorm
from modcompile.passes.simplify_masks import SimplifyMasks
from modcompile.spec import dtype_name

OPSETS = range(17, 24)
# The dtype that a float32 graph is cast to.
PRECISIONS: dict[str, Literal["float16", "bfloat16"] | None] = {"fp32": None, "fp16": "float16", "bf16": "bfloat16"}
# protobuf refuses a message of 2 GiB; the graph itself needs room beside the weights.
_EMBEDDED_LIMIT_BYTES = 2**31 - 2**26


def resolve_precision(model: GraphModel, asked: str | None) -> Precision:
    """The precision that a graph is lowered in: what was asked for, and by default what its parameters are in.

    Raises:
        UsageError: There is no such precision, or a graph that is not in float32 would have to be cast to it.
    """
    if asked not in (None, *PRECISIONS):
        raise UsageError("this precision is not supported", expected=", ".join(PRECISIONS), found=asked)
    dtypes = {dtype_name(dtype) for dtype in model.precisions()}
    # A half model may have a few parameters in float32.
    own = next((name for name, half in PRECISIONS.items() if dtypes <= {"float32", half}), None)
    if own is None or (own != "fp32" and asked not in (None, own)):
        raise UsageError("only a model in float32 is cast", expected="float32 parameters", where="precision",
                         found=f"precision {asked or 'of its own'}, parameters in {', '.join(sorted(dtypes))}",
                         fix="load the source in float32, with dtype=torch.float32 or .float(), and convert that: "
                         "precision= casts from there")
    return cast(Precision, asked or own)


def export_onnx(model: nn.Module, path: str | os.PathLike, *, example_inputs: Any = None, opset: int = 18,
                inline: bool = False, precision: Precision | None = None,
                shapes: Mapping[str, Sequence[int]] | None = None, external_data: bool = False) -> Path:
    """Writes a dense or routed model as one ONNX file that passes the checker.

    Every op of this package is one node of domain ``modcompile`` with a model-local function body of standard ops.

    Args:
        model: A ``GraphModel`` (a ``MoDModel`` is one), or any ``nn.Module`` together with ``example_inputs``.
        path: The file to write. It appears complete or not at all.
        example_inputs: What the plain module is captured with, see ``modcompile.capture.capture``.
        opset: 17 to 23.
        inline: Flattens the functions, for readers without support for them.
        precision: ``fp32``, ``fp16`` or ``bf16``, see ``modcompile.passes.cast_precision``; by default what the model
            is in. A model that is in half precision itself is taken as it is.
        shapes: Static shapes by input name; every other dim stays as symbolic as the model has it.
        external_data: Puts the weights in ``<path>.data``. Above 2 GB they go there in any case.

    Returns:
        The path written.

    Raises:
        UsageError: An option, shape or path that cannot be.
        UnsupportedGraphError: The graph has no ONNX form.
    """
    path = Path(path)
    if opset not in OPSETS:
        raise UsageError("this opset is not supported", expected=f"{OPSETS[0]} to {OPSETS[-1]}", found=opset)
    if not isinstance(model, GraphModel):
        model = _capture(model, example_inputs)
    precision = resolve_precision(model, precision)
    passes = PassManager(lowering_passes(opset, PRECISIONS[precision]))
    onnx_model = translate(
        lift(passes(flatten(model, shapes))),
        opset=max(opset, LOWEST_TRANSLATED_OPSET),
        inputs=model.inputs,
        outputs=model.outputs,
    )
    if opset == 17:
        to_opset_17(onnx_model)
    onnx_model.ir_version = max(8, onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset])
    _add_functions(onnx_model, opset, inline=inline)
    sizes = bind_shapes(model.inputs, shapes or {})
    onnx_model.metadata_props[METADATA_KEY] = ModelMetadata(
        routed_blocks=tuple(block.at(sizes) for block in model.routed_blocks),
        passes=tuple(PassRecord(**record) for record in [*model.passes, *passes.ran]),
        precision=precision,
    ).to_json()
    _save(onnx_model, path, external_data=external_data)
    return path


def lowering_passes(opset: int, half: Literal["float16", "bfloat16"] | None = None) -> list[Pass]:
    """The pipeline on the flat graph, read top to bottom."""
    fused = opset >= ONNX_FUSED_OPSET
    return [
        # A constant gate must not look like arithmetic on logits to what follows.
        FoldFilled(),
        FoldStraightThrough(),
        # Before the cast: what an operator does inside, it does in float32.
        FuseAttention(),
        # A causal mask that is written out becomes the flag again: a kernel of its own, and no mask to read.
        SimplifyMasks(),
        FuseGelu(),
        FuseRmsNorm(),
        UnflattenProducts(),
        # Below, there is no operator to fuse to.
        *([FuseRotary()] if fused else []),
        *([CastPrecision(half)] if half else []),
        # Last: it reads the dtypes and shapes that the others leave.
        LowerAttention(expand_rows=fused, causal_masks=not fused),
    ]


def _capture(model: nn.Module, example_inputs: Any) -> GraphModel:
    if example_inputs is None:
        raise UsageError(
            "a plain module needs example inputs",
            expected="export_onnx(model, path, example_inputs=...)",
            found=type(model).__name__,
        )
    return capture(model, example_inputs)


def _add_functions(model: ir.Model, opset: int, *, inline: bool) -> None:
    """Adds the bodies of the functions of our domain that the graph calls, or puts them in the place of the calls."""
    called = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    if called:
        from modcompile.ops import onnx_functions

        bodies = {body.name: ir.serde.deserialize_function(body) for body in onnx_functions(opset)}
        while missing := called - {function.name for function in model.functions.values()}:
            for name in sorted(missing):
                function = bodies[name]
                model.functions[function.identifier()] = function
                called |= {node.op_type for node in function.all_nodes() if node.domain == DOMAIN}
        model.opset_imports[DOMAIN] = 1
    if inline:
        InlinePass()(model)
        model.opset_imports.pop(DOMAIN, None)


def _save(model: ir.Model, path: Path, *, external_data: bool) -> None:
    """Writes and checks the model in a folder beside ``path``, then moves its files into place, data first."""
    weight_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    data_name = f"{path.name}.data" if external_data or weight_bytes > _EMBEDDED_LIMIT_BYTES else None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            written = folder / path.name
            ir.save(model, written, external_data=data_name)
            try:
                onnx.checker.check_model(str(written), full_check=True)
            except Exception as error:
                raise UnsupportedGraphError("the exported file does not pass the ONNX checker", found=error, where=path,
                                            fix="another opset may know an op in this precision: bfloat16 "
                                            "convolutions need 22" if "bfloat16" in str(error) else None) from error
            for name in [data_name, path.name]:
                if name and (folder / name).exists():
                    os.replace(folder / name, path.parent / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            "the ONNX file cannot be written",
            expected="a folder that exists, may be written and has room",
            found=error.strerror or error,
            where=path,
        ) from error
