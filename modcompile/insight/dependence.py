"""What the choice of rows depends on: on groups of rows that are alike, and on a row's own logit.

``routing`` is every passage's, in order; ``taken``, bool [L, N], says of all their rows together which went through
which block.
"""

__all__ = ["agreement", "by_entropy", "by_frequency", "by_kind", "by_position", "group"]

import itertools
from collections import Counter

import numpy as np

from modcompile.insight.figures import Agreement, Group, PassageRouting
from modcompile.insight.passages import KINDS

# L routed blocks  N valid rows of all passages

# Groups that a quantity is cut into.
GROUPS = 8


def group(name: str, taken: np.ndarray, rows: np.ndarray) -> Group:
    """The rows of ``taken`` [L, N] that ``rows`` [N] is true at."""
    by_block = taken[:, rows].mean(axis=1)
    return Group(name, int(rows.sum()), float(by_block.mean()), tuple(by_block.tolist()))


def by_kind(routing: list[PassageRouting], taken: np.ndarray) -> tuple[Group, ...]:
    """Rows by what kind of token they are."""
    kinds = np.array([kind for item in routing for kind in item.passage.kinds])
    return tuple(group(kind, taken, kinds == kind) for kind in KINDS if (kinds == kind).any())


def by_frequency(routing: list[PassageRouting], taken: np.ndarray) -> tuple[Group, ...]:
    """Rows by how often their token is in the text."""
    ids = [word for item in routing for word in item.passage.ids]
    counts = Counter(ids)
    power = np.array([counts[word].bit_length() - 1 for word in ids]).clip(max=GROUPS - 1)
    names = ["once", *(f"{2**p} to {2**(p + 1) - 1} times" for p in range(1, GROUPS - 1)),
             f"{2**(GROUPS - 1)} times or more"]
    return tuple(group(names[p], taken, power == p) for p in range(GROUPS) if (power == p).any())


def by_position(routing: list[PassageRouting], taken: np.ndarray) -> tuple[Group, ...]:
    """Rows by where in their passage they are."""
    at = np.concatenate([np.arange(len(item.passage.ids)) for item in routing])
    edges = np.unique(np.linspace(0, at.max() + 1, GROUPS + 1).astype(int))
    return tuple(group(f"{low} to {high - 1}" if high - low > 1 else str(low), taken, (low <= at) & (at < high))
                 for low, high in itertools.pairwise(edges))


def by_entropy(routing: list[PassageRouting], taken: np.ndarray) -> tuple[Group, ...]:
    """Rows by the entropy of the routed model's prediction, which every passage has."""
    entropy = np.concatenate([item.entropy for item in routing if item.entropy is not None])
    edges = np.unique(np.quantile(entropy, np.linspace(0, 1, GROUPS + 1)))
    cut = np.searchsorted(edges[1:-1], entropy, side="right")
    return tuple(group(f"{edges[i]:.2f} to {edges[i + 1]:.2f} nats", taken, cut == i)
                 for i in range(max(len(edges) - 1, 0)) if (cut == i).any())


def agreement(path: str, index: int, routing: list[PassageRouting]) -> Agreement:
    """Of a routed block, the ``index``-th, how often a decision that looks at one row alone is what top-k decided."""
    logits = [item.logits[index] for item in routing]
    taken = [item.taken[index] for item in routing]
    every, chosen = np.concatenate(logits), np.concatenate(taken)
    threshold = None
    if len(routing) > 1:
        known = np.sort(np.concatenate(logits[::2]))[::-1]
        last = int(np.concatenate(taken[::2]).sum())
        # Halfway between the last logit that is above and the first that is not.
        border = known[max(last - 1, 0):last + 1].mean()
        threshold = float(((np.concatenate(logits[1::2]) > border) == np.concatenate(taken[1::2])).mean())
    share = float(chosen.mean())
    return Agreement(path, share, float((every > 0).mean()), float(((every > 0) == chosen).mean()), threshold,
                     max(share, 1 - share), bool(every.max() == every.min()))
