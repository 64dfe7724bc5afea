"""Prepares an ONNX graph for TensorRT's parser. ``lower`` is the list of what is done, in order.

Checked against TensorRT-RTX 1.7: it takes TopK with a computed K, GatherND with batch_dims, an overwriting ScatterND,
bool and int64 tensors, IsNaN, If and Loop, and attention written out, which it fuses itself in half precision. What
``lower`` makes of our files of opset 17 holds no op that the parser of TensorRT 8.6 does not import.
"""

__all__ = ["TOPK_LIMIT", "lower"]

from collections.abc import Iterator, Sequence

import onnx_ir as ir
from modcompile.runtimes.trt.plugins import use_plugins
from modcompile.runtimes.trt.profile import Profile
from onnx_ir.passes import PreconditionError
from onnx_ir.passes.common import InlinePass
from onnxscript.optimizer import fold_constants_ir

from modcompile.errors import UnsupportedGraphError
from modcompile.manifest import RoutedBlock

TOPK_LIMIT = 3840
# Sizes are computed from shapes and scalars; larger tensors are data.
_SIZE_ELEMENTS = 16
_CALL = "modcompile.call"
_OLDEST_OPSET = 13
_HALVES = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
# The parser refuses these, or, float64, computes with fewer bits than it was asked for without a word.
_REFUSED = {ir.DataType.DOUBLE, ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
            ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128}


def lower(model: ir.Model, profile: Profile, routed_blocks: Sequence[RoutedBlock] = (), *,
          plugins: bool = False, weakly_typed: bool = False) -> ir.Model:
    """Returns a copy of ``model`` that TensorRT's parser takes.

    Args:
        model: Any model; its weights are shared with the copy.
        profile: The sizes the engine is built for.
        routed_blocks: What the model's metadata says of its routed blocks, so that messages can name them.
        plugins: Leave our ops to our plugins, which the builder must have loaded; otherwise they become standard ops.
        weakly_typed: For a builder that chooses the types of layers itself: that of TensorRT 8.6, with its FP16 flag.

    Raises:
        UnsupportedGraphError: The graph has something that no rewriting makes fit; what, where and what to do.
    """
    # Before, what is an input today, TopK's K among it, was an attribute.
    if (opset := model.opset_imports.get("", _OLDEST_OPSET)) < _OLDEST_OPSET:
        raise UnsupportedGraphError("the ONNX file is too old", expected=f"opset {_OLDEST_OPSET} or later", found=opset,
                                    fix="convert it with onnx.version_converter, or export the model again")
    model = model.clone()
    if plugins:
        # They have no TopK, and so no limit.
        use_plugins(model, _known_sizes(model, profile))
    else:
        for block in routed_blocks:
            _check_block(block, profile)
    _inline_calls(model)
    _name_types(model)
    if weakly_typed:
        _free_softmax(model)
        _type_exponents(model)
    _fix_sizes(model, profile)
    _allow_unfused_attention(model)
    probe = _known_sizes(model, profile, largest=True)
    _check_types(probe)
    _check_topk(probe, profile)
    return model


def _inline_calls(model: ir.Model) -> None:
    """Puts function bodies in the place of their calls.

    The parser would inline them as well, but gives every copy of a body's node one name. Here a node is named by its
    call, ``layers.1.router/Route/TopK``: the layer table and errors then say which routed block they speak of.
    """
    for node in model.graph.all_nodes():
        if node.op_identifier() in model.functions:
            node.metadata_props[_CALL] = node.name or node.op_type
    domains = {function.domain for function in model.functions.values()}
    try:
        InlinePass()(model)
    except (PreconditionError, ValueError) as error:
        raise UnsupportedGraphError("the model's functions cannot be inlined", found=error.__cause__ or error,
                                    fix="export the model with inline=True") from error
    # Those that were never called.
    model.functions.clear()
    taken = {node.name for node in model.graph.all_nodes()}
    for node in model.graph.all_nodes():
        if call := node.metadata_props.pop(_CALL, None):
            # Attributes and sub-graphs were copied with the node; only its name is left to choose.
            node.name = _unique(f"{call}/{node.op_type}", taken)
    for domain in domains - {node.domain for node in model.graph.all_nodes()}:
        model.opset_imports.pop(domain, None)


def _fix_sizes(model: ir.Model, profile: Profile, *, largest: bool = False) -> None:
    """Writes sizes into the graph: those that do not vary, or the largest of all.

    TensorRT folds what is computed from a size it knows, and a network without a varying one needs no profile.
    """
    symbols = profile.largest if largest else profile.fixed
    for value in model.graph.inputs:
        dims = zip(value.shape or (), profile.shapes[str(value.name)], strict=True)
        value.shape = ir.Shape([size.max if largest or size.min == size.max else dim for dim, size in dims])
    for value in _node_outputs(model):
        if value.shape is not None:
            value.shape = ir.Shape([dim if isinstance(dim, int) else symbols.get(str(dim), dim)
                                    for dim in value.shape])


def _name_types(model: ir.Model) -> None:
    """``CastLike`` to the ``Cast`` that it is: the parser of TensorRT 8.6 has no other."""
    for node in model.graph.all_nodes():
        if node.op_type == "CastLike" and node.domain == "":
            like = node.inputs[1]
            if like is not None and like.dtype is not None:
                node.op_type = "Cast"
                node.attributes["to"] = ir.AttrInt64("to", like.dtype)
                node.resize_inputs(1)


def _free_softmax(model: ir.Model) -> None:
    """Takes away casts of half precision to float32 before a softmax, and back after it.

    Where types are chosen by the builder, a cast is an order: it would keep attention from becoming one kernel, and
    write the scores in float32. A softmax sums in float32 whatever it reads.
    """
    for softmax in [node for node in model.graph.all_nodes() if node.op_type == "Softmax" and node.domain == ""]:
        wide = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
        narrowing = [user for user, _ in softmax.outputs[0].uses()]
        if (wide is None or wide.op_type != "Cast" or softmax.outputs[0].is_graph_output()
                or not all(user.op_type == "Cast" for user in narrowing)):
            continue
        source = wide.inputs[0]
        to = {user.attributes.get_int("to", 0) for user in narrowing}
        # The type may be unknown, of a value within what was written out; casts back tell it.
        if len(to) != 1 or not to <= _HALVES or source is None or source.dtype not in (None, *to):
            continue
        softmax.replace_input_with(0, source)
        softmax.outputs[0].dtype = ir.DataType(to.pop())
        for user in narrowing:
            ir.convenience.replace_all_uses_with(user.outputs[0], softmax.outputs[0], replace_graph_outputs=True)
            assert user.graph is not None
            user.graph.remove(user, safe=True)
        if not wide.outputs[0].uses():
            assert wide.graph is not None
            wide.graph.remove(wide, safe=True)


def _type_exponents(model: ir.Model) -> None:
    """Gives constant exponents the type of their base. ONNX allows another, and TensorRT 8.6 computes in one type."""
    for node in model.graph.all_nodes():
        if node.op_type != "Pow" or node.domain != "":
            continue
        base, exponent = node.inputs
        known = None if exponent is None else ir.convenience.get_const_tensor(exponent)
        if base is None or base.dtype not in _HALVES or exponent is None or known is None or known.dtype == base.dtype:
            continue
        assert node.graph is not None
        name = f"{exponent.name}/{base.dtype.name.lower()}"
        if name not in node.graph.initializers:
            tensor = ir.tensor(known.numpy().astype(base.dtype.numpy()), name=name)
            node.graph.register_initializer(ir.Value(name=name, type=ir.TensorType(tensor.dtype), const_value=tensor))
        node.replace_input_with(1, node.graph.initializers[name])


def _allow_unfused_attention(model: ir.Model) -> None:
    """Lets TensorRT write ``Attention`` out where it has no fused kernel: float32, and some sizes of heads.

    Otherwise the build fails there. Where a kernel exists it is used all the same. ONNX Runtime rejects the attribute.
    """
    for node in model.graph.all_nodes():
        if node.op_type == "Attention" and node.domain == "":
            node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)


def _known_sizes(model: ir.Model, profile: Profile, *, largest: bool = False) -> ir.Model:
    """A copy to look at, in which what is computed from sizes that do not vary, or from the largest, is a constant."""
    probe = model.clone()
    _fix_sizes(probe, profile, largest=largest)
    fold_constants_ir(probe, onnx_shape_inference=True, input_size_limit=_SIZE_ELEMENTS,
                      output_size_limit=_SIZE_ELEMENTS)
    return probe


def _check_types(probe: ir.Model) -> None:
    """Refuses element types that TensorRT does not have."""
    for value in [*probe.graph.inputs, *_node_outputs(probe)]:
        if value.dtype in _REFUSED:
            node = value.producer()
            where = f"input {value.name}" if node is None else f"{node.name} ({node.op_type})"
            raise UnsupportedGraphError("TensorRT does not compute with this element type",
                                        expected="float32, float16, bfloat16, int64, int32 or bool",
                                        found=str(value.dtype).lower(), where=where,
                                        fix="cast the model or the input to one of them before the export")


def _check_block(block: RoutedBlock, profile: Profile) -> None:
    rows = block.at(profile.largest).rows
    if isinstance(rows, int) and block.capacity_for(rows) > TOPK_LIMIT:
        # Rounded down: what it says to do is enough.
        ratio = TOPK_LIMIT * 10_000 // rows / 10_000
        raise _too_many(block.capacity_for(rows), f"{rows} rows", f"routed block {block.path}",
                        f"a capacity_ratio of at most {ratio}")


def _check_topk(probe: ir.Model, profile: Profile) -> None:
    """Refuses a K that is, or for all that is known could be, above TensorRT's limit.

    TensorRT itself makes an engine of a K that varies, and fails when it runs.
    """
    sizes = ", ".join(f"{symbol} = {size}" for symbol, size in profile.largest.items()) or "static sizes"
    for node in probe.graph.all_nodes():
        if node.op_type != "TopK" or node.domain != "":
            continue
        x, k = node.inputs
        assert x is not None and k is not None
        known = ir.convenience.get_const_tensor(k)
        if known is not None:
            if (count := int(known.numpy().item())) > TOPK_LIMIT:
                raise _too_many(count, sizes, f"{node.name} (TopK)", "a smaller K")
            continue
        # Whatever K will be, it is at most the number of rows.
        rows = x.shape[node.attributes.get_int("axis", -1)] if x.shape else None
        if not isinstance(rows, int) or rows > TOPK_LIMIT:
            among = f"{rows} rows" if isinstance(rows, int) else "an unknown number of rows"
            raise UnsupportedGraphError("TensorRT's TopK may be asked for more rows than it chooses",
                                        expected=f"K <= {TOPK_LIMIT}", where=f"{node.name} (TopK)",
                                        found=f"a K that only the run decides, of {among} at {sizes}",
                                        fix="a K that is a constant or computed from sizes alone")


def _too_many(k: int, sizes: str, where: str, smaller: str) -> UnsupportedGraphError:
    return UnsupportedGraphError("TensorRT's TopK does not choose that many rows", expected=f"K <= {TOPK_LIMIT}",
                                 found=f"K = {k} at {sizes}", where=where,
                                 fix=f'{smaller}, a smaller largest shape, or runtime="ort"')


def _node_outputs(model: ir.Model) -> Iterator[ir.Value]:
    for node in model.graph.all_nodes():
        yield from node.outputs


def _unique(name: str, taken: set[str | None]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
