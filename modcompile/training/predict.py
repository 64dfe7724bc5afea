"""Predictors: small networks that say for each row, from that row alone, whether it is among the K.

The second way of the paper's section 3.5 to decide without looking ahead. A predictor sees what the router sees, behind
a stop-gradient: its loss trains nothing else, so it costs no quality.
"""

__all__ = ["Predictors"]

import torch
from torch import nn

from modcompile.errors import UsageError
from modcompile.model import MoDModel
from modcompile.routers import MlpRouter, Router
from modcompile.trace import RoutingTrace
from modcompile.training.losses import Valid, mean_valid, membership_loss, valid_of


class Predictors(nn.Module):
    """One predictor for each routed block of a model that routes tokens.

    Args:
        mod: The routed model.
        hidden: The width of the hidden layer; by default a quarter of the hidden state's.

    Raises:
        UsageError: A model that routes sequences, or that was not converted with linear or mlp routers.

    Example:
        >>> import modcompile as mc
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> mod = mc.convert(torch.nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 8),))
        >>> predictors = Predictors(mod)
        >>> with mc.trace_routing(mod) as trace:
        ...     _ = mod(torch.randn(2, 16, 8))
        >>> [*predictors.losses(trace)], predictors.accuracy(trace)["layers.1"]
        (['layers.1'], tensor(0.1250))
    """

    def __init__(self, mod: MoDModel, hidden: int | None = None):
        super().__init__()
        if mod.config.axis != "token" or mod.config.router not in ("linear", "mlp"):
            raise UsageError("predictors are for routed tokens", expected='axis="token", router="linear" or "mlp"',
                             found=f'axis="{mod.config.axis}", router="{mod.config.router}"', where="Predictors")
        self.paths = list(mod.routers)
        self.networks = nn.ModuleList(MlpRouter(_width(router), hidden, router.weight.device)
                                      for router in mod.routers.values())

    def logits(self, trace: RoutingTrace) -> dict[str, torch.Tensor]:
        """Each block's prediction, float32 [B, S]; positive: the row is among the K."""
        made = {}
        for path, network in zip(self.paths, self.networks, strict=True):
            seen = trace[path].seen
            assert seen is not None
            made[path] = network(seen.detach())
        return made

    def losses(self, trace: RoutingTrace, valid: Valid = None) -> dict[str, torch.Tensor]:
        """Each block's binary cross-entropy, a mean over valid rows."""
        return {path: membership_loss(logits, trace[path].taken(), valid_of(valid, path))
                for path, logits in self.logits(trace).items()}

    @torch.no_grad()
    def accuracy(self, trace: RoutingTrace, valid: Valid = None) -> dict[str, torch.Tensor]:
        """The share of valid rows that are predicted right, by block."""
        return {path: mean_valid(((logits > 0) == trace[path].taken()).float(), valid_of(valid, path))
                for path, logits in self.logits(trace).items()}


def _width(router: Router) -> int:
    """D of the rows that a router takes."""
    return (router.up_weight if isinstance(router, MlpRouter) else router.weight).shape[1]
