"""Shared libraries that come with an engine or from a user. A library is code: what is loaded is a private copy.

The copy is made of bytes that were checked, so nobody can change a file between its check and its use.
"""

__all__ = ["private_copy"]

import atexit
import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path


def private_copy(content: bytes) -> Path:
    """A file with these contents that only this user can reach, for as long as the process lasts.

    Two calls with the same contents give the same file, so that a library is loaded once.
    """
    folder = _folder(os.getpid())
    path = folder / f"{hashlib.sha256(content).hexdigest()}.so"
    if not path.exists():
        # Several threads may come here at once; each renames a whole file, and the files are equal.
        descriptor, partial = tempfile.mkstemp(dir=folder)
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    return path


@functools.cache
def _folder(process: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="modcompile-"))
    atexit.register(_remove, folder, process)
    return folder


def _remove(folder: Path, process: int) -> None:
    # A fork of the process that made it ends earlier.
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
