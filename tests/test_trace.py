"""Tracing shows what every routed block chose, and gets out of the way again."""

import copy

import pytest
import torch
from tiny import Block, Stack, randomise_routers

from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.errors import UsageError
from modcompile.ops import gather_rows, merge_rows, route
from modcompile.trace import BlockTrace, trace_routing

X = torch.randn(3, 63, 8, generator=torch.Generator().manual_seed(1))
MASK = torch.ones(3, 63, dtype=torch.long)
MASK[1, 2:] = 0
MASK[2, :40] = 0


@pytest.fixture(scope="module")
def mod():
    config = MoDConfig(blocks="all", capacity_ratio=[5 / 63, 0.5], gate="sigmoid")
    example = {"hidden": torch.randn(2, 5, 8), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    return randomise_routers(convert(Stack(Block(), Block()), example, config))


def test_a_block_is_explained_by_its_trace(mod):
    with trace_routing(mod) as trace, torch.no_grad():
        out = mod(X, MASK)
    assert list(trace) == ["layers.0", "layers.1"]
    hidden = X
    for (path, seen), k in zip(trace.items(), (5, 32), strict=True):
        logits = mod.routers[path](hidden)
        positions, filled = route(logits, MASK.bool(), k)
        assert torch.equal(seen.logits, logits) and torch.equal(seen.positions, positions)
        assert torch.equal(seen.filled, filled)
        gate = torch.sigmoid(logits.gather(1, positions)).where(filled, 0.0)
        assert torch.equal(seen.gate, gate)
        update = mod.graph_module.get_submodule(path)(
            gather_rows(hidden, positions), gather_rows(MASK, positions)[:, None, None, :] != 0)
        hidden = merge_rows(hidden, update, positions, gate)
        assert torch.allclose(seen.output, hidden, atol=1e-6)
        taken = torch.zeros(3, 63, dtype=torch.bool)
        for b in range(3):
            taken[b, positions[b][filled[b]]] = True
        assert torch.equal(seen.taken(), taken) and (taken.sum(1) == filled.sum(1)).all()
    assert torch.equal(out, trace["layers.1"].output)
    assert trace["layers.0"].taken().sum(1).tolist() == [5, 2, 5]


def test_the_outputs_are_the_same_with_a_trace(mod):
    with torch.no_grad():
        expected = mod(X, MASK)
        with trace_routing(mod):
            assert torch.equal(mod(X, MASK), expected)


def test_the_latest_call_counts(mod):
    with trace_routing(mod) as trace, torch.no_grad():
        mod(X, MASK)
        mod(X[:1, :7], MASK[:1, :7])
    assert trace["layers.1"].logits.shape == (1, 7)


def test_traces_nest_and_end_with_their_context(mod):
    with trace_routing(mod) as outer, torch.no_grad():
        mod(X, MASK)
        with trace_routing(mod) as inner:
            mod(X[:2], MASK[:2])
        assert len(inner["layers.0"].logits) == len(outer["layers.0"].logits) == 2
        mod(X[:1], MASK[:1])
    mod(X, MASK)
    assert len(inner["layers.0"].logits) == 2 and len(outer["layers.0"].logits) == 1
    assert not mod._observers


def test_an_error_ends_the_trace(mod):
    with pytest.raises(UsageError), trace_routing(mod) as trace:
        mod(X, MASK[:, :5])
    assert not mod._observers and not trace
    with pytest.raises(KeyError), trace_routing(mod):
        raise KeyError
    assert not mod._observers


def test_two_traces_of_equal_content_are_removed_apart(mod):
    """Empty traces are equal dicts; leaving the inner context must not end the outer trace."""
    with trace_routing(mod) as outer, torch.no_grad():
        with trace_routing(mod):
            pass
        mod(X, MASK)
    assert list(outer) == ["layers.0", "layers.1"]


def test_a_copy_is_not_traced(mod):
    with trace_routing(mod) as trace, torch.no_grad():
        copy.deepcopy(mod)(X, MASK)
    assert not trace


def test_a_trace_follows_the_graph():
    """What a trace runs is made beforehand: it has to know of dropout, dtypes and capacities that changed since."""
    mod = randomise_routers(convert(Stack(Block(dropout=0.5), Block(dropout=0.5)), (torch.randn(2, 5, 8),),
                                    MoDConfig(capacity_ratio=0.5)))

    def traced():
        with trace_routing(mod) as trace, torch.no_grad():
            return mod(X.to(mod.routers["layers.1"].weight.dtype)), trace["layers.1"]

    assert torch.equal(traced()[0], traced()[0])
    mod.train()
    assert not torch.equal(traced()[0], traced()[0])
    mod.eval().set_capacity(5 / 63)
    assert traced()[1].positions.shape == (3, 5) and torch.equal(traced()[0], mod(X))
    mod.double()
    assert traced()[1].output.dtype == torch.float64


def test_gradients_reach_the_router_through_a_trace(mod):
    with trace_routing(mod) as trace:
        mod(X, MASK)
    weight = mod.routers["layers.0"].weight
    (gradient,) = torch.autograd.grad(trace["layers.0"].logits.sum(), weight)
    assert gradient.abs().sum() > 0


def test_an_empty_trace_has_no_rows():
    with pytest.raises(AssertionError):
        BlockTrace().taken()
