"""A graph and the sub-graphs it calls, apart from the tensors they use: printed, copied, saved as JSON, assembled."""

import dataclasses
import keyword
import math
import operator
import re
from collections.abc import Iterator
from typing import Any

import sympy
import torch
import torch.fx
from torch import nn

# Registers the namespace's ops, which saved graphs name.
import modcompile.ops  # noqa: F401
from modcompile.errors import IntegrityError, UnsupportedGraphError
from modcompile.shapes import dim_expr
from modcompile.spec import TensorSpec, dtype_name

__all__ = ["Program", "format_graph", "order_tensors"]

# Python functions on sizes that a graph may call; everything else must be an op of these namespaces.
FUNCTIONS = {f"operator.{f.__name__}": f for f in (
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg,
    operator.truediv, operator.pow, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)}
FUNCTIONS |= {f"torch.{f.__name__}": f for f in (torch.sym_min, torch.sym_max, torch.sym_int, torch.sym_float)}
FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}
NAMESPACES = ("aten", "modcompile", "prims")
# What a node of a saved graph may be, and how the tensors and modules that it takes may be called.
OPS = ("placeholder", "get_attr", "call_function", "call_module", "output")
MODULE_PATH = re.compile(r"[^\"'\\\x00-\x1f]+")


@dataclasses.dataclass
class Program:
    """The structure of a model: a main graph and the sub-graphs of its outlined blocks.

    Attributes:
        graph: The main graph. It calls ``bodies`` and routers by module path.
        bodies: Sub-graphs by module path; their ``get_attr`` targets are relative to that path.
    """

    graph: torch.fx.Graph
    bodies: dict[str, torch.fx.Graph] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, graph_module: torch.fx.GraphModule) -> "Program":
        """The structure of an assembled graph module; the graphs are shared, not copied."""
        bodies = {}
        for node in graph_module.graph.nodes:
            if node.op == "call_module":
                inner = graph_module.get_submodule(node.target)
                if isinstance(inner, torch.fx.GraphModule):
                    bodies[node.target] = inner.graph
        return cls(graph_module.graph, bodies)

    def copy(self) -> "Program":
        """A deep copy of the structure; shapes and names are kept."""
        return Program(_copy_graph(self.graph), {path: _copy_graph(body) for path, body in self.bodies.items()})

    def assemble(self, tensors: dict[str, torch.Tensor], modules: dict[str, nn.Module] | None = None,
                 non_persistent: frozenset[str] = frozenset()) -> torch.fx.GraphModule:
        """A runnable graph module whose parameters and buffers carry the given names.

        Args:
            tensors: Every parameter and buffer by its full name; those no graph uses are kept too. ``parameters()`` is
                in their order.
            modules: Modules that the graph calls and that are not sub-graphs (routers), by path.
            non_persistent: Names of buffers that stay out of the state dict.
        """
        root: dict[str, Any] = dict(modules or {})
        for path, body in self.bodies.items():
            targets = {n.target for n in body.nodes if n.op == "get_attr"}
            root[path] = torch.fx.GraphModule({t: tensors[f"{path}.{t}"] for t in targets}, body)
        own = tensors | {f"{path}.{name}": parameter for path, module in (modules or {}).items()
                         for name, parameter in module.named_parameters()}
        root |= {n.target: own[n.target] for n in self.graph.nodes if n.op == "get_attr"}
        graph_module = torch.fx.GraphModule(root, self.graph)
        for name, tensor in tensors.items():
            _place(graph_module, name, tensor, persistent=name not in non_persistent)
        order_tensors(graph_module, list(tensors))
        return graph_module

    def to_json(self) -> dict:
        """A JSON-ready form of the structure: no code, no tensors."""
        return {"graph": _graph_to_json(self.graph),
                "bodies": {path: _graph_to_json(body) for path, body in self.bodies.items()}}

    @classmethod
    def from_json(cls, data: dict) -> "Program":
        """Reads what ``to_json`` wrote. Only ops of known namespaces and arithmetic on sizes are accepted.

        Raises:
            IntegrityError: A node that is not well formed or names something else.
        """
        return cls(_graph_from_json(data["graph"], "graph"),
                   {path: _graph_from_json(body, path) for path, body in data["bodies"].items()})


def _copy_graph(graph: torch.fx.Graph) -> torch.fx.Graph:
    copy = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    copy.output(copy.graph_copy(graph, values))
    for node in graph.nodes:
        if node.op != "output":
            values[node].meta = dict(node.meta)
    return copy


def _place(module: nn.Module, name: str, tensor: torch.Tensor, persistent: bool) -> None:
    *parents, leaf = name.split(".")
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, nn.Module())
        module = getattr(module, parent)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        if leaf in module._buffers:
            del module._buffers[leaf]
        module.register_buffer(leaf, tensor, persistent=persistent)


def order_tensors(module: nn.Module, names: list[str]) -> None:
    """Brings a module's tensors and children into the order of the given names: optimizers count parameters by it."""
    below: dict[str, list[str]] = {}
    for name in names:
        first, _, rest = name.partition(".")
        below.setdefault(first, []).append(rest)
    registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
    for registry in registries:
        for key in [*(k for k in below if k in registry), *(k for k in registry if k not in below)]:
            registry[key] = registry.pop(key)
    for key, rests in below.items():
        if (child := module._modules.get(key)) is not None:
            order_tensors(child, rests)


def target_name(target: Any) -> str:
    """The name of what a node calls, as it is printed and saved.

    Raises:
        UnsupportedGraphError: A call that a saved graph may not contain.
    """
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload) and target.namespace in NAMESPACES:
        return str(target)
    if target in FUNCTION_NAMES:
        return FUNCTION_NAMES[target]
    raise UnsupportedGraphError("the graph calls something that is not an op", where=str(target), found=type(target),
                                expected=f"ops of {', '.join(NAMESPACES)} or arithmetic on sizes",
                                fix="avoid control flow operators and foreign custom ops in the model's forward")


def _resolve(op: str, name: str, where: str) -> Any:
    if op != "call_function":
        return name
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None) \
        if namespace in NAMESPACES else None
    # A few ops read or write files; no model does.
    if not isinstance(found, torch._ops.OpOverload) or any(a.name == "filename" for a in found._schema.arguments):
        raise IntegrityError("the saved graph calls an unknown op", expected=f"ops of {', '.join(NAMESPACES)}",
                             found=name, where=where, fix="load the model with the version that saved it")
    return found


def _encode(value: Any) -> Any:
    match value:
        case torch.fx.Node():
            return {"node": value.name}
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": repr(value)}
        case list():
            return [_encode(item) for item in value]
        case tuple():
            return {"tuple": [_encode(item) for item in value]}
        case torch.dtype():
            return {"dtype": dtype_name(value)}
        case torch.device():
            return {"device": str(value)}
        case torch.layout() | torch.memory_format():
            return {"torch": str(value).removeprefix("torch.")}
        case slice():
            return {"slice": [_encode(item) for item in (value.start, value.stop, value.step)]}
    raise UnsupportedGraphError("a node's argument cannot be saved", expected="numbers, strings, dtypes, nodes",
                                found=f"{type(value).__name__}: {value}")


def _decode(value: Any, nodes: dict[str, torch.fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "node":
            return nodes[content]
        case "float":
            return float(content)
        case "tuple":
            return tuple(_decode(item, nodes) for item in content)
        case "device":
            return torch.device(content)
        case "slice":
            return slice(*(_decode(item, nodes) for item in content))
        case "dtype" | "torch":
            found = getattr(torch, content)
            if isinstance(found, torch.dtype | torch.layout | torch.memory_format):
                return found
    raise ValueError(f"unknown argument {value}")


def _spec(node: torch.fx.Node) -> TensorSpec | None:
    """An input's dtype and dims, symbols by their name, so that shapes can be propagated again after loading."""
    value = node.meta.get("val")
    if node.op != "placeholder" or not isinstance(value, torch.Tensor):
        return node.meta.get("spec")
    exprs = map(dim_expr, value.shape)
    return TensorSpec(node.name, dtype_name(value.dtype), tuple(int(e) if e.is_number else str(e) for e in exprs))


def _graph_to_json(graph: torch.fx.Graph) -> list[dict]:
    return [{"name": node.name, "op": node.op, "target": target_name(node.target), "args": _encode(list(node.args)),
             "kwargs": {key: _encode(value) for key, value in node.kwargs.items()},
             **({"role": list(node.meta["role"])} if "role" in node.meta else {}),
             **({"spec": [spec.dtype, list(spec.shape)]} if (spec := _spec(node)) else {})} for node in graph.nodes]


def _graph_from_json(rows: list[dict], where: str) -> torch.fx.Graph:
    graph, row = torch.fx.Graph(), None
    nodes: dict[str, torch.fx.Node] = {}
    try:
        for row in rows:
            nodes[row["name"]] = _node_from_json(graph, row, nodes, f"{where}: {row['name']}")
        graph.lint()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        raise IntegrityError("the saved graph has a node that is not well formed", found=str(error),
                             where=f"{where}: {str(row)[:200]}", fix="save the model again") from error
    return graph


def _node_from_json(graph: torch.fx.Graph, row: dict, nodes: dict, where: str) -> torch.fx.Node:
    # Python runs what fx writes from a graph: every name in it has to be a name, and no more.
    names = [row["name"], *row["kwargs"], *([row["target"]] if row["op"] == "placeholder" else [])]
    if row["op"] not in OPS or not all(name.isidentifier() and not keyword.iskeyword(name) for name in names) or (
            row["op"] in ("get_attr", "call_module") and not MODULE_PATH.fullmatch(row["target"])):
        raise ValueError("a node has one of the operations of a graph, and plain names")
    node = graph.create_node(row["op"], _resolve(row["op"], row["target"], where), tuple(_decode(row["args"], nodes)),
                             {key: _decode(value, nodes) for key, value in row["kwargs"].items()}, row["name"])
    node.name = row["name"]
    if "role" in row:
        node.meta["role"] = tuple(row["role"])
    if "spec" in row:
        node.meta["spec"] = TensorSpec(row["name"], row["spec"][0], tuple(row["spec"][1]))
    return node


def format_graph(graph_module: torch.fx.GraphModule, symbols: dict[sympy.Symbol, str] | None = None) -> str:
    """Stable text of a graph and its sub-graphs: a line per value, with dtype and shape.

    Sizes are named after the main graph's inputs, or d0, d1, ... by first use in each graph; two conversions of one
    model print alike.
    """
    program = Program.of(graph_module)
    text = list(_lines(program.graph, "main", dict(symbols or {})))
    for path, body in program.bodies.items():
        # A sub-graph has symbols of its own, which may happen to be called like the main graph's.
        text += ["", *_lines(body, path, {})]
    return "\n".join(text) + "\n"


def _lines(graph: torch.fx.Graph, title: str, names: dict[sympy.Symbol, str]) -> Iterator[str]:
    def dim(value) -> str:
        expr = dim_expr(value)
        for symbol in sorted(expr.free_symbols, key=str):
            names.setdefault(symbol, f"d{len(names)}")
        return str(expr.xreplace({s: sympy.Symbol(n) for s, n in names.items()})).replace(" ", "")

    def kind(value) -> str:
        if isinstance(value, torch.Tensor):
            return f"{dtype_name(value.dtype)}[{', '.join(map(dim, value.shape))}]"
        if isinstance(value, list | tuple):
            return f"({', '.join(map(kind, value))})"
        return f"size {dim(value)}" if isinstance(value, torch.SymInt) else type(value).__name__

    def arg(value) -> str:
        match value:
            case torch.fx.Node():
                return f"%{value.name}"
            case list() | tuple():
                return f"[{', '.join(map(arg, value))}]"
            case torch.dtype():
                return dtype_name(value)
            case torch.device() | torch.layout() | torch.memory_format():
                return str(value)
        return repr(value)

    inputs = ", ".join(f"%{n.name}: {kind(n.meta.get('val'))}" for n in graph.nodes if n.op == "placeholder")
    yield f"graph {title}({inputs}) {{"
    for node in graph.nodes:
        if node.op == "output":
            yield f"  return {arg(node.args[0])}"
        elif node.op == "get_attr":
            yield f"  %{node.name} = {node.target}: {kind(node.meta.get('val'))}"
        elif node.op != "placeholder":
            call = [*map(arg, node.args), *(f"{key}={arg(value)}" for key, value in node.kwargs.items())]
            verb = f"call {node.target}" if node.op == "call_module" else target_name(node.target)
            yield f"  %{node.name}: {kind(node.meta.get('val'))} = {verb}({', '.join(call)})"
    yield "}"
