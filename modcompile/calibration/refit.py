"""Fits the routers of a model again, to what its rows matter now: training moves what calibration measured."""

__all__ = ["refit"]

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from modcompile.calibration.batches import bind_batches
from modcompile.calibration.fit import RIDGE, load_routers
from modcompile.calibration.measure import measure
from modcompile.calibration.objective import ObjectiveKind, choose_objective
from modcompile.convert import dropping_passes
from modcompile.errors import UsageError
from modcompile.model import MoDModel


class _Trained:
    """A model as it is, every block that is not left out in full beside it, on the same tensors."""

    def __init__(self, mod: MoDModel, objective: ObjectiveKind):
        self.dense = mod.variant(mod.dense_program, *dropping_passes(mod.config)).eval()
        self.routers, self.paths = mod.routers, [block.path for block in mod.routed_blocks]
        self.objective = choose_objective(self.dense, objective)


def refit(mod: MoDModel, batches: Sequence[Any], *, objective: ObjectiveKind = "auto", draws: int = 2,
          ridge: float = RIDGE, seed: int = 0) -> dict[str, float]:
    """Fits every router anew to how much each row's update matters to its block, in place.

    It is what ``calibrate`` does with the dense model, done with the model as it has become: call it a few times in
    the course of training, on a few batches of the training text, where routers are not trained by gradients.

    Args:
        mod: Of linear routers that choose tokens, and a gate that does not weigh them: "straight-through" or "scale".
            Its parameters, but for the routers', are left as they are; so are their gradients, and its mode.
        batches: Calls of the model, as for ``calibrate``.
        objective: As for ``calibrate_each``; what counts is what it draws.
        draws: Backward passes per batch.
        ridge: The strength of the regression's penalty, as a share of the mean square of the hidden state.
        seed: Of the random draws.

    Returns:
        For each routed block, the share of the importance's variance that its router explains.

    Raises:
        UsageError: Another kind of router or gate, no batches, or a block's output that is not a number.

    Example:
        >>> import modcompile as mc
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> mod = mc.convert(torch.nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 8),),
        ...                  mc.MoDConfig(gate="straight-through"))
        >>> list(refit(mod, [torch.randn(2, 16, 8)]))
        ['layers.1']
    """
    config = mod.config
    if (config.router, config.axis) != ("linear", "token") or config.gate not in ("straight-through", "scale"):
        raise UsageError("these routers cannot be fitted", where="refit",
                         expected='router="linear", axis="token", and gate="straight-through" or "scale"',
                         found=f'router="{config.router}", axis="{config.axis}", gate="{config.gate}"')
    if not batches:
        raise UsageError("there is nothing to fit routers to", expected="one batch or more", found="none",
                         where="batches")
    subject = _Trained(mod, objective)
    state = {block.path: Fraction(block.capacity_ratio) for block in mod.routed_blocks}
    fits = measure(subject, state, bind_batches(mod, batches, config), draws=draws, seed=seed)
    fitted = {path: fit.solve(ridge) for path, fit in fits.items()}
    load_routers(mod, fitted)
    return {path: r2 for path, (_, _, r2) in fitted.items()}
