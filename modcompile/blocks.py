"""Finds what could be routed: repeated sub-modules that map one hidden state [B, S, D] to another.

The graph alone decides, see ``modcompile.block_view``.
"""

__all__ = ["Block", "BlockReport", "find_blocks", "select_blocks"]

import dataclasses
import fnmatch
import re

import sympy
import torch

from modcompile.block_sides import ROWS
from modcompile.block_view import BlockView, analyse_block, block_groups
from modcompile.capture import capture
from modcompile.config import MoDConfig
from modcompile.errors import UsageError
from modcompile.model import GraphModel
from modcompile.neighbours import sees_places
from modcompile.pass_manager import Skip
from modcompile.shapes import shape_exprs

# B batch  S rows  D model dim


@dataclasses.dataclass(frozen=True)
class Block:
    """One repeated sub-module, and whether it can be routed.

    Attributes:
        path: Module path, such as "encoder.layer.1".
        group: The path of the list it belongs to; ``index``: its place in it.
        hidden_shape: Dims of the hidden state, if one was found.
        reason: Why it cannot be routed; None if it can.
        note: What to know before it is routed; None if there is nothing.
    """

    path: str
    group: str
    index: int
    hidden_shape: tuple[int | str, ...] | None
    reason: str | None
    note: str | None = None

    @property
    def routable(self) -> bool:
        """Whether the block can be routed."""
        return self.reason is None


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """The blocks of a model, in the order of its graph."""

    blocks: tuple[Block, ...]

    def __iter__(self):
        return iter(self.blocks)

    def __len__(self):
        return len(self.blocks)

    @property
    def groups(self) -> dict[str, list[Block]]:
        """The blocks of each list of modules."""
        groups: dict[str, list[Block]] = {}
        for block in self.blocks:
            groups.setdefault(block.group, []).append(block)
        return groups

    @property
    def routable(self) -> list[Block]:
        """The blocks that can be routed."""
        return [block for block in self.blocks if block.routable]


def find_blocks(model: torch.nn.Module, example_inputs=None) -> BlockReport:
    """What could be routed in a model, and for the rest why not.

    Args:
        model: A module (then with example inputs, as for ``capture``) or a GraphModel.
        example_inputs: Arguments of the model's forward.

    Raises:
        UsageError: A model that was converted, or a variant of one: its blocks are found already.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> report = find_blocks(torch.nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 8),))
        >>> [(block.path, block.routable) for block in report]
        [('layers.0', True), ('layers.1', True)]
    """
    graph_model = model if isinstance(model, GraphModel) else capture(model, example_inputs)
    if bodies := graph_model.program.bodies:
        raise UsageError("the model was converted already", expected="a dense model", where="find_blocks",
                         found=f"{type(model).__name__} with the blocks {', '.join(bodies)}",
                         fix="give the dense model that it came from; other capacities: MoDModel.with_capacity")
    graph = graph_model.graph_module.graph
    placeholders = zip(graph.find_nodes(op="placeholder"), graph_model.inputs, strict=True)
    names = {expr: spec.shape[i] for node, spec in placeholders for i, expr in enumerate(shape_exprs(node) or ())}
    symbols = {expr: sympy.Symbol(name) for expr, name in names.items() if expr.is_Symbol}
    blocks = []
    for group, paths in block_groups(graph).items():
        for index, path in paths:
            found = analyse_block(graph, path, [sibling for _, sibling in paths if sibling != path])
            shape = note = None
            if isinstance(found, BlockView):
                if (node := sees_places(found.body, ROWS, found.in_rows)) is not None:
                    note = f"{node.name} looks at rows by their place, outside of attention"
                exprs = [expr.xreplace(symbols) for expr in shape_exprs(found.hidden) or ()]
                shape = tuple(int(expr) if expr.is_number else str(expr) for expr in exprs)
            reason = _with_names(found.reason, names) if isinstance(found, Skip) else None
            blocks.append(Block(path, group, index, shape, reason, note))
    return BlockReport(tuple(blocks))


def _with_names(text: str, names: dict) -> str:
    """A reason with the inputs' names for symbols, which are numbered differently in every process."""
    known = {str(symbol): str(name) for symbol, name in names.items()}
    return re.sub(r"\bs\d+\b", lambda match: known.get(match[0], match[0]), text)


def select_blocks(report: BlockReport, config: MoDConfig) -> list[str]:
    """The paths that ``config.blocks`` names, in the model's order.

    Raises:
        UsageError: Nothing to route, an index or glob that names no block, or one that names a block that cannot be;
            likewise for ``config.dropped``.
    """
    if not report.routable:
        reasons = "; ".join(f"{b.path}: {b.reason}" for b in report.blocks[:4]) or "no repeated sub-modules"
        raise UsageError("the model has no block that can be routed", found=reasons, where="find_blocks",
                         expected="at least two numbered sub-modules that map a hidden state [B, S, D] to one of the "
                         "same shape",
                         fix="modcompile inspect shows what was found" if report.blocks else
                         "put the layers into an nn.ModuleList, and call each as layer(x), not layer.forward(x)")
    if config.blocks in ("every-other", "all"):
        chosen = {b.path for blocks in report.groups.values()
                  for i, b in enumerate(b for b in blocks if b.routable) if config.blocks == "all" or i % 2 == 1}
    else:
        chosen = _named_blocks(report, (config.blocks,) if isinstance(config.blocks, str) else config.blocks)
    routable = [block.path for block in report.routable]
    if unknown := [path for path in config.dropped if path not in routable]:
        raise UsageError("a block to drop is none", expected=", ".join(routable), found=", ".join(unknown),
                         where="MoDConfig.dropped")
    chosen -= set(config.dropped)
    # A model may leave out blocks and route none.
    if not chosen and not config.dropped:
        raise UsageError("blocks chooses nothing to route", found=repr(config.blocks), where="MoDConfig.blocks",
                         expected="one or more of " + ", ".join(b.path for b in report.routable),
                         fix='pass blocks="all", or name the blocks')
    return [b.path for b in report if b.path in chosen]


def _named_blocks(report: BlockReport, patterns: tuple[int, ...] | tuple[str, ...]) -> set[str]:
    chosen = set()
    for pattern in patterns:
        matches = [b for b in report if (b.index == pattern if isinstance(pattern, int) else
                                         fnmatch.fnmatchcase(b.path, pattern))]
        if not matches:
            raise UsageError(f"blocks names no block: {pattern!r}", where="MoDConfig.blocks", found=pattern,
                             expected=", ".join(b.path for b in report))
        # A glob may pass over what cannot be routed; an exact name or index may not.
        exact = isinstance(pattern, int) or not re.search(r"[*?\[]", pattern)
        for block in matches:
            if block.reason and exact:
                raise UsageError(f"block {block.path} cannot be routed", found=block.reason, where="MoDConfig.blocks",
                                 expected="one of " + ", ".join(b.path for b in report.routable))
        if not any(b.routable for b in matches):
            raise UsageError(f"no block of {pattern!r} can be routed", found=matches[0].reason,
                             where="MoDConfig.blocks", expected="one of " + ", ".join(b.path for b in report.routable))
        chosen |= {b.path for b in matches if b.routable}
    return chosen
