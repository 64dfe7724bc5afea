"""Capacity annealing: a training that starts as the dense model and ends at the target, in a few stages."""

__all__ = ["CapacityAnnealing"]

from fractions import Fraction

from modcompile.errors import UsageError
from modcompile.model import MoDModel


class CapacityAnnealing:
    """Lowers a model's capacities from 1 to what they are now, linearly, in stages of equal length.

    A stage derives the routed graph anew, on the same parameters, which takes as long as a conversion without its
    capture; what ``torch.compile`` made is compiled again. So a few stages, not a change at every step.

    Args:
        mod: The model, at its target capacities. It is changed in place.
        steps: The step at which the target is reached.
        stages: How many changes there are up to then.

    Example:
        >>> import torch, modcompile as mc
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> mod = mc.convert(torch.nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 8),))
        >>> annealing = CapacityAnnealing(mod, steps=100, stages=2)
        >>> [str(annealing.ratios(step)[0]) for step in (0, 49, 50, 99, 100)]
        ['1', '1', '9/16', '9/16', '1/8']
    """

    def __init__(self, mod: MoDModel, steps: int, stages: int = 8):
        if not 1 <= stages <= steps:
            raise UsageError("annealing takes at least one step a stage", expected="1 <= stages <= steps",
                             found=f"{stages} stages in {steps} steps", where="CapacityAnnealing")
        self.mod, self.steps, self.stages = mod, steps, stages
        self._target = mod.config.capacity_ratio
        self._targets = mod.config.ratios(list(mod.routers))
        self._stage = stages

    def ratios(self, step: int) -> list[Fraction]:
        """K/S of each routed block at a step."""
        return self._at(self._stage_of(step))

    def update(self, step: int) -> bool:
        """Gives the model the capacities of a step, whatever the step before was; returns whether they changed."""
        stage = self._stage_of(step)
        changed = stage != self._stage
        if changed:
            # The last stage is written as the conversion wrote it.
            self.mod.set_capacity(self._target if stage == self.stages else [float(r) for r in self._at(stage)])
            self._stage = stage
        return changed

    def _stage_of(self, step: int) -> int:
        return min(self.stages, step * self.stages // self.steps)

    def _at(self, stage: int) -> list[Fraction]:
        return [1 + (target - 1) * Fraction(stage, self.stages) for target in self._targets]
