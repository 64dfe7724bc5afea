"""How much each row's update matters, in every block at once: one forward pass and a few backward ones per batch."""

__all__ = ["Measured", "fit_importance", "importance", "measure"]

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

from modcompile.calibration.batches import Batch
from modcompile.calibration.fit import Fitted, RouterFit
from modcompile.calibration.objective import Objective
from modcompile.calibration.trials import DENSE, DROPPED, State, Trials
from modcompile.config import capacity
from modcompile.convert import padded_blocks
from modcompile.errors import UsageError
from modcompile.model import GraphModel
from modcompile.ops import route
from modcompile.routers import Router

# B batch  S rows  D model dim


@dataclasses.dataclass(frozen=True)
class Measured:
    """What importance is measured in.

    Attributes:
        dense: The dense model, its blocks outlined.
        routers: By the block's path, those that choose rows where a state leaves some out.
        padded: The blocks whose rows are the padding mask's.
        objective: What a change of the outputs costs.
    """

    dense: GraphModel
    routers: Mapping[str, Router]
    padded: Collection[str]
    objective: Objective

    @classmethod
    def of(cls, trials: Trials) -> "Measured":
        """What is tried, as it was and with the routers of the trials."""
        return cls(trials.dense, trials.mod.routers, padded_blocks(trials.mod), trials.objective)


def fit_importance(model: Measured, state: State, batches: Sequence[Batch], *, draws: int, ridge: float, seed: int
                   ) -> tuple[Fitted, int]:
    """Routers for what rows matter with a state in place, and how many rows were seen."""
    fits = measure(model, state, batches, draws=draws, seed=seed)
    return {path: fit.solve(ridge) for path, fit in fits.items()}, next(iter(fits.values())).rows


def measure(model: Measured, state: State, batches: Sequence[Batch], *, draws: int, seed: int) -> dict[str, RouterFit]:
    """Goes through the batches once and gathers, for each block, what fits its router to the rows' importance.

    Args:
        model: The model, with its routers and its objective.
        state: The ratio of each block. Updates that it leaves out are computed too, and left out.
        batches: What to run it on; one at a time is held.
        draws: Random scalars, and so backward passes, per batch.
        seed: Of the draws.

    Raises:
        UsageError: A block's output is not finite, with the block named.
    """
    fits: dict[str, RouterFit] = {}
    device = batches[0].inputs[0].device
    generator = torch.Generator(device).manual_seed(seed)
    for number, batch in enumerate(batches):
        states, scores = importance(model, state, batch, draws, generator, f"batches[{number}]")
        for path in states:
            fit = fits.setdefault(path, RouterFit(states[path].shape[-1], device))
            fit.add(states[path], scores[path], batch.valid if path in model.padded else None)
    return fits


def importance(model: Measured, state: State, batch: Batch, draws: int, generator: torch.Generator, where: str
               ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What enters each block, [B, S, D], and how much its update of each row matters, [B, S].

    To put in or leave out a row's update u = y - x moves the outputs by about g . u, g the gradient behind the block,
    drawn as the objective says. With few draws (g . u)^2 is mostly noise; its bound |g| |u| is not, and the root of
    that, whose largest values are no outliers, is what a linear router predicts best.
    """
    run = _Updates(model, state, batch)
    with torch.enable_grad():
        outputs = run.run(*batch.inputs)
        for path, (_, update, _) in run.seen.items():
            if not batch.rows(update, path in model.padded).isfinite().all():
                raise UsageError("a block's output is not a number", expected="finite rows", found="NaN or infinity",
                                 where=f"{path}, {where}", fix="calibrate in float32, and look at the weights")
        results = [result for _, _, result in run.seen.values()]
        squares: dict[str, Tensor] = {}
        for left in reversed(range(draws)):
            drawn = model.objective.draw(outputs, batch, generator)
            grads = torch.autograd.grad(drawn, results, retain_graph=left > 0)
            for path, grad in zip(run.seen, grads, strict=True):
                part = grad.float().square().sum(-1)
                squares[path] = squares.get(path, torch.zeros_like(part)) + part
    return ({path: before for path, (before, _, _) in run.seen.items()},
            {path: ((squares[path] / draws).sqrt() * update.float().norm(dim=-1)).sqrt()
             for path, (_, update, _) in run.seen.items()})


class _Updates(torch.fx.Interpreter):
    """Runs the dense model, leaves out the updates that a state does, and keeps what enters and what leaves blocks."""

    def __init__(self, model: Measured, state: State, batch: Batch):
        super().__init__(model.dense.graph_module)
        self.state, self.model, self.valid = state, model, batch.valid
        # Of each block: its input, every row's update, and its output with gradients.
        self.seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def run_node(self, node: torch.fx.Node) -> Any:
        path = str(node.target)
        if node.op != "call_module" or path not in self.state:
            return super().run_node(node)
        before, after = self.env[node.args[0]], super().run_node(node)
        result = after
        if self.state[path] != DENSE:
            chosen = self._chosen(path, before.detach())  # [B, S]
            result = torch.where(chosen[..., None], after, before)
        if not result.requires_grad:
            result = result.detach().requires_grad_()
        self.seen[path] = before.detach(), (after - before).detach(), result
        return result

    def _chosen(self, path: str, hidden: Tensor) -> Tensor:
        chosen = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if self.state[path] == DROPPED:
            return chosen
        with torch.no_grad():
            logits = self.model.routers[path](hidden)
        valid = self.valid if path in self.model.padded else None
        return chosen.scatter(1, *route(logits, valid, capacity(self.state[path], hidden.shape[1])))
