"""The plugin library: compiled kernels of our domain's ops, which TensorRT runs in the place of standard layers.

A library registers its plugins while it is loaded, by calls into TensorRT whose layout differs between major releases.
So what it is for is read from its bytes first, and only a library for this TensorRT is loaded: by a process of its own
where an engine is built, for one that is cut short ends the process that loads it.
"""

__all__ = ["CREATORS", "LIBRARY", "NAMESPACE", "VERSION", "PluginLibrary", "identify", "load_error", "open_library",
           "read_library"]

import dataclasses
import os
import re
import threading
from pathlib import Path
from typing import Any

from modcompile.runtimes.library import private_copy
from modcompile.runtimes.trt import worker

from modcompile.errors import IntegrityError, RuntimeUnavailableError
from modcompile.files import read_file

# The library's name in an engine folder.
LIBRARY = "libmodcompile_trt.so"
# Of the plugins, as in runtimes/native/trt/op.h.
NAMESPACE, VERSION = "modcompile", "1"
# Name, version and namespace of every plugin.
CREATORS = [[name, VERSION, NAMESPACE]
            for name in ("Route", "MaskedRoute", "RouteRows", "MaskedRouteRows", "GatherRows", "MergeRows")]

# What modcompile_trt_version returns.
_SIGNATURE = re.compile(rb"modcompile TensorRT plugins: version ([\w.+-]+), plugins (\w+), TensorRT (\d+)\.(\d+);")
_FIX = "build runtimes/native with -DMODCOMPILE_TRT=ON and the headers of this TensorRT"
_turn = threading.Lock()


@dataclasses.dataclass(frozen=True)
class PluginLibrary:
    """What a library says of itself.

    Attributes:
        version: The version of the package whose sources it was built from.
        plugins: The version of its plugins.
        tensorrt: Major and minor version of the TensorRT whose headers it was built with.
    """

    version: str
    plugins: str
    tensorrt: tuple[int, int]

    def __str__(self):
        return f"{self.version} for TensorRT {self.tensorrt[0]}.{self.tensorrt[1]}"


def read_library(path: str | os.PathLike) -> bytes:
    """The contents of a library that a user named.

    Raises:
        RuntimeUnavailableError: There is no such file.
    """
    try:
        # A library's name is often a link to the one with its version.
        return read_file(Path(path).resolve())
    except IntegrityError as error:
        raise RuntimeUnavailableError("the plugin library cannot be read", expected="a file",
                                      found=error.details.get("found", error.problem), where=path, fix=_FIX) from error


def identify(content: bytes, tensorrt: str, where: object) -> PluginLibrary:
    """Reads what a library is from its bytes, and compares it with a release of TensorRT. Nothing is loaded.

    Args:
        content: The library.
        tensorrt: The version of TensorRT that is to load it.
        where: The library's name in messages.

    Raises:
        RuntimeUnavailableError: It is another library, has another version of the plugins, or is for another TensorRT.
    """
    found = _SIGNATURE.search(content)
    if found is None:
        raise RuntimeUnavailableError("the library is not modcompile's plugin library", expected=LIBRARY,
                                      found=f"{len(content)} bytes without its signature", where=where, fix=_FIX)
    version, plugins, major, minor = (text.decode() for text in found.groups())
    library = PluginLibrary(version, plugins, (int(major), int(minor)))
    if library.plugins != VERSION:
        raise RuntimeUnavailableError("the plugin library has another version of the plugins",
                                      expected=f"version {VERSION}", where=where, fix=_FIX,
                                      found=f"version {plugins}, of modcompile {version}")
    here = tuple(int(number) for number in re.findall(r"\d+", tensorrt)[:2])
    # A library knows the interfaces of older releases of its major version, not those of later ones.
    if library.tensorrt[0] != here[0] or library.tensorrt > here:
        raise RuntimeUnavailableError("the plugin library is for another TensorRT",
                                      expected=f"TensorRT {here[0]}, {tensorrt} or older", where=where, fix=_FIX,
                                      found=f"TensorRT {library.tensorrt[0]}.{library.tensorrt[1]}")
    return library


def open_library(trt: Any, content: bytes, where: object) -> PluginLibrary:
    """Loads a library into this process; a second time, one with the same contents is the same library.

    Args:
        trt: The package of TensorRT.
        content: The library, verified: it was loaded by the process that built the engine.
        where: Its name in messages.

    Raises:
        RuntimeUnavailableError: It is not for this TensorRT, or does not load.
    """
    library = identify(content, trt.__version__, where)
    path = private_copy(content)
    with _turn:
        if problem := worker.load_plugins(trt, str(path), CREATORS):
            raise load_error(problem.replace(f"{path}: ", ""), where)
    return library


def load_error(found: object, where: object) -> RuntimeUnavailableError:
    """Why a library that is for this TensorRT cannot be used."""
    return RuntimeUnavailableError("the plugin library does not load",
                                   expected="a library that registers its plugins with TensorRT", found=found,
                                   where=where, fix=_FIX)
