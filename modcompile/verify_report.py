"""What ``verify`` found of an engine that passed."""

__all__ = ["RoutingDifference", "VerifyReport"]

import dataclasses
from typing import TYPE_CHECKING, Any

from modcompile.verify_compare import Comparison

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclasses.dataclass(frozen=True)
class RoutingDifference:
    """A block into which the engine let other rows than the model, because their logits are nearly equal.

    Attributes:
        block: The block's path.
        rows: How many rows the engine let in that the model did not; or the other way, if these are more.
        margin: How far apart, in the model's logits, the most distant two rows are that changed places.
        logit_error: The largest difference between the engine's and the model's logits; it explains margins up to
            twice its size.
    """

    block: str
    rows: int
    margin: float
    logit_error: float

    def __str__(self):
        return (f"block {self.block}: {self.rows} rows chosen differently, with logits up to {self.margin:.2g} apart "
                f"where the engine's are up to {self.logit_error:.2g} from the model's")


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """An engine that passed.

    Attributes:
        engine: Its folder.
        runtime: Its runtime; ``precision``: of its weights.
        tolerance: What was asked for, see ``modcompile.verify_compare.TOLERANCES``.
        outputs: The model's outputs; where they differed for near ties, those of the model with the engine's choices.
        blocks: Every value compared at the blocks' borders, in the model's order; empty if there was no need.
        routing: The near ties that were decided differently.
    """

    engine: str
    runtime: str
    precision: str
    tolerance: float
    outputs: tuple[Comparison, ...]
    blocks: tuple[Comparison, ...] = ()
    routing: tuple[RoutingDifference, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return dataclasses.asdict(self)

    def __rich__(self) -> "RenderableType":
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("compared", "shape", "largest error", "limit", "relative L2", box=None, header_style="bold",
                      pad_edge=False)
        for item in (*self.blocks, *self.outputs):
            table.add_row(Text(item.name), Text(str(list(item.shape))), f"{item.max_abs_error:.2g}",
                          f"{item.limit:.2g}", f"{item.relative_l2:.2g}")
        lines = [f"the engine agrees with the model: {self.runtime}, {self.precision}, tolerance {self.tolerance:g}"]
        if self.routing:
            lines.append("given the engine's choice among rows whose logits are nearly equal:")
        return Group(Text("\n".join([*lines, *map(str, self.routing)])), table)
