"""Captures a dense model's forward as one ATen graph, with a dynamic batch and sequence.

``torch.export`` in non-strict mode runs the model on fake tensors; the graph keeps, for each node, the stack of modules
it came from. No model family is special here: what varies is found from the graph.
"""

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.utils import _pytree as pytree

from modcompile.capture_sizes import (
    any_size,
    check_float_sizes,
    fixed_names,
    merged_symbols,
    name_symbols,
    varying_sizes,
)
from modcompile.errors import UnsupportedGraphError, UsageError
from modcompile.example_inputs import bind_example, call_arguments, defaults_of, distinct_sizes
from modcompile.interface import Interface, graph_name, pack_tree
from modcompile.model import GraphModel
from modcompile.pass_manager import PassManager
from modcompile.program import Program
from modcompile.shapes import dim_expr, simplify_sizes, uncached
from modcompile.spec import TensorSpec, dtype_name

__all__ = ["capture"]


def capture(model: nn.Module, example_inputs: dict | tuple | torch.Tensor, *, dynamic: bool = True) -> GraphModel:
    """The model as a graph that is called like the model and returns what it returns.

    Args:
        model: Any module whose forward takes tensors (and constants, which are fixed at their example's value). One
            that is a graph already, a MoDModel or a pruned model for example, is returned as it is.
        example_inputs: Arguments by name, or positional ones in a tuple. Sizes are examples: every dim that the model
            does not fix may vary, from 2 on. Those that it fixes together are the example's: the height and width of
            an image whose patches meet a table of 16 positions.
        dynamic: Whether dims may vary; if not, every size is the example's.

    Returns:
        A GraphModel that shares the model's parameters, in evaluation mode.

    Raises:
        UsageError: Example inputs that do not fit the forward's signature, or the graph that was given; a graph whose
            sizes vary, with ``dynamic=False``.
        UnsupportedGraphError: A forward that torch.export cannot trace.

    Example:
        >>> graph = capture(nn.Linear(4, 2), (torch.randn(3, 4),))
        >>> str(graph.inputs[0]), graph(torch.zeros(5, 4)).shape
        ('input float32 [batch, 4]', torch.Size([5, 2]))
    """
    if isinstance(model, GraphModel):
        return _checked(model, example_inputs, dynamic)
    parameters, arguments = bind_example(model, example_inputs)
    if "use_cache" in parameters and "use_cache" not in arguments:
        # A generation cache is state, not a value: a graph without it is what training and prefill scoring run.
        arguments["use_cache"] = False
    arguments = distinct_sizes(arguments, dynamic)
    flat = pytree.tree_leaves(arguments)
    shapes = pytree.tree_map(any_size, arguments) if dynamic else None
    while True:
        exported = _export(model, arguments, shapes)
        traced = exported.module(check_guards=False)
        graph = _flatten(traced, flat)
        names, hints = name_symbols(graph)
        fixed = fixed_names(graph, names, hints)
        if not fixed:
            break
        # Again, with numbers for what is fixed: an expression that is always 16 is not seen to be the 16 of a table.
        shapes = varying_sizes(graph, arguments, {symbol for symbol, name in names.items() if name not in fixed})
    check_float_sizes(graph, names)
    simplify_sizes(graph, merged_symbols(names))
    interface = _interface(graph, parameters, defaults_of(model), arguments, exported.call_spec.out_spec, names)
    graph_module = Program(graph).assemble(*_tensors(model, traced, graph))
    # Imported here: the passes import the pass manager, which this module uses too.
    from modcompile.passes.expand_einsum import ExpandEinsum
    from modcompile.passes.functionalize import Functionalize
    from modcompile.passes.fuse_softmax import FuseSoftmax
    from modcompile.passes.hoist_sizes import HoistSizes
    from modcompile.passes.remove_noops import RemoveNoops
    from modcompile.passes.simplify_masks import SimplifyMasks
    from modcompile.passes.split_baddbmm import SplitBaddbmm

    made = GraphModel(graph_module, interface, hints)
    # Without writes and tracing leftovers, and with sizes computed once, blocks have only the inputs they need.
    manager = PassManager([ExpandEinsum(), SplitBaddbmm(), Functionalize(), RemoveNoops(), FuseSoftmax(),
                           HoistSizes(), SimplifyMasks()])
    manager(graph_module)
    made.passes = manager.ran
    return made


def _export(model: nn.Module, arguments: dict[str, Any], dynamic_shapes: dict | None) -> torch.export.ExportedProgram:
    """The program of a forward in evaluation mode; the model's modes stay as they are.

    Raises:
        UnsupportedGraphError: A forward that torch.export cannot trace.
        UsageError: Arguments that the model does not take.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        with uncached(), _named_arguments(model, arguments):
            return torch.export.export(model.eval(), (), arguments, strict=False, dynamic_shapes=dynamic_shapes)
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        _check_takes(model, arguments)
        raise UnsupportedGraphError("torch.export cannot trace the model", found=f"{type(error).__name__}: {message}",
                                    where=type(model).__name__,
                                    expected="a forward without data-dependent control flow",
                                    fix="see the message of torch.export; a smaller forward, or constants in "
                                    "example_inputs, often help") from error
    finally:
        for module, training in modes:
            module.training = training


def _check_takes(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Refuses example inputs that the model itself does not take.

    Raises:
        UsageError: A call of the model fails, with its reason.
    """
    try:
        with torch.no_grad():
            model(**arguments)
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        raise UsageError("the model does not take the example inputs", found=f"{type(error).__name__}: {message}",
                         expected=f"arguments of {type(model).__name__}.forward", where=", ".join(arguments),
                         fix="call the model with them first; the command line takes package.module:function for a "
                         "model and its inputs") from error


def _checked(graph: GraphModel, example_inputs: dict | tuple | torch.Tensor, dynamic: bool) -> GraphModel:
    """A graph that is what would be captured."""
    graph.interface.bind(*call_arguments(example_inputs))
    varying = [str(spec) for spec in graph.inputs if any(isinstance(size, str) for size in spec.shape)]
    if varying and not dynamic:
        raise UsageError("the model is a graph already, and its sizes vary", expected="a module to capture",
                         found=", ".join(varying), where="dynamic=False",
                         fix="capture the module that it came from, with dynamic=False")
    return graph


@contextlib.contextmanager
def _named_arguments(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Gives the forward one parameter for each argument: torch.export gives those of ``**kwargs`` no dynamic sizes."""
    source, own = model.forward, "forward" in vars(model)

    def forward(**arguments):
        return source(**arguments)

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    vars(forward)["__signature__"] = inspect.Signature(parameters)
    model.forward = forward
    try:
        yield
    finally:
        if own:
            model.forward = source
        else:
            del model.forward


def _flatten(traced: torch.fx.GraphModule, flat: list) -> torch.fx.Graph:
    """The traced graph with its tensor arguments in a row and a flat tuple of results."""
    made, values = torch.fx.Graph(), {}
    placeholders = traced.graph.find_nodes(op="placeholder")
    for node, leaf in zip(placeholders, flat, strict=True):
        # Constants have no input: the trace used their values.
        if isinstance(leaf, torch.Tensor):
            values[node] = made.node_copy(node)
    for node in traced.graph.nodes:
        if node.op == "output":
            made.output(tuple(values[value] for value in node.args[0] if isinstance(value, torch.fx.Node)))
            made.output_node().meta["constants"] = list(node.args[0])
        elif node.op != "placeholder" and node not in values:
            _copy_node(traced, node, made, values)
    return made


def _copy_node(traced: torch.fx.GraphModule, node: torch.fx.Node, made: torch.fx.Graph, values: dict) -> None:
    """Copies a node; a region under no_grad, or under a disabled autocast, is copied in place of its call."""
    if node.op == "get_attr" and isinstance(_attribute(traced, node.target), torch.fx.GraphModule):
        return
    # The arguments of a region: set_grad_enabled has one setting before its graph, autocast four, the third on or off.
    settings = {torch.ops.higher_order.wrap_with_set_grad_enabled: 1, torch.ops.higher_order.wrap_with_autocast: 4}
    if node.target not in settings:
        values[node] = made.node_copy(node, lambda n: values[n])
        return
    count = settings[node.target]
    if count == 4 and node.args[2]:
        raise UnsupportedGraphError("the model's forward runs a region under autocast", where=node.name,
                                    expected="a model in one precision", found=f"autocast to {node.args[1]}",
                                    fix="capture in float32, and choose the precision at export")
    region = _attribute(traced, node.args[count].target)
    inner = dict(zip(region.graph.find_nodes(op="placeholder"), (values[arg] for arg in node.args[count + 1:]),
                     strict=True))
    for child in region.graph.nodes:
        if child.op == "output":
            results = [inner[result] for result in child.args[0]]
        elif child.op != "placeholder":
            _copy_node(region, child, made, inner)
    for user in node.users:
        # Made here, out of order: the copy of a getitem on the region is the value itself.
        values[user] = results[user.args[1]]


def _interface(graph: torch.fx.Graph, parameters, defaults: dict, arguments: dict, out_spec, names: dict) -> Interface:
    leaves: list = []
    labels: list[str] = []
    trees = {name: pack_tree(value, leaves, labels, name) for name, value in arguments.items()}
    # What was not given had its default: a call may say so.
    trees |= {name: {"const": value} for name, value in defaults.items() if name not in trees}

    def spec(name, value):
        # Sizes that are arithmetic on symbols are free symbols of their own to whoever reads the outputs.
        exprs = map(dim_expr, value.shape)
        dims = tuple(int(expr) if expr.is_number else names.get(expr, str(expr)) for expr in exprs)
        return TensorSpec(name, dtype_name(value.dtype), dims)

    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = tuple(spec(label, node.meta["val"]) for label, node in zip(labels, placeholders, strict=True))
    for node, label in zip(placeholders, labels, strict=True):
        node.name = node.target = graph_name(label)
    if len({node.name for node in placeholders}) < len(labels):
        raise UsageError("two inputs would have one name in the graph", expected="names that differ in their letters",
                         found=", ".join(labels), where="example_inputs", fix="rename one of them in the forward")
    constants = graph.output_node().meta.pop("constants")
    values = [value.meta["val"] if isinstance(value, torch.fx.Node) else value for value in constants]
    out_leaves: list = []
    out_labels: list[str] = []
    result = pack_tree(pytree.tree_unflatten(values, out_spec), out_leaves, out_labels)
    outputs = tuple(spec(label, value) for label, value in zip(out_labels, out_leaves, strict=True))
    return Interface(parameters, trees, inputs, result, outputs)


def _tensors(model: nn.Module, traced: torch.fx.GraphModule, graph: torch.fx.Graph):
    """Every tensor by name: the source's own objects, its tied names included, and what tracing lifted out."""
    tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters(remove_duplicate=False)),
                                        **dict(model.named_buffers(remove_duplicate=False))}
    non_persistent = set(tensors) - set(model.state_dict())
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in tensors:
            value = _attribute(traced, node.target)
            if not isinstance(value, torch.Tensor):
                raise UnsupportedGraphError("the traced graph holds something that is not a tensor", where=node.target,
                                            found=type(value).__name__, expected="parameters, buffers and constants",
                                            fix="avoid control flow operators in the model's forward")
            tensors[node.target] = value
            non_persistent.add(node.target)
    return tensors, None, frozenset(non_persistent)


def _attribute(module: nn.Module, name: str):
    for part in name.split("."):
        module = getattr(module, part)
    return module
