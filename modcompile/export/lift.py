"""A flat graph as an ``ExportedProgram``, which the ONNX translator and AOTInductor take.

Tracing the graph again would give one as well, but takes as long as the capture did, and ``torch.export`` refuses
what the passes know to be true: that a capacity (S + 7) // 8 fits a sequence of any length.
"""

__all__ = ["lift"]

from collections.abc import Callable
from typing import Any

import torch
from torch._export.verifier import TrainingIRVerifier
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from modcompile.export.flatten import inline

aten = torch.ops.aten


# Other names of permute and transpose, and of a norm, which no table of decompositions has.
_ALIASES = frozenset({aten.adjoint.default, aten.batch_norm.default, aten.matrix_H.default, aten.mH.default,
                      aten.moveaxis.int, aten.moveaxis.intlist, aten.movedim.int, aten.movedim.intlist,
                      aten.mT.default, aten.numpy_T.default, aten.swapaxes.default, aten.swapdims.default})
# Ops as the translator sees them. It evaluates every node once more, and the real ones decompose when they are.
_LIBRARY = torch.library.Library("modcompile_export", "FRAGMENT")
_LIBRARY.define("gather_rows(Tensor x, Tensor positions) -> Tensor")
_LIBRARY.define("merge_rows(Tensor x, Tensor y, Tensor positions, Tensor gate) -> Tensor")
torch.library.register_fake("modcompile_export::gather_rows", lambda x, positions: x.new_empty(
    (*positions.shape, *x.shape[2:])), lib=_LIBRARY)
torch.library.register_fake("modcompile_export::merge_rows", lambda x, y, positions, gate: torch.empty_like(x),
                            lib=_LIBRARY)
_OPAQUE = {torch.ops.modcompile.gather_rows.default: torch.ops.modcompile_export.gather_rows.default,
           torch.ops.modcompile.merge_rows.default: torch.ops.modcompile_export.merge_rows.default}


def lift(graph_module: GraphModule, *, opaque: bool = True) -> ExportedProgram:
    """Makes the graph's tensors inputs of the program, each once under its first name.

    Args:
        graph_module: A flat graph with shapes; it is left as it is.
        opaque: Puts ops that never decompose in the place of ours that do, as the translator needs them.
    """
    tensors: dict[int, InputSpec] = {}
    state: dict[str, torch.Tensor] = {}
    constants: dict[str, torch.Tensor] = {}
    graph, values = Graph(), {}
    # Inputs of the program come first, its own inputs last among them.
    attributes = graph_module.graph.find_nodes(op="get_attr")
    lifted: dict[int, Node] = {}
    for index, node in enumerate(attributes):
        tensor = _attribute(graph_module, str(node.target))
        if id(tensor) not in lifted:
            lifted[id(tensor)] = copy = graph.placeholder(f"tensor_{index}")
            copy.meta = dict(node.meta)
            kind = InputKind.PARAMETER if isinstance(tensor, torch.nn.Parameter) else InputKind.CONSTANT_TENSOR
            (state if kind is InputKind.PARAMETER else constants)[str(node.target)] = tensor
            tensors[id(tensor)] = InputSpec(kind, TensorArgument(copy.name), str(node.target))
        values[node] = lifted[id(tensor)]
    inputs = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            values[node] = copy = graph.node_copy(node)
            inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(copy.name), None))
    for node in graph_module.graph.nodes:
        if node.op == "output":
            outputs = tuple(values[value] for value in node.args[0])
            graph.output(outputs)
        elif node not in values:
            values[node] = copy = graph.node_copy(node, values.__getitem__)
            copy.target = _OPAQUE.get(copy.target, copy.target) if opaque else copy.target
    call = ModuleCallSignature(
        inputs=[], outputs=[],
        in_spec=pytree.tree_structure((tuple(range(len(inputs))), {})),
        out_spec=pytree.tree_structure(tuple(range(len(outputs)))),
    )
    signature = ExportGraphSignature(
        [*tensors.values(), *inputs],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(value.name), None) for value in outputs],
    )
    return _LiftedProgram(graph_module, graph, signature, state, {}, [ModuleCallEntry("", call)],
                          constants=constants, verifiers=[TrainingIRVerifier])


def _attribute(module: torch.nn.Module, name: str) -> torch.Tensor:
    *parents, leaf = name.split(".")
    return getattr(module.get_submodule(".".join(parents)), leaf)


class _LiftedProgram(ExportedProgram):
    """Decomposes the few nodes that need it; the general way traces the whole graph, twice, for minutes."""

    def run_decompositions(self, decomp_table: dict | None = None, **options: Any) -> ExportedProgram:
        if decomp_table is None or _writes_in_place(self.graph):
            # The general way knows what shares memory. Its views hold for its strides alone.
            program = super().run_decompositions(decomp_table, **options)
            for node in program.graph.find_nodes(op="call_function", target=aten.view.default):
                node.target = aten.reshape.default
            program.graph_module.recompile()
            return program
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in decomp_table:
                _decompose(node, decomp_table[node.target], decomp_table)
            elif node.op == "call_function" and node.target in _ALIASES:
                _decompose(node, node.target.decompose, decomp_table)
        # An output may have been decomposed.
        for spec, value in zip(self.graph_signature.output_specs, self.graph.output_node().args[0], strict=True):
            spec.arg = TensorArgument(value.name)
        self.graph_module.recompile()
        return self


def _writes_in_place(graph: Graph) -> bool:
    return any(isinstance(node.target, OpOverload) and node.target._schema.is_mutable for node in graph.nodes)


def _decompose(node: Node, decomposition: Callable, table: dict) -> None:
    """Puts the nodes of a decomposition in the place of a node."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Node)]

    def call(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(leaf, Node) else leaf for leaf in leaves], spec)
        result = decomposition(*args, **kwargs)
        # A tuple with names would come out as one node that makes it.
        return tuple(result) if isinstance(result, tuple) else result

    # Values that are alike share a fake tensor, which here would make two operands one.
    examples = [_fresh(leaf.meta["val"]) for leaf in inputs]
    mode = next(example.fake_mode for example in examples if isinstance(example, FakeTensor))
    with mode, torch.no_grad():
        body = make_fx(call, decomposition_table=table)(*examples)
        if _writes_in_place(body.graph):
            body = make_fx(torch.func.functionalize(body))(*examples)
    path = next((path for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())), "")
    with node.graph.inserting_before(node):
        made = inline(node.graph, body, inputs, path=path)
    if isinstance(node.meta["val"], torch.Tensor):
        node.replace_all_uses_with(made[0])
    else:
        for user in list(node.users):
            user.replace_all_uses_with(made[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def _fresh(value: Any) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return value.new_empty_strided(value.shape, value.stride())
