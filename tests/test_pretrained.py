"""examples/pretrained.py: the tokens that it makes of a text."""

import argparse

import numpy as np
import pytest
from scripts import EXAMPLES, load_script

from modcompile.errors import UsageError

pytest.importorskip("transformers")


@pytest.fixture
def script(monkeypatch):
    """The example, with a tokenizer of words: its own comes with a package of weights."""
    made = load_script(EXAMPLES / "pretrained.py")
    monkeypatch.setattr(made, "smollm2_tokenizer", lambda: lambda text, add_special_tokens: {
        "input_ids": [len(word) for word in text.split()]})
    return made


# Long words too: more than eight characters a token.
@pytest.mark.parametrize("length", [1, 3, 30])
def test_the_first_tokens_of_a_text(script, tmp_path, length):
    (tmp_path / "text.txt").write_text(f"{'a' * length} bb " * 8)
    script.write_tokens(tmp_path / "text.txt", (2, 5), tmp_path / "tokens.npz")
    ids = np.load(tmp_path / "tokens.npz")["input_ids"]
    assert ids.dtype == np.int64 and ids.tolist() == [[length, 2, length, 2, length], [2, length, 2, length, 2]]


def test_a_shape_that_is_none(script):
    assert script.read_shape("8x1024") == (8, 1024)
    for text in ("8", "8x", "0x5", "8x1024x2", "axb"):
        with pytest.raises(argparse.ArgumentTypeError, match="such as 8x1024; found"):
            script.read_shape(text)


@pytest.mark.parametrize(("count", "fix"), [(9, "a longer text, or --shape 1x5"), (4, "a longer text")])
def test_a_text_that_is_too_short(script, tmp_path, count, fix):
    (tmp_path / "text.txt").write_text("word " * count)
    with pytest.raises(UsageError) as caught:
        script.write_tokens(tmp_path / "text.txt", (2, 5), tmp_path / "tokens.npz")
    assert caught.value.problem == "the text is too short"
    assert caught.value.details == {"expected": "2 x 5 = 10 tokens", "found": str(count),
                                    "where": str(tmp_path / "text.txt"), "fix": fix}
    assert not (tmp_path / "tokens.npz").exists()
