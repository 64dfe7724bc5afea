"""Gives attention the kernel that is fastest for its sizes, on the GPU that an engine is built for.

    before:  %y = aten.scaled_dot_product_attention(%q, %k, %v, None, 0.0, True)           q, k, v: float16[B, H, S, d]
    after:   %r = aten._scaled_dot_product_flash_attention(%q, %k, %v, 0.0, True, scale=None)
             %y = %r[0]

Why: PyTorch has an order of kernels for each GPU, whatever the sizes; on Hopper cuDNN's comes first. It is the fastest
for long sequences, but the rows that a block chose are few: for [8, 16, 128, 64] in float16, causal, cuDNN's kernel
took an H200 7.5 us and the flash one 6.7, for [8, 16, 64, 64] not causal 7.8, 7.0, and the efficient one 5.9.

1. Each kind of attention, by sizes, layout, dtype and options, is timed once.
2. PyTorch's own choice stays unless another kernel saves at least a twentieth of its time: less is noise.
3. What not all kernels take stays: a mask, dropout, fewer heads for keys, another width of values, a head that is no
   multiple of 8 or wider than 256, a causal flag with fewer queries than keys, float32.
4. So does what has no known size, and all of it where there is no GPU: there is nothing to time.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor

from modcompile.attention import SDPA, attention_arguments
from modcompile.pass_manager import Pass, PassResult, Skip, call_for

__all__ = ["ChooseAttention"]

# B batch  H heads  S rows  d head dim

aten = torch.ops.aten

# What is tried, PyTorch's own choice first, and how each is called with (query, key, value) and the causal flag. The
# first of what the others give is the attention's output.
_KERNELS: dict[Any, Callable[[Any, Any, Any, bool], tuple]] = {
    SDPA: lambda q, k, v, causal: (q, k, v, None, 0.0, causal),
    aten._scaled_dot_product_flash_attention.default: lambda q, k, v, causal: (q, k, v, 0.0, causal),
    aten._scaled_dot_product_efficient_attention.default: lambda q, k, v, causal: (q, k, v, None, False, 0.0, causal),
}
# Case 2, and case 3.
_SAVES, _HEAD_UNIT, _WIDEST_HEAD = 0.05, 8, 256


@dataclasses.dataclass(frozen=True)
class ChooseAttention(Pass):
    """Replaces every attention for which another kernel than PyTorch's choice is faster.

    Attributes:
        device: The GPU that kernels are timed on, such as "cuda:0".
    """

    name: ClassVar[str] = "choose-attention"
    device: str

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Times each kind of attention, and rewrites those for which it is worth it."""
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            return PassResult(graph_module, False, (Skip("there is no GPU here to time kernels on"),))
        chosen: dict[tuple, Any] = {}
        skips, modified = [], False
        for node in graph_module.graph.find_nodes(op="call_function", target=SDPA):
            kind = _kind(node)
            if isinstance(kind, Skip):
                skips.append(kind)
                continue
            if kind not in chosen:
                chosen[kind] = self._fastest(*kind)
            if chosen[kind] != SDPA:
                _replace(node, chosen[kind])
                modified = True
        return PassResult(graph_module, modified, tuple(skips))

    def _fastest(self, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[tuple[int, ...], ...],
                 is_causal: bool, scale: float | None) -> Any:
        with torch.no_grad(), torch.device(self.device):
            query, key, value = (torch.empty_strided(shape, stride, dtype=dtype).normal_() for stride in strides)
            calls = {kernel: functools.partial(kernel, *arguments(query, key, value, is_causal), scale=scale)
                     for kernel, arguments in _KERNELS.items()}
            times = {kernel: time_us(call, self.device) for kernel, call in calls.items()}
        best = min(times, key=times.__getitem__)
        return best if times[best] < (1 - _SAVES) * times[SDPA] else SDPA


def time_us(run: Callable[[], Any], device: str) -> float:
    """The least time of several, in microseconds, in a CUDA graph, as in an engine."""
    # Only where there is a GPU is there Triton.
    from triton.testing import do_bench_cudagraph

    with torch.cuda.device(device):
        return 1000 * do_bench_cudagraph(run, rep=10, return_mode="min")


def _kind(node: torch.fx.Node) -> tuple | Skip:
    """What kernels are timed with, or case 3 or 4."""
    arguments = attention_arguments(node)
    operands: list[Tensor] = [arguments[name].meta["val"] for name in ("query", "key", "value")]
    query, key, value = operands
    if arguments["attn_mask"] is not None or arguments["dropout_p"]:
        return Skip("only attention without a mask and dropout has several kernels", node.name)
    if query.dtype not in (torch.float16, torch.bfloat16):
        return Skip("only half precision has several kernels", node.name)
    if any(not isinstance(size, int) for part in operands for size in (*part.shape, *part.stride())):
        return Skip("the sizes are not known", node.name)
    if not (query.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
            and key.shape[2] == value.shape[2] and query.shape[3] == key.shape[3] == value.shape[3]):
        return Skip("queries, keys and values differ in heads or widths", node.name)
    if query.shape[3] % _HEAD_UNIT or query.shape[3] > _WIDEST_HEAD or any(part.stride(3) != 1 for part in operands):
        return Skip("not every kernel takes heads of this width, or laid out like this", node.name)
    if query.shape[2] != key.shape[2]:
        return Skip("there are more keys than queries, or fewer", node.name)
    if any(0 in part.stride() for part in operands):
        return Skip("a value is repeated", node.name)
    return (tuple(query.shape), query.dtype, tuple(part.stride() for part in operands), arguments["is_causal"],
            arguments["scale"])


def _replace(node: torch.fx.Node, kernel: Any) -> None:
    arguments = attention_arguments(node)
    given = _KERNELS[kernel](*(arguments[name] for name in ("query", "key", "value", "is_causal")))
    with node.graph.inserting_before(node):
        made = call_for(node, kernel, *given, scale=arguments["scale"])
        output = call_for(node, operator.getitem, made, 0)
    node.replace_all_uses_with(output)
    node.graph.erase_node(node)
