"""Files of SNLI, MNLI and GLUE, as published and as they are broken. Every sentence is made up."""

import json

import pytest

from modcompile.errors import UsageError
from modcompile.tasks import Labelled, Rated, read_published

TREES = "( ( A crow ) ( sleeps ) )\t( Birds sleep )\t(ROOT (S))\t(ROOT (S))"
SNLI_HEADER = ("gold_label\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
               "sentence1\tsentence2\tcaptionID\tpairID\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5")
MNLI_HEADER = ("index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
               "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label")


def written(folder, text, name="file.tsv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("snli", f"{SNLI_HEADER}\nentailment\t{TREES}\tA crow sleeps.\tBirds sleep.\t7.jpg#1\t7.jpg#1r1e\tentailment"
                 f"\t\t\t\t\n-\t{TREES}\tA crow sleeps.\tIt is odd.\t7.jpg#1\t7.jpg#1r1n\tneutral\t\t\t\t\n",
         [Labelled("A crow sleeps.", "entailment", "Birds sleep.")]),
        ("mnli", f"{MNLI_HEADER}\n0\t12\t12n\tfiction\t{TREES}\tHe said \"no.\tHe \"agreed\".\tneutral\t"
                 "contradiction\n",
         [Labelled('He said "no.', "contradiction", 'He "agreed".')]),
        ("sst-2", "sentence\tlabel\n\"quoted\" from end to end \t0\nan open \" quote\t1\n",
         [Labelled('"quoted" from end to end ', "negative"), Labelled('an open " quote', "positive")]),
        ("mrpc", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t70\t71\tTwo ships left .\tShips left .\r\n",
         [Labelled("Two ships left .", "paraphrase", "Ships left .")]),
        ("qnli", "index\tquestion\tsentence\tlabel\n4\tWho left?\tA ship\u2028left.\tnot_entailment\n",
         [Labelled("Who left?", "not_entailment", "A ship\u2028left.")]),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\tIt rained.\tIt was wet.\tentailment",
         [Labelled("It rained.", "entailment", "It was wet.")]),
        ("qqp", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n9\t1\t2\tWhy rain?\tWhy is there rain?\t1\n\n",
         [Labelled("Why rain?", "duplicate", "Why is there rain?")]),
        ("sts-b", "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
                  "0\tmain\tmade-up\t2012\t1\tnone\tnone\tA boy runs.\tA boy is running.\t4.800\n",
         [Rated("A boy runs.", "A boy is running.", 4.8)]),
    ],
)  # fmt: skip
def test_tables_as_published(tmp_path, name, text, expected):
    assert read_published(written(tmp_path, text), name) == expected


def test_objects_as_published(tmp_path):
    rows = [{"gold_label": "neutral", "sentence1": "It snows.", "sentence2": "It is \u201ccold\u201d.", "pairID": "1"},
            {"gold_label": "-", "sentence1": "It snows.", "sentence2": "Who knows.", "annotator_labels": []}]
    path = written(tmp_path, "\n".join(map(json.dumps, rows)), "dev.jsonl")
    for name in ("snli", "mnli"):
        assert read_published(path, name) == [Labelled("It snows.", "neutral", "It is \u201ccold\u201d.")]


@pytest.mark.parametrize(
    ("file", "name", "text", "problem", "details"),
    [
        ("a.tsv", "sst2", "", "there is no such task", {"fix": "did you mean sst-2?"}),
        ("a.tsv", "sst-2", "", "the text is empty", {}),
        ("a.tsv", "sst-2", b"\x89PNG\r\n\x1a\n", "the file is no text", {}),
        ("a.tsv", "sst-2", b"sentence\tlabel\nbad \0 byte\t1\n", "the file is no text", {}),
        ("a.tsv", "sst-2", "\ufeff", "a column is missing", {"expected": "sentence, label"}),
        ("a.tsv", "rte", "index\tsentence1\tsentence2\n0\tIt rained.\tIt was wet.\n", "a column is missing",
         {"expected": "sentence1, sentence2, label", "found": "index, sentence1, sentence2"}),
        ("a.tsv", "sst-2", "sentence\tlabel\n", "the file has no examples", {}),
        ("a.tsv", "sst-2", "sentence\tlabel\nfine\t1\nbad\t2\n", "there is no such label",
         {"expected": "0, 1", "found": "'2'", "where": "line 3"}),
        ("a.tsv", "qqp", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tcut off\n",
         "a row does not fit the header", {"expected": "6 values", "found": "4", "where": "line 2"}),
        ("a.tsv", "sts-b", "sentence1\tsentence2\tscore\na\tb\t5.5\n", "this is no rating", {"found": "'5.5'"}),
        ("a.tsv", "sts-b", "sentence1\tsentence2\tscore\na\tb\tnan\n", "this is no rating", {"found": "'nan'"}),
        ("a.tsv", "sts-b", "sentence1\tsentence2\tscore\na\tb\thigh\n", "this is no rating", {}),
        ("a.jsonl", "snli", '{"gold_label": "neutral", ', "this is no JSON", {"where": "line 1"}),
        ("a.jsonl", "snli", "[" * 100_000, "this is no JSON", {}),
        ("a.jsonl", "snli", '["neutral"]', "a field is missing", {"found": "list"}),
        ("a.jsonl", "snli", '{"gold_label": "neutral", "sentence1": "a"}', "a field is missing",
         {"expected": "an object with sentence2", "found": "gold_label, sentence1"}),
        ("a.jsonl", "snli", '{"gold_label": 1, "sentence1": "a", "sentence2": "b"}',
         "the field gold_label is of another type", {"expected": "str", "found": "int"}),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path, file, name, text, problem, details):
    path = written(tmp_path, text, file)
    with pytest.raises(UsageError) as raised:
        read_published(path, name)
    assert raised.value.problem == problem
    assert problem == "there is no such task" or str(path) in raised.value.details["where"]
    for key, value in details.items():
        assert value in raised.value.details[key]


def test_damaged_rows_are_left_out_when_asked(tmp_path):
    path = written(tmp_path, "id\tquestion1\tquestion2\tis_duplicate\n1\tcut off\n2\tWhy?\tHow?\t0\n3\ta\tb\tc\t1\n")
    assert read_published(path, "qqp", skip_damaged=True) == [Labelled("Why?", "different", "How?")]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="the text cannot be read"):
        read_published(tmp_path / "train.tsv", "sst-2")
