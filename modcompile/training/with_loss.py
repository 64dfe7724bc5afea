"""A model that takes labels and returns its loss: the form in which every trainer takes a model."""

__all__ = ["WithLoss", "next_token_loss"]

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from modcompile.config import MoDConfig
from modcompile.convert import padded_blocks, padded_dims, padding_mask, valid_rows
from modcompile.errors import UsageError
from modcompile.model import GraphModel, MoDModel
from modcompile.trace import RoutingTrace, trace_routing
from modcompile.training.distill import Teacher, hidden_losses, logits_loss
from modcompile.training.losses import check_finite, routing_losses
from modcompile.training.predict import Predictors

# B batch  S rows  V vocabulary


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits [B, S, V] against the labels [B, S] one position on; -100 is no label."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


class WithLoss(nn.Module):
    """Calls the model and adds up its losses, in one forward, as DDP needs it.

    Args:
        mod: The routed model; or a dense or pruned one, which then trains under the same losses as the routed one that
            it is compared with. Save it, not this.
        task_loss: Of the logits and the labels.
        routing_weight: Of the mean over blocks of ``routing_losses``; 0 leaves them out.
        predictors: Their mean loss is added: it trains nothing but them.
        teacher: The dense model; it is called on the same inputs, and is no part of the state dict.
        logits_weight: Of ``logits_loss`` against the teacher.
        hidden_weight: Of the mean over blocks of ``hidden_losses`` against the teacher.
        temperature: Of ``logits_loss``.

    Attributes:
        step: Of the training, for the message of an error.
        losses: The latest call's, by name, detached.
    """

    # For the Trainer, which would pass a number of items to any forward that takes keywords.
    accepts_loss_kwargs = False

    def __init__(self, mod: GraphModel,
                 task_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = next_token_loss, *,
                 routing_weight: float = 0.0, predictors: Predictors | None = None, teacher: Teacher | None = None,
                 logits_weight: float = 1.0, hidden_weight: float = 0.0, temperature: float = 1.0):
        super().__init__()
        self.mod, self.task_loss, self.predictors = mod, task_loss, predictors
        self.routing_weight, self.logits_weight, self.hidden_weight = routing_weight, logits_weight, hidden_weight
        self.temperature = temperature
        # Not in a registry: a list hides it from the state dict and from DDP.
        self._teacher = [teacher] if teacher is not None else []
        # Found here and not in the forward: what is compiled would end where a configuration is made.
        config = mod.config if isinstance(mod, MoDModel) else MoDConfig()
        self._padding = padding_mask(mod, config)
        # An encoder's mask says nothing of a decoder's rows.
        logits = next((spec for spec in mod.outputs if spec.name == "logits"), mod.outputs[0])
        self._logits_padded = logits.shape[:2] == padded_dims(mod, config)
        self._padded = padded_blocks(mod) if isinstance(mod, MoDModel) else frozenset[str]()
        self.step, self.losses = 0, dict[str, torch.Tensor]()
        self.register_state_dict_post_hook(_drop_aliases)
        self.register_load_state_dict_pre_hook(_add_aliases)

    def forward(self, labels: torch.Tensor | None = None, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The logits, and with labels the loss; beside a loss they have no gradient.

        Raises:
            ModcompileError: In training, a loss that is not finite; the step and the block are named.
        """
        if labels is None:
            return {"logits": _logits(self.mod(**inputs))}
        # What a compiled graph hands on is its output, and has a gradient, of zeros where nobody reads it: of a trace,
        # two hidden states for each block. So there, what went wrong is looked up when something did.
        compiled = torch.compiler.is_compiling()
        if isinstance(self.mod, MoDModel) and (not compiled or self._reads_traces()):
            with trace_routing(self.mod) as trace:
                logits = _logits(self.mod(**inputs))
        else:
            trace, logits = RoutingTrace(), _logits(self.mod(**inputs))
        losses = {"task": self.task_loss(logits, labels), **self._further(logits, trace, inputs)}
        made = {"loss": torch.stack(list(losses.values())).sum(), "logits": logits.detach()}
        self._record(losses, None if compiled else trace, inputs)
        return made

    # Compiled, it would be compiled again for every step; as it is, what is compiled ends before it.
    @torch.compiler.disable
    def _record(self, losses: dict[str, torch.Tensor], trace: RoutingTrace | None, inputs: dict[str, torch.Tensor]
                ) -> None:
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        if self.training:
            check_finite(losses, self.step, trace if trace is not None else lambda: self._traced(inputs))

    def _traced(self, inputs: dict[str, torch.Tensor]) -> RoutingTrace:
        """The routing of a call, which is made again, as it was but for dropout."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized() \
            and torch.distributed.get_world_size() > 1
        # Where parameters are gathered from several processes, the others would have to make the call too.
        if several or not isinstance(self.mod, MoDModel):
            return RoutingTrace()
        with torch.no_grad(), trace_routing(self.mod) as trace:
            self.mod(**inputs)
        return trace

    def _reads_traces(self) -> bool:
        """Whether a loss is made of what a trace holds."""
        return self.training and (self.routing_weight != 0 or self.predictors is not None
                                  or (bool(self._teacher) and self.hidden_weight != 0))

    def move_teacher(self, device: torch.device | str) -> None:
        """Moves the teacher, which ``.to()`` leaves where it is."""
        for teacher in self._teacher:
            teacher.to(device)

    def _further(self, logits: torch.Tensor, trace: RoutingTrace, inputs: dict[str, torch.Tensor]
                 ) -> dict[str, torch.Tensor]:
        """The weighted losses that the training alone needs."""
        if not self.training:
            return {}
        mask, blocks = self._valid(inputs), len(trace)
        valid = dict.fromkeys(self._padded, mask) if mask is not None else None
        losses: dict[str, torch.Tensor] = {}

        def add(kind: str, weight: float, values: dict[str, torch.Tensor]) -> None:
            losses.update({f"{kind} of {path}": weight / blocks * value for path, value in values.items()})

        if self.routing_weight:
            add("routing", self.routing_weight, routing_losses(trace, valid))
        if self.predictors is not None:
            add("prediction", 1.0, self.predictors.losses(trace, valid))
        for teacher in self._teacher:
            expected = _logits(teacher(**inputs))
            if self.logits_weight:
                tokens = mask if self._logits_padded else None
                losses["distillation"] = self.logits_weight * logits_loss(logits, expected, tokens, self.temperature)
            if self.hidden_weight:
                add("hidden", self.hidden_weight, hidden_losses(trace, teacher.hidden, valid))
        return losses

    def _valid(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        if self._padding is None:
            return None
        return valid_rows(self._padding, inputs[self._padding.removeprefix("~")])


def _logits(outputs: Any) -> torch.Tensor:
    """The logits among a model's outputs."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, dict) and "logits" in outputs:
        return outputs["logits"]
    raise UsageError("the model's output has no logits", expected="a tensor, or a dict with logits",
                     found=type(outputs).__name__, where="WithLoss")


def _aliases(module: nn.Module) -> dict[str, str]:
    """Each further name of a tied tensor, and its first."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in module.named_parameters(
        remove_duplicate=False)}
    return {name: other for name, other in names.items() if name != other}


def _drop_aliases(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    # safetensors, which the Trainer writes, takes no tensor twice.
    for name in _aliases(module):
        state.pop(prefix + name, None)


def _add_aliases(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, other in _aliases(module).items():
        if prefix + other in state:
            state.setdefault(prefix + name, state[prefix + other])
