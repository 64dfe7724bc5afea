"""Turns our ops into nodes that TensorRT's parser gives to our plugins.

before:  %positions: [B, K] int64, %filled: [B, K] bool = modcompile.MaskedRoute(%logits, %valid, %capacity)
         %mask_rows: [B, K, 1, S] bool = modcompile.GatherRows(%mask, %positions)

after:   %valid_int: [B, S] int32 = Cast(%valid)
         %positions: [B, K] int64 = modcompile.MaskedRoute[capacity=K](%logits, %valid_int)
         %filled: [B, K] bool = Cast(GatherElements(%valid_int, %positions))
         %mask_int: [B, S, 1, S] int32 = Cast(%mask)
         %rows_int: [B, K, 1, S] int32 = modcompile.GatherRows(%mask_int, %positions)
         %mask_rows: [B, K, 1, S] bool = Cast(%rows_int)

Three things differ between an op and its plugin, whatever the interface of the plugin:
1. The capacity is a field, a number that is known when the engine is built: a plugin reads no tensor on the host.
2. Plugins take and give no bool, so a mask goes through int32.
3. A route's plugin gives positions alone. ``filled`` is the mask at positions; without a mask it is true, which is
   written as positions equal to themselves.
The parser finds a plugin by the node's op type and the two attributes below. It inlines the function of a node without
them, even where the plugins are loaded: a file that was not lowered is read as it is.
"""

__all__ = ["use_plugins"]

from collections.abc import Callable

import onnx_ir as ir

from modcompile.errors import UnsupportedGraphError

_DOMAIN = "modcompile"
# As in runtimes/native/trt/op.h.
_ATTRIBUTES = {"plugin_namespace": "modcompile", "plugin_version": "1"}


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
        _replace(node, rewrites[node.op_type](node, sized))
    for identifier in [identifier for identifier in model.functions if identifier[0] == _DOMAIN]:
        del model.functions[identifier]


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
        if not any(output.uses() or output.is_graph_output() for output in new.outputs):
            graph.remove(new, safe=True)


def _route(node: ir.Node, sized: ir.Node) -> list[ir.Node]:
    logits, _ = node.inputs
    positions, filled = _chosen(node)
    route = _plugin(node, [logits], positions, capacity=_capacity(node, sized))
    return [route, _node(node, "Equal", [route.outputs[0], route.outputs[0]], filled)]


def _masked_route(node: ir.Node, sized: ir.Node) -> list[ir.Node]:
    logits, valid, _ = node.inputs
    positions, filled = _chosen(node)
    mask = _cast(node, valid, ir.DataType.INT32)
    route = _plugin(node, [logits, mask.outputs[0]], positions, capacity=_capacity(node, sized))
    chosen = _node(node, "GatherElements", [mask.outputs[0], route.outputs[0]], axis=1)
    return [mask, route, chosen, _cast(node, chosen.outputs[0], ir.DataType.BOOL, filled)]


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


def _plugin(node: ir.Node, inputs: list[ir.Value | None], output: str | None = None, **fields: int) -> ir.Node:
    made = ir.node(node.op_type, inputs, {**_ATTRIBUTES, **fields}, domain=_DOMAIN, name=node.name)
    made.outputs[0].name = output
    return made


def _node(node: ir.Node, op_type: str, inputs: list[ir.Value | None], output: str | None = None, **attributes: int
          ) -> ir.Node:
    made = ir.node(op_type, inputs, attributes, name=f"{node.name}/{op_type}")
    made.outputs[0].name = output
    return made


def _cast(node: ir.Node, x: ir.Value | None, dtype: ir.DataType, output: str | None = None) -> ir.Node:
    made = _node(node, "Cast", [x], output, to=dtype)
    made.name = f"{made.name}.{dtype.name.lower()}"
    made.outputs[0].dtype = dtype
    return made
