"""Tasks of our own construction, from WordNet's nouns: entailment, questions, similarity. No benchmark has them.

Every synset is on one side, training or test, as a hash of its name says: no synset, and no name of one, is on both. So
a word has to be understood from what the model knew before and from its definition. What is drawn follows from a seed.

Names are in lower case and of letters; the most general synsets, of which nearly everything is a kind, are left out.
"""

__all__ = ["wordnet_entailment", "wordnet_questions", "wordnet_similarity"]

import hashlib
import random
import re
from collections.abc import Callable
from typing import TypeVar

from modcompile.errors import UsageError
from modcompile.tasks.example import Answer, Labelled, Question, Rated, Task
from modcompile.tasks.wordnet import Synset, WordNet

# Of the names, this share is tested on.
TESTED = 0.3

# "Physical entity", "abstraction" and their like have a smaller depth.
LEAST_DEPTH = 4

# Of a passage.
ENTRIES = 4

# So many draws that gave nothing new, one after the other, and there is nothing left to draw.
PATIENCE = 10_000

_NAME = re.compile(r"[a-z]+( [a-z]+)?")
Made = TypeVar("Made", Labelled, Rated, Question)

# Draws the example of a number, or nothing, if what came up does not fit.
Draw = Callable[["_Side", random.Random, int], Made | None]


def wordnet_entailment(wordnet: WordNet, train: int, test: int, seed: int = 0) -> Task[Labelled]:
    """Whether a noun that is explained is also of another kind: entailment, neutral or contradiction, a third each.

    *Entailment*: the hypothesis names something that the premise's synset is a kind of. *Neutral*: the other way round.
    *Contradiction*: two synsets that no synset is a kind of both of; one is beside the other, or beside something that
    the other is a kind of, so that how general a hypothesis is does not tell the label.

    Args:
        wordnet: The nouns.
        train: How many examples to train on.
        test: How many to measure on.
        seed: Of what is drawn.

    Raises:
        UsageError: The nouns do not suffice for as many.
    """
    def draw(side: _Side, chance: random.Random, number: int) -> Labelled | None:
        low, label = side.pick(chance), ("entailment", "neutral", "contradiction")[number % 3]
        other = side.beside(low, chance) if label == "contradiction" else side.above(low, 6, chance)
        if other is None:
            return None
        turned = label == "neutral" or (label == "contradiction" and chance.random() < 0.5)
        premise, hypothesis = (other, low) if turned else (low, other)
        return Labelled(_entry(premise), label, f"It is a kind of {hypothesis.name}.")

    return _task("WordNet entailment (ours)", wordnet, train, test, seed, draw)


def wordnet_questions(wordnet: WordNet, train: int, test: int, seed: int = 0) -> Task[Question]:
    """A passage that explains four nouns, and a question that one of them answers, by its definition or by its kind.

    Arguments and errors are those of ``wordnet_entailment``.
    """
    def draw(side: _Side, chance: random.Random, number: int) -> Question | None:
        answer = side.pick(chance)
        others = [side.pick(chance) for _ in range(ENTRIES - 1)]
        if len({synset.name for synset in (answer, *others)}) < ENTRIES:
            return None
        if number % 2:
            text = f"Which word means {answer.definition}?"
        else:
            kind = side.above(answer, 3, chance)
            if kind is None or any(kind.id in wordnet.ancestors(other.id) for other in others):
                return None
            text = f"Which is a kind of {kind.name}?"
        entries = [answer, *others]
        chance.shuffle(entries)
        before = sum(len(_entry(entry)) + 2 for entry in entries[:entries.index(answer)])
        return Question(text, ". ".join(map(_entry, entries)), (Answer(answer.name, before),))

    return _task("WordNet questions (ours)", wordnet, train, test, seed, draw)


def wordnet_similarity(wordnet: WordNet, train: int, test: int, seed: int = 0) -> Task[Rated]:
    """Two definitions, or a definition and a usage example, and how near their synsets are (``WordNet.similarity``).

    A quarter each: of one synset; of two that are directly of one kind; of two that are remotely; any two.

    Arguments and errors are those of ``wordnet_entailment``.
    """
    def draw(side: _Side, chance: random.Random, number: int) -> Rated | None:
        kind = number % 4
        if kind == 0:
            used = chance.choice(side.used)
            return Rated(used.definition, chance.choice(used.examples), 1.0)
        first = side.pick(chance)
        second = side.pick(chance) if kind == 3 else side.near(first, 1 if kind == 1 else 4, chance)
        if second is None or second is first:
            return None
        return Rated(first.definition, second.definition, wordnet.similarity(first.id, second.id))

    return _task("WordNet similarity (ours)", wordnet, train, test, seed, draw)


class _Side:
    """The synsets that one side of a split may name."""

    def __init__(self, wordnet: WordNet, tested: bool):
        self.wordnet = wordnet
        self.synsets = [synset for synset in wordnet.synsets.values()
                        if _NAME.fullmatch(synset.name) and _tested(synset.name) == tested
                        and wordnet.depth(synset.id) >= LEAST_DEPTH]
        self.used = [synset for synset in self.synsets if synset.examples]
        self._ids = {synset.id for synset in self.synsets}
        if not self.used:
            raise UsageError("WordNet has too few nouns", expected="nouns with usage examples on both sides of a split",
                             found=f"{len(self.synsets)} nouns on one side", where="WordNet")

    def pick(self, chance: random.Random) -> Synset:
        """Any."""
        return chance.choice(self.synsets)

    def above(self, synset: Synset, steps: int, chance: random.Random) -> Synset | None:
        """What it is a kind of, at most so many steps up."""
        found = [id for id, far in self.wordnet.ancestors(synset.id).items() if 0 < far <= steps and id in self._ids]
        return self.wordnet.synsets[chance.choice(found)] if found else None

    def beside(self, synset: Synset, chance: random.Random) -> Synset | None:
        """A neighbour of it, or of what it is a kind of, which has nothing below it in common with it."""
        start = chance.choice([id for id, far in self.wordnet.ancestors(synset.id).items() if far <= 3])
        found = [id for above in self.wordnet.synsets[start].above for id in self.wordnet.below[above]
                 if id in self._ids and id not in self.wordnet.ancestors(synset.id)]
        other = chance.choice(found) if found else None
        return None if other is None or self._share(synset.id, other) else self.wordnet.synsets[other]

    def near(self, synset: Synset, steps: int, chance: random.Random) -> Synset | None:
        """Something that is of a kind with it, as many steps up."""
        found = [id for id, far in self.wordnet.ancestors(synset.id).items() if far == steps]
        here = chance.choice(found) if found else synset.id
        for _ in range(steps):
            if kinds := self.wordnet.below.get(here):
                here = chance.choice(kinds)
        return self.wordnet.synsets[here] if here in self._ids else None

    def _share(self, first: int, second: int) -> bool:
        """Whether anything is a kind of both."""
        pending = [first]
        while pending:
            here = pending.pop()
            if second in self.wordnet.ancestors(here):
                return True
            pending += self.wordnet.below.get(here, [])
        return False


def _task(name: str, wordnet: WordNet, train: int, test: int, seed: int,
          draw: Draw[Made]) -> Task[Made]:
    return Task(name, *(_drawn(_Side(wordnet, tested), count, random.Random(f"{name}, {tested}, {seed}"), draw)
                        for tested, count in ((False, train), (True, test))))


def _drawn(side: _Side, count: int, chance: random.Random, draw: Draw[Made]) -> list[Made]:
    """So many different examples."""
    made: dict[Made, None] = {}
    idle = 0
    while len(made) < count:
        example, before = draw(side, chance, len(made)), len(made)
        if example is not None:
            made[example] = None
        idle = 0 if len(made) > before else idle + 1
        if idle > PATIENCE:
            raise UsageError("WordNet has too few nouns", expected=f"{count} examples", found=len(made),
                             where="WordNet", fix="ask for fewer")
    return list(made)


def _tested(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) < TESTED * 2**32


def _entry(synset: Synset) -> str:
    return f"{synset.name}: {synset.definition}"
