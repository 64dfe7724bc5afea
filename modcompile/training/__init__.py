"""What training a routed model takes beyond an ordinary loop: losses, freezing, annealing, refits, checkpoints.

There is no training engine here. A ``MoDModel`` is a module: a PyTorch loop, the transformers ``Trainer`` and
``accelerate`` train it, as the examples show. ``callback`` is for the ``Trainer``, and is imported by itself.
"""

__all__ = ["CapacityAnnealing", "Predictors", "QuantileThresholds", "RouterRefits", "Teacher", "WithLoss",
           "causal_model", "check_finite", "freeze", "hidden_losses", "latest_checkpoint", "load_checkpoint",
           "logits_loss", "next_token_loss", "routing_accuracy", "routing_losses", "save_checkpoint", "step_flops"]

from modcompile.training.anneal import CapacityAnnealing
from modcompile.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from modcompile.training.decide import causal_model
from modcompile.training.distill import Teacher, hidden_losses, logits_loss
from modcompile.training.freeze import freeze
from modcompile.training.losses import check_finite, routing_accuracy, routing_losses
from modcompile.training.predict import Predictors
from modcompile.training.refit import RouterRefits
from modcompile.training.step_flops import step_flops
from modcompile.training.threshold import QuantileThresholds
from modcompile.training.with_loss import WithLoss, next_token_loss
