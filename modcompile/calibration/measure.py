"""How much each row's update matters, in every block at once: one forward pass and a few backward ones per batch."""

__all__ = ["importance", "measure"]

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

from modcompile.calibration.batches import Batch
from modcompile.calibration.fit import RouterFit
from modcompile.calibration.objective import Objective
from modcompile.errors import UsageError
from modcompile.model import GraphModel

# B batch  S rows  D model dim


def measure(dense: GraphModel, paths: Sequence[str], batches: Sequence[Batch], objective: Objective, *, draws: int,
            seed: int) -> dict[str, RouterFit]:
    """Goes through the batches once and gathers, for each block, what fits its router to the rows' importance.

    Args:
        dense: The dense model, its blocks outlined.
        paths: The blocks.
        batches: What to run it on; one at a time is held.
        objective: What it costs to leave an update out.
        draws: Random scalars, and so backward passes, per batch.
        seed: Of the draws.

    Raises:
        UsageError: A block's output is not finite, with the block named.
    """
    fits: dict[str, RouterFit] = {}
    device = batches[0].inputs[0].device
    generator = torch.Generator(device).manual_seed(seed)
    for number, batch in enumerate(batches):
        states, scores = importance(dense, paths, batch, objective, draws, generator, f"batches[{number}]")
        for path in paths:
            fit = fits.setdefault(path, RouterFit(states[path].shape[-1], device))
            fit.add(states[path], scores[path], batch.valid)
    return fits


def importance(dense: GraphModel, paths: Sequence[str], batch: Batch, objective: Objective, draws: int,
               generator: torch.Generator, where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What enters each block, [B, S, D], and how much its update of each row matters, [B, S].

    To leave out a row's update u = y - x moves the loss by about (g . u), g its gradient at y. The loss of one text
    has tokens that were easy by luck, so g is drawn as the objective says, and the importance is the log of the mean
    (g . u)^2: of the Fisher norm of u, or of the change it makes in the outputs.
    """
    run = _Updates(dense.graph_module, paths)
    with torch.enable_grad():
        outputs = run.run(*batch.inputs)
        for path, (_, after) in run.updates.items():
            if not batch.rows(after.detach()).isfinite().all():
                raise UsageError("a block's output is not a number", expected="finite rows", found="NaN or infinity",
                                 where=f"{path}, {where}", fix="calibrate in float32, and look at the weights")
        results = [after for _, after in run.updates.values()]
        squares: dict[str, Tensor] = {}
        for left in reversed(range(draws)):
            drawn = objective.draw(outputs, batch, generator)
            grads = torch.autograd.grad(drawn, results, retain_graph=left > 0)
            for (path, (before, after)), grad in zip(run.updates.items(), grads, strict=True):
                part = (grad.float() * (after - before).detach().float()).sum(-1).square()
                squares[path] = squares.get(path, torch.zeros_like(part)) + part
    states = {path: before.detach() for path, (before, _) in run.updates.items()}
    return states, {path: (total / draws).clamp(min=torch.finfo(total.dtype).tiny).log()
                    for path, total in squares.items()}


class _Updates(torch.fx.Interpreter):
    """Runs the model and keeps what enters and what leaves each block."""

    def __init__(self, graph_module: torch.fx.GraphModule, paths: Sequence[str]):
        super().__init__(graph_module)
        self.paths = frozenset(paths)
        self.updates: dict[str, tuple[Tensor, Tensor]] = {}

    def run_node(self, node: torch.fx.Node) -> Any:
        if node.op != "call_module" or node.target not in self.paths:
            return super().run_node(node)
        before, after = self.env[node.args[0]], super().run_node(node)
        if not after.requires_grad:
            after = after.detach().requires_grad_()
        self.updates[str(node.target)] = before, after
        return after
