"""Makes the chosen rows and their norm part of the kernel that chooses them, for a GPU.

    before:  %r = modcompile.route(%logits, %valid, K);  %p: int64[B, K] = %r[0]
             %g: [B, K, D] = modcompile.gather_rows(%x: [B, S, D], %p)
             %n = aten.layer_norm(%g, [D], %weight, %bias, 1e-05)
             %m = aten.index_put(%x, [%b, %p], %y)
    after:   %h = aten.mul(%x, 1.0)
             %r = modcompile.route_and_norm(%logits, %valid, K, %h, %weight, %bias, 1e-05, True);  %p = %r[0]
             %g = %r[2];  %n = %r[3]
             %m = aten.index_put(%h, [%b, %p], %y)

Why: a pre-norm block's chosen rows are normed first of all. Finding them keeps one program a sequence busy, and the GPU
idle; the norm's kernel then waits for it. In one kernel every program finds the rows again, all at the same time, and
norms a few of them.

1. Layer norm and RMS norm of the last dim, with parameters that do not depend on the rows.
2. Sizes must be known: they say how many programs there are.
3. A long sequence takes a program long to look through, which many would then do: it stays.
4. So does a row that no program can hold, and RMS norm whose epsilon the dtype gives.
5. The kernel needs the rows in memory, and there the merge writes over them. What is written over the compiler makes in
   a kernel of its own, before everything else that is made of the same values, which on 8 x 1024 rows costs as much as
   the route. So it is made a second value of, one times the first. A clone it would take for the first.
"""

import dataclasses
import operator
from typing import ClassVar

import torch
import torch.fx

# Registers the op.
import modcompile.ops.route_and_norm  # noqa: F401
from modcompile.pass_manager import Pass, PassResult, call_for

__all__ = ["RouteAndNorm"]

# B batch  S rows  K capacity  D width

aten, mod = torch.ops.aten, torch.ops.modcompile

# Case 3, in rows, and case 4, in values.
_LONGEST, _WIDEST = 2048, 16384
# A layer norm's weight, bias and epsilon where they are not given.
_LEFT_OUT = (None, None, 1e-5)


@dataclasses.dataclass(frozen=True)
class RouteAndNorm(Pass):
    """Rewrites every ``route`` after which rows of one value are gathered and normed."""

    name: ClassVar[str] = "route-and-norm"

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Starts from each route."""
        found = graph_module.graph.find_nodes(op="call_function", target=mod.route.default)
        return PassResult(graph_module, any([_join(node) for node in found]))


def _join(route: torch.fx.Node) -> bool:
    norm = next((norm for positions in route.users if positions.args[1:] == (0,) for norm in _norms(positions, route)),
                None)
    if norm is None:
        return False
    logits, valid, capacity = route.args
    x = norm.args[0].args[0]
    is_centered = norm.target is aten.layer_norm.default
    given = tuple(norm.args[2:5])
    if is_centered:
        weight, bias, eps = given + _LEFT_OUT[len(given):]
    else:
        (weight, eps), bias = given, None
    # A parameter that others use before stays where it is.
    for node in (weight, bias):
        if isinstance(node, torch.fx.Node) and route < node:
            route.prepend(node)
    gathers = [gather for gather in x.users if gather.target is mod.gather_rows.default
               and gather.args[0] is x and gather.args[1] is norm.args[0].args[1]]
    with route.graph.inserting_before(route):
        # Case 5.
        held = call_for(route, aten.mul.Tensor, x, 1.0, like=x)
        for put in [user for user in x.users if user.target is aten.index_put.default and user.args[0] is x]:
            put.args = (held, *put.args[1:])
        joined = call_for(route, mod.route_and_norm.default, logits, valid, capacity, held, weight, bias, eps,
                          is_centered)
        chosen, normed = (call_for(norm, operator.getitem, joined, index, like=norm) for index in (2, 3))
    route.replace_all_uses_with(joined)
    norm.replace_all_uses_with(normed)
    route.graph.erase_node(norm)
    for gather in gathers:
        gather.replace_all_uses_with(chosen)
        route.graph.erase_node(gather)
    route.graph.erase_node(route)
    return True


def _norms(positions: torch.fx.Node, route: torch.fx.Node) -> list[torch.fx.Node]:
    """What can be part of the route's kernel, of the norms of rows that were gathered at its positions."""
    return [norm for gather in positions.users
            if gather.target is mod.gather_rows.default and gather.args[1] is positions and gather.args[0] < route
            for norm in gather.users if norm.args[0] is gather and _fits(norm, gather)]


def _fits(norm: torch.fx.Node, gather: torch.fx.Node) -> bool:
    x = gather.args[0].meta["val"]
    sizes = [*x.shape, gather.meta["val"].shape[1]]
    if norm.target not in (aten.layer_norm.default, aten.rms_norm.default) or x.dim() != 3:
        return False
    # Cases 2 to 4.
    if not all(isinstance(size, int) for size in sizes) or x.shape[1] > _LONGEST or x.shape[2] > _WIDEST:
        return False
    # Case 1.
    parameters = [node for node in norm.all_input_nodes if node is not gather]
    has_epsilon = norm.target is aten.layer_norm.default or len(norm.args) > 3
    return len(norm.args[1]) == 1 and has_epsilon and all(node.op in ("get_attr", "placeholder") for node in parameters)
