"""What a compiled package is bound to beyond torch: the kind of device, processor, GPU and CUDA it was compiled for."""

__all__ = ["check_target", "find_device", "target_of"]

import platform
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from modcompile.errors import RuntimeUnavailableError, UsageError

# What must be the same on the machine that runs an engine, and what else may be said of it.
_SAME = {"platform": "the operating system and processor", "compute_capability": "the GPU's compute capability",
         "cuda": "torch's CUDA version"}


def find_device(text: str) -> torch.device:
    """The device of a name such as "cpu", "cuda" (the current one) or "cuda:1".

    Raises:
        UsageError: Another kind of device, or no device at all.
        RuntimeUnavailableError: There is no such GPU here.
    """
    try:
        device = torch.device(text)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError("this is no device that engines are compiled for", expected='"cpu", "cuda" or "cuda:1"',
                         found=repr(text), where="device")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count <= (device.index or 0):
        raise RuntimeUnavailableError("there is no such GPU", expected=text, found=f"{count} GPUs that torch sees",
                                      where=f"torch {torch.__version__}",
                                      fix='see `modcompile doctor`; or build the engine with device="cpu"')
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def target_of(device: torch.device) -> dict[str, str]:
    """What a package is bound to that is compiled here for a device, as the manifest has it.

    The compiler is told to use every instruction of this processor, for a GPU's packages too: they launch its kernels.
    """
    known = torch.cpu.get_capabilities()
    target = {"device": device.type, "platform": f"{sys.platform} {platform.machine()}",
              "cpu_features": " ".join(sorted(name for name, has in known.items() if has is True))}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        target |= {"compute_capability": f"{major}.{minor}", "cuda": str(torch.version.cuda)}
    return target


def check_target(target: Mapping[str, str], device: torch.device, folder: Path) -> None:
    """Compares what an engine was compiled for with what is here.

    Raises:
        UsageError: It was compiled for another kind of device than the one asked for.
        RuntimeUnavailableError: It was compiled for another processor, GPU or CUDA.
    """
    if target.get("device") != device.type:
        raise UsageError("the engine was compiled for another kind of device", expected=target.get("device"),
                         found=device, where=folder, fix=f'build it again with device="{device.type}"')
    here = target_of(device)
    for name, what in _SAME.items():
        if target.get(name) != here.get(name):
            raise _unfit(what, target.get(name), here.get(name), folder)
    missing = sorted(set(target.get("cpu_features", "").split()) - set(here["cpu_features"].split()))
    if missing:
        raise _unfit("the processor's instructions", ", ".join(missing), "a processor without them", folder)


def _unfit(what: str, expected: object, found: object, folder: Path) -> RuntimeUnavailableError:
    return RuntimeUnavailableError(f"the engine was compiled for another machine: {what} differs", expected=expected,
                                   found=found, where=folder, fix="build the engine again on this machine")
