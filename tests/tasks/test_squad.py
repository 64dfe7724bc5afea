"""SQuAD's two forms, and what is wrong with a file. The passages are made up."""

import json

import pytest

from modcompile.errors import UsageError
from modcompile.tasks import Answer, Question, read_squad

PASSAGE = "The mill at Orrel was built in 1790. It burned down in 1802."
BUILT = {"id": "1", "question": "When was it built?", "answers": [
    {"text": "1790", "answer_start": 31}, {"text": "in 1790", "answer_start": 28},
    {"text": "1790", "answer_start": 31}]}
UNKNOWN = {"id": "2", "question": "Who built it?", "is_impossible": True, "answers": [],
           "plausible_answers": [{"text": "Orrel", "answer_start": 12}]}


def written(folder, *questions, passage=PASSAGE):
    path = folder / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "Mill", "paragraphs": [
        {"context": passage, "qas": list(questions)}]}]}))
    return path


def test_both_versions(tmp_path):
    assert read_squad(written(tmp_path, BUILT)) == [
        Question("When was it built?", PASSAGE, (Answer("1790", 31), Answer("in 1790", 28)))]
    assert read_squad(written(tmp_path, {**BUILT, "is_impossible": False}, UNKNOWN))[1] == Question(
        "Who built it?", PASSAGE, ())
    # What such a question may have are plausible answers.
    assert read_squad(written(tmp_path, {**BUILT, "is_impossible": True}))[0].answers == ()


@pytest.mark.parametrize(
    ("question", "problem", "details"),
    [
        ({**BUILT, "answers": [{"text": "1790", "answer_start": 30}]}, "an answer is not in its place",
         {"expected": "'1790'", "found": "' 179'", "where": "data[0].paragraphs[0].qas[0], character 30"}),
        ({**BUILT, "answers": [{"text": "2.", "answer_start": -2}]}, "an answer is not in its place", {}),
        ({**BUILT, "answers": [{"text": "1790", "answer_start": 3100}]}, "an answer is not in its place", {}),
        ({**BUILT, "answers": [{"text": "1790", "answer_start": "31"}]}, "the field answer_start is of another type",
         {"expected": "int", "found": "str"}),
        ({**BUILT, "answers": [{"text": "1790", "answer_start": True}]}, "the field answer_start is of another type",
         {"found": "bool"}),
        ({**BUILT, "answers": []}, "a question has no answer", {}),
        ({**UNKNOWN, "is_impossible": 1}, "the field is_impossible is of another type", {}),
        ({"question": "Who?"}, "a field is missing", {"expected": "an object with answers", "found": "question"}),
        ("Who?", "a field is missing", {"found": "str"}),
    ],
)
def test_questions_that_are_refused(tmp_path, question, problem, details):
    path = written(tmp_path, question)
    with pytest.raises(UsageError) as raised:
        read_squad(path)
    assert raised.value.problem == problem
    assert str(path) in raised.value.details["where"]
    for key, value in details.items():
        assert value in raised.value.details[key]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the text is empty"),
        (b"\x93NUMPY\x01\x00", "the file is no text"),
        (b'{"data": [', "this is no JSON"),
        (b"[]", "a field is missing"),
        (b'{"data": {}}', "the field data is of another type"),
        (b'{"data": []}', "the file has no questions"),
        (b'{"data": [{"title": "none"}]}', "a field is missing"),
    ],
)
def test_files_that_are_refused(tmp_path, content, problem):
    path = tmp_path / "squad.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=problem):
        read_squad(path)
