"""How good answers are: accuracy, rank correlation, and how far a span is the expected one."""

__all__ = ["accuracy", "exact_match", "overlap", "spearman"]

import collections
import re
import string
from collections.abc import Sequence

from torch import Tensor

# N examples
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(predicted: Tensor, expected: Tensor) -> float:
    """The share of classes [N] that are right."""
    return (predicted == expected).double().mean().item()


def spearman(predicted: Tensor, expected: Tensor) -> float:
    """The correlation of the ranks of two lists of numbers [N]; equal numbers share the mean of their ranks.

    0 where one of them is constant, and orders nothing.

    Example:
        >>> import torch
        >>> round(spearman(torch.tensor([1.0, 2.0, 3.0, 3.0]), torch.tensor([0.1, 0.2, 0.9, 0.5])), 4)
        0.9487
    """
    first, second = (ranks - ranks.mean() for ranks in map(_ranks, (predicted, expected)))
    size = first.norm() * second.norm()
    return (first @ second / size).item() if size > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, places, counts = values.double().unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    return (ends - (counts - 1) / 2)[places]


def exact_match(predicted: str, answers: Sequence[str]) -> float:
    """1 if a span is one of the answers, but for case, punctuation and articles; none is expected where none is given.

    As in Rajpurkar et al. 2016.
    """
    return float(any(_words(predicted) == _words(answer) for answer in answers or [""]))


def overlap(predicted: str, answers: Sequence[str]) -> float:
    """The F1 of a span's words against the answer's that fits best, but for case, punctuation and articles.

    Example:
        >>> round(overlap("the Great Dane", ["great dane dog", "dane"]), 4)
        0.8
    """
    return max(_f1(_words(predicted), _words(answer)) for answer in answers or [""])


def _f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    shared = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected))


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()
