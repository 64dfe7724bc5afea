"""WordNet's nouns, from the folder of its database files: synsets, what they mean, and what is a kind of what.

The format is that of wndb(5WN): a line a synset, which begins with its place in the file, in bytes.
"""

__all__ = ["Synset", "WordNet"]

import collections
import dataclasses
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from modcompile.errors import UsageError
from modcompile.text_file import read_text

# The pointers "is a kind of" and, of a name, "is an instance of".
_ABOVE = ("@", "@i")

# Usage examples stand behind the definition, in quotes; who is quoted may follow.
_QUOTED = re.compile(r';\s*"([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Synset:
    """Words of one meaning.

    Attributes:
        id: Its place in data.noun.
        words: The most usual first, with spaces.
        definition: What they mean.
        examples: How they are used.
        above: Ids of what it is a kind of.
    """

    id: int
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    above: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its first word."""
        return self.words[0]


class WordNet:
    """The nouns of a WordNet.

    Args:
        folder: Of data.noun, such as the one that Debian's package wordnet-base installs.

    Attributes:
        synsets: By id, in the file's order.

    Raises:
        UsageError: No such file, or a line of another form.
    """

    def __init__(self, folder: str | os.PathLike):
        file = Path(folder) / "data.noun"
        if not file.is_file():
            raise UsageError("there is no WordNet here", expected="a folder with data.noun", found="none", where=folder,
                             fix="apt-get install wordnet-base, and give the folder of its data.noun")
        self.synsets = {synset.id: synset for synset in _read(file)}
        for synset in self.synsets.values():
            if unknown := [above for above in synset.above if above not in self.synsets]:
                raise UsageError("a synset is a kind of what is not there", expected="the id of a line",
                                 found=", ".join(map(str, unknown)), where=f"{file}, synset {synset.id:08d}")
        self._ancestors = functools.cache(self._find_ancestors)

    @functools.cached_property
    def below(self) -> dict[int, list[int]]:
        """Of each synset that has kinds, their ids."""
        found = collections.defaultdict(list)
        for synset in self.synsets.values():
            for above in synset.above:
                found[above].append(synset.id)
        return dict(found)

    def ancestors(self, id: int) -> dict[int, int]:
        """What a synset is a kind of, however remotely, by the fewest steps up; itself with 0."""
        return self._ancestors(id)

    def depth(self, id: int) -> int:
        """The fewest steps up to a synset that is a kind of nothing, and 1.

        Raises:
            UsageError: There is no end of the way up.
        """
        tops = [steps for above, steps in self.ancestors(id).items() if not self.synsets[above].above]
        if not tops:
            raise UsageError("a synset is a kind of itself", expected="a way up that ends", found="a circle",
                             where=f"synset {id:08d}")
        return 1 + min(tops)

    def similarity(self, first: int, second: int) -> float:
        """In [0, 1]: how much of two synsets' way down is common, 1 for the same (Wu and Palmer 1994).

        2 d / (2 d + l1 + l2), d the depth of what both are a kind of and l the steps to it; of several, the largest.
        """
        ours, theirs = self.ancestors(first), self.ancestors(second)
        depths = {common: 2 * self.depth(common) for common in ours.keys() & theirs.keys()}
        return max((depth / (depth + ours[common] + theirs[common]) for common, depth in depths.items()), default=0.0)

    def _find_ancestors(self, id: int) -> dict[int, int]:
        found, border, steps = dict[int, int](), [id], 0
        while border:
            found |= dict.fromkeys(border, steps)
            border = [above for each in border for above in self.synsets[each].above if above not in found]
            steps += 1
        return found


def _read(file: Path) -> Iterator[Synset]:
    found = False
    for number, line in enumerate(read_text(file).split("\n"), 1):
        # The licence stands before the data, behind blanks.
        if line and not line.startswith("  "):
            yield _synset(line, f"{file}, line {number}")
            found = True
    if not found:
        raise UsageError("the file has no synsets", expected="lines of data", found="the licence alone", where=file)


def _synset(line: str, where: str) -> Synset:
    """Of a line: offset file type count word lex_id ... count symbol offset type source/target ... | gloss."""
    data, bar, gloss = line.partition(" | ")
    try:
        offset, _, kind, count, *rest = data.split()
        words, rest = rest[:2 * int(count, 16):2], rest[2 * int(count, 16):]
        pointers = [rest[i:i + 4] for i in range(1, 1 + 4 * int(rest[0]), 4)]
        above = tuple(int(place) for symbol, place, part, _ in pointers if symbol in _ABOVE and part == "n")
        if not (bar and kind == "n" and words):
            raise ValueError("no noun with a gloss")
        id = int(offset)
    except (ValueError, IndexError) as error:
        raise UsageError("this is no line of WordNet's nouns", expected="offset, words, pointers | gloss, see wndb(5)",
                         found=f"{line[:80]!r}: {error}", where=where) from error
    definition = _QUOTED.split(gloss, maxsplit=1)[0].strip()
    return Synset(id, tuple(word.replace("_", " ") for word in words), definition, tuple(_QUOTED.findall(gloss)), above)
