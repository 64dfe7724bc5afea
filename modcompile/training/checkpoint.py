"""Checkpoints of a training, which appear whole or not at all: one that is killed at any moment goes on from the last.

A checkpoint is a folder ``step-00000100`` with ``state.pt``, which holds state dicts and the states of torch's random
generators, and is read with ``weights_only``.
"""

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint"]

import os
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch

from modcompile.errors import IntegrityError, UsageError
from modcompile.files import new_folder

_STATE = "state.pt"
_NAME = re.compile(r"step-\d{8,}")


class Stateful(Protocol):
    """A module, an optimizer, a scheduler, a data loader that knows its place."""

    def state_dict(self) -> dict[str, Any]:
        """What there is to keep."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Takes it back."""


def save_checkpoint(folder: str | os.PathLike, step: int, *, keep: int = 2, **objects: Stateful) -> Path:
    """Writes a checkpoint, and removes all but the latest ones.

    Args:
        folder: Of the run's checkpoints.
        step: How many steps were taken.
        keep: How many checkpoints stay, at least 1.
        objects: What has a state, by name.

    Raises:
        UsageError: The folder has checkpoints of later steps, which are another run's; a state that could be written
            and not read back; or a number that does not fit.

    Example:
        >>> import tempfile
        >>> layer, folder = torch.nn.Linear(2, 2), tempfile.mkdtemp()
        >>> save_checkpoint(folder, 10, model=layer).name, load_checkpoint(folder, model=layer)
        ('step-00000010', 10)
    """
    if step < 0 or keep < 1:
        raise UsageError("a checkpoint cannot be kept", expected="step of at least 0, keep of at least 1",
                         found=f"step {step}, keep {keep}", where="save_checkpoint")
    target = Path(folder) / f"step-{step:08d}"
    if (latest := latest_checkpoint(folder)) and _step(latest) > step:
        raise UsageError("the folder has checkpoints of later steps", expected=f"none after step {step}",
                         found=latest.name, where=folder,
                         fix="load_checkpoint, to go on with that run; or name another folder")
    with new_folder(target, marker=_STATE, overwrite=True) as staging:
        torch.save({"step": step, "objects": {name: value.state_dict() for name, value in objects.items()},
                    "random": torch.get_rng_state(),
                    "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []},
                   staging / _STATE)
        try:
            # Tensors stay where they are: this reads what they hang on.
            torch.load(staging / _STATE, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise UsageError("a state could not be read back", where="save_checkpoint",
                             expected="tensors, numbers, strings, and lists and dicts of them",
                             found=str(error).partition("\n")[0], fix="make numbers of NumPy's scalars: float(lr)"
                             ) from error
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The folder of the latest checkpoint, if there is one."""
    return next(reversed(_checkpoints(folder)), None)


def load_checkpoint(folder: str | os.PathLike, **objects: Stateful) -> int:
    """Puts objects and random generators back to the latest checkpoint.

    Args:
        folder: Of the run's checkpoints; it need not exist.
        objects: As they were saved.

    Returns:
        The number of steps that were taken; 0, and nothing is touched, if there is no checkpoint.

    Raises:
        IntegrityError: The file cannot be read.
        UsageError: It holds other objects.
    """
    latest = latest_checkpoint(folder)
    if latest is None:
        return 0
    try:
        state = torch.load(latest / _STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever torch's reader and unpickler say of a file that something else truncated.
        raise IntegrityError("the checkpoint cannot be read", found=str(error).partition("\n")[0], where=latest,
                             fix="remove this folder: the run goes on from the checkpoint before") from error
    if state["objects"].keys() != objects.keys():
        raise UsageError("the checkpoint is of other objects", expected=", ".join(objects),
                         found=", ".join(state["objects"]), where=latest)
    for name, value in objects.items():
        value.load_state_dict(state["objects"][name])
    torch.set_rng_state(state["random"])
    if torch.cuda.is_available() and state["random_cuda"]:
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return state["step"]


def _checkpoints(folder: str | os.PathLike) -> list[Path]:
    found = Path(folder)
    return sorted((path for path in found.iterdir() if _NAME.fullmatch(path.name)), key=_step) if found.is_dir() else []


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
