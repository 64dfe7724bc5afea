"""The corpus of examples/scaling.py: what is held out, and what is refused."""

import pytest
import torch
from scripts import EXAMPLES, load_script

from modcompile.errors import UsageError

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def scaling():
    return load_script(EXAMPLES / "scaling.py")


def read(scaling, tmp_path, *contents):
    paths = [tmp_path / f"{index:02}.txt" for index in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return scaling.corpus(scaling.options_of(["--text", *map(str, paths), "--length", "8"]))


def test_a_twentieth_is_held_out(scaling, tmp_path):
    # Of few files the end of each, of many whole files.
    train, held, vocabulary = read(scaling, tmp_path, bytes(range(1, 101)), bytes(range(101, 201)))
    assert held.tolist() == [*range(96, 101), *range(196, 201)] and vocabulary == 256
    assert train.tolist() == [*range(1, 96), *range(101, 196)]
    train, held, _ = read(scaling, tmp_path, *(bytes([index]) * 9 for index in range(1, 22)))
    assert held.tolist() == [20] * 9 and torch.equal(train.unique(), torch.tensor([*range(1, 20), 21]))


@pytest.mark.parametrize(("contents", "match"), [
    ([b""], "too short to train on"), ([b"few words, hardly a line"], "too short to hold out"),
    ([b"text" * 100, b"\x7fELF\0\0"], "not text")], ids=["empty", "short", "binary"])
def test_what_is_no_corpus(scaling, tmp_path, contents, match):
    with pytest.raises(UsageError, match=match):
        read(scaling, tmp_path, *contents)
