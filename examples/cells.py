"""The figures of a comparison, by name, in one JSON file that several processes and calls add to."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class Cells:
    """What is measured so far of one setting. Each cell is written as soon as it is made, whole or not at all.

    Args:
        file: ``{"setting": ..., "cells": {name: ...}}``; a new one is made with the first cell.
        setting: What all cells have in common. A file of another setting is refused.
    """

    def __init__(self, file: Path, setting: dict[str, Any]):
        self.file = file
        self.setting = json.loads(json.dumps(setting))
        if (found := self.report["setting"]) != self.setting:
            changed = sorted(key for key in found.keys() | self.setting if found.get(key) != self.setting.get(key))
            raise SystemExit(f"{file} is of other options ({', '.join(changed)}): name another")

    @property
    def report(self) -> dict[str, Any]:
        """The file as it is now."""
        if self.file.exists():
            return json.loads(self.file.read_text(encoding="utf-8"))
        return {"setting": self.setting, "cells": {}}

    def __contains__(self, name: str) -> bool:
        """Whether a cell is there, made by whichever process."""
        return name in self.report["cells"]

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether a cell is this process's to make: it is not there, and no other process is at it."""
        try:
            held = FileLock(self.file.with_name(f"{name}.lock")).acquire(timeout=0)
        except Timeout:
            yield False
            return
        with held:
            yield name not in self

    def write(self, name: str, cell: dict[str, Any]) -> None:
        """Adds a cell to the file."""
        with FileLock(self.file.with_suffix(".lock")):
            report = self.report
            report["cells"][name] = cell
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.file)
