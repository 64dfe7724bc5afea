"""How far a tensor of an engine is from the model's."""

__all__ = ["TOLERANCES", "Comparison", "apart_from_mean", "compare"]

import dataclasses

import torch
from torch import Tensor

# B batch  S rows

# How far an engine's floats may be from the model's, by the engine's precision. It bounds the relative L2 error, and
# the largest absolute error as a share of the largest magnitude expected (of 1, where that is smaller). Room for sums
# of thousands of terms in another order, at 23, 10 and 7 bits of mantissa, through dozens of blocks. Integers: equal.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tensor of the engine beside the model's. Rows of padding are left out.

    Attributes:
        name: The output's name; within a block, "encoder.layer.1 logits".
        shape: The engine's shape, which is the model's but in a failure.
        max_abs_error: The largest difference; ``limit``: the largest that passes.
        relative_l2: ``||engine - model|| / ||model||``.
        compared: How many elements were, being finite on both sides.
        not_finite: How many elements are NaN or infinite on one side and something else on the other.
        worst: Where the largest difference is, and the engine's and the model's number there.
    """

    name: str
    shape: tuple[int, ...]
    max_abs_error: float
    limit: float
    relative_l2: float
    compared: int
    not_finite: int
    worst: str
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the engine's tensor is the model's within the tolerance."""
        return self.not_finite == 0 and self.max_abs_error <= self.limit and self.relative_l2 <= self.tolerance


def compare(name: str, found: Tensor, expected: Tensor, tolerance: float, rows: Tensor | None) -> Comparison:
    """One tensor beside another.

    Args:
        name: What to call it.
        found: The engine's.
        expected: The model's, on the same device.
        tolerance: See ``TOLERANCES``; integers have to be equal.
        rows: Which leading dims count, bool [B, S] or [B]; all if None.
    """
    shape = tuple(found.shape)
    if found.shape != expected.shape:
        return Comparison(name, shape, torch.inf, 0.0, torch.inf, 0, 0, f"for shape {list(expected.shape)}", tolerance)
    if not expected.is_floating_point():
        tolerance = 0.0
    dtype = torch.float64 if expected.dtype == torch.float64 or not expected.is_floating_point() else torch.float32
    a, b = found.to(dtype), expected.to(dtype)
    keep = torch.ones((), dtype=torch.bool)
    if rows is not None:
        keep = rows.reshape(*rows.shape, *[1] * (b.dim() - rows.dim()))
        a, b = (side.masked_fill(~keep, 0) for side in (a, b))
    finite = a.isfinite() & b.isfinite()
    # Where both are NaN, or infinite with one sign, they agree.
    not_finite = int((~finite & ~((a == b) | (a.isnan() & b.isnan()))).sum())
    a, b = (side.masked_fill(~finite, 0) for side in (a, b))
    error = (a - b).abs()
    if error.numel() == 0:
        return Comparison(name, shape, 0.0, 0.0, 0.0, 0, 0, "", tolerance)
    at = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    norm, size = (float(torch.linalg.vector_norm(side, dtype=torch.float64)) for side in (error, b))
    return Comparison(name, shape, float(error.max()), tolerance * max(1.0, float(b.abs().max())),
                      norm / size if size else float(norm > 0), int((finite & keep).sum()), not_finite,
                      f"at {at}: {float(a[tuple(at)]):.6g} for {float(b[tuple(at)]):.6g}", tolerance)


def apart_from_mean(found: Tensor, expected: Tensor, rows: Tensor | None) -> float:
    """The relative L2 error of scores [B, S] apart from each sequence's mean, over rows that are numbers on both sides.

    Zero where the expected ones are alike but for the last bits of float32: then nothing is ranked.
    """
    a, b = found.double(), expected.double()
    keep = a.isfinite() & b.isfinite() & (torch.ones_like(a, dtype=torch.bool) if rows is None else rows)
    count = keep.sum(1, keepdim=True).clamp(min=1)
    a, b = (torch.where(keep, x, 0) for x in (a, b))
    apart, wanted = (torch.where(keep, x - x.sum(1, keepdim=True) / count, 0) for x in (a - b, b))
    error, size, whole = (float(torch.linalg.vector_norm(x)) for x in (apart, wanted, b))
    return error / size if size > 1e-6 * whole else 0.0
