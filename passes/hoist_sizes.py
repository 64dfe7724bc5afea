"""Computes every size once, at the top, from the inputs.

    before:  %s1 = aten.sym_size.int(%h, 1)      in every block, from whatever tensor was at hand
             %v = aten.view(%h, [%s0, %s1, 4, 8])
    after:   %size_0 = aten.sym_size.int(%input_ids, 1)
             ...
             %v = aten.view(%h, [%size_1, %size_0, 4, 8])

Why: a size read inside a block ties the block to that tensor. Once sizes are plain values of the graph, outlining can
give each block its own: K rows, not S.
"""

import dataclasses
from typing import ClassVar

import sympy
import torch
import torch.fx
from torch.utils._sympy.functions import ToFloat
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from modcompile.errors import UnsupportedGraphError
from modcompile.pass_manager import Pass, PassResult
from modcompile.shapes import shape_exprs, size_value

__all__ = ["HoistSizes", "emit_size"]


def emit_size(graph: torch.fx.Graph, expr, symbols: dict) -> torch.fx.Node | int:
    """Nodes that compute a size expression, at the graph's insertion point; a plain integer where it has no symbol.

    Args:
        graph: Where the nodes go.
        expr: A sympy expression over the keys of ``symbols``.
        symbols: The node that holds each symbol's value, in an order that is the graph's: it decides that of terms.

    Raises:
        UnsupportedGraphError: A size that is computed through a float.
    """
    if expr.is_number:
        return int(expr)
    if expr.has(ToFloat):
        raise UnsupportedGraphError("the model computes a size through a float", expected="sizes in integers",
                                    found=expr, where="forward", fix="write torch.arange(n) + 0.5 for "
                                    "torch.arange(0.5, n), or capture with dynamic=False")
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    # A symbol's own number differs from process to process, and terms are sorted by it.
    names = {symbol: sympy.Symbol(f"s{i:03}", integer=True, positive=True) for i, symbol in enumerate(symbols)}
    proxies = {names[symbol]: torch.fx.Proxy(node, tracer) for symbol, node in symbols.items()}
    return sympy_interp(PythonReferenceAnalysis, proxies, expr.xreplace(names)).node


@dataclasses.dataclass(frozen=True)
class HoistSizes(Pass):
    """Replaces every computed size by one computed from the inputs' dims."""

    name: ClassVar[str] = "hoist-sizes"

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """One node per distinct size, right after the inputs."""
        graph = graph_module.graph
        placeholders = graph.find_nodes(op="placeholder")
        dims = {expr for node in placeholders for expr in shape_exprs(node) or () if expr.is_Symbol}
        # What depends on the inputs' values, such as the number of nonzeros, is known where it arises and no earlier.
        sizes = {node: expr for node in graph.nodes if (expr := size_value(node)) is not None
                 and expr.free_symbols <= dims}
        if all(node.meta.get("hoisted") for node in sizes):
            return PassResult(graph_module, False)
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            symbols: dict = {}
            for node in placeholders:
                for dim, size in enumerate(node.meta["val"].shape):
                    if isinstance(size, torch.SymInt) and size.node.expr not in symbols:
                        symbols[size.node.expr] = self._place(graph, node, dim, size)
            known: dict = dict(symbols)
            for node, expr in sizes.items():
                if expr not in known:
                    known[expr] = emit_size(graph, expr, symbols)
                node.replace_all_uses_with(known[expr])
        # What is now at the top stays there: a second run finds nothing to do.
        for node in graph.nodes:
            if node is first:
                break
            node.meta["hoisted"] = True
        return PassResult(graph_module, True)

    @staticmethod
    def _place(graph: torch.fx.Graph, source: torch.fx.Node, dim: int, size: torch.SymInt) -> torch.fx.Node:
        node = graph.call_function(torch.ops.aten.sym_size.int, (source, dim))
        node.meta["val"] = size
        return node
