"""The options of a conversion: what fits, what is said where something does not, and one K for everybody."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Mlp, Stack

from modcompile.capture import capture
from modcompile.config import MAX_DENOMINATOR, MoDConfig, as_fraction, capacity
from modcompile.convert import convert
from modcompile.errors import UsageError
from modcompile.manifest import RoutedBlock
from modcompile.trace import trace_routing

ratios = st.floats(1 / MAX_DENOMINATOR, 1.0) | st.fractions(
    Fraction(1, MAX_DENOMINATOR), 1, max_denominator=MAX_DENOMINATOR)


@given(ratio=ratios, rows=st.integers(1, 10**6), multiple=st.integers(1, 300))
def test_capacity_is_the_exact_ceiling(ratio, rows, multiple):
    nearest = Fraction(ratio).limit_denominator(MAX_DENOMINATOR)
    at_least = math.ceil(nearest * rows)
    k = capacity(ratio, rows, multiple)
    assert 1 <= at_least <= k <= rows
    assert k == rows or (k % multiple == 0 and k - at_least < multiple)


@given(st.fractions(Fraction(1, MAX_DENOMINATOR), 1, max_denominator=MAX_DENOMINATOR))
def test_a_float_stands_for_the_fraction_it_was_written_as(fraction):
    assert as_fraction(float(fraction)) == fraction


def test_rounding_errors_of_the_float_do_not_count():
    assert math.ceil(0.07 * 100) == 8 and capacity(0.07, 100) == 7
    assert [capacity(p / 33, 33) for p in range(1, 34)] == list(range(1, 34))


@pytest.fixture(scope="module")
def dense():
    return capture(Stack(Mlp(), Mlp()), (torch.randn(2, 5, 8),))


@pytest.mark.parametrize(("ratio", "multiple"), [(0.25, 1), (5 / 33, 1), (1 / 3, 4), (0.999, 1), (1 / 4096, 1), (1, 8)])
def test_the_graph_counts_the_same_k(dense, ratio, multiple):
    mod = convert(dense, None, MoDConfig(capacity_ratio=ratio, capacity_multiple=multiple))
    (block,) = mod.routed_blocks
    for rows in (*range(1, 70), 255, 256, 257, 4096):
        with trace_routing(mod) as trace, torch.no_grad():
            mod(torch.zeros(1, rows, 8))
        k = trace["layers.1"].positions.shape[1]
        assert k == capacity(ratio, rows, multiple) == block.capacity_for(rows)


@settings(max_examples=40)
@given(ratio=st.fractions(Fraction(1, MAX_DENOMINATOR), 1, max_denominator=MAX_DENOMINATOR),
       rows=st.integers(1, 5000), multiple=st.integers(1, 100))
def test_a_manifest_counts_the_same_k(ratio, rows, multiple):
    block = RoutedBlock(path="h.1", capacity_ratio=f"{ratio.numerator}/{ratio.denominator}", multiple=multiple,
                        attend_to="all", gate="raw", rows="sequence")
    assert block.capacity_for(rows) == block.at({"sequence": rows}).capacity == capacity(ratio, rows, multiple)


@pytest.mark.parametrize("option", [
    {"capacity_ratio": 0}, {"capacity_ratio": -0.5}, {"capacity_ratio": 1.5}, {"capacity_ratio": math.nan},
    {"capacity_ratio": math.inf}, {"capacity_ratio": "half"}, {"capacity_ratio": [0.5, 0]}, {"capacity_ratio": 1e-6},
])
def test_a_ratio_that_does_not_fit(option):
    with pytest.raises(UsageError) as caught:
        MoDConfig(**option)
    assert caught.value.problem == "capacity_ratio does not fit"
    assert caught.value.details == {
        "expected": "a number in (0, 1], at least 1/4096, or a list with one per routed block",
        "found": repr(option["capacity_ratio"]), "where": "MoDConfig.capacity_ratio"}


@pytest.mark.parametrize(("option", "expected"), [
    ({"gate": "softmax"}, "'raw', 'sigmoid', 'tanh', 'straight-through' or 'scale'"),
    ({"attend_to": "none"}, "'chosen' or 'all'"),
    ({"axis": "head"}, "'token' or 'sequence'"),
    ({"capacity_multiple": 0}, "greater than or equal to 1"),
    ({"padding_mask": 3}, "a valid string"),
    ({"blocks": 1}, '"every-other", "all", a list of indices, a path glob or a list of those'),
    ({"blocks": ["h.1", 2]}, '"every-other", "all", a list of indices, a path glob or a list of those'),
    ({"dropped": 1}, "a list of block paths"),
    ({"dropped": [1]}, "a list of block paths"),
])
def test_an_option_that_does_not_fit(option, expected):
    ((name, value),) = option.items()
    with pytest.raises(UsageError) as caught:
        MoDConfig(**option)
    assert caught.value.problem == f"{name} does not fit"
    assert caught.value.details == {"expected": expected, "found": repr(value), "where": f"MoDConfig.{name}"}


def test_one_dropped_block_is_a_list_of_one():
    with pytest.raises(UsageError, match="dropped does not fit") as caught:
        MoDConfig(dropped="layers.1")
    assert caught.value.details == {"expected": "a list of block paths", "found": "'layers.1'",
                                    "where": "MoDConfig.dropped", "fix": "for one block, dropped=['layers.1']"}


def test_an_option_that_does_not_exist():
    with pytest.raises(UsageError, match="there is no option capacity\n") as caught:
        MoDConfig(capacity=0.5)
    assert caught.value.details["fix"] == "did you mean capacity_ratio?"
    assert "blocks, capacity_ratio" in caught.value.details["expected"]


def test_ratios_are_one_for_all_or_one_each():
    assert MoDConfig(capacity_ratio=0.25).ratios(["a", "b"]) == [Fraction(1, 4)] * 2
    assert MoDConfig(capacity_ratio=[0.25, Fraction(5, 33)]).ratios(["a", "b"]) == [Fraction(1, 4), Fraction(5, 33)]
    with pytest.raises(UsageError, match="list of the wrong length") as caught:
        MoDConfig(capacity_ratio=[0.25]).ratios(["a", "b"])
    assert caught.value.details == {"expected": "2 ratios, one per routed block", "found": "1",
                                    "where": "MoDConfig.capacity_ratio", "fix": "the routed blocks are a, b"}


def test_a_config_does_not_change_and_survives_json():
    config = MoDConfig(blocks=[0, 2], capacity_ratio=[0.5, 5 / 33], gate="tanh", axis="sequence", padding_mask="~pad")
    with pytest.raises(ValueError):
        config.gate = "raw"
    assert MoDConfig.model_validate_json(config.model_dump_json()) == config
