"""What a side's router logits make it choose, and where an engine and its model chose otherwise.

A side is the engine or the model. Its values are those of ``modcompile.variants.with_routing_outputs``, on the CPU, by
their names: "routing.<block>.<role>".
"""

__all__ = ["ForcedRouting", "RoutingRules"]

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.fx
from torch import Tensor

from modcompile.convert import padded_blocks
from modcompile.errors import ParityError
from modcompile.manifest import RoutedBlock
from modcompile.model import MoDModel
from modcompile.ops import route
from modcompile.passes.routing_outputs import ROLES
from modcompile.verify_report import RoutingDifference

# B batch  S rows


class RoutingRules:
    """What follows from logits by the contract of ``route``, or where each row decides for itself by its threshold.

    Args:
        mod: The routed model.
        valid: Which rows are no padding, bool [B, S]; None if all are.
    """

    def __init__(self, mod: MoDModel, valid: Tensor | None):
        self.blocks = {block.path: block for block in mod.routed_blocks}
        self.padded, self.thresholds, self.valid = padded_blocks(mod), mod.thresholds, valid

    def choices(self, values: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
        """The engine's positions and filled slots, up to the first block where they do not follow its own logits."""
        forced: dict[tuple[str, str], Tensor] = {}
        for block in self.blocks.values():
            _, positions, filled = (values[f"routing.{block.path}.{role}"] for role in ROLES[:3])
            due = self._route(block, values, positions.shape[1])
            if not (torch.equal(positions, due[0]) and torch.equal(filled, due[1])):
                break
            forced |= {(block.path, "positions"): positions, (block.path, "filled"): filled}
        return forced

    def difference(self, path: str, values: Mapping[str, Tensor], expected: Mapping[str, Tensor],
                   natural: Mapping[tuple[str, str], Tensor], logit_error: float) -> list[RoutingDifference]:
        """What the engine chose in a block otherwise than the model would have, on the same history.

        Args:
            path: The block's.
            values: The engine's.
            expected: The model's with the engine's choices, on any device.
            natural: What the model would have chosen itself, by block and role.
            logit_error: The largest difference between the two sides' logits.
        """
        block = self.blocks[path]
        expected = {name: value.cpu() for name, value in expected.items() if name.startswith(f"routing.{path}.")}
        logits = expected[f"routing.{path}.logits"]

        def taken(positions, filled):
            return torch.zeros_like(logits, dtype=torch.bool).scatter(1, positions.cpu(), filled.cpu())

        model = taken(*(natural[path, role] for role in ("positions", "filled")))
        engine = taken(*(values[f"routing.{path}.{role}"] for role in ("positions", "filled")))
        swapped = model != engine
        rows = max(int((swapped & side).sum()) for side in (engine, model))
        if not rows:
            return []
        crossed = torch.zeros_like(swapped)
        margin = torch.zeros(())
        if path in self.thresholds:
            # Of those that decided otherwise, how far they are from the threshold; a row's slot may be another's then.
            crossed = swapped & (self._takes(block, expected) != self._takes(block, values))
            asked = expected.get(f"routing.{path}.decision", logits)
            margin = (asked - self.thresholds[path]).abs().masked_fill(~crossed, 0).max()
        score = logits.nan_to_num(nan=-torch.inf).clamp(min=torch.finfo(logits.dtype).min)
        left_out = score.masked_fill(~(swapped & model & ~crossed), -torch.inf).amax(1)
        let_in = score.masked_fill(~(swapped & engine & ~crossed), torch.inf).amin(1)
        margin = (left_out - let_in).nan_to_num(0, 0, 0).max().clamp(min=margin)
        return [RoutingDifference(path, rows, float(margin), logit_error)]

    def broken_order(self, path: str, values: Mapping[str, Tensor], where: Path) -> ParityError:
        """What to say of an engine, in the folder ``where``, whose choice in a block does not follow its own logits."""
        positions = values[f"routing.{path}.positions"]
        due, _ = self._route(self.blocks[path], values, positions.shape[1])
        row = int((due != positions).any(1).nonzero()[0]) if not torch.equal(due, positions) else 0
        return ParityError(
            f"the engine's routing does not follow its own logits, first in block {path}", where=where,
            expected=f"positions {due[row].tolist()} in sequence {row}, the contract of route on the engine's logits",
            found=f"positions {positions[row].tolist()}, filled {values[f'routing.{path}.filled'][row].tolist()}",
            fix="this is a defect of the runtime's TopK or of the lowering of route: please report it")

    def valid_for(self, path: str) -> Tensor | None:
        """Which rows of a block are no padding, of the shape of its logits; None if all are."""
        if self.valid is None or path not in self.padded:
            return None
        return self.valid if self.blocks[path].axis == "token" else self.valid.any(1)[None]  # [1, B]

    def _route(self, block: RoutedBlock, values: Mapping[str, Tensor], capacity: int) -> tuple[Tensor, Tensor]:
        """What follows from a side's logits by the contract."""
        takes = self._takes(block, values) if block.path in self.thresholds else self.valid_for(block.path)
        return route(values[f"routing.{block.path}.logits"], takes, capacity)

    def _takes(self, block: RoutedBlock, values: Mapping[str, Tensor]) -> Tensor:
        """The rows that want to enter, where each decides for itself."""
        asked = values.get(f"routing.{block.path}.decision", values[f"routing.{block.path}.logits"]).cpu()
        takes, valid = asked > self.thresholds[block.path], self.valid_for(block.path)
        return takes if valid is None else takes & valid


class ForcedRouting(torch.fx.Interpreter):
    """Runs a routed graph with given choices in the place of its own, which it notes."""

    def __init__(self, graph_module: torch.fx.GraphModule, forced: Mapping[tuple[str, str], Tensor]):
        super().__init__(graph_module)
        self.forced = forced
        self.natural: dict[tuple[str, str], Tensor] = {}

    def run_node(self, node: torch.fx.Node):
        """Notes what a node with a role in the routing gives, and passes the given choice on, if there is one."""
        value = super().run_node(node)
        if "role" in node.meta:
            key = tuple(node.meta["role"])
            self.natural[key] = value
            return self.forced.get(key, value)
        return value
