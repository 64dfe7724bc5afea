"""Routers that follow the model: fitted again, in closed form, a few times while it trains."""

__all__ = ["RouterRefits"]

from collections.abc import Collection, Sequence
from typing import Any

import torch

from modcompile.calibration import refit_routers
from modcompile.calibration.given import check_routers
from modcompile.errors import UsageError
from modcompile.model import MoDModel


class RouterRefits:
    """Fits a model's routers again when given steps come, for training moves what they were fitted to.

    Each time costs a forward and a few backward passes per batch, without a step of the optimizer. Early steps move a
    model most: 5, 10, 20, 30 and 50 % of a run are good ones, and routers between them stay as they are fitted. Of
    several processes, each takes the routers of the first: none may route a row otherwise than the others.

    Args:
        mod: The model; see ``calibration.refit_routers`` for the routers that can be fitted.
        batches: What they are fitted to, calls of the model.
        steps: When.
        options: As for ``refit_routers``.

    Raises:
        UsageError: A step below 0, or routers that cannot be fitted. ``update`` raises what ``refit_routers`` does.

    Example:
        >>> import torch, modcompile as mc
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> mod = mc.convert(torch.nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 8),),
        ...                  mc.MoDConfig(gate="straight-through"))
        >>> refits = RouterRefits(mod, [(torch.randn(2, 5, 8),)], steps=(2, 4))
        >>> [refits.update(step) for step in range(6)]
        [False, False, True, False, True, False]
    """

    def __init__(self, mod: MoDModel, batches: Sequence[Any], steps: Collection[int], **options: Any):
        check_routers(mod.config)
        if any(step < 0 for step in steps):
            raise UsageError("a step does not fit", expected="steps of at least 0", found=sorted(steps),
                             where="RouterRefits")
        self.mod, self.batches, self.steps, self.options = mod, batches, frozenset(steps), options
        self.r2: dict[str, float] = {}

    def update(self, step: int) -> bool:
        """Fits the routers if it is time to; ``r2`` then is what ``refit_routers`` returned. Returns whether it was."""
        if step not in self.steps:
            return False
        self.r2 = refit_routers(self.mod, self.batches, **self.options)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for router in self.mod.routers.values():
                for parameter in router.parameters():
                    torch.distributed.broadcast(parameter.detach(), 0)
        return True
