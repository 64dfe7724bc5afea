"""Routers for blocks that are given, in closed form: when a model is routed, and again when training has changed it."""

__all__ = ["check_routers", "fit_routers", "refit_routers"]

from collections.abc import Sequence
from typing import Any

from torch import nn

from modcompile.calibration.batches import check_options, prepare, sizes_of
from modcompile.calibration.fit import RIDGE, load_fitted
from modcompile.calibration.measure import Measured, fit_importance
from modcompile.calibration.objective import ObjectiveKind, choose_objective
from modcompile.calibration.procedure import CalibrationResult, describe_blocks
from modcompile.calibration.trials import DENSE, DROPPED, trials_of
from modcompile.config import MoDConfig
from modcompile.convert import convert, padded_blocks, padded_dims
from modcompile.errors import UsageError
from modcompile.flops import count_flops
from modcompile.model import MoDModel
from modcompile.variants import pruned_model

# B batch  S rows  D model dim


def fit_routers(model: nn.Module, batches: Sequence[Any], config: MoDConfig, *, objective: ObjectiveKind = "auto",
                draws: int = 2, ridge: float = RIDGE, trial_batches: int = 2, seed: int = 0) -> CalibrationResult:
    """Routes a model as a configuration says and fits its routers, without training and without a choice of blocks.

    Routers are fitted to what rows matter in the dense model, as ``calibrate``'s are, and with those in place again:
    what earlier blocks pass by or leave out changes what later ones see.

    Args:
        model: As for ``calibrate``.
        batches: What the routers are fitted to.
        config: The blocks, their ratios, and what is left out. Importance is measured without its
            ``capacity_multiple``.
        objective: As for ``calibrate_each``, like the others.
        draws: Backward passes per batch.
        ridge: The strength of the regression's penalty.
        trial_batches: On how many of the batches the reported losses are measured.
        seed: Of the random draws.

    Raises:
        UsageError: Batches that do not fit the model, or a router or gate that importance says nothing for.
        UnsupportedGraphError: A model that cannot be captured or routed.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model, batches = nn.TransformerEncoder(layer, 4), [(torch.randn(2, 16, 8),)]
        >>> config = MoDConfig(blocks=(1, 2), capacity_ratio=(0.5, 0.25), gate="straight-through")
        >>> {path: block["ratio"] for path, block in fit_routers(model, batches, config).report["blocks"].items()}
        {'layers.1': '1/2', 'layers.2': '1/4'}
    """
    check_routers(config)
    check_options("fit_routers", draws=draws, ridge=ridge, trial_batches=trial_batches)
    graph, bound = prepare(model, batches, config)
    mod = convert(graph, config=config)
    ratios = dict(zip(mod.routers, config.ratios(list(mod.routers)), strict=True))
    state = ratios | dict.fromkeys(config.dropped, DROPPED)
    candidates = MoDConfig(blocks=tuple(state), gate="straight-through", padding_mask=config.padding_mask)
    (trials,), _ = trials_of(graph, candidates, config.attend_to, bound, trial_batches, objective)
    for seen in (dict.fromkeys(trials.paths, DENSE), state):
        fitted, rows = fit_importance(Measured.of(trials), seen, bound, draws=draws, ridge=ridge, seed=seed)
        load_fitted(trials.mod, fitted)
        trials.forget()
    load_fitted(mod, {path: fitted[path] for path in ratios})
    # Of the model itself, for trials know no multiple of capacities.
    loss, share = trials.loss_of(mod.eval()), count_flops(mod, sizes_of(graph, bound[0])) / trials.dense_flops
    return CalibrationResult(mod, {
        "objective": trials.objective.name, "flops": share, "rows": rows,
        "loss": {"dense": trials.loss(dict.fromkeys(trials.paths, DENSE)), "calibrated": loss},
        "blocks": describe_blocks({path: state[path] for path in trials.paths}, fitted),
        "attend_to": {config.attend_to: {"loss": loss, "flops": share}},
        "trial_batches": min(trial_batches, len(bound)),
    })


def refit_routers(mod: MoDModel, batches: Sequence[Any], *, objective: ObjectiveKind = "auto", draws: int = 2,
                  ridge: float = RIDGE, seed: int = 0) -> dict[str, float]:
    """Fits a routed model's routers again, in place, to what rows matter in it as it is now.

    Training moves hidden states away from those that the routers were fitted to, and changes which rows matter. The
    optimizer should leave the routers alone, for it would move them by moments of those that are gone.

    Args:
        mod: The routed model, in any mode; only its routers change.
        batches: As for ``calibrate``.
        objective: As for ``calibrate_each``, like the others.
        draws: Backward passes per batch.
        ridge: The strength of the regression's penalty.
        seed: Of the random draws.

    Returns:
        By the block's path, the share of the importance's variance that its router explains.

    Raises:
        UsageError: As for ``fit_routers``, or parameters that are spread over processes.

    Example:
        >>> import torch, modcompile as mc
        >>> _ = torch.manual_seed(0)
        >>> model, batches = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 4), [
        ...     (torch.randn(2, 16, 8),)]
        >>> mod = mc.calibrate(model, batches, budget=0.8).mod
        >>> list(refit_routers(mod, batches)) == list(mod.routers)
        True
    """
    check_routers(mod.config)
    check_options("refit_routers", draws=draws, ridge=ridge)
    if sharded := [name for name, parameter in mod.named_parameters() if hasattr(parameter, "full_tensor")]:
        raise UsageError("routers are fitted where the whole model is", where="refit_routers",
                         expected="whole parameters, as in one process or under DistributedDataParallel",
                         found=f"shares of {len(sharded)} parameters, such as {sharded[0]}",
                         fix="fit them before fully_shard, or to a copy that is whole")
    state = dict(zip(mod.routers, mod.config.ratios(list(mod.routers)), strict=True))
    if not state:
        return {}
    dense, bound = prepare(pruned_model(mod, mod.config.dropped).eval(), batches, mod.config)
    chosen = choose_objective(dense, objective, padded_dims(dense, mod.config))
    measured = Measured(dense, mod.routers, padded_blocks(mod), chosen)
    fitted, _ = fit_importance(measured, state, bound, draws=draws, ridge=ridge, seed=seed)
    load_fitted(mod, fitted)
    return {path: r2 for path, (_, _, r2) in fitted.items()}


def check_routers(config: MoDConfig) -> None:
    """Whether importance says what a configuration's routers should give.

    Raises:
        UsageError: It does not.
    """
    if (config.router, config.axis) != ("linear", "token") or config.gate not in ("straight-through", "scale"):
        raise UsageError("routers are fitted to rank the rows of a sequence", where="MoDConfig",
                         expected='router="linear", axis="token", gate="straight-through" or "scale"',
                         found=f'router="{config.router}", axis="{config.axis}", gate="{config.gate}"')
