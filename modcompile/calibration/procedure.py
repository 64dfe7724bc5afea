"""The whole of calibration: measure, fit the routers, choose blocks and ratios, convert."""

__all__ = ["CalibrationResult", "calibrate", "pruning_order"]

import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import nn

from modcompile.calibration.batches import Batch, bind_batches
from modcompile.calibration.choose import search
from modcompile.calibration.measure import measure
from modcompile.calibration.trials import DENSE, DROPPED, Trials
from modcompile.capture import capture
from modcompile.config import MoDConfig, as_fraction
from modcompile.convert import convert
from modcompile.errors import UnsupportedGraphError, UsageError
from modcompile.model import GraphModel, MoDModel

# B batch  S rows  D model dim

# What is added to the regression's diagonal, as a share of its mean. With a few thousand rows and D = 576, a hundredth
# to a tenth ranked rows best on other text; a thousandth, or one, clearly worse.
RIDGE = 0.03


@dataclasses.dataclass(frozen=True)
class CalibrationResult:
    """A calibrated model and how it came about.

    Attributes:
        mod: The routed model, its routers fitted. It shares the dense model's parameters.
        report: JSON-ready: ``objective``, ``budget`` and ``flops``, shares of the dense model's; ``loss`` of the
            ``dense`` and the ``calibrated`` model on the trial batches; ``attend_to``, with the loss and FLOPs of each
            that was tried; ``moves`` in the order that they were taken; ``blocks``, the ratio of each (1 if it is not
            routed) and the share ``r2`` of the importance's variance that its router explains; ``rows`` and
            ``trial_batches``, what was seen.
    """

    mod: MoDModel
    report: dict[str, Any]


def calibrate(model: nn.Module, batches: Sequence[Any], budget: float, *, blocks: str | Sequence = "all",
              ratios: Sequence[float | Fraction] = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2)),
              attend_to: Literal["auto", "all", "chosen"] = "auto",
              objective: Literal["auto", "next-token", "outputs"] = "auto", padding_mask: str | None = None,
              draws: int = 2, ridge: float = RIDGE, trial_batches: int = 4, seed: int = 0,
              say: Callable[[str], None] = lambda text: None) -> CalibrationResult:
    """Turns a pretrained dense model into a routed one for a budget of FLOPs, without training.

    1. Every row's importance to every block is measured in the dense model: the log of the Fisher norm of its update
       (see ``calibration.measure``), which ranks rows far more like the KL divergence of leaving one update out does
       than the update's own norm.
    2. Each router is fitted to it by ridge regression on what the router sees.
    3. Blocks and their ratios are chosen by measured loss per FLOP saved, with these routers, until the budget is met.

    On a CPU the same arguments give the same model. Memory, beside the model: activations of one batch with gradients, a
    float64 matrix [D, D] for each block, and, for the objective "outputs", the outputs of the trial batches.

    Args:
        model: A dense module, or a GraphModel from ``capture``. It is run in evaluation mode.
        batches: Calls of the model, in a list: dicts of tensors by name, tuples, or single tensors. Sizes may differ;
            FLOPs are counted for the first one's, which is also what a module is captured with.
        budget: What the routed model may cost, as a share of the dense model's FLOPs.
        blocks: Candidates, as for ``MoDConfig.blocks``.
        ratios: What a routed block may get of its rows, from which each block's is chosen. The last block chosen gets
            what the budget leaves it.
        attend_to: What chosen rows attend to; "auto" tries both ways and takes the one of less loss.
        objective: What losses are: "next-token" cross entropy, "outputs", the squared change of the outputs as a share
            of their square; "auto" takes the first for models whose logits do not look ahead.
        padding_mask: As for ``MoDConfig``.
        draws: Backward passes per batch.
        ridge: The strength of the regression's penalty, as a share of the mean square of the hidden state.
        trial_batches: On how many of the batches, spread evenly, losses are measured.
        seed: Of the random draws of the measurement.
        say: Told of progress.

    Raises:
        UsageError: Batches that do not fit the model, a budget that cannot be met, with the lowest that can, or a loss
            or a block's output that is not a number.
        UnsupportedGraphError: A model that cannot be captured or routed.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model, batches = nn.TransformerEncoder(layer, 4), [(torch.randn(2, 16, 8),)]
        >>> result = calibrate(model, batches, budget=0.8)
        >>> result.report["flops"] <= 0.8, result.mod(torch.randn(3, 7, 8)).shape
        (True, torch.Size([3, 7, 8]))
    """
    asked = [as_fraction(ratio) for ratio in ratios]
    if not asked or not all(0 < ratio < 1 for ratio in asked):
        raise UsageError("a ratio does not fit", expected="numbers in (0, 1)", found=tuple(map(str, ratios)),
                         where="ratios")
    if draws < 1 or ridge <= 0 or trial_batches < 1:
        raise UsageError("an option is too small", expected="draws and trial_batches of at least 1, ridge above 0",
                         found=f"draws {draws}, trial_batches {trial_batches}, ridge {ridge}", where="calibrate")
    if not 0 < budget < 1:
        raise UsageError("the budget does not fit", expected="a share of the dense model's FLOPs, in (0, 1)",
                         found=budget, where="budget")
    config = MoDConfig(blocks=blocks if isinstance(blocks, str) else tuple(blocks), gate="straight-through",
                       padding_mask=padding_mask)
    graph, bound = _prepare(model, batches, config)
    tried, refused = _trials(graph, config, attend_to, bound, trial_batches, objective)
    say("measuring what rows matter")
    first = tried[0]
    fits = measure(first.dense, first.paths, bound, first.objective, draws=draws, seed=seed)
    fitted = {path: fit.solve(ridge) for path, fit in fits.items()}
    found = []
    for trials in tried:
        _load(trials.mod, fitted)
        say(f"choosing blocks that attend to {trials.attend_to} rows")
        found.append((*search(trials, asked, budget, say), trials))
    state, moves, trials = min(found, key=lambda each: each[1][-1].loss)
    routed = {path: ratio for path, ratio in state.items() if ratio < DENSE}
    mod = convert(graph, config=MoDConfig(**config.model_dump() | {
        "blocks": tuple(routed), "capacity_ratio": tuple(map(float, routed.values())), "attend_to": trials.attend_to}))
    _load(mod, fitted)
    report = {
        "objective": trials.objective.name,
        "budget": budget,
        "flops": moves[-1].flops,
        "loss": {"dense": trials.loss(dict.fromkeys(trials.paths, DENSE)), "calibrated": moves[-1].loss},
        "attend_to": {each.attend_to: {"loss": taken[-1].loss, "flops": taken[-1].flops} for _, taken, each in found}
        | {way: {"refused": reason} for way, reason in refused.items()},
        "blocks": {path: {"ratio": str(ratio), "r2": fitted[path][2]} for path, ratio in state.items()},
        "moves": [dataclasses.asdict(move) | {"ratio": str(move.ratio)} for move in moves],
        "rows": fits[trials.paths[0]].rows,
        "trial_batches": min(trial_batches, len(bound)),
    }
    return CalibrationResult(mod, report)


def pruning_order(model: nn.Module, batches: Sequence[Any], budget: float, *, blocks: str | Sequence = "all",
                  objective: Literal["auto", "next-token", "outputs"] = "auto", padding_mask: str | None = None,
                  trial_batches: int = 4, say: Callable[[str], None] = lambda text: None) -> list[str]:
    """Blocks from the least to the most useful, by measured loss: the strong baseline that is pruned, not routed.

    It is the ``order`` that ``variants.pruned_blocks`` takes. Each next block is the one whose absence, beside that of
    those before it, costs the least loss per FLOP; blocks that are not needed for the budget follow in the model's
    order. Arguments and errors are those of ``calibrate``.
    """
    config = MoDConfig(blocks=blocks if isinstance(blocks, str) else tuple(blocks), padding_mask=padding_mask)
    graph, bound = _prepare(model, batches, config)
    (trials,), _ = _trials(graph, config, "chosen", bound, trial_batches, objective)
    _, moves = search(trials, [DROPPED], budget, say)
    dropped = [move.path for move in moves]
    return [*dropped, *(path for path in trials.paths if path not in dropped)]


def _prepare(model: nn.Module, batches: Sequence[Any], config: MoDConfig) -> tuple[GraphModel, list[Batch]]:
    """The model's graph, and the batches as its inputs, of which it takes the first."""
    if not isinstance(batches, Sequence) or not batches:
        raise UsageError("calibration goes through its batches many times", where="batches",
                         expected="a list of calls: dicts of inputs by name, or tensors",
                         found="an empty list" if isinstance(batches, Sequence) else type(batches).__name__,
                         fix="list(batches)")
    graph = model if isinstance(model, GraphModel) else capture(model, batches[0])
    bound = bind_batches(graph, batches, config)
    try:
        with torch.no_grad():
            graph.run_graph(bound[0].inputs)
    except (IndexError, RuntimeError) as error:
        # Longer than a table of positions, for example.
        raise UsageError("the model does not take these sizes", expected=graph.interface.summary(), where="batches[0]",
                         found=f"{', '.join(str(tuple(tensor.shape)) for tensor in bound[0].inputs)}: "
                         f"{str(error).partition(chr(10))[0]}", fix="give it shorter sequences") from error
    return graph, bound


def _trials(graph: GraphModel, config: MoDConfig, attend_to: str, batches: list[Batch], count: int,
            objective: Literal["auto", "next-token", "outputs"]) -> tuple[list[Trials], dict[str, str]]:
    """What is tried: a graph for each way to attend. "auto" leaves out one that the blocks cannot be cut for."""
    picked = [batches[i * len(batches) // min(count, len(batches))] for i in range(min(count, len(batches)))]
    made, refused = [], {}
    for way in ("all", "chosen") if attend_to == "auto" else (attend_to,):
        try:
            made.append(Trials(graph, MoDConfig(**config.model_dump() | {"attend_to": way}), objective, picked))
        except UnsupportedGraphError as error:
            if attend_to != "auto" or way == "chosen":
                raise
            refused[way] = str(error)
    return made, refused


def _load(mod: MoDModel, fitted: dict[str, tuple[torch.Tensor, torch.Tensor, float]]) -> None:
    """Gives the routers their fitted weights."""
    with torch.no_grad():
        for path, router in mod.routers.items():
            weight, bias, _ = fitted[path]
            router.weight.copy_(weight[None])
            router.bias.copy_(bias)
