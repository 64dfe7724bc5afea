"""Makes a TensorRT engine folder from a model, by Torch-TensorRT's converters.

The whole graph becomes one engine: an op without a converter is an error, not a part that stays in PyTorch. For a model
that is to stay in PyTorch, ``lower_ops`` gives the program that ``torch_tensorrt.dynamo.compile`` takes.

What was tried is the RTX build of Torch-TensorRT 2.14, without a GPU, up to the serialized engine. No such engine was
run, and nothing was tried with TensorRT itself.
"""

__all__ = ["build", "lower_model", "lowering_passes"]

import copy
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modcompile.passes.cast_precision import CastPrecision
from modcompile.passes.fold_filled import FoldFilled
from modcompile.passes.fold_straight_through import FoldStraightThrough
from modcompile.passes.fuse_attention import FuseAttention
from modcompile.passes.simplify_masks import SimplifyMasks
from modcompile.runtimes.torch_trt.lower import lower_ops
from modcompile.runtimes.torch_trt.package import import_torch_tensorrt
from modcompile.runtimes.trt.builder import _only as only_version
from modcompile.runtimes.trt.engine import COMPUTE_CAPABILITY, ENTRY
from modcompile.runtimes.trt.execution import compute_capability
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from modcompile.capture import capture
from modcompile.engine import Shapes
from modcompile.errors import UnsupportedGraphError, UsageError
from modcompile.export.flatten import bind_shapes, flatten
from modcompile.export.lift import lift
from modcompile.export.onnx_file import PRECISIONS, resolve_precision
from modcompile.manifest import PassRecord
from modcompile.model import GraphModel
from modcompile.pass_manager import Pass, PassManager
from modcompile.spec import TensorSpec, dtype_name


def build(model: nn.Module, folder: Path, *, runtime: str, precision: str | None = None, shapes: Shapes | None = None,
          example_inputs: Any = None, tf32: bool = False) -> dict[str, Any]:
    """Fills ``folder`` with a serialized engine.

    Args:
        model: A ``GraphModel`` (a ``MoDModel`` is one), or any ``nn.Module`` together with ``example_inputs``.
        folder: The engine folder to be.
        runtime: "torch-tensorrt". The manifest names the runtime that runs the engine.
        precision: "fp32", "fp16" or "bf16"; by default what the model is in.
        shapes: Static shapes by input name. Together they leave no size open.
        example_inputs: What the plain module is captured with, see ``modcompile.capture.capture``.
        tf32: Lets float32 matrix products round their inputs to 10 bits of mantissa.

    Returns:
        The manifest's fields.

    Raises:
        UsageError: A precision or shape that cannot be, or a size that is left open.
        UnsupportedGraphError: Torch-TensorRT or TensorRT does not take the graph.
        RuntimeUnavailableError: Torch-TensorRT is missing or does not load.
    """
    torch_tensorrt = import_torch_tensorrt()
    # Torch-TensorRT puts the one that it works with under this name.
    trt = importlib.import_module("tensorrt")
    graph = model if isinstance(model, GraphModel) else capture(model, example_inputs)
    precision = resolve_precision(graph, precision)
    flat, program, passes = lower_model(graph, precision, shapes)
    inputs, outputs = _inputs(flat), _outputs(flat)
    try:
        engine = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            program, disable_tf32=not tf32,
            arg_inputs=[torch_tensorrt.Input(_shape(node), dtype=node.meta["val"].dtype) for node in inputs],
            arg_input_binding_names=tuple(spec.name for spec in graph.inputs),
            output_binding_names=tuple(spec.name for spec in graph.outputs))
    except Exception as error:
        raise UnsupportedGraphError("Torch-TensorRT does not build the graph", found=f"{type(error).__name__}: {error}",
                                    fix='see its messages above; or build from ONNX, with runtime="tensorrt" or '
                                    '"tensorrt-rtx"') from error
    (folder / ENTRY).write_bytes(engine)
    name = "tensorrt-rtx" if torch_tensorrt.ENABLED_FEATURES.tensorrt_rtx else "tensorrt"
    # TensorRT-RTX finishes its kernels on the machine that runs them.
    target = {COMPUTE_CAPABILITY: compute_capability()} if name == "tensorrt" else {}
    sizes = bind_shapes(graph.inputs, shapes or {})
    return {
        "runtime": name,
        "runtime_version": trt.__version__,
        "runtime_range": only_version(trt.__version__),
        "precision": precision,
        "entry": ENTRY,
        "inputs": _specs(graph.inputs, inputs),
        "outputs": _specs(graph.outputs, outputs),
        "routed_blocks": tuple(block.at(sizes) for block in graph.routed_blocks),
        "passes": tuple(PassRecord(**record) for record in [*graph.passes, *passes.ran]),
        "target": target,
        "created_with": {name: trt.__version__, "torch_tensorrt": torch_tensorrt.__version__},
    }


def lower_model(model: GraphModel, precision: str | None = None, shapes: Shapes | None = None,
                ) -> tuple[GraphModule, ExportedProgram, PassManager]:
    """Makes the program that Torch-TensorRT takes. The model stays as it is.

    Args:
        model: The model.
        precision: "fp32", "fp16" or "bf16"; by default what the model is in.
        shapes: Static shapes by input name. Together they leave no size open.

    Returns:
        The flat graph, with our ops; the program that it became, without; and the passes that ran on it.

    Raises:
        UsageError: A precision or shape that cannot be, or a size that is left open.
        UnsupportedGraphError: The graph does not run at these sizes, or TensorRT would not choose that many rows.
    """
    precision = resolve_precision(model, precision)
    # A copy that shares the tensors, for evaluation.
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in model.tensors().values()}).eval()
    passes = PassManager(lowering_passes(precision))
    flat = passes(flatten(model, shapes))
    for spec, node in zip(model.inputs, _inputs(flat), strict=True):
        if not all(isinstance(size, int) for size in _shape(node)):
            raise UsageError("engines of this runtime have static shapes", expected="shapes that leave no size open",
                             found=spec, where="shapes", fix=f"pass shapes={{{spec.name!r}: (...), ...}}")
    if len(set(_outputs(flat))) < len(_outputs(flat)):
        raise UnsupportedGraphError("two outputs are one value, which Torch-TensorRT gives once",
                                    found=", ".join(spec.name for spec in model.outputs),
                                    fix="leave one of them out of what the model returns")
    return flat, lower_ops(lift(flat, opaque=False)), passes


def lowering_passes(precision: str) -> list[Pass]:
    """The pipeline on the flat graph, read top to bottom."""
    half = PRECISIONS[precision]
    return [
        # A constant gate must not look like arithmetic on logits to what follows.
        FoldFilled(),
        FoldStraightThrough(),
        # Attention that is written out becomes one node, which becomes one layer of TensorRT's.
        FuseAttention(),
        # The layer has a causal flag.
        SimplifyMasks(),
        # Last: networks are strongly typed, so the types in the graph are those that are computed with.
        *([CastPrecision(half)] if half else []),
    ]


def _inputs(flat: GraphModule) -> list[Node]:
    return flat.graph.find_nodes(op="placeholder")


def _outputs(flat: GraphModule) -> Sequence[Node]:
    return flat.graph.output_node().args[0]


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _specs(specs: Sequence[TensorSpec], nodes: Sequence[Node]) -> tuple[TensorSpec, ...]:
    """The model's specs with the dtypes and sizes of the graph's values."""
    return tuple(TensorSpec(spec.name, dtype_name(node.meta["val"].dtype), _shape(node))
                 for spec, node in zip(specs, nodes, strict=True))
