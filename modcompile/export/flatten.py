"""One flat graph of ATen ops from a model's graph and the sub-graphs and routers it calls, at the sizes asked for.

    before:  %y = call encoder.layer.1(%rows, %mask_rows)
             %logits = call router.encoder.layer.1(%x)
    after:   the nodes of both, each with the path of the module it came from

Why: an ONNX graph has no modules. The model's own graphs are not touched; its tensors are shared, not copied.
"""

__all__ = ["bind_shapes", "flatten", "inline"]

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from modcompile.errors import UnsupportedGraphError, UsageError
from modcompile.model import GraphModel
from modcompile.routers import router_path
from modcompile.shapes import ShapePropagation, dim_expr, fake_inputs
from modcompile.spec import TensorSpec


def flatten(model: GraphModel, shapes: Mapping[str, Sequence[int]] | None = None) -> GraphModule:
    """Copies a model's graph without calls of modules, with every value's shape recorded.

    Args:
        model: The model; its graph stays as it is.
        shapes: Static shapes by input name. A symbol they bind is static in every input.

    Returns:
        The flat graph. Sizes that are numbers are plain numbers in it.

    Raises:
        UsageError: A shape that contradicts the specs or another shape.
        UnsupportedGraphError: The graph does not run at these sizes.
    """
    sizes = bind_shapes(model.inputs, shapes or {})
    specs = [TensorSpec(spec.name, spec.dtype, [sizes.get(d, d) if isinstance(d, str) else d for d in spec.shape])
             for spec in model.inputs]
    flat = GraphModule(model.graph_module, _inline(model.graph_module))
    try:
        _propagate(flat, fake_inputs(specs, model.hints, model))
    except Exception as error:
        raise UnsupportedGraphError("the graph does not run at these sizes", where=sizes or "dynamic shapes",
                                    expected=model.interface.summary(), found=f"{type(error).__name__}: {error}",
                                    fix="choose other sizes, see the message of the op") from error
    _fold_sizes(flat.graph)
    flat.recompile()
    return flat


def bind_shapes(inputs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Returns the size of every symbol that ``shapes`` makes static."""
    specs = {spec.name: spec for spec in inputs}
    sizes: dict[str, int] = {}
    if not isinstance(shapes, Mapping) or not all(isinstance(shape, Sequence) and all(
            isinstance(size, int) for size in shape) for shape in shapes.values()):
        raise UsageError("shapes are sizes by the input's name", expected="such as {'input_ids': (8, 512)}",
                         found=shapes, where="shapes")
    for name, shape in shapes.items():
        if name not in specs:
            raise UsageError("a shape is given for an input the model does not have", expected=list(specs), found=name)
        declared = specs[name].shape
        fits = len(shape) == len(declared) and all(
            size > 0 and size == (sizes.setdefault(d, size) if isinstance(d, str) else d)
            for size, d in zip(shape, declared, strict=True)
        )
        if not fits:
            raise UsageError(
                "a given shape does not fit the model's input",
                expected=f"{tuple(declared)}" + (f" with {sizes}" if sizes else ""),
                found=tuple(shape),
                where=f"shapes[{name!r}]",
            )
    return sizes


def _inline(root: GraphModule) -> Graph:
    """Copies the root's graph, with the nodes of what it calls in the place of the calls."""
    flat = Graph()
    values: dict[Node, Any] = {}
    path = ""
    for node in root.graph.nodes:
        if node.op == "output":
            flat.output(torch.fx.map_arg(node.args[0], values.__getitem__))
            break
        if node.op != "call_module":
            values[node] = copy = flat.node_copy(node, values.__getitem__)
            _name(copy, path)
            continue
        called = root.get_submodule(str(node.target))
        # What routing put after a router and after a block has no path of its own: it belongs to the block.
        path = str(node.target).removeprefix(router_path(""))
        body = called if isinstance(called, GraphModule) else _trace(called, node)
        (values[node],) = inline(flat, body, [values[argument] for argument in node.args], str(node.target),
                                 str(node.target))
    return flat


def inline(graph: Graph, body: GraphModule, arguments: Sequence[Any], prefix: str = "", path: str = "") -> list[Any]:
    """Copies a sub-graph to the end, or the insertion point, of a graph.

    Args:
        graph: Where the nodes go.
        body: The sub-graph.
        arguments: The values of its inputs.
        prefix: The path that its attributes' names continue.
        path: The module path of nodes that have none.

    Returns:
        The values of its outputs.
    """
    inputs = iter(arguments)
    values: dict[Node, Any] = {}
    for node in body.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.op != "output":
            values[node] = copy = graph.node_copy(node, values.__getitem__)
            if node.op == "get_attr":
                copy.target = f"{prefix}.{node.target}"
            _name(copy, path)
    return [values.get(value, value) for value in pytree.tree_leaves(body.graph.output_node().args)]


def _name(node: Node, path: str) -> None:
    """Gives a node that has no module path this one."""
    if "nn_module_stack" not in node.meta and path:
        node.meta["nn_module_stack"] = {path: (path, "")}


def _trace(module: nn.Module, call: Node) -> GraphModule:
    """The graph of a module that is called as it is, a router, with its parameters as attributes."""
    parameters = dict(module.named_parameters()) | dict(module.named_buffers())

    def forward(tensors: dict[str, torch.Tensor], *inputs: torch.Tensor) -> Any:
        return torch.func.functional_call(module, tensors, inputs)

    examples = [argument.meta["val"] for argument in call.args if isinstance(argument, Node)]
    mode = examples[0].fake_mode
    fakes = {name: mode.from_tensor(tensor, static_shapes=True) for name, tensor in parameters.items()}
    with mode, torch.no_grad():
        # What is recorded in the graph is from before the model was moved to its device.
        examples = [example.to(next(iter(fakes.values()), example).device) for example in examples]
        body = make_fx(forward, pre_dispatch=True)(fakes, *examples)
    random = next((node.target for node in body.graph.nodes if isinstance(node.target, OpOverload)
                   and torch.Tag.nondeterministic_seeded in node.target.tags), None)
    if random is not None:
        raise UnsupportedGraphError("a router draws random numbers, so no engine could be verified", found=random,
                                    expected="logits that follow from the rows", where=call.target,
                                    fix="convert with another router; compare qualities in PyTorch")
    placeholders = body.graph.find_nodes(op="placeholder")
    for node, name in zip(placeholders, parameters, strict=False):
        with body.graph.inserting_before(node):
            attribute = body.graph.create_node("get_attr", name)
        node.replace_all_uses_with(attribute)
        body.graph.erase_node(node)
    return body


def _propagate(graph_module: GraphModule, inputs: list[torch.Tensor]) -> None:
    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    with torch.no_grad():
        _Propagation(graph_module, mode).run(*inputs)


class _Propagation(ShapePropagation):
    """Evaluates one node of each kind: the layers of a model differ in their parameters alone.

    Values that are alike are one fake tensor, so that an op's operands tell what it will give.
    """

    def __init__(self, graph_module: GraphModule, mode: FakeTensorMode):
        super().__init__(graph_module, mode)
        self.results: dict[tuple, Any] = {}
        self.alike: dict[tuple, FakeTensor] = {}

    def run_node(self, node: Node) -> Any:
        """Takes the result of an equal node, or evaluates this one."""
        if node.op != "call_function" or (isinstance(node.target, OpOverload) and node.target._schema.is_mutable):
            result = pytree.tree_map_only(FakeTensor, self._representative, super().run_node(node))
        else:
            operands, form = pytree.tree_flatten(self.fetch_args_kwargs_from_env(node))
            key = (node.target, form, *map(_key, operands))
            if key not in self.results:
                self.results[key] = pytree.tree_map_only(FakeTensor, self._representative, super().run_node(node))
            result = self.results[key]
        if node.op != "output":
            node.meta["val"] = result
        return result

    def _representative(self, value: FakeTensor) -> FakeTensor:
        dims = tuple(map(dim_expr, (*value.shape, *value.stride())))
        return self.alike.setdefault((value.dtype, value.device, dims), value)


def _key(operand: Any) -> Any:
    if isinstance(operand, torch.Tensor):
        return id(operand)
    return (type(operand), dim_expr(operand) if isinstance(operand, torch.SymInt) else operand)


def _fold_sizes(graph: Graph) -> None:
    """Puts numbers in the place of the nodes that compute sizes which are known."""
    for node in reversed(graph.nodes):
        if isinstance(node.meta.get("val"), int) and node.op == "call_function":
            node.replace_all_uses_with(node.meta["val"])
            graph.erase_node(node)
