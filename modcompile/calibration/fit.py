"""A router in closed form: ridge regression from the hidden state to what a row's update is worth."""

__all__ = ["RIDGE", "Fitted", "RouterFit", "load_fitted"]

import torch
from torch import Tensor

from modcompile.model import MoDModel

# B batch  S rows  D model dim

# What is added to the regression's diagonal, as a share of its mean.
RIDGE = 0.01

# The weight [D] and the bias of each block's router, and the share of the importance's variance that they explain.
Fitted = dict[str, tuple[torch.Tensor, torch.Tensor, float]]


class RouterFit:
    """Gathers what the regression of one block needs, a batch at a time: one float64 matrix [D, D].

    A router only ranks the rows of one sequence, so states and scores are taken relative to their sequence's mean: what
    makes a whole sequence important is no router's business.

    Args:
        width: D.
        device: Where it is gathered.

    Example:
        >>> fit, x = RouterFit(2), torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])
        >>> fit.add(x, x @ torch.tensor([3.0, -1.0]) + 5)
        >>> weight, bias, r2 = fit.solve(1e-12)
        >>> [round(value, 4) for value in (*weight.tolist(), r2)]
        [3.0, -1.0, 1.0]
    """

    def __init__(self, width: int, device: torch.device | None = None):
        self._gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._moment = torch.zeros(width, dtype=torch.float64, device=device)
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._square = torch.zeros((), dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, states: Tensor, scores: Tensor, valid: Tensor | None = None) -> None:
        """Takes in states [B, S, D] and their scores [B, S], but not those of padding."""
        keep = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid  # [B, S]
        # A row of padding may hold anything, NaN included: it is replaced, not weighted by 0.
        states = states.double().where(keep[..., None], 0.0)
        scores = scores.double().where(keep, 0.0)
        counts = keep.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
        self._sum += states.sum((0, 1))
        self.rows += int(keep.sum())
        centred = (states - states.sum(1, keepdim=True) / counts[..., None]).where(keep[..., None], 0.0).flatten(0, 1)
        targets = (scores - scores.sum(1, keepdim=True) / counts).where(keep, 0.0).flatten()
        self._gram += centred.T @ centred
        self._moment += centred.T @ targets
        self._square += targets.square().sum()

    def solve(self, strength: float) -> tuple[Tensor, Tensor, float]:
        """The router's weight [D] and bias [], and the share of the scores' variance that they explain.

        Args:
            strength: What is added to the matrix's diagonal, as a share of its mean; above 0.

        The bias makes the mean logit 0, where every gate is open to gradients.
        """
        size = strength * self._gram.diagonal().mean() + torch.finfo(torch.float64).tiny
        ridge = size * torch.eye(len(self._gram), dtype=torch.float64, device=self._gram.device)
        weight = torch.linalg.solve(self._gram + ridge, self._moment)
        left = self._square - 2 * weight @ self._moment + weight @ self._gram @ weight
        r2 = float(1 - left / self._square) if self._square > 0 else 0.0
        return weight, -weight @ self._sum / max(1, self.rows), r2


def load_fitted(mod: MoDModel, fitted: Fitted) -> None:
    """Gives routers their fitted weights."""
    with torch.no_grad():
        for path, (weight, bias, _) in fitted.items():
            router = mod.routers[path]
            router.weight.copy_(weight[None])
            router.bias.copy_(bias)
