"""SQuAD, versions 1.1 and 2.0: questions about passages, the answers spans."""

__all__ = ["read_squad"]

import os
from collections.abc import Iterator
from typing import Any

from modcompile.errors import UsageError
from modcompile.tasks.example import Answer, Question
from modcompile.tasks.rows import parse_json, required
from modcompile.text_file import read_text


def read_squad(path: str | os.PathLike) -> list[Question]:
    """The questions of a file as published; those that are impossible to answer have no answers.

    Raises:
        UsageError: A file that is missing, empty, no text or no JSON, that lacks a field, or whose answers are not
            where it says.
    """
    made = list(_questions(parse_json(read_text(path), path), path))
    if not made:
        raise UsageError("the file has no questions", expected="data, paragraphs and qas", found="none", where=path)
    return made


def _questions(content: Any, path: str | os.PathLike) -> Iterator[Question]:
    for i, article in enumerate(required(content, "data", list, path)):
        for j, paragraph in enumerate(required(article, "paragraphs", list, f"{path}, data[{i}]")):
            where = f"{path}, data[{i}].paragraphs[{j}]"
            passage = required(paragraph, "context", str, where)
            for k, asked in enumerate(required(paragraph, "qas", list, where)):
                yield _question(asked, passage, f"{where}.qas[{k}]")


def _question(asked: Any, passage: str, where: str) -> Question:
    text = required(asked, "question", str, where)
    impossible = "is_impossible" in asked and required(asked, "is_impossible", bool, where)
    answers = [Answer(required(answer, "text", str, where), required(answer, "answer_start", int, where))
               for answer in required(asked, "answers", list, where)]
    for answer in answers:
        found = passage[max(0, answer.start):max(0, answer.start) + len(answer.text)]
        if answer.start < 0 or found != answer.text:
            raise UsageError("an answer is not in its place", expected=repr(answer.text), found=repr(found),
                             where=f"{where}, character {answer.start}")
    if not answers and not impossible:
        raise UsageError("a question has no answer", expected="answers, or is_impossible", found="neither", where=where)
    # What an impossible question has are plausible answers, mostly under another name.
    return Question(text, passage, () if impossible else tuple(dict.fromkeys(answers)))
