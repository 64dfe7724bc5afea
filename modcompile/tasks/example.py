"""What a task consists of: texts with a label, pairs of texts with a rating, questions with spans that answer them."""

__all__ = ["Answer", "Example", "Labelled", "Question", "Rated", "Task"]

import dataclasses
from typing import Generic, TypeVar


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A text, or a pair of texts, of a class.

    Attributes:
        text: The text; of a pair, the first: a premise, for example.
        label: Its class.
        pair: The second text: a hypothesis, for example.
    """

    text: str
    label: str
    pair: str | None = None


@dataclasses.dataclass(frozen=True)
class Rated:
    """A pair of texts and how alike they are; larger is more alike."""

    text: str
    pair: str
    score: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """A span of a passage, ``passage[start:start + len(text)]``."""

    text: str
    start: int


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a passage.

    Attributes:
        text: The question.
        passage: Where the answer is looked for.
        answers: The spans that count as right; none, if the passage does not answer it.
    """

    text: str
    passage: str
    answers: tuple[Answer, ...]


Example = TypeVar("Example", Labelled, Rated, Question)


@dataclasses.dataclass(frozen=True)
class Task(Generic[Example]):
    """What is trained on, and what is measured on."""

    name: str
    train: list[Example]
    test: list[Example]
