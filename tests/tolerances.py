"""How far numbers may be apart: one table, by runtime and dtype, and the one way to measure it."""

__all__ = ["EXACT", "TOLERANCES", "deviation", "farthest", "tensors_of"]

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

EXACT = 0.0

# "eager" is this package's graph against the source model or the reference, "gradient" its gradients against theirs;
# a runtime is itself against that graph.
TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    "eager": {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2},
    # 30 pretrained blocks with outlier features: there the float32 reference is itself 1.2e-5 from a float64 one.
    "eager-deep": {torch.float32: 2e-5},
    "gradient": {torch.float32: 1e-5},
    "ort": {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2},
    "tensorrt-rtx": {torch.float32: 1e-3, torch.float16: 1e-2},
    "aoti": {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2},
}


def deviation(actual: Tensor, expected: Tensor) -> float:
    """Measures the largest difference, as a share of the largest expected number where that is above 1.

    Anything that is not finite on one side alone, or another shape, is infinitely far away.
    """
    if actual.shape != expected.shape or not torch.equal(actual.isfinite(), expected.isfinite()):
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    actual, expected = (side.detach().double().nan_to_num(0, 0, 0) for side in (actual, expected))
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def farthest(actual: Any, expected: Any, valid: Tensor | None = None) -> float:
    """Measures the largest `deviation` among the tensors of two models' outputs.

    Args:
        actual: Outputs of any nesting.
        expected: Outputs with as many tensors.
        valid: ``[B, S]`` bool: where given, an output that begins with ``[B, S]`` is compared on valid rows alone.
    """
    worst = 0.0
    for one, other in zip(tensors_of(actual), tensors_of(expected), strict=True):
        if valid is not None and one.dim() > 1 and one.shape[:2] == valid.shape:
            one, other = one[valid], other[valid]
        worst = max(worst, deviation(one, other))
    return worst


def tensors_of(outputs: Any) -> list[Tensor]:
    """Lists the tensors of a model's outputs, in order."""
    leaves = pytree.tree_leaves(dict(outputs) if isinstance(outputs, dict) else outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
