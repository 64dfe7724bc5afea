"""What the ops that decide an engine's speed become in ONNX; torch's library translates all others.

Chosen by measurement on ONNX Runtime's CPU provider: see each function.
B batch  H heads  G key and value heads  S rows  K capacity  D model dim  d head dim
"""

__all__ = ["DOMAIN", "ONNX_FUSED_OPSET", "lowerings"]

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnx.defs import OpSchema
from onnxscript.function_libs.torch_lib.ops.core import aten_index

DOMAIN = "modcompile"
# Attention, RMSNormalization and RotaryEmbedding are operators from here on.
ONNX_FUSED_OPSET = 23
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_TENSOR_TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)", "tensor(bool)",
                 "tensor(int32)", "tensor(int64)"]
aten = torch.ops.aten
# Typed as any op set: what is recorded are graph values, which the stubs of single operators do not know.
op: Any = onnxscript.opset18
op23: Any = onnxscript.opset23


def lowerings(opset: int) -> dict[Callable, Callable]:
    """Maps torch ops to functions that record ONNX nodes, for ``torch.onnx.export``'s ``custom_translation_table``."""
    fused = opset >= ONNX_FUSED_OPSET
    table = _routing() | _CASTS | {
        aten.scaled_dot_product_attention.default: _attention if fused else _attention_written_out,
        aten.rms_norm.default: _rms_norm if fused else _rms_norm_written_out,
        torch.ops.modcompile_export.rotary.default: _rotary,
        aten.index.Tensor: _index,
    }
    if opset < 20:
        table[aten.gelu.default] = _gelu_written_out
    return table


def _attention(query: Any, key: Any, value: Any, mask: Any = None, dropout: float = 0.0, causal: bool = False, *,
               scale: float | None = None, enable_gqa: bool = False) -> Any:
    """``Attention``, on [B, S, H * d] where the heads come straight from a projection or a rotary embedding.

    At 8 x 12 x 256 x 32: 18 ms, with heads split and transposed outside 21, written out 44, contrib
    MultiHeadAttention 16. At 32 rows 0.35, 0.47, 0.47, 0.41.
    """
    if len(query.shape) != 4:
        return _attention_written_out(query, key, value, mask, scale=scale)
    heads, groups = query.shape[1], key.shape[1]
    attention = op23.Attention
    packed = [_packed(operand) for operand in (query, key, value)]
    if any(operand is None for operand in packed):
        return attention(query, key, value, mask, scale=scale, is_causal=int(causal))[0]
    mixed, *_ = attention(*packed, mask, scale=scale, is_causal=int(causal), q_num_heads=heads, kv_num_heads=groups)
    return _split_heads(mixed, query, value.shape[3])


def _attention_written_out(query: Any, key: Any, value: Any, mask: Any = None, dropout: float = 0.0,
                           causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False) -> Any:
    """Two products and a softmax in float32, no more. Grouped heads are a broadcast dim, so nothing is repeated."""
    rank, width, half = len(query.shape), query.shape[-1], query.dtype in _HALF
    heads, groups = query.shape[1], key.shape[1]
    scores = op.Mul(query, op.CastLike(op.Constant(value_float=width**-0.5 if scale is None else scale), query))
    keys = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])  # [B, G, d, S]
    values = value
    grouped = rank == 4 and heads != groups
    if grouped:
        scores = op.Reshape(scores, op.Constant(value_ints=[0, groups, heads // groups, -1, width]))
        keys, values = (op.Unsqueeze(operand, op.Constant(value_ints=[2])) for operand in (keys, values))
        mask = None if mask is None else _group_mask(mask, groups, heads // groups)
    scores = op.MatMul(scores, keys)
    scores = scores if mask is None else op.Add(scores, mask)
    weights = op.CastLike(op.Softmax(op.Cast(scores, to=ir.DataType.FLOAT), axis=-1), value) if half else \
        op.Softmax(scores, axis=-1)
    mixed = op.MatMul(weights, values)
    return op.Reshape(mixed, op.Constant(value_ints=[0, heads, -1, value.shape[-1]])) if grouped else mixed


def _group_mask(mask: Any, groups: int, repeats: int) -> Any:
    """A mask [..., S, S] of up to four dims as it goes with scores [B, G, H / G, S, S]."""
    rank = len(mask.shape)
    if rank < 3:
        return mask
    if mask.shape[rank - 3] == 1:
        return op.Unsqueeze(mask, op.Constant(value_ints=[rank - 2]))
    heads = op.Constant(value_ints=[*[0] * (rank - 3), groups, repeats])
    return op.Reshape(mask, op.Concat(heads, op.Shape(mask, start=rank - 2), axis=0))


def _rms_norm(x: Any, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """``RMSNormalization``: 0.12 ms for 512 x 576, as ONNX Runtime's own fusion of the next form."""
    return op23.RMSNormalization(x, _ones_unless(weight, x, shape), axis=-len(shape),
                                               epsilon=_epsilon(eps))


def _rms_norm_written_out(x: Any, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """In float32, with a division: the form ONNX Runtime fuses. A product with the reciprocal takes 0.26 ms."""
    wide = op.Cast(x, to=ir.DataType.FLOAT) if x.dtype in _HALF else x
    axes = op.Constant(value_ints=list(range(-len(shape), 0)))
    mean = op.ReduceMean(op.Pow(wide, op.Constant(value_float=2.0)), axes, keepdims=1)
    normalised = op.Div(wide, op.Sqrt(op.Add(mean, op.Constant(value_float=_epsilon(eps)))))
    normalised = op.CastLike(normalised, x) if x.dtype in _HALF else normalised
    return normalised if weight is None else op.Mul(normalised, weight)


def _rotary(x: Any, cos: Any, sin: Any) -> Any:
    """``RotaryEmbedding``, on [B, S, H * d] where it can be: 0.07 ms for 512 x 9 x 64, written out 0.31."""
    packed = _packed(x)
    if packed is None:
        return op23.RotaryEmbedding(x, cos, sin)
    turned = op23.RotaryEmbedding(packed, cos, sin, num_heads=x.shape[1])
    return _split_heads(turned, x, x.shape[3])


def _gelu_written_out(x: Any, approximate: str = "none") -> Any:
    """The forms ONNX Runtime fuses, 0.5 ms for 512 x 1536; torch's library writes one of 1.1."""
    def constant(value: float) -> Any:
        return op.CastLike(op.Constant(value_float=value), x)

    if approximate == "none":
        inner = op.Erf(op.Div(x, constant(2**0.5)))
        return op.Mul(op.Mul(x, op.Add(inner, constant(1.0))), constant(0.5))
    cubic = op.Mul(op.Pow(x, op.Constant(value_float=3.0)), constant(0.044715))
    inner = op.Tanh(op.Mul(op.Add(x, cubic), constant((2 / torch.pi) ** 0.5)))
    return op.Mul(op.Mul(x, constant(0.5)), op.Add(inner, constant(1.0)))


def _index(x: Any, indices: Sequence[Any]) -> Any:
    """``Gather`` for a lookup along one dim; torch's library writes every lookup as GatherND between transposes."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) == 1 and given[0][1].dtype != ir.DataType.BOOL:
        return op.Gather(x, given[0][1], axis=given[0][0])
    return aten_index(x, indices)


def _routing() -> dict[Callable, Callable]:
    """Our own ops, each one node of our domain."""
    def declare(name: str, inputs: str, outputs: str) -> Any:
        def parameters(text: str) -> list[OpSchema.FormalParameter]:
            return [OpSchema.FormalParameter(*item.split(":")) for item in text.split()]

        generic = [("T", _TENSOR_TYPES, "")] if ":T" in inputs else []
        schema = OpSchema(name, DOMAIN, 1, inputs=parameters(inputs), outputs=parameters(outputs),
                          type_constraints=generic)
        return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), name, schema)

    chosen = "positions:tensor(int64) filled:tensor(bool)"  # [B, K] each
    # logits [B, S], valid [B, S], capacity []
    plain = declare("Route", "logits:tensor(float) capacity:tensor(int64)", chosen)
    masked = declare("MaskedRoute", "logits:tensor(float) valid:tensor(bool) capacity:tensor(int64)", chosen)
    # x [B, S, ...] -> [B, K, ...]
    gather_rows = declare("GatherRows", "x:T positions:tensor(int64)", "rows:T")
    # x [B, S, D], y [B, K, D], gate [B, K] -> [B, S, D]
    merge_rows = declare("MergeRows", "x:T y:T positions:tensor(int64) gate:T", "merged:T")
    return {
        torch.ops.modcompile.route.default: lambda logits, valid, capacity: (
            plain(logits, capacity) if valid is None else masked(logits, valid, capacity)),
        torch.ops.modcompile_export.gather_rows.default: gather_rows,
        torch.ops.modcompile_export.merge_rows.default: merge_rows,
    }


# Ops of a captured graph that torch's library expects to be decomposed: all are casts, or nothing.
_CASTS: dict[Callable, Callable] = {
    aten.to.dtype: lambda x, dtype, *_, **__: op.Cast(x, to=dtype),
    aten.to.device: lambda x, device, dtype, *_, **__: op.Cast(x, to=dtype),
    aten.to.dtype_layout: lambda x, dtype=-1, **_: op.Identity(x) if dtype == -1 else op.Cast(x, to=dtype),
    aten.to.other: lambda x, other, *_, **__: op.CastLike(x, other),
    aten.type_as.default: lambda x, other: op.CastLike(x, other),
    aten.detach.default: lambda x: op.Identity(x),
}


def _packed(heads: Any) -> Any | None:
    """The value [B, S, H * d] that heads [B, H, S, d] were split from; None if they come from elsewhere."""
    transpose = heads.producer()
    if transpose is None or transpose.op_type != "Transpose":
        return None
    if list(transpose.attributes.get_ints("perm")) != [0, 2, 1, 3]:
        return None
    reshape = transpose.inputs[0].producer()
    if reshape is None or reshape.op_type != "Reshape":
        return None
    packed = reshape.inputs[0]
    _, count, _, width = heads.shape
    known = packed.shape is not None and len(packed.shape) == 3 and packed.shape[2] == count * width
    return packed if known else None


def _split_heads(packed: Any, like: Any, width: int) -> Any:
    """[B, S, H * d] -> [B, H, S, d], for the B, H and S of another value."""
    batch, heads, rows, _ = like.shape
    # The translator records types and shapes of final values alone, and _packed looks at this one.
    packed.type, packed.shape = like.type, ir.Shape([batch, rows, heads * width])
    split = op.Reshape(packed, op.Constant(value_ints=[0, 0, heads, width]))
    return op.Transpose(split, perm=[0, 2, 1, 3])


def _ones_unless(weight: Any, x: Any, shape: Sequence[int]) -> Any:
    if weight is not None:
        return weight
    ones = op.Constant(value=ir.tensor(torch.ones(tuple(shape)).numpy()))
    return op.CastLike(ones, x)


def _epsilon(eps: float | None) -> float:
    return torch.finfo(torch.float32).eps if eps is None else eps
