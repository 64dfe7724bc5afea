"""Examines the environment: what is installed, what works, what is missing, and the command that installs it."""

__all__ = ["Finding", "diagnose", "find_ort_headers", "is_broken"]

import dataclasses
import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "modcompile"
# Extras that a user's machine is examined for; "dev" and "demo" are about this repository.
EXTRAS = ("hf", "gpu", "tensorrt", "tensorrt-rtx", "torch-tensorrt")
# A distribution that holds all of another's module, and more: either will do, both at once overwrite each other.
LARGER = {"onnxruntime": "onnxruntime-gpu"}
# Modules that are not named like their distribution; elsewhere a hyphen is an underscore.
MODULES = {"onnxruntime-gpu": "onnxruntime"}
FIXES = {"onnxruntime-gpu": "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"}
TOOLS = {"nvcc": "builds CUDA kernels", "cmake": "builds the C++ runtime", "g++": "compiles AOTInductor engines"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        name: What was examined: a package, a device or a tool.
        state: "ok"; "missing": not there; "broken": there, but too old or it does not load.
        found: Version and abilities, or what is wrong with it.
        needed: The version range, or what it is for.
        required: Whether this package does not work without it.
        fix: The command that mends it.
    """

    name: str
    state: Literal["ok", "missing", "broken"]
    found: str = ""
    needed: str = ""
    required: bool = False
    fix: str = ""


def diagnose() -> list[Finding]:
    """Examines Python, the packages that this one and its extras ask for, the GPU, and the native tools.

    Example:
        >>> [finding.state for finding in diagnose() if finding.name == "numpy"]
        ['ok']
    """
    if _version(PACKAGE) is None:
        return [Finding(PACKAGE, "broken", "files without an installation", required=True, fix="pip install -e .")]
    return [_python(), *_packages(), _onnxruntime_is_one(), _gpu(), *(_tool(name, use) for name, use in TOOLS.items()),
            _ort_headers()]


def find_ort_headers() -> Path | None:
    """The folder of ONNX Runtime's C++ headers, which its Python package lacks; None where there is none.

    The environment variable ``ONNXRUNTIME_INCLUDE_DIR`` names one that lies elsewhere than the system's.
    """
    given = os.environ.get("ONNXRUNTIME_INCLUDE_DIR")
    folders = [given] if given else [f"{prefix}/include/onnxruntime" for prefix in ("/usr", "/usr/local")]
    return next((Path(folder) for folder in folders if Path(folder, "onnxruntime_cxx_api.h").is_file()), None)


def is_broken(findings: list[Finding]) -> bool:
    """Whether something that is required is missing or broken."""
    return any(finding.required and finding.state != "ok" for finding in findings)


def _python() -> Finding:
    needed = importlib.metadata.metadata(PACKAGE)["Requires-Python"]
    # pip checks the range when it installs; a copied source tree does not.
    state: Literal["ok", "broken"] = "ok" if Requirement(f"python{needed}").specifier.contains(
        platform.python_version(), prereleases=True) else "broken"
    return Finding("python", state, f"{platform.python_version()} on {platform.system()} {platform.machine()}", needed,
                   required=True)


def _packages() -> Iterator[Finding]:
    for requirement in map(Requirement, importlib.metadata.requires(PACKAGE) or ()):
        extra = next((e for e in EXTRAS if requirement.marker and requirement.marker.evaluate({"extra": e})
                      and not requirement.marker.evaluate({"extra": ""})), None)
        if extra or not requirement.marker or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement, extra)


def _package(requirement: Requirement, extra: str | None) -> Finding:
    name = requirement.name
    needed = str(requirement.specifier) + (f" for [{extra}]" if extra else "")
    install = f'pip install "{PACKAGE}[{extra}]"' if extra else f'pip install "{name}{requirement.specifier}"'

    def finding(state: Literal["ok", "missing", "broken"], found: str = "") -> Finding:
        return Finding(name, state, found, needed, extra is None, "" if state == "ok" else FIXES.get(name, install))

    version = _version(name) or _version(LARGER.get(name))
    if version is None:
        return finding("missing")
    if not requirement.specifier.contains(version, prereleases=True):
        return finding("broken", version)
    try:
        module = importlib.import_module(MODULES.get(name, name.replace("-", "_")))
        abilities = ABILITIES.get(name, lambda module: "")(module)
    # A library that does not load raises whatever its loader likes.
    except Exception as error:
        return finding("broken", f"{version}, which does not load: {type(error).__name__}: {error}")
    return finding("ok", f"{version} ({abilities})" if abilities else version)


def _version(name: str | None) -> str | None:
    try:
        return importlib.metadata.version(name) if name else None
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_abilities(torch: Any) -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"


def _providers(onnxruntime: Any) -> str:
    return ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())


# What a package can do here beyond being importable.
ABILITIES: dict[str, Callable[[Any], str]] = {"torch": _torch_abilities, "onnxruntime": _providers,
                                              "onnxruntime-gpu": _providers}


def _onnxruntime_is_one() -> Finding:
    """Two distributions fill the same folder: whichever was installed last has overwritten the other."""
    found = sorted({canonicalize_name(d.name) for d in importlib.metadata.distributions()
                    if d.name and canonicalize_name(d.name).startswith("onnxruntime")
                    and "onnxruntime/__init__.py" in map(str, d.files or ())})
    fix = f"pip uninstall -y {' '.join(found)}, then install only one: onnxruntime-gpu has the CPU provider too"
    needed = "one distribution with the module onnxruntime"
    if len(found) > 1:
        return Finding("onnxruntime's files", "broken", " and ".join(found), needed, fix=fix)
    return Finding("onnxruntime's files", "ok", ", ".join(found), needed)


def _gpu() -> Finding:
    needed = "for CUDA and TensorRT engines"
    driver = _first_line("nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader")
    if driver is None:
        return Finding("NVIDIA GPU", "missing", "no working nvidia-smi", needed)
    torch = sys.modules.get("torch")
    if torch is not None and not torch.cuda.is_available():
        return Finding("NVIDIA GPU", "broken", f"{driver}, which torch does not see", needed,
                       fix="install a CUDA build of torch that fits the driver")
    return Finding("NVIDIA GPU", "ok", driver, needed)


def _tool(name: str, use: str) -> Finding:
    # nvcc's version is on one of the last lines of its banner, the others' on the first.
    version = _output(name, "--version")
    if version is None:
        return Finding(name, "missing", needed=use)
    lines = version.splitlines()
    line = next((line for line in lines if "release" in line or "version" in line), lines[0])
    return Finding(name, "ok", line.strip(), use)


def _ort_headers() -> Finding:
    name, needed = "ONNX Runtime's headers", "builds the custom-op library"
    folder = find_ort_headers()
    if folder is None:
        return Finding(name, "missing", needed=needed, fix="apt-get install libonnxruntime-dev, or "
                       "runtimes/native/ort/fetch_headers.sh FOLDER and ONNXRUNTIME_INCLUDE_DIR=FOLDER")
    return Finding(name, "ok", str(folder), needed)


def _first_line(*command: str) -> str | None:
    output = _output(*command)
    return output.splitlines()[0].strip() if output else None


def _output(*command: str) -> str | None:
    path = shutil.which(command[0])
    if path is None:
        return None
    try:
        done = subprocess.run([path, *command[1:]], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
