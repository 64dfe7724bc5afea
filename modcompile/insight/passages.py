"""A text as the model reads it: passages of tokens, each with the characters it stands for and their kind.

Nothing here knows a tokenizer's conventions. What a token stands for is cut out of the text by the tokenizer's offsets,
and its kind comes from the Unicode categories of these characters and from the character before them.
"""

__all__ = ["KINDS", "Passage", "kind_of", "read_passages"]

import dataclasses
import unicodedata
from typing import Any

from modcompile.errors import UsageError

KINDS = ("word, its start", "word, a later part", "number", "punctuation", "symbol", "space", "mixed",
         "part of a character", "special")

# The first letter of a Unicode category; what is left are separators and controls.
_PLAIN = {"L": "letter", "M": "letter", "N": "number", "P": "punctuation", "S": "symbol"}
# More characters than this a token, on average, no text has.
_CHARACTERS_A_TOKEN = 64


@dataclasses.dataclass(frozen=True)
class Passage:
    """Tokens that the model reads together. S tokens.

    Attributes:
        ids: The tokens, [S].
        pieces: What each stands for, with the white space before it, so that they spell the text when joined; of a
            special token its name.
        kinds: Of ``KINDS``, one for each token.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    kinds: tuple[str, ...]


def kind_of(piece: str, led: bool) -> str:
    """The kind of a token.

    Args:
        piece: The characters it stands for.
        led: Whether white space, or nothing, is before them.

    Example:
        >>> kind_of("dog", True), kind_of("gy", False), kind_of(" 1976", False), kind_of("'s", False)
        ('word, its start', 'word, a later part', 'number', 'mixed')
    """
    bare = piece.strip()
    kinds = {_PLAIN.get(unicodedata.category(character)[0], "space") for character in bare} or {"space"}
    if len(kinds) > 1:
        return "mixed"
    kind = kinds.pop()
    if kind != "letter":
        return kind
    return "word, its start" if led or piece[0].isspace() else "word, a later part"


def read_passages(text: str, tokenizer: Any, *, rows: int = 256, count: int = 16, by_line: bool = False
                  ) -> list[Passage]:
    """The beginning of a text as passages.

    Args:
        text: What to read.
        tokenizer: A tokenizer of transformers that knows its offsets.
        rows: S, the largest number of tokens in a passage.
        count: The largest number of passages.
        by_line: Every line that is not blank is a passage, cut to ``rows``, with the special tokens that the model
            wants around it; lines are of several lengths, so batches have padding. Otherwise the text is cut into
            passages of exactly ``rows`` tokens, without special tokens, and a last one that is shorter is left out.

    Raises:
        UsageError: A tokenizer without offsets, or a text without two tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError("the tokenizer does not say which characters a token stands for",
                         expected="a tokenizer with offsets, which tokenizer.json gives", where="tokenizer",
                         found=type(tokenizer).__name__)
    if rows < 2:
        raise UsageError("passages are too short", expected="two tokens, and better some hundred", found=rows,
                         where="rows", fix="a larger --shape input_ids=BxS")
    if by_line:
        lines = [line[:_CHARACTERS_A_TOKEN * rows] for line in text.splitlines() if line.strip()][:count]
        made = [_passage(line, tokenizer, add_special_tokens=True, truncation=True, max_length=rows) for line in lines]
    else:
        whole = _passage(text[:_CHARACTERS_A_TOKEN * rows * count], tokenizer, add_special_tokens=False)
        # A text that is shorter than one passage is one.
        rows = min(rows, len(whole.ids))
        made = [Passage(whole.ids[at:at + rows], whole.pieces[at:at + rows], whole.kinds[at:at + rows])
                for at in range(0, len(whole.ids) - rows + 1, max(rows, 1))][:count]
    if not any(len(passage.ids) > 1 for passage in made):
        raise UsageError("the text is too short", expected="two tokens, and better some thousand",
                         found=sum(len(passage.ids) for passage in made), where="text")
    return made


def _passage(text: str, tokenizer: Any, **options: Any) -> Passage:
    read = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False, **options)
    pieces, kinds, last = [], [], 0
    for word, (start, end), special in zip(read["input_ids"], read["offset_mapping"], read["special_tokens_mask"],
                                           strict=True):
        if special and start == end:
            pieces.append(str(tokenizer.convert_ids_to_tokens(word)))
            kinds.append("special")
        elif start < last:
            # Several tokens spell one character: the first of them shows it.
            pieces.append("")
            kinds.append("part of a character")
        else:
            pieces.append(text[last:end])
            kinds.append(kind_of(text[start:end], start == 0 or text[start - 1].isspace()))
            last = end
    return Passage(tuple(read["input_ids"]), tuple(pieces), tuple(kinds))
