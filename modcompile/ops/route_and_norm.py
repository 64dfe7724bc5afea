"""``route_and_norm``: ``route``, the chosen rows and their norm, in one kernel.

Not one of the ops that a routed graph is written in: the pass ``route-and-norm`` puts it into graphs for one GPU.
"""

__all__ = ["route_and_norm"]

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.nn.functional import layer_norm, rms_norm

from modcompile.ops.gather_rows import gather_rows
from modcompile.ops.route import route

# B batch  S rows  K capacity  D width

_LIBRARY = torch.library.Library("modcompile", "FRAGMENT")
_LIBRARY.define(
    "route_and_norm(Tensor logits, Tensor? valid, int capacity, Tensor x, Tensor? weight, Tensor? bias, float eps, "
    "bool is_centered) -> (Tensor positions, Tensor filled, Tensor chosen, Tensor normed)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def route_and_norm(logits: Tensor, valid: Tensor | None, capacity: int, x: Tensor, weight: Tensor | None = None,
                   bias: Tensor | None = None, eps: float = 1e-5, *, is_centered: bool = True
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chooses rows as ``route`` does, gathers and norms them.

    Args:
        logits: Router scores, ``[B, S]`` float32.
        valid: False at padding, ``[B, S]`` bool, or None.
        capacity: K, in 1..S.
        x: ``[B, S, D]``, of a floating dtype. Norms are computed in float32.
        weight: ``[D]``: what the norm is multiplied by, or None.
        bias: ``[D]``: what is added then, or None. RMS norm has none.
        eps: What is added to the mean square.
        is_centered: Whether a row's mean is subtracted first: layer norm, else RMS norm.

    Returns:
        ``positions`` and ``filled``, ``[B, K]``, see ``route``, and ``chosen`` and ``normed``, ``[B, K, D]`` in x's
        dtype: the chosen rows and their norm.

    Raises:
        UsageError: What ``route`` and ``gather_rows`` raise.
    """
    return torch.ops.modcompile.route_and_norm.default(logits, valid, capacity, x, weight, bias, eps, is_centered)


def _reference(logits: Tensor, valid: Tensor | None, capacity: int, x: Tensor, weight: Tensor | None,
               bias: Tensor | None, eps: float, is_centered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions, filled = route(logits, valid, capacity)
    chosen, shape = gather_rows(x, positions), x.shape[2:]
    normed = layer_norm(chosen, shape, weight, bias, eps) if is_centered else rms_norm(chosen, shape, weight, eps)
    return positions, filled, chosen, normed


def _fake(logits: Tensor, valid: Tensor | None, capacity: int, x: Tensor, weight: Tensor | None, bias: Tensor | None,
          eps: float, is_centered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions, filled = route(logits, valid, capacity)
    chosen = x.new_empty((*positions.shape, x.shape[2]))
    return positions, filled, chosen, torch.empty_like(chosen)


def _on_cuda(logits: Tensor, valid: Tensor | None, capacity: int, x: Tensor, weight: Tensor | None,
             bias: Tensor | None, eps: float, is_centered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from modcompile.ops import route_and_norm_triton

    with torch.cuda.device_of(logits):
        return route_and_norm_triton.launch(logits, valid, capacity, x, weight, bias, eps, is_centered=is_centered)


def _functionalize(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """As for ``route``: compilers see the kernel, ``torch.export`` keeps one node."""
    if args[0].device.type != "cuda" or not torch._functorch.config.decompose_custom_triton_ops:
        return mode.__torch_dispatch__(op, types, args, kwargs)
    from modcompile.ops import route_and_norm_triton

    *given, is_centered = args
    with mode:
        return route_and_norm_triton.launch(*given, is_centered=is_centered, traced=True)


_LIBRARY.impl("route_and_norm", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("modcompile::route_and_norm", _fake, lib=_LIBRARY)
if importlib.util.find_spec("triton") is not None:
    _LIBRARY.impl("route_and_norm", _on_cuda, "CUDA")
    torch.library.register_torch_dispatch("modcompile::route_and_norm", FunctionalTensorMode, _functionalize,
                                          lib=_LIBRARY)
