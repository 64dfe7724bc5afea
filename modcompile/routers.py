"""Routers: modules that score rows. The graph calls them by path, and they train like any module."""

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Router", "router_path"]


class Router(nn.Module):
    """The paper's linear router: logits = x . w + b, in float32 whatever the model's precision.

    Weight 0 and bias 1 at the start: with the gates ``raw`` and ``straight-through``, a converted model at capacity 1.0
    is the dense model.

    Args:
        width: D, the size of the hidden state.
        device: Where the parameters are.

    Example:
        >>> Router(4)(torch.randn(2, 3, 4))
        tensor([[1., 1., 1.],
                [1., 1., 1.]], grad_fn=<SqueezeBackward1>)
    """

    def __init__(self, width: int, device: torch.device | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width, device=device))
        self.bias = nn.Parameter(torch.ones(1, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [...], of rows x [..., D]."""
        return F.linear(x.float(), self.weight.float(), self.bias.float()).squeeze(-1)


def router_path(block: str) -> str:
    """The module path of a block's router.

    Example:
        >>> router_path("encoder.layer.1")
        'router.encoder.layer.1'
    """
    return f"router.{block}"
