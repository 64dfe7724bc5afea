"""The reference itself: against the dense model, against blinded attention, and against sums done by hand."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any
from unittest import mock

import pytest
import torch
from families import FAMILIES, Family, family
from reference import Routed, capacity_of, choose, mod_reference, random_routers
from tolerances import TOLERANCES, deviation, farthest
from torch import Tensor, nn
from torch.nn import functional

EAGER = TOLERANCES["eager"][torch.float32]


@pytest.mark.parametrize(
    ("logits", "valid", "capacity", "expected"),
    [
        ([1.0, 3.0, 2.0], None, 2, [1, 2]),
        ([5.0, 5.0, 5.0, 5.0], None, 2, [0, 1]),
        ([math.nan, -math.inf, 0.0], None, 2, [0, 2]),
        ([-math.inf, math.nan, 0.0], None, 2, [0, 2]),
        ([math.inf, 9.0, math.inf], None, 2, [0, 2]),
        ([9.0, 1.0, -math.inf, math.nan], [False, True, True, True], 3, [1, 2, 3]),
        ([1.0, 9.0, 8.0], [True, False, False], 2, [0, 1]),
        ([0.0, 1.0], [False, False], 1, [1]),
    ],
)
def test_choose_follows_the_contract(logits, valid, capacity, expected):
    assert choose(logits, valid or [True] * len(logits), capacity) == expected


@pytest.mark.parametrize(
    ("ratio", "count", "multiple", "expected"),
    [
        (5 / 33, 33, 1, 5),
        (0.25, 63, 1, 16),
        (0.125, 1, 1, 1),
        (1.0, 17, 1, 17),
        (0.25, 63, 10, 20),
        (0.5, 63, 64, 63),
        (Fraction(1, 3), 9, 1, 3),
        (0.1, 10, 1, 1),
    ],
)
def test_capacity_is_an_exact_fraction_rounded_up(ratio, count, multiple, expected):
    assert capacity_of(ratio, count, multiple) == expected


@pytest.mark.parametrize("attend_to", ["chosen", "all"])
@pytest.mark.parametrize("member", FAMILIES, ids=str)
def test_everything_chosen_is_the_dense_model(member: Family, attend_to: str):
    model = member.build()
    for padding in (None, *member.paddings):
        inputs = member.inputs(3, member.rows or 33, padding, seed=5)
        valid = member.valid(inputs)
        routed = mod_reference(
            model, member.routed, inputs, random_routers(member.routed, member.width), 1.0, gate="straight-through",
            attend_to=attend_to, valid=valid, at_positions=member.at_positions,
        )  # fmt: skip
        dense = model(**inputs)
        assert type(routed) is type(dense)
        assert farthest(routed, dense, valid) <= EAGER


@contextmanager
def blinded(seen: Tensor) -> Iterator[None]:
    """Hides all keys but some from every attention: seen [S] bool."""
    dark = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    attend, softmax = functional.scaled_dot_product_attention, functional.softmax

    def attend_blinded(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **options: Any,
    ) -> Tensor:  # fmt: skip
        mask = dark.expand(query.shape[-2], -1)
        if is_causal:
            mask = mask.masked_fill(torch.ones(mask.shape, dtype=torch.bool).triu(1), -torch.inf)
        if attn_mask is not None:
            mask = mask.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else mask + attn_mask
        return attend(query, key, value, attn_mask=mask, **options)

    def softmax_blinded(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return softmax(scores + dark, *args, **kwargs)

    with (
        mock.patch.object(functional, "scaled_dot_product_attention", attend_blinded),
        mock.patch.object(functional, "softmax", softmax_blinded),
        mock.patch.object(torch, "softmax", softmax_blinded),
    ):
        yield


@pytest.mark.parametrize("member", FAMILIES, ids=str)
def test_attending_to_the_chosen_is_attending_blind_to_the_others(member: Family):
    """The rows alone, gathered with every side input, are the rows of a dense block that cannot see the others."""
    model = member.build()
    path = member.routed[0]
    block, dense = model.get_submodule(path), model.get_submodule(path).forward
    routers = random_routers(member.routed, member.width)
    for padding in (None, *member.paddings):
        inputs = member.inputs(2, member.rows or 33, padding, seed=6)
        valid = member.valid(inputs)
        trace: dict[str, Routed] = {}
        options = dict(valid=valid, at_positions=member.at_positions, trace=trace)
        routed = mod_reference(model, [path], inputs, routers, 0.25, gate="straight-through", **options)

        def blind(*args: Any, step: Routed = trace[path], **kwargs: Any) -> Any:
            hidden = args[0] if args else next(iter(kwargs.values()))
            texts = []
            for text, positions in enumerate(step.positions):
                seen = torch.zeros(hidden.shape[1], dtype=torch.bool).index_fill(0, positions, True)
                with blinded(seen):
                    output = dense(*args, **kwargs)
                whole = output if isinstance(output, Tensor) else output[0]
                chosen = positions[step.filled[text]]
                texts.append(hidden[text].index_copy(0, chosen, whole[text, chosen]))
            merged = torch.stack(texts)
            return merged if isinstance(output, Tensor) else (merged, *output[1:])

        with mock.patch.object(block, "forward", blind):
            expected = model(**inputs)
        assert farthest(routed, expected, valid) <= EAGER
        assert farthest(model(**inputs), expected, valid) > 0.01


def hidden_before(model: nn.Module, path: str, inputs: dict[str, Tensor]) -> Tensor:
    kept = []
    with model.get_submodule(path).register_forward_pre_hook(lambda _, args: kept.append(args[0])):
        model(**inputs)
    return kept[0]


@pytest.mark.parametrize(
    ("gate", "weigh"),
    [("raw", lambda r: r), ("sigmoid", torch.sigmoid), ("tanh", torch.tanh), ("straight-through", lambda r: 1)],
)
def test_one_row_by_hand(gate: str, weigh: Callable[[Tensor], Any]):
    """A row that sees itself alone takes its own value: x + g * (y - x) with y = v + mlp(v), v = x + out(value(x))."""
    member = family("small-gpt")
    model = member.build()
    path = member.blocks[3]
    inputs = member.inputs(1, 17, None, seed=7)
    block = model.get_submodule(path)
    before = hidden_before(model, path, inputs)[0]  # [S, D]
    weight, bias = random_routers([path], 32)[path]
    logits = before @ weight[0] + bias
    best = logits.argmax()
    row = before[best]
    value = block.qkv(block.norm_attention(row))[64:]
    attended = row + block.out(value)
    updated = attended + block.mlp(block.norm_mlp(attended))
    after = before.clone()
    after[best] = row + weigh(logits[best]) * (updated - row)

    result = mod_reference(
        model, [path], inputs, {path: (weight, bias)}, 1 / 17, gate=gate, at_positions=member.at_positions
    )
    assert deviation(result[0], model.head(model.norm(after))) <= EAGER


def test_padding_is_chosen_last_and_changes_nothing():
    member = family("llama")
    model = member.build()
    inputs = member.inputs(3, 33, "left", seed=8)
    valid = inputs["attention_mask"].bool()
    trace: dict[str, Routed] = {}
    routers = random_routers(member.routed, 32)
    mod_reference(model, member.routed, inputs, routers, 0.5, valid=valid, trace=trace)
    for step in trace.values():
        assert step.filled.sum(1).tolist() == [17, 17, 5]
        assert (step.gates == 0).equal(~step.filled)
        assert valid.gather(1, step.positions).equal(step.filled)


def test_sequences_are_pooled_over_valid_rows_and_enter_whole():
    member = family("bert")
    model = member.build()
    path = member.routed[0]
    inputs = member.inputs(3, 17, "right", seed=9)
    valid = inputs["attention_mask"].bool()
    weight, bias = random_routers([path], 32)[path]
    before = hidden_before(model, path, inputs)
    logits = torch.stack([text[keep].mean(0) @ weight[0] + bias[0] for text, keep in zip(before, valid, strict=True)])
    best = logits.argmax()

    def once(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = hidden.clone()
        result[best] += logits[best] * (dense(hidden, *args, **kwargs)[best] - hidden[best])
        return result

    trace: dict[str, Routed] = {}
    routed = mod_reference(
        model, [path], inputs, {path: (weight, bias)}, 1 / 3, axis="sequence", valid=valid, trace=trace
    )
    dense = model.get_submodule(path).forward
    with mock.patch.object(model.get_submodule(path), "forward", once):
        expected = model(**inputs)
    assert trace[path].positions.tolist() == [[best.item()]]
    assert farthest(routed, expected, valid) <= EAGER


def test_the_model_is_left_as_it_was():
    member = family("gpt2")
    model = member.build()
    inputs = member.example()
    dense = model(**inputs).logits
    with pytest.raises(KeyError):
        mod_reference(model, member.routed, inputs, {}, 0.5)
    assert model(**inputs).logits.equal(dense)
    assert not any("forward" in vars(model.get_submodule(path)) for path in member.blocks)
