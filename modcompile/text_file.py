"""A text and its tokenizer, from files: what is measured on a text begins here."""

__all__ = ["decode_text", "read_text", "tokenizer_of"]

import os
from pathlib import Path
from typing import Any

from modcompile.errors import RuntimeUnavailableError, UsageError


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file.

    Raises:
        UsageError: A file that is missing, empty, or no text.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UsageError("the text cannot be read", expected="a file", found=error.strerror, where=path) from error
    return decode_text(data, path)


def decode_text(data: bytes, where: object) -> str:
    """The text of a file's content.

    Raises:
        UsageError: It is empty, or no text; ``where`` says what of.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("the file is no text", expected="UTF-8", found=f"byte {data[error.start]:#04x} at "
                         f"{error.start}", where=where, fix="convert it: iconv -t utf-8") from error
    if "\0" in text:
        raise UsageError("the file is no text", expected="text without NUL", where=where,
                         found=f"NUL at character {text.index(chr(0))}")
    if not text.strip():
        raise UsageError("the text is empty", expected="some thousand words", found=f"{len(data)} bytes", where=where)
    return text


def tokenizer_of(folder: str | os.PathLike) -> Any:
    """The tokenizer that lies in a transformers folder. Nothing is downloaded, and no code of the folder is run.

    Raises:
        UsageError: There is none.
        RuntimeUnavailableError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise RuntimeUnavailableError("a text needs a tokenizer, and so the package transformers", found=error,
                                      where=folder, fix='pip install "modcompile[hf]"') from error
    # A model's folder without one would give a tokenizer of its class with a vocabulary of a few words.
    known = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
    if not any((Path(folder) / name).is_file() for name in known):
        raise UsageError("there is no tokenizer", expected=f"a folder with one of {', '.join(known)}", found="none",
                         where=folder, fix="name the tokenizer's folder: --tokenizer FOLDER")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UsageError("transformers cannot load the tokenizer", expected="the files of a tokenizer", where=folder,
                         found=f"{type(error).__name__}: {error}") from error
