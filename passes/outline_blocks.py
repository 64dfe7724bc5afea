"""Outlines each block as a sub-graph at its module path.

    before:  %h1: float32[B, S, D] = aten.add(%h0, ...)          about forty nodes of the block
    after:   %encoder_layer_1 = call encoder.layer.1(%h0, %mask)
             graph encoder.layer.1(%hidden: float32[B, R, D], %mask: bool[B, 1, R, R]) { ... }

Why: the sub-graph takes its sizes from its hidden state, so the same text computes S rows in the dense model and K in
the routed one. It keeps the source's parameter names, for it stands where the source's module stood.

1. Side inputs are aligned to the rank their consumer broadcasts them to, so that they can be gathered per sequence.
   A dim 0 that holds heads folded into the batch is unfolded outside of the sub-graph, and folded again inside.
2. A size becomes arithmetic on the dims of the sub-graph's inputs; so does a literal S, where the sequence is fixed.
3. Parameters of other modules come in as side inputs.
"""

import dataclasses
import itertools
from typing import ClassVar

import sympy
import torch
import torch.fx
from modcompile.passes.hoist_sizes import emit_size

from modcompile.block_sides import ROWS, side_rank
from modcompile.block_view import BlockView, analyse_block, block_groups
from modcompile.errors import PassContractError, UnsupportedGraphError
from modcompile.pass_manager import Pass, PassResult, Skip
from modcompile.program import order_tensors
from modcompile.shapes import dim_expr, propagate_alike, shape_exprs, size_value
from modcompile.spec import TensorSpec, dtype_name

__all__ = ["OutlineBlocks"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class OutlineBlocks(Pass):
    """Puts each of the named blocks into a sub-graph.

    Attributes:
        blocks: Module paths, in the model's order.
    """

    name: ClassVar[str] = "outline-blocks"
    blocks: tuple[str, ...] = ()

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Outlines the blocks, the last one first, so that the others' borders stay in place."""
        called = {node.target for node in graph_module.graph.nodes if node.op == "call_module"}
        pending = [path for path in self.blocks if path not in called]
        lists = [[path for _, path in group] for group in block_groups(graph_module.graph).values()]
        skips = []
        known: dict = {}
        for path in reversed(pending):
            siblings = next((group for group in lists if path in group), [])
            view = analyse_block(graph_module.graph, path, [other for other in siblings if other != path])
            if isinstance(view, Skip):
                skips.append(view)
            else:
                _outline(graph_module, view, known)
        return PassResult(graph_module, len(pending) > len(skips), tuple(skips))

    def ensures(self, graph_module: torch.fx.GraphModule) -> None:
        """Every named block is a call of a sub-graph."""
        called = {node.target for node in graph_module.graph.nodes if node.op == "call_module"}
        missing = [path for path in self.blocks if path not in called]
        if missing:
            raise PassContractError("blocks could not be outlined", expected="one sub-graph per block",
                                    found=", ".join(missing), where=self.name,
                                    fix="modcompile inspect shows the reasons")


def _outline(graph_module: torch.fx.GraphModule, view: BlockView, known: dict) -> None:
    graph, sides = graph_module.graph, list(view.sides.values())
    body = _Body(view)
    for node in view.body:
        body.copy(node)
    body.graph.output(body.values[view.result])
    with graph.inserting_before(view.result):
        arguments = []
        for side in sides:
            value = side.node
            # Case 1.
            for _ in range(side.rank - len(shape_exprs(side.node) or ())):
                value = graph.call_function(aten.unsqueeze.default, (value, 0))
            if side.folded > 1:
                value = graph.call_function(aten.unflatten.int, (value, 0, [-1, side.folded]))
            arguments.append(value)
        call = graph.call_module(view.path, (view.hidden, *arguments))
    call.meta = {"val": view.result.meta["val"]}
    _install(graph_module, view.path, body.graph)
    try:
        propagate_alike(graph_module.get_submodule(view.path), *body.input_specs(), known)
        rows = (shape_exprs(body.values[view.hidden]) or ())[1]
        # A symbol that met a number is that number: the block has a table of so many rows.
        if rows.is_number:
            raise ValueError(f"it takes {rows} rows only")
    except Exception as error:
        size = f"S = {view.rows}" if view.rows.is_number else "S"
        raise UnsupportedGraphError(f"block {view.path} does not compute another number of rows",
                                    expected=f"a block in which {size} is the size of the sequence only",
                                    found=str(error).splitlines()[0], where=view.path,
                                    fix="choose an input with another number of tokens, or leave the block out of "
                                    "MoDConfig.blocks") from error
    view.result.replace_all_uses_with(call)
    for node in reversed(view.body):
        graph.erase_node(node)


def _install(graph_module: torch.fx.GraphModule, path: str, graph: torch.fx.Graph) -> None:
    """Puts the sub-graph where the block's parameters are; they stay under their names."""
    holder = graph_module.get_submodule(path)
    made = torch.fx.GraphModule(holder, graph)
    for name, child in holder.named_modules():
        target = made
        for part in name.split(".") if name else ():
            if part not in target._modules:
                target.add_module(part, torch.nn.Module())
            target = target._modules[part]
        target._parameters.update(child._parameters)
        target._buffers.update(child._buffers)
        target._non_persistent_buffers_set |= child._non_persistent_buffers_set
    order_tensors(made, [name for name, _ in holder.named_parameters(remove_duplicate=False)])
    parent, _, name = path.rpartition(".")
    graph_module.get_submodule(parent)._modules[name] = made


# What takes a part of a value along a dim, or shifts it.
CUTS = frozenset({aten.narrow, aten.roll, aten.select, aten.slice, aten.split, aten.split_with_sizes,
                  aten.unsafe_split})


def _is_size(argument) -> bool:
    kind = argument.real_type
    while kind.kind() in ("ListType", "OptionalType"):
        kind = kind.getElementType()
    # A range ends with a size, though its argument may be any number.
    return kind.kind() == "SymIntType" or argument.name in ("start", "end")


class _Body:
    """The sub-graph under construction."""

    def __init__(self, view: BlockView):
        self.view, self.graph = view, torch.fx.Graph()
        self.values = {view.hidden: self.graph.placeholder("hidden")}
        self.side_values = {key: self.graph.placeholder(side.node.name) for key, side in view.sides.items()}
        for key, side in view.sides.items():
            if side.folded > 1:
                self.side_values[key] = self.graph.call_function(aten.flatten.using_ints, (self.side_values[key], 0, 1))
        # Case 2: where each symbol can be read off the inputs, the hidden state first.
        self.sources: dict[sympy.Expr, tuple[torch.fx.Node, int]] = {}
        self.sizes: dict[sympy.Expr, torch.fx.Node] = {}
        for (node, rank), value in [((view.hidden, 3), self.values[view.hidden]), *self.side_values.items()]:
            exprs = shape_exprs(node) or ()
            for dim, expr in enumerate(map(view.in_rows, exprs)):
                if expr.is_Symbol:
                    self.sources.setdefault(expr, (value, dim + rank - len(exprs)))

    def copy(self, node: torch.fx.Node) -> None:
        """Copies a node of the block, its inputs replaced by the sub-graph's own."""
        schema = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else ()
        sizes = {key for i, argument in enumerate(schema) if _is_size(argument) for key in (i, argument.name)}
        if not self._cuts_rows(node):
            sizes = set()

        def mapped(key, value):
            return torch.fx.node.map_aggregate(value, lambda arg: self._argument(arg, node, key in sizes))

        args = tuple(mapped(i, value) for i, value in enumerate(node.args))
        kwargs = {name: mapped(name, value) for name, value in node.kwargs.items()}
        copy = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        copy.meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}
        self.values[node] = copy

    def _cuts_rows(self, node: torch.fx.Node) -> bool:
        """Whether numbers in a call may be of rows: along another dim of theirs a part begins and ends as it is."""
        if getattr(node.target, "overloadpacket", None) not in CUTS:
            return True
        names = [argument.name for argument in node.target._schema.arguments]
        place = next(i for i, name in enumerate(names) if name in ("dim", "dims"))
        dims = node.args[place] if len(node.args) > place else node.kwargs.get(names[place], 0)
        exprs = shape_exprs(node.args[0]) or ()
        return any(exprs[dim] == self.view.rows for dim in ([dims] if isinstance(dims, int) else dims))

    def _argument(self, arg, user: torch.fx.Node, is_size: bool):
        if type(arg) is int and is_size:
            return self._size(sympy.Integer(arg))
        if not isinstance(arg, torch.fx.Node):
            return arg
        if arg in self.values:
            return self.values[arg]
        expr = size_value(arg)
        if expr is not None:
            return self._size(expr)
        rank = side_rank(arg, user)
        key = (arg, rank) if (arg, rank) in self.side_values else (arg, len(shape_exprs(arg) or ()))
        if arg.op == "get_attr" and arg.target.startswith(self.view.path + "."):
            return self._parameter(arg)
        return self.side_values[key]

    def _parameter(self, arg: torch.fx.Node) -> torch.fx.Node:
        self.values[arg] = self.graph.get_attr(arg.target.removeprefix(self.view.path + "."))
        return self.values[arg]

    def _size(self, expr: sympy.Expr):
        expr = self.view.in_rows(expr)
        if expr.is_number:
            return int(expr)
        if expr not in self.sizes:
            used = [symbol for symbol in self.sources if symbol == expr or symbol in expr.free_symbols]
            for symbol in used:
                if symbol not in self.sizes:
                    self.sizes[symbol] = self.graph.call_function(aten.sym_size.int, self.sources[symbol])
            if expr not in self.sizes:
                self.sizes[expr] = emit_size(self.graph, expr, {s: self.sizes[s] for s in used})
        return self.sizes[expr]

    def input_specs(self) -> tuple[list[TensorSpec], dict[str, int]]:
        """The inputs with a symbolic batch and rows, whatever the model's own sequence is, and the symbols' hints."""
        hints: dict[str, int] = {}
        if self.view.rows.is_number:
            # Another size than S: what still holds the number S then fits no more, which is noticed here.
            sizes = {dim for node in self.view.body for arg in node.all_input_nodes for dim in shape_exprs(arg) or ()}
            hints[str(ROWS)] = next(n for n in itertools.count(int(self.view.rows) + 1) if n not in sizes)

        def name(dim) -> int | str:
            expr = self.view.in_rows(dim_expr(dim))
            if expr.is_number:
                return int(expr)
            hints.setdefault(str(expr), dim.node.hint if isinstance(dim, torch.SymInt) else int(dim))
            return str(expr)

        hidden = self.view.hidden.meta["val"]
        specs = [TensorSpec("hidden", dtype_name(hidden.dtype), tuple(map(name, hidden.shape)))]
        for side in self.view.sides.values():
            value = side.node.meta["val"]
            lead = (1,) * (side.rank - value.dim()) if side.folded == 1 else (specs[0].shape[0], side.folded)
            dims = tuple(map(name, value.shape[side.folded > 1:]))
            specs.append(TensorSpec(side.node.name, dtype_name(value.dtype), lead + dims))
        return specs, hints
