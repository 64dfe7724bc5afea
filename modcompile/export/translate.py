"""Translates a program into an ONNX IR model, simplifies it, and names its nodes and dims."""

__all__ = ["LOWEST_TRANSLATED_OPSET", "translate"]

import logging
import re
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from modcompile.errors import UnsupportedGraphError
from modcompile.export.lowerings import ONNX_FUSED_OPSET, lowerings
from modcompile.export.simplify import simplify
from modcompile.spec import TensorSpec

# Below this the translator has no library; lower opsets are lowered from it.
LOWEST_TRANSLATED_OPSET = 18


def translate(program: ExportedProgram, *, opset: int, inputs: Sequence[TensorSpec],
              outputs: Sequence[TensorSpec]) -> ir.Model:
    """Translates a program at ``opset`` (18 or later), with module paths as node names.

    Returns:
        The model, in which our ops are nodes of domain ``modcompile`` that still lack their function bodies.

    Raises:
        UnsupportedGraphError: An op has no translation.
    """
    # The translator announces its steps and every version conversion on the root logger.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=lowerings(opset),
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            verbose=False,
            # It would also fuse, without checking that the fused operators take these shapes.
            optimize=False,
        )
    except torch.onnx.OnnxExporterError as error:
        # Its own message is advice to report it; the first cause says which op of which module it was.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UnsupportedGraphError("the graph has an op without an ONNX form", found=cause,
                                    expected=f"ops that torch.onnx translates to opset {opset}",
                                    fix="replace the op in the model"
                                    + (", or export with a later opset" if opset < ONNX_FUSED_OPSET else "")) from error
    assert onnx_program is not None
    model = onnx_program.model
    simplify(model)
    _name_values(model, [spec.name for spec in inputs], [spec.name for spec in outputs])
    _name_nodes(model)
    _name_dims(model, inputs)
    return model


def _name_values(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Names inputs and outputs as they are called: the translator renames an input that is an output as well.

    An output that is called as an input is, which ONNX cannot have, has ``_out`` behind its name.
    """
    graph, wanted = model.graph, list(inputs)
    for name in outputs:
        while name in wanted:
            name += "_out"
        wanted.append(name)
    if [value.name for value in (*graph.inputs, *graph.outputs)] == wanted:
        return
    known = set(graph.inputs)
    for place, value in enumerate(graph.outputs):
        if value in known:
            # One value cannot have two names.
            copy = ir.node("Identity", [value])
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.append(copy)
            graph.outputs[place] = copy.outputs[0]
        known.add(value)
    named = (*graph.inputs, *graph.outputs)
    for node in graph:
        for value in node.outputs:
            if value not in named and value.name in wanted:
                value.name = f"{value.name}_inner"
    for number, value in enumerate(named):
        value.name = f"named_{number}"
    for value, name in zip(named, wanted, strict=True):
        value.name = name


def _name_nodes(model: ir.Model) -> None:
    """Names nodes by module path, and drops the translator's notes: they hold source lines and local paths."""
    taken: dict[str, int] = {}
    for node in model.graph.all_nodes():
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        path = scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_empty_nn_module_stack") else ""
        name = f"{path}/{node.op_type}" if path else node.op_type
        count = taken[name] = taken.get(name, -1) + 1
        node.name = f"{name}_{count}" if count else name
        node.metadata_props.clear()
    for value in _values(model.graph):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _name_dims(model: ir.Model, inputs: Sequence[TensorSpec]) -> None:
    """Puts the specs' symbol names in the place of the trace's, also inside expressions such as K's."""
    names = {
        str(dim): name
        for value, spec in zip(model.graph.inputs, inputs, strict=True)
        for dim, name in zip(value.shape or (), spec.shape, strict=True)
        if isinstance(name, str) and not isinstance(dim, int)
    }
    word = re.compile(r"[A-Za-z_]\w*")
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else _renamed(str(d), names, word) for d in value.shape])


def _renamed(expression: str, names: dict[str, str], word: re.Pattern) -> str | None:
    # Shape inference of single nodes invents symbols, the same one for unrelated dims: a runtime would believe it.
    known = all(symbol in names for symbol in word.findall(expression))
    return word.sub(lambda match: names[match[0]], expression) if known else None
