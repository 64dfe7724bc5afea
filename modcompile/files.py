"""Files that must be whole: output folders that appear complete or not at all, and reading that trusts nothing.

A folder is built under a hidden name beside its target, flushed to the disk and renamed into place. Reading refuses
symbolic links, anything that is not a regular file, and paths that could leave the folder.
"""

__all__ = ["check_new_folder", "check_relative_path", "hash_file", "list_files", "new_folder", "read_file",
           "write_whole"]

import contextlib
import errno
import hashlib
import io
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from modcompile.errors import IntegrityError, UsageError

# What the disk says when it is full, over its quota, read-only or broken: the folder's fault, whoever was writing.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, *, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Gives a folder to write into, which becomes ``path`` when the ``with`` block ends without an error.

    Until then ``path`` is as it was; after an error or an interrupt nothing of the new folder stays. Missing parent
    folders are made.

    Args:
        path: The folder to make. It may exist if it is empty.
        marker: The file that every folder of this kind holds. Only a folder that holds it is ever overwritten.
        overwrite: Replace an existing folder. The old one stays until the new one is complete.

    Yields:
        The folder to write into, beside ``path``.

    Raises:
        UsageError: ``path`` exists and is not to be replaced; or it cannot be written (read-only, full, no folder).
    """
    # The parent is resolved, so that a link to a folder is followed; ``..`` in the last place is resolved with it.
    target = Path(os.path.realpath(path))
    _check_target(target, marker, overwrite)
    unique = os.urandom(4).hex()
    staging = target.with_name(f".modcompile-{unique}.partial")
    made: list[Path] = []
    try:
        with _writing(target, every_error=True):
            for parent in [p for p in reversed(target.parents) if not p.exists()]:
                parent.mkdir()
                made.append(parent)
            staging.mkdir()
        with _writing(target):
            yield staging
        with _writing(target, every_error=True):
            _flush(staging)
            _check_target(target, marker, overwrite)
            _put_in_place(staging, target, old=target.with_name(f".modcompile-{unique}.old"))
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in reversed(made):
                parent.rmdir()
        raise


def check_new_folder(path: str | os.PathLike, *, marker: str, overwrite: bool = False) -> None:
    """Raises what ``new_folder`` would of what is there now: before hours of work whose result goes there."""
    _check_target(Path(os.path.realpath(path)), marker, overwrite)


def check_relative_path(path: str) -> str:
    """Returns ``path`` if it names a file below a folder, on every system; "a/b.bin" does.

    Raises:
        ValueError: It is absolute, climbs with "..", or holds a backslash, a drive letter or control characters.

    Example:
        >>> check_relative_path("weights/model.onnx.data")
        'weights/model.onnx.data'
        >>> check_relative_path("../secret")
        Traceback (most recent call last):
        ...
        ValueError: '../secret' is not a plain path below the folder
    """
    parts = path.split("/")
    # A colon is a drive letter or an alternate stream on Windows; a lone surrogate is no text at all.
    if (any(part in ("", ".", "..") for part in parts)
            or any(c in "\\:" or ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in path)):
        raise ValueError(f"{path!r} is not a plain path below the folder")
    return path


def list_files(folder: Path) -> list[str]:
    """The regular files below a folder, as sorted relative paths with forward slashes.

    Raises:
        IntegrityError: A symbolic link or another entry that is neither file nor folder, or an unreadable folder.
    """
    found: list[str] = []
    pending = [""]
    try:
        while pending:
            prefix = pending.pop()
            with os.scandir(folder / prefix) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{prefix}{entry.name}/")
                    elif entry.is_file(follow_symlinks=False):
                        found.append(f"{prefix}{entry.name}")
                    else:
                        raise _not_regular(Path(entry.path))
    except OSError as error:
        raise IntegrityError("a folder cannot be read", found=error.strerror, where=folder) from error
    return sorted(found)


def hash_file(path: Path) -> tuple[str, int]:
    """The SHA-256 of a regular file, in lower-case hex, and its size in bytes; reads in pieces.

    Raises:
        IntegrityError: The file is missing, unreadable or not a regular file.
    """
    with _open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def read_file(path: Path, limit_bytes: int | None = None) -> bytes:
    """The contents of a regular file.

    Raises:
        IntegrityError: The file is missing, unreadable, not a regular file, or larger than ``limit_bytes``.
    """
    with _open_regular(path) as file:
        content = file.read() if limit_bytes is None else file.read(limit_bytes + 1)
    if limit_bytes is not None and len(content) > limit_bytes:
        raise IntegrityError("a file is larger than it can be", expected=f"at most {limit_bytes} bytes", where=path)
    return content


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file that appears complete or not at all.

    Args:
        path: The file; one that exists is replaced.
        write: Given the open file, writes its content.

    Raises:
        UsageError: The file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            with open(partial, "xb") as file:
                write(file)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError("the output cannot be written", expected="a folder that exists, may be written and has room",
                         found=error.strerror or error, where=path) from error


@contextlib.contextmanager
def _open_regular(path: Path) -> Iterator[io.BufferedReader]:
    # Without O_NONBLOCK, opening a pipe that someone put in the file's place would wait for ever.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _not_regular(path)
            yield file
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_regular(path) from error
        problem = "a file is missing" if error.errno == errno.ENOENT else "a file cannot be read"
        raise IntegrityError(problem, found=error.strerror, where=path) from error


def _not_regular(path: Path) -> IntegrityError:
    found = "a symbolic link" if path.is_symlink() else "neither a file nor a folder"
    return IntegrityError("an entry of the folder is not a regular file", expected="regular files and folders",
                          found=found, where=repr(str(path)), fix="put the file itself there, or remove the entry")


def _check_target(target: Path, marker: str, overwrite: bool) -> None:
    try:
        entries = os.listdir(target)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise UsageError("the output folder cannot be made", expected="a path that is free, below folders",
                         found="a file in the way", where=target, fix="choose another path") from None
    except OSError as error:
        raise _not_writable(target, error) from error
    if entries and not overwrite:
        raise UsageError("the output folder exists and is not empty", expected="a new or an empty folder",
                         found=f"{len(entries)} entries", where=target,
                         fix="choose another folder, or replace this one: overwrite=True, --overwrite")
    if entries and marker not in entries:
        raise UsageError("the output folder holds something else, which is not overwritten",
                         expected=f"a folder with {marker}", found=", ".join(map(repr, sorted(entries)[:5])),
                         where=target, fix="choose another folder, or empty this one yourself")


def _put_in_place(staging: Path, target: Path, old: Path) -> None:
    replaced = target.exists()
    if replaced:
        os.rename(target, old)
    try:
        os.rename(staging, target)
    except BaseException:
        if replaced:
            os.rename(old, target)
        raise
    _sync_folder(target.parent)
    if replaced:
        shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(root)


def _sync_folder(folder: str | os.PathLike) -> None:
    # Windows opens no folders.
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems flush no folders; the rename then lasts when they choose.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _writing(target: Path, every_error: bool = False) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if every_error or error.errno in _DISK_ERRORS:
            raise _not_writable(target, error) from error
        raise


def _not_writable(target: Path, error: OSError) -> UsageError:
    return UsageError("the output folder cannot be written", expected="a place that may be written and has room",
                      found=error.strerror or error, where=target,
                      fix="free some space, or choose another folder; nothing was left behind")
