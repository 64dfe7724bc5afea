"""The custom-op library: compiled kernels of our domain's ops, which ONNX Runtime runs in the place of their bodies.

ONNX Runtime takes a registered op over a model-local function of the same name (tried with releases 1.24 and 1.32), so
one model file serves with the library and without.

A library is code. It is loaded from a private copy of bytes that were checked, so nobody can change a file between its
check and its use, and a file that a user names is first loaded by a process of its own: one that is cut short does not
fail to load, it ends the process.
"""

__all__ = ["DOMAIN", "DOMAIN_VERSION", "LIBRARY", "CustomOps", "open_library", "read_library"]

import ctypes
import dataclasses
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

from modcompile.runtimes.library import private_copy

from modcompile.errors import IntegrityError, RuntimeUnavailableError
from modcompile.files import read_file

# The library's name in an engine folder.
LIBRARY = "libmodcompile_ort.so"
# Of the ops, as in modcompile.ops, which takes torch to import.
DOMAIN, DOMAIN_VERSION = "modcompile", 1
_PROBE_S = 60
_FIX = "build runtimes/native with -DMODCOMPILE_ORT=ON on a machine like this one"


@dataclasses.dataclass(frozen=True)
class CustomOps:
    """A library that is loaded.

    Attributes:
        path: The private copy that it was loaded from.
        version: The version of the package whose sources it was built from.
        providers: The execution providers that have kernels in it.
    """

    path: Path
    version: str
    providers: tuple[str, ...]

    def check_gpu(self, device: int) -> None:
        """Asks whether the kernels for CUDA run on a GPU.

        Raises:
            RuntimeUnavailableError: There are none in the library, or none for this GPU's architecture.
        """
        if "CUDAExecutionProvider" not in self.providers:
            raise RuntimeUnavailableError("the custom-op library has no kernels for CUDA",
                                          expected="CUDAExecutionProvider", found=", ".join(self.providers),
                                          fix="build runtimes/native with -DMODCOMPILE_ORT=ON and without "
                                          "-DMODCOMPILE_CUDA=OFF, or pass custom_ops=False to load_engine")
        # Loaded already: the same path is the same library.
        ask = ctypes.CDLL(str(self.path)).modcompile_ort_cuda_error
        ask.restype = ctypes.c_char_p
        if (reason := ask(device)) is not None:
            raise RuntimeUnavailableError("the custom-op library's kernels do not run on this GPU",
                                          expected=f"kernels for the architecture of cuda:{device}",
                                          found=reason.decode(), fix="build runtimes/native with "
                                          "-DCMAKE_CUDA_ARCHITECTURES=native on this machine, or pass custom_ops=False")

    def __str__(self):
        return f"{self.version} for {', '.join(name.removesuffix('ExecutionProvider') for name in self.providers)}"


def read_library(path: str | os.PathLike) -> bytes:
    """The contents of a library that a user named, proved to be one that loads.

    Raises:
        RuntimeUnavailableError: There is no such file, or it is no library that loads on this machine.
    """
    try:
        # A library's name is often a link to the one with its version.
        content = read_file(Path(path).resolve())
    except IntegrityError as error:
        raise RuntimeUnavailableError("the custom-op library cannot be read", expected="a file",
                                      found=error.details.get("found", error.problem), where=path, fix=_FIX) from error
    copy = private_copy(content)
    if reason := _probe(copy):
        raise _does_not_load(path, reason, copy)
    return content


def open_library(content: bytes, where: object) -> CustomOps:
    """Loads a library; a second time, one with the same contents is the same library.

    Args:
        content: The library, from ``read_library`` or verified.
        where: Its name in messages.

    Raises:
        RuntimeUnavailableError: It does not load, is another library, or has another version of the ops.
    """
    path = private_copy(content)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise _does_not_load(where, error, path) from error
    try:
        domain_version = library.modcompile_ort_domain_version()
        texts = [library.modcompile_ort_version, library.modcompile_ort_providers]
    except AttributeError as error:
        raise RuntimeUnavailableError("the library is not modcompile's custom-op library", expected=LIBRARY,
                                      found=str(error).rpartition(": ")[2], where=where, fix=_FIX) from error
    for text in texts:
        text.restype = ctypes.c_char_p
    version, providers = (text().decode() for text in texts)
    if domain_version != DOMAIN_VERSION:
        raise RuntimeUnavailableError("the custom-op library has another version of the ops",
                                      expected=f"version {DOMAIN_VERSION} of the domain {DOMAIN}",
                                      found=f"version {domain_version}, of modcompile {version}", where=where, fix=_FIX)
    return CustomOps(path, version, tuple(providers.split()))


@functools.cache
def _probe(copy: Path) -> str | None:
    """Why another process does not load a library, if it does not."""
    command = [sys.executable, "-I", "-S", "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(copy)]
    try:
        probe = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S)
    except subprocess.TimeoutExpired:
        return f"nothing within {_PROBE_S} s"
    if probe.returncode < 0:
        return f"the process that loaded it died of {signal.Signals(-probe.returncode).name}"
    return probe.stderr.strip().rpartition("\n")[2].removeprefix("OSError: ") if probe.returncode else None


def _does_not_load(where: object, found: object, copy: Path) -> RuntimeUnavailableError:
    return RuntimeUnavailableError("the custom-op library does not load", expected="a shared library for this machine",
                                   found=str(found).replace(f"{copy}: ", ""), where=where, fix=_FIX)
