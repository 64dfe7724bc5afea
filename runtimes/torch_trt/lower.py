"""Writes our three ops in ATen ops that Torch-TensorRT has converters for, at sizes that are all known.

    before:  %positions, %filled = modcompile.route(%logits, %valid, K)
             %rows = modcompile.gather_rows(%x, %positions)
             %out = modcompile.merge_rows(%x, %y, %positions, %gate)
    after:   topk, comparisons and a second topk; index_select; scatter

Why not the reference: its sort becomes TensorRT's TopK of S rows, which takes no more than 3840 and does not say how it
breaks ties. As in the ONNX bodies, a TopK is asked for values alone, or of keys that all differ.

Read in Torch-TensorRT 2.13 and 2.14: ``isnan`` becomes x == x, which a compiler may take for true, so a comparison with
-inf finds NaN; ``index_put``, which ``index_copy`` decomposes to, gets an index of two numbers for each element that it
writes, ``scatter`` of one.
"""

__all__ = ["lower_ops"]

import torch
from modcompile.runtimes.trt.lower import TOPK_LIMIT
from torch import Tensor
from torch.export import ExportedProgram

from modcompile.errors import UnsupportedGraphError
from modcompile.ops.gather_rows import _reference as gather_whole_rows

# B batch  S rows  K capacity  D model dim


def lower_ops(program: ExportedProgram) -> ExportedProgram:
    """Returns the program without ops of ours; but for ``addmm``, every other op stays as it is.

    Args:
        program: A program of static shapes.

    Raises:
        UnsupportedGraphError: A capacity is above what TensorRT's TopK chooses.
    """
    ours = torch.ops.modcompile
    # Of the base class: what the lifted program has in its place leaves alone what Torch-TensorRT wants decomposed.
    return ExportedProgram.run_decompositions(program, {
        ours.route.default: _route,
        ours.gather_rows.default: gather_whole_rows,
        ours.merge_rows.default: _merge_rows,
        torch.ops.aten.addmm.default: _addmm,
    })


def _route(logits: Tensor, valid: Tensor | None, capacity: int) -> tuple[Tensor, Tensor]:
    if capacity > TOPK_LIMIT:
        raise UnsupportedGraphError("TensorRT's TopK does not choose that many rows", expected=f"K <= {TOPK_LIMIT}",
                                    found=f"K = {capacity} of {logits.shape[1]} rows", where="route",
                                    fix="a smaller capacity_ratio or a smaller shape")
    # NaN is not above -inf, and -inf stays what it is.
    score = torch.where(logits > -torch.inf, logits, -torch.inf)  # [B, S]
    if valid is None:
        chosen = _best(_class(score, _kth(score, capacity)), capacity)
        return chosen.to(torch.int64), chosen >= 0
    # Valid rows have classes 3 to 5, invalid ones 0 to 2. The K-th best valid row is their threshold (-inf where fewer
    # than K are valid, which takes them all); among invalid rows it is the one that fills the last spare slot.
    valid_threshold = _kth(torch.where(valid, score, -torch.inf), capacity)  # [B, 1]
    best_invalid = torch.where(valid, -torch.inf, score).topk(capacity, dim=1).values  # [B, K]
    is_valid = valid.to(torch.float32)
    spare = capacity - is_valid.sum(1, keepdim=True)  # [B, 1]
    last_spare = (spare - 1).clamp(min=0).to(torch.int64)
    threshold = torch.where(valid, valid_threshold, best_invalid.gather(1, last_spare))  # [B, S]
    chosen = _best(_class(score, threshold) + 3 * is_valid, capacity)  # [B, K]
    positions = chosen.to(torch.int64)
    # As numbers: TensorRT's element-wise gather has no bool.
    return positions, is_valid.gather(1, positions) > 0


def _kth(score: Tensor, capacity: int) -> Tensor:
    """The K-th best score of each sequence, ``[B, 1]``."""
    return score.topk(capacity, dim=1).values[:, capacity - 1:]


def _class(score: Tensor, threshold: Tensor) -> Tensor:
    """2 above the threshold, 1 at it, 0 below."""
    return (score > threshold).to(torch.float32) + (score >= threshold).to(torch.float32)


def _best(rank: Tensor, capacity: int) -> Tensor:
    """The K rows of the highest class, of equals the first ones; ascending, ``[B, K]`` float32.

    The keys are whole numbers and all differ, exact in float32 while 5 * S < 2^24.
    """
    rows = rank.shape[1]
    key = rank * rows - torch.arange(rows, device=rank.device).to(torch.float32)
    chosen = key.topk(capacity, dim=1).indices.to(torch.float32)
    return chosen.topk(capacity, dim=1, largest=False).values


def _merge_rows(x: Tensor, y: Tensor, positions: Tensor, gate: Tensor) -> Tensor:
    rows = gather_whole_rows(x, positions)  # [B, K, D]
    weight = gate.to(x.dtype)[..., None]  # [B, K, 1]
    mixed = rows + weight * (y - rows)
    mixed = torch.where(weight == 1, y, mixed)
    mixed = torch.where(weight == 0, rows, mixed)
    return x.scatter(1, positions[..., None].expand(mixed.shape), mixed)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """GPT-2's projections like those of other models: with the weight as ``[out, in]``, a constant as well.

    From the other form, TensorRT-RTX 1.5 and 1.7 do not build its attention: they stop with an internal error.
    """
    linear = torch.nn.functional.linear
    if alpha == 1 and beta == 1 and bias.dim() == 1:
        return linear(x, weight.t(), bias)
    return alpha * linear(x, weight.t()) + beta * bias
