"""Turns a softmax that is written out into the softmax that it is.

    before:  %m = aten.amax(%s, [-1], True);  %e = aten.exp(aten.sub(%s, %m))
             %p = aten.div(%e, aten.sum(%e, [-1], True))
    after:   %p = aten.softmax(%s, -1)

Why: attention is found by its softmax, to be split or fused. The largest score is taken off so that exp does not
overflow, which a softmax does itself.

1. The largest score may be there or not, and detached or not.
2. It is taken off before a softmax too: there it changes nothing.
"""

import dataclasses
import operator
from typing import ClassVar

import torch
import torch.fx

from modcompile.pass_manager import Pass, PassResult, call_for

__all__ = ["FuseSoftmax"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class FuseSoftmax(Pass):
    """Rewrites quotients of exponents and their sum, and softmaxes of shifted values."""

    name: ClassVar[str] = "fuse-softmax"

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Makes the softmaxes, then looks at what each is of."""
        graph, modified = graph_module.graph, False
        for node in graph.find_nodes(op="call_function", target=aten.div.Tensor):
            exponents, total = node.args
            if node.kwargs or not isinstance(total, torch.fx.Node) or exponents.target is not aten.exp.default:
                continue
            dim, value = _along(total, aten.sum.dim_IntList, exponents), exponents.args[0]
            # A softmax takes no integers.
            if dim is not None and value.meta["val"].dtype == node.meta["val"].dtype:
                with graph.inserting_before(node):
                    softmax = call_for(node, aten.softmax.int, value, dim, like=node)
                node.replace_all_uses_with(softmax)
                graph.erase_node(node)
                modified = True
        for node in graph.find_nodes(op="call_function", target=aten.softmax.int):
            shifted, dim = node.args[:2]
            if shifted.target is not aten.sub.Tensor or shifted.kwargs:
                continue
            # Case 2.
            if _largest(*shifted.args) == dim % _rank(node):
                node.replace_input_with(shifted, shifted.args[0])
                modified = True
        return PassResult(graph_module, modified)


def _largest(value: torch.fx.Node, of: object) -> int | None:
    """The dim along which a node is the largest of a value."""
    while isinstance(of, torch.fx.Node) and of.target is aten.detach.default:
        of = of.args[0]
    if not isinstance(of, torch.fx.Node):
        return None
    if of.target is operator.getitem and of.args[1] == 0:
        return _along(of.args[0], aten.max.dim, value)
    return _along(of, aten.amax.default, value)


def _along(node: torch.fx.Node, target: object, value: torch.fx.Node) -> int | None:
    """The dim of a call that makes one of those along one dim of a value, and keeps the dim; None for any other."""
    if node.target is not target or node.kwargs or len(node.args) != 3 or not node.args[2] or node.args[0] is not value:
        return None
    dims = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    return dims[0] % _rank(value) if len(dims) == 1 else None


def _rank(node: torch.fx.Node) -> int:
    return node.meta["val"].dim()
