"""Computes in half precision, except where it would hurt.

    before:  %v = aten.pow(%x, 2);  %m = aten.mean(%v);  %n = aten.mul(%x, aten.rsqrt(%m));  %y = aten.linear(%n, %w)
    after:   %x32 = aten.to(%x, float32);  %v = aten.pow(%x32, 2);  %m = aten.mean(%v);  %r = aten.rsqrt(%m)
             %n = aten.mul(%x, aten.to(%r, float16));  %y = aten.linear(%n, %w as float16)

Why: the captured graph is float32. Casting every value would square hidden states beyond float16's 65504, and rank rows
by logits with three digits. The policy is the one of autocast, with the residual stream in half as well:

1. Powers, reductions, exponentials, softmax and angles run in float32, and so does what is divided by one of them: a
   norm may be beyond the half's range, or below it. So does what only a router needs, and its gate.
2. Everything that meets a half value runs in half: products, attention, norms (which reduce in float32 inside),
   elementwise work. What does not (masks, rotary tables, the terms of a norm) stays float32 until it does.
3. Parameters are cast once each, tied ones once for all; a router's stay, and what it reads of a block's it reads as it
   was. Buffers stay float32 until they meet a half
   value: of the frequencies of rotary angles, three digits would leave nothing of a position past some hundred.
4. Masks made of float32's lowest number are clamped to the half's, as are such numbers among arguments and those that
   a constant holds. What keeps a sum from zero, such as 1e-12, stays a number that is not.
5. The model's float inputs and outputs become half; integers, bools, and logits and gates that are handed out stay.
"""

import dataclasses
import math
import operator
from typing import ClassVar, Literal

import torch
import torch.fx

from modcompile.errors import PassContractError
from modcompile.pass_manager import Pass, PassResult
from modcompile.shapes import fake_mode_of
from modcompile.spec import dtype_from_name

__all__ = ["CastPrecision"]

aten = torch.ops.aten
# Case 1.
SENSITIVE = frozenset({
    aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.mean.dim, aten.mean.default,
    aten.sum.dim_IntList, aten.sum.default, aten.cumsum.default, aten.var.correction, aten.rsqrt.default,
    aten.sqrt.default, aten.reciprocal.default, aten.exp.default, aten.log.default, aten.softmax.int,
    aten._softmax.default, aten.log_softmax.int, aten.sin.default, aten.cos.default, aten.linalg_vector_norm.default})

COPIES = (aten.lift_fresh_copy.default, aten.clone.default, aten.detach.default, aten.alias.default)
# What is made of one number, an argument of this place.
FILLS = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2, aten.scalar_tensor.default: 0}


@dataclasses.dataclass(frozen=True)
class CastPrecision(Pass):
    """Casts a flat float32 graph, whose inputs carry shapes.

    Attributes:
        dtype: float16 or bfloat16.
    """

    name: ClassVar[str] = "cast-precision"
    dtype: Literal["float16", "bfloat16"] = "float16"

    def requires(self, graph_module: torch.fx.GraphModule) -> None:
        """The graph calls no module: a sub-graph would have to be cast with it."""
        called = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]
        if called:
            raise PassContractError("a graph that calls modules cannot be cast", expected="a flat graph",
                                    found=", ".join(called[:5]), where=self.name, fix="flatten it first")

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Walks the graph once, in order; a graph without float32 inputs or parameters has been cast already."""
        graph, half = graph_module.graph, dtype_from_name(self.dtype)
        protected = _router_only(graph)
        if not any(node not in protected and _dtype(node) == torch.float32
                   and (node.op == "placeholder" or _is_parameter(graph_module, node)) for node in graph.nodes):
            return PassResult(graph_module, False)
        cast = _Cast(graph_module, half, protected)
        cast.keep(protected)
        for node in list(graph.nodes):
            cast.visit(node)
        return PassResult(graph_module, True)

    def ensures(self, graph_module: torch.fx.GraphModule) -> None:
        """Router logits are float32, and no output is."""
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.modcompile.route.default):
            if _dtype(node.args[0]) != torch.float32:
                raise PassContractError("router logits must stay float32", expected="float32", where=node.name,
                                        found=_dtype(node.args[0]))


def _dtype(node: object) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def _is_parameter(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(operator.attrgetter(str(node.target))(graph_module), torch.nn.Parameter)


def _router_only(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """What is computed for the logits alone, and what becomes of them up to the merge."""
    routes = graph.find_nodes(op="call_function", target=torch.ops.modcompile.route.default)
    found, pending = set(routes), [node.args[0] for node in routes]
    while pending:
        node = pending.pop()
        # An engine that hands out its routing returns logits and gates as they are.
        if node not in found and all(user in found or user.op == "output" or _from_logits(user, routes)
                                     for user in node.users):
            found.add(node)
            pending.extend(node.all_input_nodes)
    for node in graph.nodes:
        if _from_logits(node, routes):
            found.add(node)
    return found


def _from_logits(node: torch.fx.Node, routes: list[torch.fx.Node]) -> bool:
    """Whether a node is between the logits and the gate of a merge: it looks at logits, never at rows."""
    logits = {route.args[0] for route in routes}
    if node.op != "call_function" or node.target in (torch.ops.modcompile.merge_rows.default,
                                                     torch.ops.modcompile.gather_rows.default):
        return False
    inputs = [arg for arg in node.all_input_nodes if _dtype(arg) == torch.float32]
    return bool(inputs) and all(arg in logits or _from_logits(arg, routes) for arg in inputs)


class _Cast:
    """The graph being cast, node by node."""

    def __init__(self, graph_module: torch.fx.GraphModule, half: torch.dtype, protected: set[torch.fx.Node]):
        self.graph_module, self.graph, self.half, self.protected = graph_module, graph_module.graph, half, protected
        self.mode = fake_mode_of(graph_module)
        # The dtype that each float value now has.
        self.dtypes: dict[torch.fx.Node, torch.dtype] = {}
        self.casts: dict[tuple, torch.fx.Node] = {}
        self.parameters: dict[int, torch.Tensor] = {}

    def keep(self, nodes: set[torch.fx.Node]) -> None:
        """Gives parameters that are read both in float32 and in half, case 3, a second name in float32."""
        halved = {node.target for node in self.graph.find_nodes(op="get_attr") if node not in self.protected}
        for node in nodes:
            if node.op == "get_attr" and node.target in halved and _is_parameter(self.graph_module, node):
                holder, leaf = self._attribute(node)
                setattr(holder, f"{leaf}_float32", getattr(holder, leaf))
                node.target = f"{node.target}_float32"

    def visit(self, node: torch.fx.Node) -> None:
        """Casts one node's operands, and notes its own dtype."""
        before = _dtype(node)
        if node.op == "placeholder" and before == torch.float32:
            self._retype_input(node)
        elif before == torch.float32 and node not in self.protected and _is_parameter(self.graph_module, node):
            self._cast_parameter(node)
        elif node.op == "output":
            node.args = torch.fx.node.map_arg(
                node.args, lambda arg: arg if arg in self.protected else self._as(arg, self.half, node))
        elif node.op == "call_function":
            self._compute(node)
        if node not in self.dtypes and before is not None:
            self.dtypes[node] = before

    def _compute(self, node: torch.fx.Node) -> None:
        if node.target is aten.expand_as.default and node.args[0] in self.dtypes:
            # Of its second operand it takes the shape alone.
            node.meta.pop("val", None)
            self.dtypes[node] = self.dtypes[node.args[0]]
            return
        floats = [arg for arg in node.all_input_nodes if self.dtypes.get(arg, torch.int64).is_floating_point]
        divisor = node.args[1] if node.target is aten.div.Tensor else None
        wide = (node in self.protected or node.target in SENSITIVE or self.dtypes.get(divisor) == torch.float32
                or all(self.dtypes[arg] == torch.float32 for arg in floats))
        target = torch.float32 if wide else self.half
        mask = self._mask(node)
        if floats:
            node.args, node.kwargs = torch.fx.node.map_arg(
                (node.args, node.kwargs), lambda arg: self._as(arg, target, node, clamp=arg is mask))
        if not wide and self.half == torch.float16:
            node.args = torch.fx.node.map_aggregate(node.args, self._in_range)
            if node.target in (aten.add.Tensor, aten.clamp_min.default, aten.clamp.default):
                node.args = torch.fx.node.map_aggregate(node.args, self._above_zero)
        result = node.meta.pop("val", None)
        made = result.dtype if isinstance(result, torch.Tensor) else None
        if made == torch.float32:
            # A value made of no float (a range, a fill, a cast of integers) is float32 as it says.
            self.dtypes[node] = target if floats and not self._names_float32(node) else torch.float32
        elif isinstance(result, tuple | list):
            self.dtypes[node] = target
        elif made is not None:
            self.dtypes[node] = made
        if node.target is operator.getitem and made == torch.float32:
            self.dtypes[node] = self.dtypes.get(node.args[0], target)

    @staticmethod
    def _names_float32(node: torch.fx.Node) -> bool:
        return torch.float32 in (*node.args, *node.kwargs.values())

    def _mask(self, node: torch.fx.Node) -> torch.fx.Node | None:
        """Case 4: the operand of attention that may hold float32's lowest number."""
        if node.target is aten.scaled_dot_product_attention.default:
            return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        return None

    def _in_range(self, arg):
        limits = torch.finfo(self.half)
        return min(max(arg, limits.min), limits.max) if isinstance(arg, float) and abs(arg) != float("inf") else arg

    def _above_zero(self, arg):
        least = torch.finfo(self.half).smallest_normal * torch.finfo(self.half).eps
        return math.copysign(least, arg) if isinstance(arg, float) and 0 < abs(arg) < least else arg

    def _is_out_of_range(self, node: torch.fx.Node) -> bool:
        """Whether a constant holds numbers that the half would take for infinity."""
        while node.target in COPIES:
            node = node.args[0]
        if node.op == "get_attr":
            held = operator.attrgetter(str(node.target))(self.graph_module)
            return bool((held.isfinite() & (held.abs() > torch.finfo(self.half).max)).any())
        number = node.args[FILLS[node.target]] if node.target in FILLS else None
        return isinstance(number, float | int) and torch.finfo(self.half).max < abs(number) < math.inf

    def _as(self, arg: torch.fx.Node, dtype: torch.dtype, user: torch.fx.Node, clamp: bool = False) -> torch.fx.Node:
        if not self.dtypes.get(arg, torch.int64).is_floating_point or self.dtypes[arg] == dtype:
            return arg
        clamp = clamp or (dtype == torch.float16 and self._is_out_of_range(arg))
        if (arg, dtype, clamp) not in self.casts:
            with self.graph.inserting_before(user):
                value = arg
                if clamp:
                    limits = torch.finfo(dtype)
                    value = self.graph.call_function(aten.clamp.default, (value, limits.min, limits.max))
                made = self.graph.call_function(aten.to.dtype, (value, dtype))
            made.meta["nn_module_stack"] = user.meta.get("nn_module_stack", {})
            self.casts[arg, dtype, clamp] = made
        return self.casts[arg, dtype, clamp]

    def _retype_input(self, node: torch.fx.Node) -> None:
        with self.mode:
            node.meta["val"] = node.meta["val"].to(self.half)
        self.dtypes[node] = self.half

    def _cast_parameter(self, node: torch.fx.Node) -> None:
        """Case 3, in place of the attribute: the graph module is a copy that shares tensors with the model."""
        holder, leaf = self._attribute(node)
        tensor = getattr(holder, leaf)
        if tensor.dtype == torch.float32:
            if id(tensor) not in self.parameters:
                self.parameters[id(tensor)] = torch.nn.Parameter(tensor.detach().to(self.half), requires_grad=False)
            setattr(holder, leaf, self.parameters[id(tensor)])
        node.meta.pop("val", None)
        self.dtypes[node] = self.half

    def _attribute(self, node: torch.fx.Node) -> tuple[torch.nn.Module, str]:
        """The module that has a node's tensor, and its name there."""
        parents, _, leaf = str(node.target).rpartition(".")
        return self.graph_module.get_submodule(parents), leaf
