"""Distillation: the dense model that was converted teaches the routed one, by its logits and its blocks' outputs."""

__all__ = ["Teacher", "hidden_losses", "logits_loss"]

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from modcompile.model import MoDModel
from modcompile.trace import RoutingTrace
from modcompile.training.losses import Valid, mean_valid, valid_of
from modcompile.variants import dense_model

# B batch  S rows  D model dim  V vocabulary


class Teacher(nn.Module):
    """The dense model, frozen, in evaluation mode. It is called like the routed one.

    Args:
        mod: The routed model. Its dense form is on its own tensors, so training them would move the teacher: it copies
            them, as they are now.
        share: Take the routed model's own tensors, for a training of the routers alone, which changes none of the dense
            model's. Their ``requires_grad`` is left alone.

    Attributes:
        hidden: The hidden state [B, S, D] after each routed block in the latest call, by path.

    Example:
        >>> import modcompile as mc
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> mod = mc.convert(torch.nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 8),))
        >>> teacher, x = Teacher(mod), torch.randn(2, 16, 8)
        >>> expected = teacher(x)
        >>> with mc.trace_routing(mod) as trace:
        ...     out = mod(x)
        >>> (F.mse_loss(out, expected) + sum(hidden_losses(trace, teacher.hidden).values())).backward()
    """

    def __init__(self, mod: MoDModel, *, share: bool = False):
        super().__init__()
        dense = dense_model(mod)
        self.model = dense.eval() if share else copy.deepcopy(dense).eval().requires_grad_(False)
        self.hidden: dict[str, torch.Tensor] = {}
        for path in mod.routers:
            self.model.graph_module.get_submodule(path).register_forward_hook(
                lambda _, __, value, path=path: self.hidden.__setitem__(path, value))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the dense model returns; nothing of it carries gradients."""
        self.hidden.clear()
        with torch.no_grad():
            return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> "Teacher":
        """Does nothing: a teacher has no dropout."""
        return self


def logits_loss(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor | None = None,
                temperature: float = 1.0) -> torch.Tensor:
    """T^2 KL(teacher || student) of softmax(logits / T), a mean over valid tokens (Hinton et al. 2015).

    Args:
        student: [B, S, V], or [B, V].
        teacher: The same shape.
        valid: Bool [B, S], false at padding.
        temperature: T.
    """
    ours, theirs = ((x.float() / temperature).log_softmax(-1) for x in (student, teacher.detach()))
    return temperature**2 * mean_valid(F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1), valid)


def hidden_losses(trace: RoutingTrace, teacher: Mapping[str, torch.Tensor], valid: Valid = None
                  ) -> dict[str, torch.Tensor]:
    """Each routed block's squared distance of its output to the teacher's, over the teacher's squared norm.

    Args:
        trace: The routed model's, from a call under ``trace_routing``.
        teacher: ``Teacher.hidden`` after a call on the same inputs.
        valid: Which rows are no padding.
    """
    made = {}
    for path, block in trace.items():
        assert block.output is not None
        ours, theirs = block.output.float(), teacher[path].float()  # [B, S, D]
        rows = valid_of(valid, path)
        made[path] = (mean_valid((ours - theirs).square().sum(-1), rows)
                      / mean_valid(theirs.square().sum(-1), rows))
    return made
