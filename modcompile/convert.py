"""From a dense model to its Mixture-of-Depths form: capture, find blocks, outline, route."""

import itertools
import warnings
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import nn

from modcompile.blocks import BlockReport, find_blocks, select_blocks
from modcompile.capture import capture
from modcompile.config import MoDConfig
from modcompile.errors import ModcompileWarning, UsageError
from modcompile.manifest import RoutedBlock
from modcompile.model import GraphModel, MoDModel
from modcompile.pass_manager import Pass, PassManager
from modcompile.passes.attend_to_all import AttendToAll
from modcompile.passes.outline_blocks import OutlineBlocks
from modcompile.passes.prune_blocks import PruneBlocks
from modcompile.passes.round_capacity import RoundCapacity
from modcompile.passes.route_blocks import RouteBlocks
from modcompile.passes.split_fused_qkv import SplitFusedQkv
from modcompile.program import Program
from modcompile.routers import make_router, router_path
from modcompile.shapes import fake_inputs, propagate

__all__ = ["at_capacity", "convert", "dropping_passes", "padding_mask", "routing_passes"]

DEFAULT_MASK = "attention_mask"


def convert(model: nn.Module, example_inputs=None, config: MoDConfig | None = None) -> MoDModel:
    """Rewrites a dense model so that chosen blocks process only the K rows that a router picks.

    The result shares the model's parameters. Its routers start at weight 0 and bias 1: every row has the same logit,
    and the first K valid rows of a sequence are taken, until the routers are trained or calibrated.

    Args:
        model: A dense module, or a GraphModel from ``capture``.
        example_inputs: Arguments of the model's forward, as for ``capture``; not needed for a GraphModel.
        config: What to route; the paper's choice by default.

    Returns:
        A MoDModel that is called like the model and returns what it returns.

    Warns:
        ModcompileWarning: Chosen rows of a block are to see each other by their place, as in a convolution.

    Raises:
        UsageError: Options that do not fit the model.
        UnsupportedGraphError: A model that cannot be captured, or a block that cannot be rewritten.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> mod = convert(nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 8),), MoDConfig(capacity_ratio=0.5))
        >>> list(mod.routers), mod(torch.randn(3, 7, 8)).shape
        (['layers.1'], torch.Size([3, 7, 8]))
    """
    config = MoDConfig() if config is None else config
    if not isinstance(config, MoDConfig):
        raise UsageError("the options of a conversion are a MoDConfig", expected="MoDConfig(...)",
                         found=type(config).__name__, where="convert, argument config", fix="MoDConfig(**options)")
    source = model if isinstance(model, GraphModel) else capture(model, example_inputs)
    report = find_blocks(source)
    routed = select_blocks(report, config)
    _warn_of_places(report, routed, config)
    described = _describe(report, routed, config)
    graph_module = source.program.copy().assemble(source.tensors(), non_persistent=source.non_persistent())
    hints = _make_room(graph_module, source, described)
    # Every block that can be, so that any of them can be dropped, and their borders compared.
    outline = PassManager([OutlineBlocks(tuple(block.path for block in report.routable))])
    outline(graph_module)
    dense_program = Program.of(graph_module).copy()
    device = next(graph_module.parameters()).device
    for path in routed:
        width = next(block.hidden_shape[-1] for block in report if block.path == path)
        graph_module.add_submodule(router_path(path), make_router(config, int(width), path == routed[0], device))
    manager = PassManager(routing_passes(source, routed, config))
    manager(graph_module)
    made = MoDModel(graph_module, source.interface, hints, [*source.passes, *outline.ran, *manager.ran], config,
                    described, dense_program)
    return made.train(model.training)


def _warn_of_places(report: BlockReport, routed: list[str], config: MoDConfig) -> None:
    """Says which routed blocks are not the dense ones' on the rows they get."""
    noted = [block for block in report if block.path in routed and block.note]
    # attend_to="all" refuses such blocks with a reason, and whole sequences keep their rows.
    if noted and config.attend_to == "chosen" and config.axis == "token":
        others = f" (and {len(noted) - 1} more)" if len(noted) > 1 else ""
        warnings.warn(f"block {noted[0].path}{others}: {noted[0].note}. Chosen rows lie next to each other in it, and "
                      "rows of padding pass by it: valid rows get something else than from the dense block, with "
                      "padding even at capacity_ratio=1.0. Train the converted model, or route other blocks",
                      ModcompileWarning, stacklevel=3)


def at_capacity(mod: MoDModel, ratio: float | Sequence[float]) -> MoDModel:
    """``MoDModel.with_capacity``: the routing passes anew, at another ratio, on the outlined dense graph."""
    refuse_decided(mod, "with_capacity")
    config = MoDConfig(**{**mod.config.model_dump(), "capacity_ratio": ratio})
    routed = list(mod.routers)
    described = [block.with_ratio(ratio) for block, ratio in zip(mod.routed_blocks, config.ratios(routed), strict=True)]
    dense = mod.variant(mod.dense_program, routers=True)
    hints = _make_room(dense.graph_module, dense, described)
    manager = PassManager(routing_passes(mod, routed, config))
    manager(dense.graph_module)
    routing = {record["name"] for record in manager.ran}
    before = itertools.takewhile(lambda record: record["name"] not in routing, mod.passes)
    made = MoDModel(dense.graph_module, mod.interface, hints, [*before, *manager.ran], config, described,
                    mod.dense_program.copy())
    return made.train(mod.training)


def refuse_decided(mod: MoDModel, where: str) -> None:
    """Refuses a model in which each row decides for itself: routed anew from the dense graph, it would look ahead.

    Raises:
        UsageError: It is one.
    """
    if mod.thresholds:
        raise UsageError("a model in which each row decides for itself cannot be routed anew", where=where,
                         expected="a model of top-k", found="one of causal_model",
                         fix="start from the model that causal_model was given; it takes a capacity_ratio too")


def routing_passes(source: GraphModel, routed: list[str], config: MoDConfig) -> list[Pass]:
    """The pipeline on the outlined graph, read top to bottom."""
    paths, ratios = tuple(routed), tuple(str(ratio) for ratio in config.ratios(routed))
    # A whole sequence attends to itself either way, so only rows need the split.
    split = config.attend_to == "all" and config.axis == "token"
    return [
        *dropping_passes(config),
        *([
            # Queries of rows that pass by are never needed: a fused projection would compute them.
            SplitFusedQkv(paths),
            # Keys and values from all rows, everything else from the chosen ones.
            AttendToAll(paths),
        ] if split else []),
        RouteBlocks(paths, ratios, config.gate, config.axis, padding_mask(source, config),
                    seen=config.router if config.router in ("depth", "attention") else "hidden"),
        # Last: it needs the capacities that routing computes.
        RoundCapacity(config.capacity_multiple),
    ]


def dropping_passes(config: MoDConfig) -> list[Pass]:
    """What leaves out the blocks that nothing is routed through."""
    return [PruneBlocks(config.dropped)] if config.dropped else []


def padding_mask(source: GraphModel, config: MoDConfig) -> str | None:
    """The name of the padding mask's input, with its "~"; None if every row is valid.

    Raises:
        UsageError: The configuration names no input of shape [B, S].
    """
    name = (config.padding_mask or DEFAULT_MASK).removeprefix("~")
    spec = next((spec for spec in source.inputs if spec.name == name), None)
    if spec is None or len(spec.shape) != 2:
        if config.padding_mask is None:
            return None
        raise UsageError("padding_mask names no input of shape [B, S]", expected=source.interface.summary(),
                         found=config.padding_mask, where="MoDConfig.padding_mask",
                         fix="name one of the inputs, and give it in example_inputs")
    return config.padding_mask or DEFAULT_MASK


def valid_rows(name: str, mask: torch.Tensor) -> torch.Tensor:
    """Which rows are no padding, as the input says that ``padding_mask`` names; bool [B, S]."""
    return mask == 0 if name.startswith("~") else mask != 0


def padded_dims(source: GraphModel, config: MoDConfig) -> tuple[int | str, ...] | None:
    """The dims of the padding mask, [B, S]: it is of values that begin with them. None without one."""
    name = padding_mask(source, config)
    return next((spec.shape for spec in source.inputs if name and spec.name == name.removeprefix("~")), None)


def padded_blocks(mod: MoDModel) -> frozenset[str]:
    """The routed blocks whose rows are those of the padding mask; in others, such as a decoder's, all rows count."""
    batch, rows = padded_dims(mod, mod.config) or (None, None)
    return frozenset(block.path for block in mod.routed_blocks
                     if block.rows == (rows if block.axis == "token" else batch))


def _make_room(graph_module: torch.fx.GraphModule, source: GraphModel, blocks: list[RoutedBlock]) -> dict[str, int]:
    """The sizes that shapes are propagated with, once that is done with larger ones where capacities need room."""
    hints = _roomy_hints(source.hints, blocks)
    if hints != source.hints:
        try:
            propagate(graph_module, fake_inputs(list(source.inputs), hints, source))
        except RuntimeError:
            # Longer than the model can be, as a table of positions may say: no size that it takes has more room.
            hints = source.hints
            propagate(graph_module, fake_inputs(list(source.inputs), hints, source))
    return hints


def _roomy_hints(hints: dict[str, int], blocks: list[RoutedBlock]) -> dict[str, int]:
    """Sizes at which every capacity that may vary is at least 2, and less than the rows where it can be.

    A size of 1, or two sizes that happen to be equal, would be taken for fixed while shapes are propagated.
    """
    made = dict(hints)
    for block in blocks:
        # An S that is computed from other sizes keeps its own.
        if block.rows in made and (ratio := Fraction(block.capacity_ratio)) < 1:
            size = max(made[block.rows], int(1 / ratio) + 1 if block.multiple == 1 else block.multiple + 1)
            while block.capacity_for(size) == size and size < 2 * block.multiple + 8:
                size += 1
            made[block.rows] = size
    return made


def _describe(report: BlockReport, routed: list[str], config: MoDConfig) -> list[RoutedBlock]:
    shapes = {block.path: block.hidden_shape for block in report}
    made = []
    for path, ratio in zip(routed, config.ratios(routed), strict=True):
        rows = shapes[path][1 if config.axis == "token" else 0]
        block = RoutedBlock(path=path, capacity_ratio=f"{ratio.numerator}/{ratio.denominator}", rows=str(rows),
                            multiple=config.capacity_multiple, attend_to=config.attend_to, gate=config.gate,
                            router=config.router, axis=config.axis)
        made.append(block.at({str(rows): rows}) if isinstance(rows, int) else block)
    return made
