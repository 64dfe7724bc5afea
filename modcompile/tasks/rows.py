"""Rows of a file, as dicts: tab-separated values with a header, or one JSON object a line."""

__all__ = ["json_rows", "lines_of", "parse_json", "required", "tab_rows"]

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from modcompile.errors import UsageError
from modcompile.text_file import read_text

# A row, and where it stands, for messages.
Row = tuple[str, Mapping[str, Any]]


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, and their numbers. Only a line feed ends one: texts hold other separators."""
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def tab_rows(path: str | os.PathLike, columns: Sequence[str], skip_damaged: bool = False) -> Iterator[Row]:
    """The rows of a file of tab-separated values, whose first line names the columns. Quotes mean nothing.

    Args:
        path: The file.
        columns: What each row must have.
        skip_damaged: Leave out rows of another number of values than the header has.

    Raises:
        UsageError: No text, a column that is missing, or such a row.
    """
    lines = lines_of(read_text(path))
    _, first = next(lines, (1, ""))
    header = first.split("\t")
    missing = [name for name in columns if name not in header]
    if missing:
        raise UsageError("a column is missing", expected=", ".join(columns), found=f"{', '.join(header)[:200]}",
                         where=path, fix="a file as published; those for submissions have no labels")
    for number, line in lines:
        values = line.split("\t")
        if len(values) == len(header):
            yield f"{path}, line {number}", dict(zip(header, values, strict=True))
        elif not skip_damaged:
            raise UsageError("a row does not fit the header", expected=f"{len(header)} values", found=len(values),
                             where=f"{path}, line {number}", fix="skip_damaged=True leaves such rows out")


def json_rows(path: str | os.PathLike, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a file of one JSON object a line.

    Raises:
        UsageError: No text, no JSON, or an object that lacks a column.
    """
    for number, line in lines_of(read_text(path)):
        where = f"{path}, line {number}"
        row = parse_json(line, where)
        for name in columns:
            required(row, name, str, where)
        yield where, row


def parse_json(text: str, where: object) -> Any:
    """A JSON text's value.

    Raises:
        UsageError: It is none.
    """
    try:
        return json.loads(text.removeprefix("\ufeff"))
    # Numbers of too many digits are a ValueError; of too many brackets, the recursion is too deep.
    except (ValueError, RecursionError) as error:
        raise UsageError("this is no JSON", expected="JSON", found=error, where=where) from error


def required(value: Any, name: str, kind: type, where: object) -> Any:
    """A field of a JSON object.

    Raises:
        UsageError: The value is no object, lacks the field, or has another type there.
    """
    if not isinstance(value, dict) or name not in value:
        found = ", ".join(map(str, value))[:200] if isinstance(value, dict) else type(value).__name__
        raise UsageError("a field is missing", expected=f"an object with {name}", found=found or "an empty object",
                         where=where)
    if not isinstance(value[name], kind) or isinstance(value[name], bool) != (kind is bool):
        raise UsageError(f"the field {name} is of another type", expected=kind.__name__,
                         found=type(value[name]).__name__, where=where)
    return value[name]
