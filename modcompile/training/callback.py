"""What the transformers ``Trainer`` has to be told of a routed model."""

__all__ = ["RoutedTraining", "complete_checkpoint"]

import json
import os
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from modcompile.training.anneal import CapacityAnnealing
from modcompile.training.refit import RouterRefits
from modcompile.training.with_loss import WithLoss


class RoutedTraining(TrainerCallback):
    """Tells the model the step, for errors to name it, lowers its capacities, and fits its routers again.

    Args:
        model: What the Trainer trains.
        annealing: Of its routed model, if there is one.
        refits: Of its routers, likewise.
    """

    def __init__(self, model: WithLoss, annealing: CapacityAnnealing | None = None, refits: RouterRefits | None = None):
        self.model, self.schedules = model, [each for each in (annealing, refits) if each is not None]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before every step."""
        self.model.step = state.global_step
        for schedule in self.schedules:
            schedule.update(state.global_step)


def complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The Trainer's latest checkpoint that is whole, for ``trainer.train(resume_from_checkpoint=...)``.

    The Trainer writes a checkpoint in place, ``trainer_state.json`` last: a run that was killed meanwhile leaves one
    without, or with half of that file, and ``resume_from_checkpoint=True`` would take it.
    """
    def whole(path: Path) -> bool:
        try:
            return isinstance(json.loads((path / "trainer_state.json").read_text()), dict)
        except (OSError, ValueError):
            return False

    root = Path(folder)
    found = [path for path in root.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)] if root.is_dir() else []
    steps = sorted((path for path in found if whole(path)), key=lambda path: int(path.name.rpartition("-")[2]))
    return str(steps[-1]) if steps else None
