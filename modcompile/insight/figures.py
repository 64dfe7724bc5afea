"""What is measured of a routed model on a text: each figure, and of what it is."""

__all__ = ["Agreement", "BlockFacts", "Group", "Insight", "PassageRouting", "Variant"]

import dataclasses
from typing import Any

import numpy as np

from modcompile.insight.passages import Passage

# S rows  L routed blocks


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that have something in common.

    Attributes:
        name: What.
        rows: How many there are.
        rate: The share of (row, routed block) pairs in which the row went through the block; ``by_block``: the share of
            rows, for each block.
    """

    name: str
    rows: int
    rate: float
    by_block: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of one block, how often a decision that looks at one row alone is what top-k decided. All are shares of rows.

    Attributes:
        path: The block.
        taken: Rows that top-k took; ``positive``: those whose logit is above 0.
        sign: Agreement of "logit above 0", that is sigmoid above 1/2, which auxiliary cross-entropy trains.
        threshold: Agreement of "logit above the value that took as many rows of the passages with even numbers",
            measured on those with odd numbers; None for a text of one passage.
        constant: Agreement of one decision for all rows, the better of the two: what a decision has to beat.
        flat: Whether every row has the same logit, so that top-k took the first ones.
    """

    path: str
    taken: float
    positive: float
    sign: float
    threshold: float | None
    constant: float
    flat: bool

    @property
    def sign_decides(self) -> bool:
        """Whether the logit's sign says more of top-k's choice than one decision for all rows."""
        return not self.flat and self.sign > self.constant


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model beside the others.

    Attributes:
        name: "dense", "routed" or "pruned".
        flops: Of one call.
        loss: Mean cross-entropy of the next token, in nats; None where it is not defined.
        deviation: ||y - y_dense|| / ||y_dense|| of the model's first output over the valid rows.
    """

    name: str
    flops: int
    loss: float | None
    deviation: float


@dataclasses.dataclass(frozen=True)
class BlockFacts:
    """One block, routed or not.

    Attributes:
        path: Its module path; ``routed``: whether it is routed.
        rows: S, or B where sequences are routed; ``capacity``: how many of them enter.
        flops: Of one call, with its router's; ``dense_flops``: of the block in the dense model.
        rate: The share of rows that went through; 1 for a block that is not routed, 0 for one that is left out.
        empty: The share of slots that no valid row filled.
    """

    path: str
    routed: bool
    rows: int
    capacity: int
    flops: int
    dense_flops: int
    rate: float = 1.0
    empty: float = 0.0


@dataclasses.dataclass(frozen=True)
class PassageRouting:
    """One passage and what was decided on it. S valid rows, L routed blocks.

    Attributes:
        passage: Its tokens.
        logits: float32 [L, S]; ``taken``: bool [L, S], whether the row went through the block.
        entropy: Of the routed model's prediction at each row, in nats, [S]; None without logits over a vocabulary.
        loss: Cross-entropy of the token after each row, [S - 1]; None where it is not defined.
    """

    passage: Passage
    logits: np.ndarray
    taken: np.ndarray
    entropy: np.ndarray | None
    loss: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Insight:
    """All that was measured.

    Attributes:
        options: The conversion's options, as JSON-ready values.
        sizes: The size of each symbol of the inputs in a full batch.
        padding: The share of rows that are padding.
        passages: What was read, in order; ``blocks``: every block, in the model's order.
        overall: All rows.
        by_kind, by_frequency, by_position: All rows, cut by what kind of token they are, how often the token is in the
            text, and where in the passage it is.
        by_entropy: Cut by the entropy of the prediction; a text with the reason where it cannot be.
        agreement: Of each routed block.
        variants: Dense, routed and pruned; ``pruned``: the blocks that the pruned model lacks.
        no_loss: Why there is no loss; None if there is one.
    """

    options: dict[str, Any]
    sizes: dict[str, int]
    padding: float
    passages: tuple[PassageRouting, ...]
    blocks: tuple[BlockFacts, ...]
    overall: Group
    by_kind: tuple[Group, ...]
    by_frequency: tuple[Group, ...]
    by_position: tuple[Group, ...]
    by_entropy: tuple[Group, ...] | str
    agreement: tuple[Agreement, ...]
    variants: tuple[Variant, ...]
    pruned: tuple[str, ...]
    no_loss: str | None

    @property
    def routed(self) -> tuple[BlockFacts, ...]:
        """The routed blocks."""
        return tuple(block for block in self.blocks if block.routed)

    def to_dict(self) -> dict[str, Any]:
        """What can be told in short, as JSON-ready values: everything but the passages."""
        made = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "passages"}
        made = {name: _plain(value) for name, value in made.items()}
        return {"tokens": self.overall.rows, "passages": len(self.passages), **made}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
