"""The whole of calibration: measure, fit the routers, choose blocks and ratios, convert."""

__all__ = ["CalibrationResult", "calibrate", "calibrate_each", "describe_blocks", "pruning_order"]

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal

from torch import nn

from modcompile.calibration.batches import Batch, check_options, prepare
from modcompile.calibration.choose import Search, check_budget
from modcompile.calibration.fit import RIDGE, Fitted, load_fitted
from modcompile.calibration.measure import Measured, fit_importance
from modcompile.calibration.objective import ObjectiveKind
from modcompile.calibration.trials import DENSE, DROPPED, State, Trials, trials_of
from modcompile.config import MoDConfig, as_fraction
from modcompile.convert import convert
from modcompile.errors import UsageError
from modcompile.model import GraphModel, MoDModel

# B batch  S rows  D model dim

# On the way to a budget, routers are fitted again each time that this share of the dense model's FLOPs is saved.
STRIDE = 0.1


@dataclasses.dataclass(frozen=True)
class CalibrationResult:
    """A calibrated model and how it came about.

    Attributes:
        mod: The routed model, its routers fitted; blocks that are worth nothing are left out. It shares the dense
            model's parameters.
        report: JSON-ready: ``objective``, ``budget`` and ``flops``, shares of the dense model's; ``loss`` on the trial
            batches of the ``dense`` model, of the ``pruned`` one for this budget and of the ``calibrated`` one;
            ``attend_to``, with the loss and FLOPs of each way that was tried; ``moves`` in the order that they were
            taken; ``blocks``, the ratio of each (1: not routed, 0: left out) and the share ``r2`` of the importance's
            variance that its router explains; ``rows`` and ``trial_batches``, what was seen. Where nothing was chosen
            (``fit_routers``) there are no ``budget``, no ``pruned`` loss and no ``moves``, and only the blocks that the
            configuration names.
    """

    mod: MoDModel
    report: dict[str, Any]


def calibrate(model: nn.Module, batches: Sequence[Any], budget: float, **options: Any) -> CalibrationResult:
    """Turns a pretrained dense model into a routed one for a budget of FLOPs, without training.

    1. Every row's importance to every block is measured: how far its update may move what the model returns (see
       ``calibration.measure``). Each router is fitted to it by ridge regression on what the router sees.
    2. Blocks get fewer rows, or are left out, by measured loss per FLOP saved, with these routers.
    3. Whenever a tenth of the dense model's FLOPs is saved, 1 is done again with what is routed in place; a router
       changes only where that lowers the loss. Then rows go from block to block as long as that does.

    The result is never worse, on the trial batches, than the model pruned to the budget by measured loss: that is one
    of the places that the search goes on from.

    On a CPU the same arguments give the same model. Memory, beside the model: activations of one batch with gradients,
    a float64 matrix [D, D] for each block, and of the trial batches the hidden states and the outputs.

    Args:
        model: A dense module, or a GraphModel from ``capture``. It is run in evaluation mode.
        batches: Calls of the model, in a list: dicts of tensors by name, tuples, or single tensors. Sizes may differ;
            FLOPs are counted for the first one's, which is also what a module is captured with.
        budget: What the routed model may cost, as a share of the dense model's FLOPs.
        options: As for ``calibrate_each``.

    Raises:
        UsageError: Batches that do not fit the model, a budget that cannot be met, with the lowest that can, or a loss
            or a block's output that is not a number.
        UnsupportedGraphError: A model that cannot be captured or routed.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model, batches = nn.TransformerEncoder(layer, 4), [(torch.randn(2, 16, 8),)]
        >>> result = calibrate(model, batches, budget=0.8)
        >>> result.report["flops"] <= 0.8, result.mod(torch.randn(3, 7, 8)).shape
        (True, torch.Size([3, 7, 8]))
    """
    return next(calibrate_each(model, batches, [budget], **options))


def calibrate_each(model: nn.Module, batches: Sequence[Any], budgets: Sequence[float], *,
                   blocks: str | Sequence = "all",
                   ratios: Sequence[float | Fraction] = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2)),
                   attend_to: Literal["auto", "all", "chosen"] = "auto", objective: ObjectiveKind = "auto",
                   padding_mask: str | None = None, draws: int = 2, ridge: float = RIDGE, trial_batches: int = 2,
                   exchanges: int = 4, seed: int = 0, say: Callable[[str], None] = lambda text: None,
                   ) -> Iterator[CalibrationResult]:
    """One model for each of several budgets, on one way down: cheaper than calibrating for each.

    Args:
        model: As for ``calibrate``.
        batches: What the model is calibrated on.
        budgets: Shares of the dense model's FLOPs. Results come from the highest to the lowest.
        blocks: Candidates, as for ``MoDConfig.blocks``.
        ratios: What a routed block may get of its rows. One block gets what the budget leaves.
        attend_to: What chosen rows attend to; "auto" tries both ways and takes the one of less loss.
        objective: What losses are: "divergence" from the dense model's predictions, "next-token", the text's cross
            entropy, or "outputs", the squared change of the outputs as a share of their square. "auto" takes the first
            for models that predict words, and the last for others.
        padding_mask: As for ``MoDConfig``.
        draws: Backward passes per batch.
        ridge: The strength of the regression's penalty, as a share of the mean square of the hidden state.
        trial_batches: On how many of the batches, spread evenly, losses are measured.
        exchanges: How often, at most, rows go from block to block at each stage.
        seed: Of the random draws of the measurement.
        say: Told of progress.

    Raises:
        UsageError: As for ``calibrate``.
        UnsupportedGraphError: As for ``calibrate``.
    """
    asked = [as_fraction(ratio) for ratio in ratios]
    if not asked or not all(0 < ratio < 1 for ratio in asked):
        raise UsageError("a ratio does not fit", expected="numbers in (0, 1)", found=tuple(map(str, ratios)),
                         where="ratios")
    check_options("calibrate", draws=draws, ridge=ridge, trial_batches=trial_batches, exchanges=exchanges)
    if not budgets or not all(0 < budget < 1 for budget in budgets):
        raise UsageError("the budget does not fit", expected="a share of the dense model's FLOPs, in (0, 1)",
                         found=", ".join(map(str, budgets)), where="budget")
    config = MoDConfig(blocks=blocks if isinstance(blocks, str) else tuple(blocks), gate="straight-through",
                       padding_mask=padding_mask)
    graph, bound = prepare(model, batches, config)
    tried, refused = trials_of(graph, config, attend_to, bound, trial_batches, objective)
    for trials in tried:
        check_budget(trials, DROPPED, min(budgets))
    ways = [_Way(trials, bound, asked, draws, ridge, exchanges, seed, say) for trials in tried]
    for budget in sorted(set(budgets), reverse=True):
        for way in ways:
            way.descend(budget)
        best = min(ways, key=lambda way: way.search.loss)
        report = best.report(budget) | {
            "attend_to": {way.trials.attend_to: {"loss": way.search.loss, "flops": way.share} for way in ways}
            | {way: {"refused": reason} for way, reason in refused.items()},
            "trial_batches": min(trial_batches, len(bound)),
        }
        yield CalibrationResult(_converted(graph, config, best), report)


class _Way:
    """The way down with one choice of what rows attend to."""

    def __init__(self, trials: Trials, batches: list[Batch], ratios: list[Fraction], draws: int, ridge: float,
                 exchanges: int, seed: int, say: Callable[[str], None]):
        self.trials, self._batches, self._draws, self._ridge = trials, batches, draws, ridge
        self._exchanges, self._seed, self._say, self._reached = exchanges, seed, say, 1.0
        say(f"measuring what rows matter, attending to {trials.attend_to} rows")
        self.fitted = self._fit(dict.fromkeys(trials.paths, DENSE))
        self.dense = trials.loss(dict.fromkeys(trials.paths, DENSE))
        self._load(self.fitted)
        self.pruned, self.search = Search(trials, [DROPPED]), Search(trials, [DROPPED, *ratios], say)

    @property
    def share(self) -> float:
        """The FLOPs that are left, as a share of the dense model's."""
        return self.search.flops / self.trials.dense_flops

    def descend(self, budget: float) -> None:
        """Goes on to a lower budget, by stages."""
        while self._reached > budget:
            self._reached = max(budget, self._reached - STRIDE)
            self._stage(self._reached)

    def report(self, budget: float) -> dict[str, Any]:
        """What is to be told of the model as it is now."""
        return {
            "objective": self.trials.objective.name, "budget": budget, "flops": self.share, "rows": self._rows,
            "loss": {"dense": self.dense, "pruned": self.pruned.loss, "calibrated": self.search.loss},
            "blocks": describe_blocks(self.search.state, self.fitted),
            "moves": [dataclasses.asdict(move) | {"ratio": str(move.ratio)} for move in self.search.moves],
        }

    def _stage(self, budget: float) -> None:
        # The pruned model's prices are part of the search's: what is measured once is known to both.
        self.pruned.lower(budget)
        self.search.lower(budget)
        if self.pruned.loss < self.search.loss:
            self._say(f"leaving out blocks alone is better: loss {self.pruned.loss:.4g}")
            self.search.take(self.pruned.state)
        self._refit()
        for _ in range(self._exchanges):
            if not self.search.exchange(budget):
                break
        self.search.fill(budget)

    def _refit(self) -> None:
        """Fits the routers to what they see now. Those in use change only where that lowers the loss."""
        state, fitted = self.search.state, self._fit(self.search.state)
        idle = {path: fitted[path] for path, ratio in state.items() if ratio in (DENSE, DROPPED)}
        self._load(idle)
        self.fitted |= idle
        loss = self.search.loss
        for path in fitted.keys() - idle.keys():
            self._load({path: fitted[path]})
            if (made := self.trials.loss(state, path)) < loss:
                loss, self.fitted[path] = made, fitted[path]
            else:
                self._load({path: self.fitted[path]})
        self.search.take(state)
        self._say(f"routers fitted again: loss {self.search.loss:.4g}")

    def _fit(self, state: State) -> Fitted:
        fitted, self._rows = fit_importance(
            Measured.of(self.trials), state, self._batches, draws=self._draws, ridge=self._ridge, seed=self._seed)
        return fitted

    def _load(self, fitted: Fitted) -> None:
        load_fitted(self.trials.mod, fitted)
        self.trials.forget()


def describe_blocks(state: State, fitted: Fitted) -> dict[str, dict[str, Any]]:
    """What is told of each block."""
    return {path: {"ratio": str(ratio), "r2": fitted[path][2]} for path, ratio in state.items()}


def _converted(graph: GraphModel, config: MoDConfig, way: _Way) -> MoDModel:
    """A model of its own with the state and the routers of a way."""
    state = way.search.state
    routed = {path: ratio for path, ratio in state.items() if DROPPED < ratio < DENSE}
    mod = convert(graph, config=MoDConfig(**config.model_dump() | {
        "blocks": tuple(routed), "capacity_ratio": tuple(map(float, routed.values())),
        "dropped": tuple(path for path, ratio in state.items() if ratio == DROPPED),
        "attend_to": way.trials.attend_to}))
    load_fitted(mod, {path: way.fitted[path] for path in routed})
    return mod


def pruning_order(model: nn.Module, batches: Sequence[Any], budget: float, *, blocks: str | Sequence = "all",
                  objective: ObjectiveKind = "auto", padding_mask: str | None = None, trial_batches: int = 2,
                  say: Callable[[str], None] = lambda text: None) -> list[str]:
    """Blocks from the least to the most useful, by measured loss: the strong baseline that is pruned, not routed.

    It is the ``order`` that ``variants.pruned_blocks`` takes. Each next block is the one whose absence, beside that of
    those before it, costs the least loss per FLOP; blocks that are not needed for the budget follow in the model's
    order. Arguments and errors are those of ``calibrate_each``.
    """
    check_options("pruning_order", trial_batches=trial_batches)
    config = MoDConfig(blocks=blocks if isinstance(blocks, str) else tuple(blocks), padding_mask=padding_mask)
    graph, bound = prepare(model, batches, config)
    (trials,), _ = trials_of(graph, config, "chosen", bound, trial_batches, objective)
    search = Search(trials, [DROPPED], say)
    search.lower(budget)
    dropped = [move.path for move in search.moves]
    return [*dropped, *(path for path in trials.paths if path not in dropped)]
