"""What a step of a training costs: floating-point operations of the forward and of the backward, as they run."""

__all__ = ["step_flops"]

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def step_flops(loss: Callable[[], torch.Tensor]) -> int:
    """Operations of one call and its backward, 2 per multiply-add.

    Products, convolutions and attention count, as in ``count_flops``: attention as the products that it is made of, in
    full whatever its mask, and without what a fused kernel computes again in the backward. So the count is that of the
    model, on every machine. Gradients are added to those that are there.

    Args:
        loss: Computes what is minimised; it is called once, and the result's ``backward``.

    Example:
        >>> layer, x = torch.nn.Linear(4, 2), torch.randn(10, 4, requires_grad=True)
        >>> step_flops(lambda: layer(x).sum())
        480
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()
