"""Labelled and rated texts in the files as they are published: SNLI, MNLI, and tasks of GLUE.

The columns are found by name, so that a file may have others too. GLUE's own editions of SNLI and MNLI have the same.
"""

__all__ = ["PUBLISHED", "Columns", "read_published"]

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from pathlib import Path

from modcompile.errors import UsageError
from modcompile.tasks.example import Labelled, Rated
from modcompile.tasks.rows import Row, json_rows, tab_rows


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where a published file has what.

    Attributes:
        text: The column of the first text.
        label: The column of the label or of the rating.
        pair: The column of the second text, if there is one.
        labels: The name of each class by what stands in the file; without them, the column is a rating.
        scale: The lowest and the highest rating.
        undecided: Labels that say that there is none: such rows are left out.
    """

    text: str
    label: str
    pair: str | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scale: tuple[float, float] = (0.0, 0.0)
    undecided: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The columns."""
        return [name for name in (self.text, self.pair, self.label) if name is not None]


def _same(*labels: str) -> dict[str, str]:
    return {label: label for label in labels}


# Annotators who did not agree leave "-".
_INFERENCE = Columns("sentence1", "gold_label", "sentence2", _same("entailment", "neutral", "contradiction"),
                     undecided=("-",))

PUBLISHED: dict[str, Columns] = {
    "snli": _INFERENCE,
    "mnli": _INFERENCE,
    "sst-2": Columns("sentence", "label", labels={"0": "negative", "1": "positive"}),
    "mrpc": Columns("#1 String", "Quality", "#2 String", {"0": "different", "1": "paraphrase"}),
    "qnli": Columns("question", "label", "sentence", _same("entailment", "not_entailment")),
    "rte": Columns("sentence1", "label", "sentence2", _same("entailment", "not_entailment")),
    "qqp": Columns("question1", "is_duplicate", "question2", {"0": "different", "1": "duplicate"}),
    "sts-b": Columns("sentence1", "score", "sentence2", scale=(0.0, 5.0)),
}


def read_published(path: str | os.PathLike, name: str, *, skip_damaged: bool = False) -> list[Labelled] | list[Rated]:
    r"""The examples of a file.

    Args:
        path: A ``.jsonl`` file of one object a line, or a file of tab-separated values under any other name.
        name: Which task's: a key of ``PUBLISHED``.
        skip_damaged: Leave out rows of another number of values than the header has; QQP's training file has some.

    Raises:
        UsageError: Another name; or a file that is missing, empty, no text, without these columns or with labels that
            the task does not have.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "train.tsv")
        >>> _ = path.write_text('sentence\tlabel\na "fine film\t1\n')
        >>> read_published(path, "sst-2")
        [Labelled(text='a "fine film', label='positive', pair=None)]
    """
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name.lower(), PUBLISHED, 1)
        raise UsageError("there is no such task", expected=", ".join(PUBLISHED), found=name, where="read_published",
                         fix=f"did you mean {near[0]}?" if near else None)
    columns = PUBLISHED[name]
    rows = (json_rows(path, columns.names) if Path(path).suffix == ".jsonl"
            else tab_rows(path, columns.names, skip_damaged))
    made = [_rated(row, columns) if not columns.labels else _labelled(row, columns) for row in rows
            if row[1][columns.label] not in columns.undecided]
    if not made:
        raise UsageError("the file has no examples", expected="rows with a label", found="none", where=path)
    # Of one kind: that of the columns.
    return made  # type: ignore[return-value]


def _labelled(row: Row, columns: Columns) -> Labelled:
    where, values = row
    label = values[columns.label]
    if label not in columns.labels:
        raise UsageError("there is no such label", expected=", ".join(columns.labels), found=repr(label), where=where,
                         fix="is this the file of another task?")
    return Labelled(values[columns.text], columns.labels[label], values[columns.pair] if columns.pair else None)


def _rated(row: Row, columns: Columns) -> Rated:
    where, values = row
    low, high = columns.scale
    try:
        score = float(values[columns.label])
    except ValueError:
        score = math.nan
    if not low <= score <= high:
        raise UsageError("this is no rating", expected=f"a number from {low} to {high}",
                         found=repr(values[columns.label]), where=where)
    assert columns.pair is not None
    return Rated(values[columns.text], values[columns.pair], score)
