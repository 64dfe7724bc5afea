"""Replaces operations that write in place by ones that make a new value, where nobody can tell the difference.

    before:  %y: [B, S, D] = aten.add_.Tensor(%x, %f)
             %z = aten.layer_norm(%x, ...)                  reads what was written to %x
    after:   %y: [B, S, D] = aten.add.Tensor(%x, %f)
             %z = aten.layer_norm(%y, ...)

Why: ``x += f(x)`` is how many blocks are written, and a block that writes into its input cannot be moved into a
sub-graph, nor see a copy of some rows instead.

1. Later readers of the tensor that was written to read the result instead.
2. Where mixed precisions would give another dtype, the result is cast to the dtype of the tensor that was written to.
3. A write that another name of the same memory (a view, or what it is a view of) is read after stays as it is.
4. So does a write to a parameter or a buffer, which the next call sees, and one that has no form out of place.
5. A view in place (unsqueeze_) writes nothing but the tensor's own shape: it becomes the view.
6. New memory of which nothing is read before copies have filled all parts of it, along one dim, is these joined.

A caller's tensor that the source model writes to is left as it was.
"""

import dataclasses
from typing import ClassVar

import torch
import torch.fx

from modcompile.pass_manager import Pass, PassResult, Skip, call_for
from modcompile.shapes import propagate, shape_exprs, simplify_sizes

__all__ = ["Functionalize"]

aten = torch.ops.aten
NEW = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)


@dataclasses.dataclass(frozen=True)
class Functionalize(Pass):
    """Rewrites in-place operations of the main graph."""

    name: ClassVar[str] = "functionalize"

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Rewrites the writes in order, so that each sees the values that the earlier ones made."""
        graph = graph_module.graph
        joined = any([_join(graph, node) for node in list(graph.nodes) if node.target in NEW])
        writes = [node for node in graph.nodes if _writes(node)]
        if not writes:
            return PassResult(graph_module, joined)
        place = {node: i for i, node in enumerate(graph.nodes)}
        for node in [node for node in writes if torch.Tag.inplace_view in node.target.tags]:
            # Case 5.
            if (target := _out_of_place(node.target)) is not None:
                _redirect(node, target, node, place)
                writes.remove(node)
        # Which values share memory is known once the graph has run on fake tensors that do.
        propagate(graph_module, [node.meta["val"] for node in graph.find_nodes(op="placeholder")],
                  simplify=False)
        memory = {node: _memory(node.meta.get("val")) for node in graph.nodes}
        for node in graph.find_nodes(op="call_function", target=aten.dropout.default):
            # One that is off gives the tensor it was given, though on fake tensors it may be another.
            memory[node] |= memory[node.args[0]]
        simplify_sizes(graph)
        skips = []
        for node in writes:
            reason = _kept(node, memory, place)
            if reason:
                skips.append(Skip(reason, node.name))
            else:
                _rewrite(graph, node, place)
        return PassResult(graph_module, joined or any(not _writes(node) for node in writes), tuple(skips))


def _writes(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _join(graph: torch.fx.Graph, new: torch.fx.Node) -> bool:
    """Case 6: whether new memory was replaced."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    # Each copy with where its part begins and ends; what a slice ends with may lie behind the end.
    parts, dims = {}, set()
    for part in [user for user in new.users if user.target is aten.slice.Tensor]:
        copy = next(iter(part.users), None)
        if copy is None or len(part.users) > 1 or copy.target is not aten.copy_.default or copy.args[0] is not part:
            continue
        source = copy.args[1].meta["val"]
        same = shape_exprs(copy.args[1]) == shape_exprs(part) and source.dtype == new.meta["val"].dtype
        if copy.users or not same or len(part.args) > 4:
            return False
        _, dim, start, _ = (*part.args, 0, None, None)[:4]
        dims.add(dim % source.dim())
        parts[copy] = (start or 0, source.shape[dim])
    copies = sorted(parts, key=order.__getitem__)
    if not copies or len(dims) > 1:
        return False
    reads = [user for user in new.users if user not in {copy.args[0] for copy in copies}]
    between = [node for node in graph.nodes if order[copies[0]] <= order[node] <= order[copies[-1]] and _writes(node)]
    if between != copies or any(order[user] < order[copies[-1]] for user in reads):
        return False
    (dim,), end = dims, 0
    joined = sorted(copies, key=parts.__getitem__)
    for start, size in map(parts.__getitem__, joined):
        if start != end or not isinstance(size, int):
            return False
        end += size
    if end != new.meta["val"].shape[dim]:
        return False
    with graph.inserting_before(copies[-1]):
        whole = call_for(new, aten.cat.default, [copy.args[1] for copy in joined], dim, like=new)
    for copy in copies:
        part = copy.args[0]
        graph.erase_node(copy)
        graph.erase_node(part)
    new.replace_all_uses_with(whole)
    graph.erase_node(new)
    return True


def _memory(value: object) -> frozenset[int]:
    """The storages of a value, which is a tensor or several."""
    if isinstance(value, torch.Tensor):
        return frozenset({value.untyped_storage()._cdata})
    return frozenset().union(*map(_memory, value)) if isinstance(value, list | tuple) else frozenset()


def _out_of_place(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The operation of the same arguments that returns what the given one writes to its first."""
    writes = [info is not None and info.is_write for info in (a.alias_info for a in target._schema.arguments)]
    if writes != [True] + [False] * (len(writes) - 1):
        return None
    name = target._schema.name.rpartition("::")[2].removesuffix("_")
    return getattr(getattr(aten, name, None), target._overloadname, None)


def _kept(node: torch.fx.Node, memory: dict, place: dict) -> str | None:
    """Why a write has to stay; None if it need not. Cases 3 and 4."""
    if _out_of_place(node.target) is None:
        return f"{node.target} has no form out of place"
    tensor = node.args[0]
    for other in memory:
        if other is tensor or place.get(other, 0) >= place[node] or not memory[other] & memory[tensor]:
            continue
        if any(place[user] > place[node] for user in other.users):
            return f"{node.name} writes to {tensor.name}, whose memory is read as {other.name} afterwards"
    held = [other for other in memory if other.op == "get_attr" and memory[other] & memory[tensor]]
    return f"{node.name} writes to {held[0].target}, which the next call sees" if held else None


def _rewrite(graph: torch.fx.Graph, node: torch.fx.Node, place: dict) -> None:
    target, dtype = _out_of_place(node.target), node.args[0].meta["val"].dtype
    assert target is not None, "the writes that have no other form were refused before"
    with node.meta["val"].fake_mode:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
        value = target(*args, **kwargs)
    result = node
    if value.dtype != dtype:
        # Case 2.
        with graph.inserting_after(node):
            result = graph.call_function(aten.to.dtype, (node, dtype))
        result.meta = dict(node.meta)
        node.meta["val"] = value
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    _redirect(node, target, result, place)


def _redirect(node: torch.fx.Node, target: torch._ops.OpOverload, result: torch.fx.Node, place: dict) -> None:
    """Case 1."""
    node.target = target
    node.args[0].replace_all_uses_with(result, delete_user_cb=lambda user: place.get(user, 0) > place[node])
