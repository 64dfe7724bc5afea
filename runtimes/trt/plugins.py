"""Turns our ops into nodes that TensorRT's parser gives to our plugins.

before:  %positions: [B, K] int64, %filled: [B, K] bool = modcompile.MaskedRoute(%logits, %valid, %capacity)
         %mask_rows: [B, K, 1, S] bool = modcompile.GatherRows(%mask, %positions)

after:   %valid_int: [B, S] int32 = Cast(%valid)
         %positions: [B, K] int64 = modcompile.MaskedRoute[capacity=K](%logits, %valid_int)
         %filled: [B, K] bool = Cast(GatherElements(%valid_int, %positions))
         %mask_int: [B, S, 1, S] int32 = Cast(%mask)
         %rows_int: [B, K, 1, S] int32 = modcompile.GatherRows(%mask_int, %positions)
         %mask_rows: [B, K, 1, S] bool = Cast(%rows_int)

before:  %wide: [B, S, D] float32 = Cast(%x)
         %logits: [B, S] = Squeeze(Add(MatMul(%wide, %weight), %bias))
         %positions, %filled = modcompile.Route(%logits, %capacity)
         %gate: [B, K] = Where(%filled, GatherElements(%logits, %positions), 0)

after:   %logits, %positions = modcompile.RouteRows[capacity=K](%x, %weight, %bias)
         %gate: [B, K] = GatherElements(%logits, %positions)

Four things differ between an op and its plugin, whatever the interface of the plugin:
1. The capacity is a field, a number that is known when the engine is built: a plugin reads no tensor on the host.
2. Plugins take and give no bool, so a mask goes through int32.
3. A route's plugin does not give ``filled``, which is the mask at positions. Without a mask it is true: a choice by it
   is no choice, and elsewhere it is written as positions equal to themselves.
4. A linear router is part of its route's plugin. As layers it would write every row in float32, read it again, and take
   longer than the route.
The parser finds a plugin by the node's op type and the two attributes below. It inlines the function of a node without
them, even where the plugins are loaded: a file that was not lowered is read as it is.
"""

__all__ = ["use_plugins"]

from collections.abc import Callable
from typing import NamedTuple

import onnx_ir as ir
from modcompile.runtimes.trt.plugin_library import NAMESPACE, VERSION

from modcompile.errors import UnsupportedGraphError

# The domain of our ops.
_DOMAIN = "modcompile"
# The types of rows that a router's plugin reads.
_ROWS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_ATTRIBUTES = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION}


def use_plugins(model: ir.Model, sizes: ir.Model) -> None:
    """Rewrites every node of ours, in place; the functions of those ops are dropped.

    Args:
        model: Any model; one without ops of ours stays as it is.
        sizes: A copy of it in which a capacity that does not vary is a constant.

    Raises:
        UnsupportedGraphError: A capacity that varies, or an op without a plugin.
    """
    rewrites: dict[str, Callable[[ir.Node, ir.Node], list[ir.Node]]] = {
        "Route": _route, "MaskedRoute": _masked_route, "GatherRows": _gather_rows, "MergeRows": _merge_rows}
    # Folding removes nodes, none of ours.
    for node, sized in zip(_ours(model), _ours(sizes), strict=True):
        if node.op_type not in rewrites:
            raise UnsupportedGraphError("there is no plugin for this op", expected=", ".join(rewrites),
                                        found=node.op_type, where=node.name)
        producers = [value.producer() for value in node.inputs if value is not None]
        _replace(node, rewrites[node.op_type](node, sized))
        # A router that is in the plugin is not computed again.
        for producer in producers:
            if producer is not None:
                _remove_unused(producer)
    for identifier in [identifier for identifier in model.functions if identifier[0] == _DOMAIN]:
        del model.functions[identifier]
    # The logits of a plugin come where the route was, and may have been read before.
    model.graph.sort()


def _ours(model: ir.Model) -> list[ir.Node]:
    """The nodes of our domain that are not plugins yet."""
    return [node for node in model.graph.all_nodes()
            if node.domain == _DOMAIN and not _ATTRIBUTES.keys() <= node.attributes.keys()]


def _replace(node: ir.Node, made: list[ir.Node]) -> None:
    """Puts nodes in the place of one whose outputs they name."""
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, made)
    replacements = {output.name: output for new in made for output in new.outputs}
    for output in node.outputs:
        if output.uses() or output.is_graph_output():
            replacement = replacements[output.name]
            replacement.shape, replacement.type = output.shape, output.type
            ir.convenience.replace_all_uses_with(output, replacement, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    # Whoever does not ask for `filled` does not pay for it.
    for new in reversed(made):
        _remove_unused(new)


def _remove_unused(node: ir.Node) -> None:
    """Removes a node that nobody reads, and then what only it read."""
    if node.graph is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    producers = [value.producer() for value in node.inputs if value is not None]
    node.graph.remove(node, safe=True)
    for producer in producers:
        if producer is not None:
            _remove_unused(producer)


def _route(node: ir.Node, sized: ir.Node) -> list[ir.Node]:
    positions, filled = _chosen(node)
    made = [_routing(node, sized, "RouteRows", [node.inputs[0]], positions)]
    if len(node.outputs) > 1:
        _choose_always(node.outputs[1])
    return [*made, _node(node, "Equal", [made[0].outputs[-1], made[0].outputs[-1]], filled)]


def _masked_route(node: ir.Node, sized: ir.Node) -> list[ir.Node]:
    logits, valid, _ = node.inputs
    positions, filled = _chosen(node)
    mask = _cast(node, valid, ir.DataType.INT32)
    route = _routing(node, sized, "MaskedRouteRows", [logits, mask.outputs[0]], positions)
    chosen = _node(node, "GatherElements", [mask.outputs[0], route.outputs[-1]], axis=1)
    return [mask, route, chosen, _cast(node, chosen.outputs[0], ir.DataType.BOOL, filled)]


def _routing(node: ir.Node, sized: ir.Node, fused: str, inputs: list[ir.Value | None], positions: str | None
             ) -> ir.Node:
    """A route's plugin, of the op type ``fused`` if it has the router in front."""
    capacity = _capacity(node, sized)
    logits, *mask = inputs
    router = _find_router(logits)
    if router is None or logits is None:
        return _plugin(node, inputs, positions, capacity=capacity)
    made = _plugin(node, [router.x, _vector(node, router.weight), _vector(node, router.bias), *mask], positions,
                   op_type=fused, outputs=2, capacity=capacity)
    scores = made.outputs[0]
    scores.name, scores.shape, scores.type = logits.name, logits.shape, logits.type
    ir.convenience.replace_all_uses_with(logits, scores)
    return made


class _Router(NamedTuple):
    x: ir.Value  # [B, S, D]
    weight: ir.Value  # [D, 1]
    bias: ir.Value  # [1]


def _find_router(logits: ir.Value | None) -> _Router | None:
    """The linear router that computes these logits, float32 whatever x is, if one does."""
    squeeze = _producer(logits, "Squeeze")
    if squeeze is None or logits is None or logits.is_graph_output() or len(squeeze.inputs) != 2:
        return None
    axes = None if squeeze.inputs[1] is None else ir.convenience.get_const_tensor(squeeze.inputs[1])
    add = _producer(squeeze.inputs[0], "Add")
    if add is None or axes is None or axes.numpy().tolist() not in ([-1], [2]):
        return None
    for product, bias in (add.inputs, add.inputs[::-1]):
        matmul = _producer(product, "MatMul")
        if matmul is None:
            continue
        x, weight = matmul.inputs
        cast = _producer(x, "Cast")
        source = x if cast is None else cast.inputs[0]
        if (source is not None and source.shape is not None and len(source.shape) == 3 and source.dtype in _ROWS
                and _is_constant(weight, (source.shape[2], 1)) and _is_constant(bias, (1,))):
            assert weight is not None and bias is not None
            return _Router(source, weight, bias)
    return None


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _is_constant(value: ir.Value | None, shape: tuple[object, ...]) -> bool:
    """Whether a value is float32 numbers of a shape."""
    known = None if value is None else ir.convenience.get_const_tensor(value)
    return known is not None and known.dtype == ir.DataType.FLOAT and tuple(known.shape) == shape


def _vector(node: ir.Node, value: ir.Value) -> ir.Value:
    """A constant as an initializer of one dim; nodes that had one constant share one."""
    assert node.graph is not None
    name = f"{value.name}/vector"
    if name not in node.graph.initializers:
        known = ir.convenience.get_const_tensor(value)
        assert known is not None
        tensor = ir.tensor(known.numpy().reshape(-1), name=name)
        node.graph.register_initializer(ir.Value(name=name, type=ir.TensorType(tensor.dtype), const_value=tensor))
    return node.graph.initializers[name]


def _choose_always(filled: ir.Value) -> None:
    """Takes away choices by a value that is true, where they change no shape."""
    for where, index in list(filled.uses()):
        first, output = where.inputs[1] if len(where.inputs) > 1 else None, where.outputs[0]
        if (where.op_type == "Where" and where.domain == "" and index == 0 and first is not None
                and first.shape is not None and first.shape == filled.shape and not output.is_graph_output()):
            ir.convenience.replace_all_uses_with(output, first)
            assert where.graph is not None
            where.graph.remove(where, safe=True)


def _gather_rows(node: ir.Node, sized: ir.Node) -> list[ir.Node]:
    x, positions = node.inputs
    rows = node.outputs[0].name
    assert x is not None
    if x.dtype is None:
        raise UnsupportedGraphError("the type of what is gathered is not known", expected="a value with a type",
                                    found=x.name, where=node.name, fix="run onnx.shape_inference on the file")
    if x.dtype != ir.DataType.BOOL:
        return [_plugin(node, [x, positions], rows)]
    wide = _cast(node, x, ir.DataType.INT32)
    gather = _plugin(node, [wide.outputs[0], positions])
    return [wide, gather, _cast(node, gather.outputs[0], ir.DataType.BOOL, rows)]


def _merge_rows(node: ir.Node, sized: ir.Node) -> list[ir.Node]:
    return [_plugin(node, list(node.inputs), node.outputs[0].name)]


def _chosen(node: ir.Node) -> tuple[str | None, str | None]:
    """The names of a route's positions and filled, the second of which a file may leave out."""
    names = [output.name for output in node.outputs]
    return names[0], names[1] if len(names) > 1 else None


def _capacity(node: ir.Node, sized: ir.Node) -> int:
    capacity = sized.inputs[-1]
    known = None if capacity is None else ir.convenience.get_const_tensor(capacity)
    if known is None:
        raise UnsupportedGraphError("a plugin's capacity must be known when the engine is built",
                                    expected="a capacity that is a constant, or computed from sizes that do not vary",
                                    found="a capacity that varies", where=node.name,
                                    fix="give the routed axis one size in the shapes, or build without plugins")
    return int(known.numpy().item())


def _plugin(node: ir.Node, inputs: list[ir.Value | None], output: str | None = None, *, op_type: str | None = None,
            outputs: int = 1, **fields: int) -> ir.Node:
    made = ir.node(op_type or node.op_type, inputs, {**_ATTRIBUTES, **fields}, domain=_DOMAIN, name=node.name,
                   num_outputs=outputs)
    made.outputs[-1].name = output or f"{node.outputs[0].name}/{node.op_type}"
    return made


def _node(node: ir.Node, op_type: str, inputs: list[ir.Value | None], output: str | None = None, *, suffix: str = "",
          **attributes: int) -> ir.Node:
    made = ir.node(op_type, inputs, attributes, name=f"{node.name}/{op_type}{suffix}")
    # A name that the graph chose may be that of an initializer.
    made.outputs[0].name = output or f"{node.outputs[0].name}/{op_type}{suffix}"
    return made


def _cast(node: ir.Node, x: ir.Value | None, dtype: ir.DataType, output: str | None = None) -> ir.Node:
    made = _node(node, "Cast", [x], output, suffix=f".{dtype.name.lower()}", to=dtype)
    made.outputs[0].dtype = dtype
    return made
