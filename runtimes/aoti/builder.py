"""Makes an AOTInductor engine folder from a model: one package of machine code and weights.

The model's flat graph is lowered like that for ONNX, and compiled without being exported again. None of our ops is left
in the package: ``gather_rows`` and ``merge_rows`` decompose, and ``route`` becomes its Triton kernel on a GPU, a stable
sort on a CPU. So it runs where torch's C++ library is, without this package and without Python.
"""

__all__ = ["build"]

import copy
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from modcompile.passes.activate_products import ActivateProducts
from modcompile.passes.cast_precision import CastPrecision
from modcompile.passes.choose_attention import ChooseAttention
from modcompile.passes.expand_gelu import ExpandGelu
from modcompile.passes.fold_filled import FoldFilled
from modcompile.passes.fold_straight_through import FoldStraightThrough
from modcompile.passes.fuse_attention import FuseAttention
from modcompile.passes.fuse_gelu import FuseGelu
from modcompile.passes.fuse_rms_norm import FuseRmsNorm
from modcompile.passes.norm_before_merge import NormBeforeMerge
from modcompile.passes.overwrite_rows import OverwriteRows
from modcompile.passes.route_and_norm import RouteAndNorm
from modcompile.passes.simplify_masks import SimplifyMasks
from modcompile.passes.sum_columns import SumColumns
from modcompile.runtimes.aoti.choices import GatheredRows
from modcompile.runtimes.aoti.engine import ELEMENTS, ENTRY, LARGEST, open_package
from modcompile.runtimes.aoti.target import find_device, target_of
from torch import nn
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.package import package_aoti
from torch._inductor.virtualized import V
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from modcompile.capture import capture
from modcompile.engine import Shapes
from modcompile.errors import ModcompileError, RuntimeUnavailableError, UnsupportedGraphError
from modcompile.export.flatten import bind_shapes, flatten
from modcompile.export.lift import lift
from modcompile.export.onnx_file import PRECISIONS, resolve_precision
from modcompile.manifest import PassRecord, VersionRange
from modcompile.model import GraphModel, device_of
from modcompile.ops.route import _reference as sorted_route
from modcompile.pass_manager import Pass, PassManager
from modcompile.spec import TensorSpec, dtype_name

# Sizes of the kernels that the compiler writes. Products stay cuBLAS's: in a package the compiler, when it tunes them,
# expands the bias first, which is a kernel more; and each candidate is launched by a program that gcc makes for it, so
# that a small product's time is its launch's (of 1024 x 1024 x 4096 in float16 on an H100 the best was one of 18.8 us,
# where cuBLAS takes 15.3) and a product costs half a minute.
_AUTOTUNE = {"max_autotune_pointwise": True}
# Namespaces of ops that need no library but torch's own.
_IN_LIBTORCH = ("aten", "mkldnn", "prims", "quantized")


def build(model: nn.Module, folder: Path, *, runtime: str, precision: str | None = None, shapes: Shapes | None = None,
          example_inputs: Any = None, device: str | None = None, autotune: bool = False) -> dict[str, Any]:
    """Fills ``folder`` with a package, and runs it once.

    Args:
        model: A ``GraphModel`` (a ``MoDModel`` is one), or any ``nn.Module`` together with ``example_inputs``.
        folder: The engine folder to be.
        runtime: The runtime's name.
        precision: "fp32", "fp16" or "bf16"; by default what the model is in.
        shapes: Static shapes by input name; every other dim stays as symbolic as the model has it.
        example_inputs: What the plain module is captured with, see ``modcompile.capture.capture``.
        device: What to compile for: "cpu", "cuda" or "cuda:1". By default where the model is. The model stays there.
        autotune: Tries several sizes for each kernel that the compiler writes, one by one. See docs/benchmarks.md: of
            GPT-2 medium's shape on an H200 the engine was no faster for it.

    Returns:
        The manifest's fields.

    Raises:
        UsageError: An option, precision or shape that cannot be.
        UnsupportedGraphError: AOTInductor does not compile the graph.
        RuntimeUnavailableError: There is no such device, or no compiler.
    """
    graph = model if isinstance(model, GraphModel) else capture(model, example_inputs)
    precision = resolve_precision(graph, precision)
    place = find_device(str(device_of(graph)) if device is None else device)
    passes = PassManager(lowering_passes(precision, place))
    flat = passes(flatten(_at(graph, place), shapes))
    # On a GPU the compiler sees route's kernel.
    program = lift(flat, opaque=False).run_decompositions(
        {torch.ops.modcompile.route.default: sorted_route} if place.type == "cpu" else {})
    examples = [_example(node, place) for node in _inputs(flat)]
    with tempfile.TemporaryDirectory(prefix=".build", dir=folder) as scratch:
        files = _compile(program, examples, scratch, autotune)
        _check_calls(files)
        package_aoti(str(folder / ENTRY), files)
    _prove(folder / ENTRY, place, flat, examples)
    sizes = bind_shapes(graph.inputs, shapes or {})
    return {
        "runtime": runtime,
        "runtime_version": torch.__version__,
        "runtime_range": _release(),
        "precision": precision,
        "entry": ENTRY,
        "inputs": _specs(graph.inputs, _inputs(flat)),
        "outputs": _specs(graph.outputs, _outputs(flat)),
        "routed_blocks": tuple(block.at(sizes) for block in graph.routed_blocks),
        "passes": tuple(PassRecord(**record) for record in [*graph.passes, *passes.ran]),
        "target": {**target_of(place), **_largest(graph.inputs, _inputs(flat)),
                   **(_elements(graph.inputs, flat) if place.type == "cuda" else {})},
    }


def lowering_passes(precision: str, device: torch.device | None = None) -> list[Pass]:
    """The pipeline on the flat graph, read top to bottom.

    Args:
        precision: "fp32", "fp16" or "bf16".
        device: What an engine is for. Without one, activations stay as the model writes them: in PyTorch, with which
            an engine is compared, they are.
    """
    half = PRECISIONS[precision]
    return [
        # A constant gate must not look like arithmetic on logits to what follows.
        FoldFilled(),
        FoldStraightThrough(),
        # Attention that is written out becomes one node, for which there are kernels.
        FuseAttention(),
        # The fastest one takes a causal flag and no mask.
        SimplifyMasks(),
        # A norm that is written out becomes one node, which can be moved as one.
        FuseRmsNorm(),
        NormBeforeMerge(),
        # So does an activation, before its power is cast to float32.
        *([FuseGelu()] if device else []),
        # What an operator does inside, it does in float32.
        *([CastPrecision(half)] if half else []),
        # A router's product, which is in float32 whatever the precision, joins the kernel that makes its rows.
        SumColumns(),
        # What is left of a merge, where nothing is left of its gate.
        OverwriteRows(),
        # cuBLASLt's products have an activation in them, what chooses rows can norm them, and few rows may have another
        # attention kernel.
        *([ActivateProducts(), RouteAndNorm(), ChooseAttention(str(device))] if device and device.type == "cuda"
          else []),
        # For what is left there is a form without a tanh.
        *([ExpandGelu()] if device else []),
    ]


def _at(model: GraphModel, device: torch.device) -> GraphModel:
    """The model on a device, in evaluation mode. It shares the tensors that are there; the given one stays as it is."""
    tensors = {id(tensor): _moved(tensor, device) for tensor in model.tensors().values()}
    # What is in the memo already is taken from there.
    return copy.deepcopy(model, tensors).to(device).eval()


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def _inputs(flat: GraphModule) -> list[Node]:
    return flat.graph.find_nodes(op="placeholder")


def _outputs(flat: GraphModule) -> Sequence[Node]:
    return flat.graph.output_node().args[0]


def _sizes(node: Node) -> tuple[int, ...]:
    """A value's shape at the example's sizes."""
    return tuple(dim if isinstance(dim, int) else int(dim.node.hint) for dim in node.meta["val"].shape)


def _example(node: Node, device: torch.device) -> torch.Tensor:
    return torch.zeros(_sizes(node), dtype=node.meta["val"].dtype, device=device)


def _specs(specs: Sequence[TensorSpec], nodes: Sequence[Node]) -> tuple[TensorSpec, ...]:
    """The model's specs with the dtypes and static sizes of the graph's values."""
    return tuple(TensorSpec(spec.name, dtype_name(node.meta["val"].dtype), [
        size if isinstance(size, int) else dim for size, dim in zip(node.meta["val"].shape, spec.shape, strict=True)])
        for spec, node in zip(specs, nodes, strict=True))


def _largest(specs: Sequence[TensorSpec], nodes: Sequence[Node]) -> dict[str, str]:
    """The largest sizes that the compiler allowed for: it may choose narrow indices, and says so in the symbol."""
    found = {}
    for spec, node in zip(specs, nodes, strict=True):
        for name, size in zip(spec.shape, node.meta["val"].shape, strict=True):
            if isinstance(size, torch.SymInt):
                upper = size.node.shape_env.bound_sympy(size.node.expr).upper
                if upper.is_Integer and upper < torch.iinfo(torch.int32).max:
                    found[f"{LARGEST}{name}"] = str(upper)
    return found


def _elements(specs: Sequence[TensorSpec], flat: GraphModule) -> dict[str, str]:
    """How many elements the tensors of a graph of varying sizes have at most.

    For a GPU the compiler takes 32-bit indices where they reach at the example's sizes, and guards nothing.
    """
    names = {size.node.expr: name for spec, node in zip(specs, _inputs(flat), strict=True)
             for name, size in zip(spec.shape, node.meta["val"].shape, strict=True) if isinstance(size, torch.SymInt)}
    most: dict[tuple[str, ...], int] = {}
    for node in flat.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        factor = 1
        factors: list[str] = []
        for size in value.shape:
            if isinstance(size, int):
                factor *= size
                continue
            # A size such as ceil(S / 8) or S + 1 is at most S times what it is for S = 1.
            symbols = size.node.expr.free_symbols
            factor *= max(1, int(size.node.expr.subs(dict.fromkeys(symbols, 1))))
            factors += [str(names[symbol]) for symbol in symbols]
        kind = tuple(sorted(factors))
        most[kind] = max(most.get(kind, 0), factor)
    products = [" ".join([str(factor), *kind]) for kind, factor in sorted(most.items()) if kind]
    return {ELEMENTS: ", ".join(products)} if products else {}


def _compile(program: ExportedProgram, examples: list[torch.Tensor], scratch: str, autotune: bool) -> list[Any]:
    """Compiles, and returns the files of the package. Weights and code go to ``scratch``, not to torch's cache."""
    options = {
        "aot_inductor.package": True,
        "aot_inductor.output_path": scratch,
        # As many threads as the machine that runs it is told to use.
        "cpp.dynamic_threads": True,
        # By its file's name. Where the linker finds only the static one, the package has a second copy of the C++
        # library, and its streams crash on the first one's locales.
        **({"aot_inductor.custom_op_libs": [":libstdc++.so.6"]} if sys.platform == "linux" else {}),
        **(_AUTOTUNE if autotune else {}),
    }
    try:
        with torch.no_grad(), V.set_choices_handler(GatheredRows()):
            return list(torch._inductor.aot_compile(program.module(check_guards=False), tuple(examples),
                                                    options=options))
    except InvalidCxxCompiler as error:
        raise RuntimeUnavailableError("there is no C++ compiler", expected="g++ or clang++, or its path in CXX",
                                      found=error, fix="install g++") from error
    except torch.OutOfMemoryError as error:
        raise ModcompileError("the GPU has too little memory to compile the model", found=error,
                              fix="free some of it") from error
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        raise UnsupportedGraphError("AOTInductor does not compile the graph", fix="see the compiler's messages above",
                                    found=f"{type(error).__name__}: {message}") from error


def _prove(package: Path, device: torch.device, flat: GraphModule, examples: list[torch.Tensor]) -> None:
    """Runs a package once."""
    run = open_package(package, device)
    try:
        outputs = run(examples)
        if device.type == "cuda":
            # What fails on a GPU is said when it is waited for.
            torch.cuda.synchronize(device)
    except Exception as error:
        raise UnsupportedGraphError("the compiled package does not run", found=error, where=package.name) from error
    made = [(tuple(output.shape), output.dtype) for output in outputs]
    promised = [(_sizes(node), node.meta["val"].dtype) for node in _outputs(flat)]
    if made != promised:
        raise UnsupportedGraphError("the compiled package gives something else than the graph", expected=promised,
                                    found=made, where=package.name)


def _check_calls(files: Sequence[Any]) -> None:
    """Refuses a package that calls an op which C++ does not have, such as one that Python registers."""
    for path in map(Path, map(str, files)):
        if path.suffix != ".json":
            continue
        for entry in json.loads(path.read_text(encoding="utf-8")).get("nodes", ()):
            target = entry["node"]["target"]
            if target.removeprefix("torch.ops.").replace(".", "::").partition("::")[0] not in _IN_LIBTORCH:
                raise UnsupportedGraphError("the compiled package would call an op that torch's C++ library lacks",
                                            expected=f"ops of {', '.join(_IN_LIBTORCH)}", found=target,
                                            fix="give the op a decomposition, or replace it in the model")


def _release() -> VersionRange:
    """This release of torch, with its patches."""
    major, minor = torch.__version__.split(".")[:2]
    return VersionRange(minimum=f"{major}.{minor}", below=f"{major}.{int(minor) + 1}")
