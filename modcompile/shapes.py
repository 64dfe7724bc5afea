"""Shapes of a graph's values: fake inputs from specs, and propagation of what is missing.

Every tensor node carries ``meta["val"]``, a fake tensor whose dims are numbers or SymInts; every size node carries
its SymInt. Symbols are shared: a dim of a side input that varies with the sequence has the sequence's symbol.
"""

import itertools
import operator
from contextlib import AbstractContextManager

import sympy
import torch
import torch._dynamo.config
import torch.fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import Max, Min

from modcompile.spec import TensorSpec, dtype_from_name

__all__ = ["ShapePropagation", "describe", "dim_expr", "equalities", "fake_inputs", "fake_mode_of", "new_symbol",
           "propagate", "propagate_alike", "propagate_missing", "shape_exprs", "simplify_sizes", "size_value",
           "uncached"]

# Sizes that stand for a symbol while shapes are propagated: pairwise different, odd, and unlikely to equal a real dim.
HINTS = (3, 57, 61, 67, 71, 73, 79)

_serial = itertools.count()


def uncached() -> AbstractContextManager[None]:
    """Within it, modes of fake tensors are made without torch's cache of results.

    Where sizes are symbols, to look a result up costs more than to compute it again: of small models' export a third.
    """
    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False)


def new_symbol(shape_env: ShapeEnv, name: str, hint: int) -> torch.SymInt:
    """A fresh symbolic size with the given hint; its range starts at 2."""
    # Guards name their source; a counter keeps the names of equal symbols in different graphs apart.
    source = ConstantSource(f"__{name}_{next(_serial)}")
    symbol = shape_env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    return shape_env.create_symintnode(symbol, hint=hint, source=source)


def fake_inputs(specs: list[TensorSpec], hints: dict[str, int] | None = None, like: torch.nn.Module | None = None
                ) -> list[torch.Tensor]:
    """Fake tensors for the specs, in a shape environment of their own; equal symbol names share a symbol.

    Args:
        specs: The inputs, in call order.
        hints: The size that stands for a symbol while guards are decided, by its name.
        like: The inputs are where this module's tensors are; by default on the CPU.
    """
    device = next((tensor.device for tensor in (*like.parameters(), *like.buffers())), None) if like else None
    shape_env = ShapeEnv()
    with uncached():
        mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True, static_shapes=False)
    names = list(dict.fromkeys(dim for spec in specs for dim in spec.shape if isinstance(dim, str)))
    sizes = {name: new_symbol(shape_env, name, (hints or {}).get(name, HINTS[i % len(HINTS)]))
             for i, name in enumerate(names)}
    with mode:
        return [torch.empty([sizes[d] if isinstance(d, str) else d for d in spec.shape],
                            dtype=dtype_from_name(spec.dtype), device=device) for spec in specs]


def fake_mode_of(graph_module: torch.fx.GraphModule) -> FakeTensorMode:
    """The fake mode whose tensors the graph's placeholders carry."""
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
            return node.meta["val"].fake_mode
    raise ValueError("the graph has no tensor input that carries a shape")


def dim_expr(dim: int | torch.SymInt) -> sympy.Expr:
    """A dim as a sympy expression: an integer, a symbol, or arithmetic on symbols."""
    return dim.node.expr if isinstance(dim, torch.SymInt) else sympy.Integer(dim)


def shape_exprs(node: torch.fx.Node) -> tuple[sympy.Expr, ...] | None:
    """The dims of a tensor node as sympy expressions; None for what is not a tensor."""
    value = node.meta.get("val")
    return tuple(dim_expr(d) for d in value.shape) if isinstance(value, torch.Tensor) else None


def describe(node: torch.fx.Node) -> str:
    """A value with its dims, for a reason: "add [s0, s1, 8]"."""
    return f"{node.name} [{', '.join(map(str, shape_exprs(node) or ()))}]"


def size_value(node: object) -> sympy.Expr | None:
    """The expression of a node that computes a size; None for any other node or value."""
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return value.node.expr if isinstance(value, torch.SymInt) else None


class ShapePropagation(torch.fx.Interpreter):
    """Runs a graph on fake tensors and records each value in ``meta["val"]``; with ``missing_only``, only new nodes."""

    def __init__(self, graph_module: torch.fx.GraphModule, mode: FakeTensorMode, missing_only: bool = False):
        super().__init__(graph_module, garbage_collect_values=False)
        self.mode, self.missing_only = mode, missing_only

    def run_node(self, node: torch.fx.Node):
        """Evaluates one node on fake values, or takes the value it already carries."""
        if self.missing_only and "val" in node.meta and node.op != "output":
            return node.meta["val"]
        if node.op == "get_attr":
            value = self.fetch_attr(node.target)
            result = self.mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value
        else:
            result = super().run_node(node)
        if node.op != "output":
            node.meta["val"] = result
        return result

    def call_module(self, target, args, kwargs):
        """A sub-graph's output follows from the symbols of its inputs; another module runs on fake tensors."""
        module = self.fetch_attr(target)
        with self.mode:
            if isinstance(module, torch.fx.GraphModule):
                return _apply_shapes(module.graph, args)
            return module(*args, **kwargs)

    def call_function(self, target, args, kwargs):
        """ATen and modcompile ops run on fake tensors."""
        # Without Python's dispatcher, some composite ops of torch 2.11 take no symbolic sizes: linear without a bias.
        with self.mode, enable_python_dispatcher():
            return target(*args, **kwargs)


def _apply_shapes(graph: torch.fx.Graph, args: tuple) -> torch.Tensor:
    """The output of a sub-graph whose shapes are known for symbolic inputs, at the sizes of these arguments."""
    sizes: dict[sympy.Expr, int | torch.SymInt] = {}
    for node, value in zip(graph.find_nodes(op="placeholder"), args, strict=True):
        for expr, size in zip(shape_exprs(node) or (), value.shape, strict=True):
            if expr.is_Symbol:
                sizes.setdefault(expr, size)
    result = graph.output_node().args[0]
    shape = [int(expr) if expr.is_number else sizes[expr] for expr in shape_exprs(result) or ()]
    return args[0].new_empty(shape, dtype=result.meta["val"].dtype)


def propagate(graph_module: torch.fx.GraphModule, inputs: list, simplify: bool = True) -> None:
    """Records the shape of every value of the graph for the given fake inputs.

    With ``simplify``, values whose sizes have a simpler form share no memory with what they are views of.
    """
    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    with torch.no_grad():
        ShapePropagation(graph_module, mode).run(*inputs)
    if simplify:
        simplify_sizes(graph_module.graph)


def equalities(graph: torch.fx.Graph) -> list[sympy.Eq]:
    """The equalities that were guarded while the graph's shapes were found, in the symbols that the graph has."""
    values = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    if not mode or not mode.shape_env:
        return []
    exprs = [mode.shape_env.replace(guard.expr) for guard in mode.shape_env.guards if guard.expr.is_Equality]
    return [expr for expr in exprs if expr.is_Equality]


def simplify_sizes(graph: torch.fx.Graph, merged: dict | None = None) -> None:
    """What always equals a symbol of the inputs becomes that symbol in every recorded shape.

    A table of 128 positions of which the last S are taken has 128 - max(0, 128 - S), which is guarded to be S.

    Args:
        graph: With shapes.
        merged: Symbols that become others.
    """
    merged = merged or {}
    symbols = {expr for node in graph.find_nodes(op="placeholder") for expr in shape_exprs(node) or ()
               if expr.is_Symbol}
    equal = {}
    for equality in equalities(graph):
        for symbol, expr in (equality.args, equality.args[::-1]):
            if symbol in symbols and symbol in expr.free_symbols <= symbols:
                equal[expr.xreplace(merged)] = merged.get(symbol, symbol)
    known: dict = {}

    def simple(value, expr):
        if expr not in known:
            known[expr] = equal.get(made := expr.xreplace(merged), made)
            # 1 - max(0, 1 - S) is 1.
            if known[expr].has(Max, Min) and (bounds := value.node.shape_env.bound_sympy(made)).is_singleton():
                known[expr] = sympy.Integer(int(bounds.lower))
        return known[expr]

    def is_simple(value):
        expr = dim_expr(value)
        return expr.is_number or simple(value, expr) == expr

    def size(value):
        if is_simple(value):
            return value
        expr = simple(value, dim_expr(value))
        return int(expr) if expr.is_number else value.node.shape_env.create_symintnode(expr, hint=value.node.hint)

    def renamed(value):
        if isinstance(value, torch.SymInt) and not simple(value, dim_expr(value)).is_number:
            return size(value)
        if isinstance(value, FakeTensor) and not all(map(is_simple, value.shape)):
            with value.fake_mode:
                return torch.empty([size(d) for d in value.shape], dtype=value.dtype, device=value.device)
        return value

    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(renamed, node.meta["val"])


def propagate_alike(body: torch.fx.GraphModule, specs: list[TensorSpec], hints: dict[str, int], known: dict) -> None:
    """Records a sub-graph's shapes for the given inputs, once per kind of sub-graph.

    The layers of a model differ in their parameters only: what was found for one holds for the next.

    Args:
        body: The sub-graph.
        specs: Its inputs.
        hints: The sizes that stand for their symbols.
        known: What was found so far, by kind; kept by the caller.
    """
    kind = (*((spec.dtype, spec.shape) for spec in specs), *_text_of(body))
    if kind not in known:
        propagate(body, fake_inputs(specs, hints, body))
    _share_values(body, kind, known)


def _text_of(body: torch.fx.GraphModule) -> tuple:
    """What a sub-graph computes, whatever the names and the numbers of its parameters."""
    place = {node: i for i, node in enumerate(body.graph.nodes)}

    def of(node: torch.fx.Node) -> object:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(body)
            return value.shape, value.dtype, value.device
        return str(node.target) if node.op == "call_function" else node.op

    return tuple((of(node), str(torch.fx.node.map_arg((node.args, node.kwargs), lambda arg: place[arg])))
                 for node in body.graph.nodes)


def _share_values(body: torch.fx.GraphModule, kind: tuple, known: dict) -> None:
    """Gives a sub-graph the values of the first one of its kind, which it may be itself."""
    values = known.setdefault(kind, [node.meta.get("val") for node in body.graph.nodes])
    for node, value in zip(body.graph.nodes, values, strict=True):
        if node.op != "output":
            node.meta["val"] = value


def propagate_missing(graph_module: torch.fx.GraphModule, known: dict | None = None) -> None:
    """Records the shape of every value that carries none yet, here and in the sub-graphs it calls.

    A graph whose inputs carry no shapes is left as it is. Of sub-graphs that compute the same of the same inputs, one
    is propagated; ``known`` holds what was found, by kind.
    """
    known = {} if known is None else known
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and "val" not in node.meta:
            return
    placeholders = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    mode = next((v.fake_mode for v in placeholders if isinstance(v, FakeTensor)), None)
    if mode is None:
        return
    with torch.no_grad():
        ShapePropagation(graph_module, mode, missing_only=True).run(*placeholders)
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            inner = graph_module.get_submodule(str(node.target))
            if isinstance(inner, torch.fx.GraphModule):
                _propagate_inner(inner, known)


def _propagate_inner(body: torch.fx.GraphModule, known: dict) -> None:
    nodes = list(body.graph.nodes)
    if all("val" in node.meta for node in nodes if node.op != "output"):
        return
    kind = (*(id(node.meta.get("val")) for node in nodes if node.op == "placeholder"), *_text_of(body))
    if kind not in known:
        propagate_missing(body, known)
    _share_values(body, kind, known)
