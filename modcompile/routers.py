"""Routers: modules that score rows. The graph calls them by path, and they train like any module.

1. ``linear``, the paper's: logits = x . w + b.
2. ``mlp``: a hidden layer before that.
3. ``depth``: one network, an ``mlp`` on the first routed block's input, predicts how deep an input has to go; every
   further block adds an offset of its own to that prediction. The deepest K inputs enter a block, so a block of a
   smaller capacity takes some of those that an earlier one took.
4. ``attention``: no parameters; the attention that a row received in the block before says what it is worth.
5. ``noise``: top-k of Gaussian noise, the control that a router which has learned something must beat.
"""

import torch
from torch import nn
from torch.nn import functional as F

from modcompile.config import MoDConfig

__all__ = ["AttentionRouter", "DepthStep", "MlpRouter", "NoiseRouter", "Router", "make_router", "router_path"]

# B batch  S rows  D model dim  R hidden width of the router


class Router(nn.Module):
    """The paper's linear router: logits = x . w + b, in float32 whatever the model's precision.

    Weight 0 and bias 1 at the start: with the gates ``raw``, ``scale`` and ``straight-through``, a converted model at
    capacity 1.0 is the dense model.

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
        return linear_in_float32(x, self.weight, self.bias).squeeze(-1)


def linear_in_float32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Of rows [..., D], in float32 under autocast too: a choice of rows compares logits that differ by little."""
    operands, device = (x.float(), weight.float(), bias.float()), x.device.type
    if len(weight) == 1 and torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        # A product of matrices would keep float32 copies of x and of its gradient; sums are fused with what is around.
        return (operands[0] * operands[1].flatten()).sum(-1, keepdim=True) + operands[2]
    # Not torch.amp.is_autocast_available, before which torch.compile of some releases ends its graph.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return F.linear(*operands)
    with torch.autocast(device, enabled=False):
        return F.linear(*operands)


class MlpRouter(Router):
    """A linear router behind one hidden layer, which starts random; the last layer starts as the linear router's.

    Args:
        width: D, the size of the hidden state.
        hidden: R, the size of the hidden layer; by default D / 4.
        device: Where the parameters are.

    Example:
        >>> MlpRouter(4, hidden=2)(torch.randn(3, 4))
        tensor([1., 1., 1.], grad_fn=<SqueezeBackward1>)
    """

    def __init__(self, width: int, hidden: int | None = None, device: torch.device | None = None):
        hidden = hidden or max(1, width // 4)
        super().__init__(hidden, device)
        first = nn.Linear(width, hidden, device=device)
        self.up_weight, self.up_bias = first.weight, first.bias  # [R, D], [R]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [...], of rows x [..., D]."""
        return super().forward(F.silu(linear_in_float32(x, self.up_weight, self.up_bias)))


class DepthStep(nn.Module):
    """A further block of depth routing: the predicted depth, and the block's offset, 0 at the start."""

    def __init__(self, device: torch.device | None = None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, depth: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [B], of predicted depths [B]."""
        return depth + self.bias.float()


class AttentionRouter(nn.Module):
    """Hands on the attention that was received. Nothing here learns, and nothing learns through it."""

    def forward(self, received: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [B, S], of the attention received [B, S]."""
        return received.detach().float()


class NoiseRouter(nn.Module):
    """Gaussian noise in the place of logits, new at every call and in every mode.

    Like dropout it follows ``torch.manual_seed``; no engine can be made of it, for none could be verified.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [...], for rows x [..., D]."""
        return torch.randn_like(x.select(-1, 0), dtype=torch.float32)


def make_router(config: MoDConfig, width: int, first: bool, device: torch.device | None = None) -> nn.Module:
    """The router of one block as a conversion leaves it.

    Args:
        config: What kind; with the gate ``scale`` it has a parameter ``scale``, 1 at the start.
        width: D, the size of the hidden state.
        first: Whether it is the first routed block's.
        device: Where the parameters are.
    """
    router: nn.Module
    if config.router == "noise":
        router = NoiseRouter()
    elif config.router == "attention":
        router = AttentionRouter()
    elif config.router == "depth" and not first:
        router = DepthStep(device)
    elif config.router in ("mlp", "depth"):
        router = MlpRouter(width, config.router_hidden, device)
    else:
        router = Router(width, device)
    if config.gate == "scale":
        router.register_parameter("scale", nn.Parameter(torch.ones(1, device=device)))
    return router


def router_path(block: str) -> str:
    """The module path of a block's router.

    Example:
        >>> router_path("encoder.layer.1")
        'router.encoder.layer.1'
    """
    return f"router.{block}"
