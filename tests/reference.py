"""Mixture-of-Depths by hand: the model's own blocks, called on the chosen rows from Python, one text at a time.

This is what every converted model is compared with, so it shares nothing with the package: no graph, no ops, no top-k.
The source model runs as it is; only the ``forward`` of its routed blocks is replaced while `mod_reference` runs.
"""

__all__ = ["Routed", "capacity_of", "choose", "mod_reference", "random_routers"]

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# B batch  S rows  K capacity  D model dim  N rows or texts to choose from  C how many of them are chosen


@dataclass
class Routed:
    """What a routed block did.

    Args:
        logits: ``[B, S]`` when it chose rows, ``[1, B]`` when it chose texts.
        positions: Ascending, ``[B, K]`` or ``[1, C]``.
        filled: False where a slot holds padding.
        gates: As applied: 0 where a slot is not filled.
    """

    logits: Tensor
    positions: Tensor
    filled: Tensor
    gates: Tensor


def capacity_of(ratio: float | Fraction, count: int, multiple: int = 1) -> int:
    """Counts the slots: the ratio rounded up to a whole number, then to a multiple, never above the count."""
    exact = Fraction(ratio).limit_denominator(4096)
    return min(count, math.ceil(math.ceil(exact * count) / multiple) * multiple)


def choose(logits: Sequence[float], valid: Sequence[bool], capacity: int) -> list[int]:
    """Picks positions: valid before padding, then higher logits, then lower positions; NaN is as low as can be."""

    def order(position: int) -> tuple[bool, float, int]:
        logit = logits[position]
        return not valid[position], math.inf if math.isnan(logit) else -logit, position

    return sorted(sorted(range(len(logits)), key=order)[:capacity])


def random_routers(paths: Sequence[str], width: int, seed: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """Makes a weight ``[1, D]`` and a bias ``[1]`` for each path, with logits of about 1 for a normalised row."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: (torch.randn(1, width, generator=generator) * width**-0.5, torch.randn(1, generator=generator))
        for path in paths
    }


def mod_reference(
    model: nn.Module,
    block_paths: Sequence[str],
    inputs: Mapping[str, Tensor],
    routers: Mapping[str, tuple[Tensor, Tensor]],
    capacity_ratio: float | Fraction,
    *,
    capacity_multiple: int = 1,
    gate: str = "raw",
    attend_to: str = "chosen",
    valid: Tensor | None = None,
    axis: str = "token",
    at_positions: Callable[..., Any] | None = None,
    trace: dict[str, Routed] | None = None,
) -> Any:
    """Runs the model with some of its blocks routed.

    Args:
        model: The dense model; it is as before when the call returns.
        block_paths: The blocks to route.
        inputs: Keyword arguments of the call.
        routers: For each path the router's weight ``[1, D]`` and bias ``[1]``.
        capacity_ratio: The share of rows, or of texts, that enters a routed block.
        capacity_multiple: What the capacity is rounded up to a multiple of.
        gate: "raw", "sigmoid", "tanh" or "straight-through".
        attend_to: "chosen" or "all".
        valid: ``[B, S]`` bool, false for padding.
        axis: "token" or "sequence".
        at_positions: For blocks that number their rows inside: ``at_positions(block, positions, rows)`` is a context
            within which the rows of a block's call are those at ``positions`` ``[K]`` among ``rows``.
        trace: Filled with what each routed block did, by path.

    Returns:
        What the model returns, with gradients.
    """

    def routed(path: str) -> Callable[..., Any]:
        block = model.get_submodule(path)
        dense = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else next(iter(kwargs.values()))
            batch, rows, _ = hidden.shape
            keep = torch.ones(batch, rows, dtype=torch.bool) if valid is None else valid
            scored = hidden.float()  # [B, S, D]
            if axis == "sequence":
                scored = ((scored * keep[:, :, None]).sum(1) / keep.sum(1, keepdim=True))[None]  # [1, B, D]
                keep = torch.ones(1, batch, dtype=torch.bool)
            weight, bias = routers[path]
            logits = (scored * weight).sum(-1) + bias
            capacity = capacity_of(capacity_ratio, logits.shape[1], capacity_multiple)
            picks = [choose(row, ok, capacity) for row, ok in zip(logits.tolist(), keep.tolist(), strict=True)]
            positions = torch.tensor(picks)
            filled = _each(keep, positions)
            gates = _gate(gate, _each(logits, positions)) * filled
            if trace is not None:
                trace[path] = Routed(logits.detach(), positions, filled, gates.detach())

            if axis == "sequence":
                enters = positions[0]
                output = _call(dense, args, kwargs, partial(_texts_of, texts=enters, batch=batch, rows=rows))
                return _with_hidden(output, _merge(hidden, _hidden_of(output), enters, gates[0]))
            merged = []
            for text, chosen in enumerate(positions):
                if attend_to == "all":
                    output = dense(*args, **kwargs)
                    updated = _hidden_of(output)[text, chosen]
                else:
                    select = partial(_rows_of, text=text, positions=chosen, batch=batch, rows=rows)
                    with at_positions(block, chosen, rows) if at_positions else nullcontext():
                        output = _call(dense, args, kwargs, select)
                    updated = _hidden_of(output)[0]
                merged.append(_merge(hidden[text], updated, chosen, gates[text]))
            return _with_hidden(output, torch.stack(merged))

        return forward

    # Gradients stay on: without them nn.TransformerEncoder takes a fused path that calls no block.
    with torch.enable_grad(), _forwards(model, {path: routed(path) for path in block_paths}):
        return model(**inputs)


@contextmanager
def _forwards(model: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Replaces the forward of sub-modules for a while."""
    for path, forward in forwards.items():
        model.get_submodule(path).forward = forward
    try:
        yield
    finally:
        for path in forwards:
            del model.get_submodule(path).forward


def _each(table: Tensor, positions: Tensor) -> Tensor:
    """Picks from each row of a table: [B, N], [B, C] -> [B, C]."""
    return torch.stack([row[chosen] for row, chosen in zip(table, positions, strict=True)])


def _gate(name: str, logits: Tensor) -> Tensor:
    """Applies a gate function: [B, C] -> [B, C]."""
    if name == "straight-through":
        share = torch.sigmoid(logits)
        return torch.ones_like(share) + (share - share.detach())
    return {"raw": logits, "sigmoid": torch.sigmoid(logits), "tanh": torch.tanh(logits)}[name]


def _merge(rows: Tensor, updated: Tensor, positions: Tensor, gates: Tensor) -> Tensor:
    """Moves the rows at some positions towards their updates: [N, ...], [C, ...], [C], [C] -> [N, ...]."""
    result = list(rows)
    for position, update, gate in zip(positions.tolist(), updated, gates, strict=True):
        row = rows[position]
        if gate == 1:
            # The update itself, and yet a gradient for the gate.
            result[position] = update + (gate - 1) * (update - row)
        elif gate != 0:
            result[position] = row + gate * (update - row)
    return torch.stack(result)


def _call(dense: Callable[..., Any], args: Any, kwargs: Any, select: Callable[[Tensor], Tensor]) -> Any:
    """Calls a block on a selection of every tensor it is given, in lists and tuples too.

    Where the block hands one of its arguments on as an output, the whole argument is handed on.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    parts = [select(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    part_args, part_kwargs = pytree.tree_unflatten(parts, spec)
    output = dense(*part_args, **part_kwargs)
    if isinstance(output, Tensor):
        return output
    whole = {id(part): leaf for part, leaf in zip(parts, leaves, strict=True) if isinstance(leaf, Tensor)}
    return output[0], *(whole.get(id(other), other) for other in output[1:])


def _hidden_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def _is_per_text(side: Tensor, batch: int, rows: int) -> bool:
    """Tells whether dim 0 counts texts, alone or folded with the heads as in [B * H, 1, S]."""
    if batch == 1 or side.dim() == 0 or side.shape[0] == rows:
        return False
    return side.shape[0] == batch or (side.shape[0] % batch == 0 and rows in side.shape)


def _texts_of(side: Tensor, texts: Tensor, batch: int, rows: int) -> Tensor:
    """Takes some texts of a tensor, in order; tensors that are not per text stay whole."""
    if not _is_per_text(side, batch, rows):
        return side
    return side.unflatten(0, (batch, -1))[texts].flatten(0, 1)


def _rows_of(side: Tensor, text: int, positions: Tensor, batch: int, rows: int) -> Tensor:
    """Takes one text of a tensor, and of that the rows at some positions along every dim that has S of them."""
    side = _texts_of(side, torch.tensor([text]), batch, rows)
    for dim, size in enumerate(side.shape):
        if size == rows:
            side = side.index_select(dim, positions)
    return side
