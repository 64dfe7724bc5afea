"""Files that are no text, and folders without a tokenizer."""

import pytest

from modcompile.errors import UsageError
from modcompile.text_file import read_text, tokenizer_of


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the text is empty"),
        (b" \n\t ", "the text is empty"),
        (b"\x89PNG\r\n\x1a\n", "the file is no text"),
        (b"abc\0def", "the file is no text"),
    ],
)
def test_files_that_are_no_text(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as raised:
        read_text(path)
    assert raised.value.details["where"] == str(path)
    with pytest.raises(UsageError, match="the text cannot be read"):
        read_text(tmp_path / "other.txt")


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UsageError, match="there is no tokenizer"):
        tokenizer_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="transformers cannot load the tokenizer"):
        tokenizer_of(tmp_path)
