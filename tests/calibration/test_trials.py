"""Trials against models that were converted, or pruned, in earnest."""

import functools
from fractions import Fraction

import pytest
import torch
from tiny import WIDTH, Block, Stack, randn, randomise_routers
from tolerances import TOLERANCES

import modcompile as mc
from modcompile.calibration.batches import bind_batches
from modcompile.calibration.trials import DENSE, DROPPED, Trials, _Trial
from modcompile.errors import UsageError
from modcompile.flops import count_flops
from modcompile.variants import dense_model, pruned_model

EAGER = TOLERANCES["eager"][torch.float32]
# B batch  S rows
B, S = 3, 63
SIZES = {"batch": B, "sequence": S}


def batches():
    valid = torch.arange(S) < torch.tensor([[S], [31], [7]])
    return [{"hidden": randn(B, S, WIDTH, seed=seed), "attention_mask": valid.long()} for seed in (1, 2)]


@functools.cache
def trials_of(attend_to):
    graph = mc.capture(Stack(*(Block() for _ in range(3))), batches()[0])
    config = mc.MoDConfig(blocks="all", gate="straight-through", attend_to=attend_to)
    made = Trials(graph, config, "auto", bind_batches(graph, batches(), config))
    randomise_routers(made.mod)
    return graph, made


def change(model, dense):
    """The squared change of the valid rows, as a share, by hand."""
    shares = []
    with torch.no_grad():
        for call in batches():
            valid = call["attention_mask"].bool()
            before, after = dense(**call)[valid], model(**call)[valid]
            shares.append(float((after - before).square().sum() / before.square().sum()))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("attend_to", ["chosen", "all"])
def test_a_trial_is_the_converted_model(attend_to):
    graph, trials = trials_of(attend_to)
    routed = {"layers.1": Fraction(5, 63), "layers.2": Fraction(1, 2)}
    mod = mc.convert(graph, config=mc.MoDConfig(blocks=tuple(routed), gate="straight-through", attend_to=attend_to,
                                                capacity_ratio=tuple(routed.values())))  # fmt: skip
    for path, router in mod.routers.items():
        router.load_state_dict(trials.mod.routers[path].state_dict())
    state = dict.fromkeys(trials.paths, DENSE) | routed
    assert trials.flops(state) == count_flops(mod, SIZES)
    assert trials.loss(state) == pytest.approx(change(mod, graph), abs=EAGER)
    # And back again.
    assert trials.flops(dict.fromkeys(trials.paths, DENSE)) == count_flops(dense_model(mod), SIZES)
    assert trials.loss(dict.fromkeys(trials.paths, DENSE)) <= EAGER**2


def test_a_trial_computes_the_same_from_a_settled_state():
    _, trials = trials_of("all")
    state = dict.fromkeys(trials.paths, DENSE) | {"layers.0": Fraction(1, 2), "layers.2": Fraction(1, 4)}
    trials.forget()
    fresh = {path: trials.loss(state | {path: Fraction(1, 8)}) for path in trials.paths}
    trials.forget()
    trials.settle(state)
    ran, counts, run_node = [], [], _Trial.run_node

    def counted(self, node):
        ran.append(node.name)
        return run_node(self, node)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Trial, "run_node", counted)
        for path in trials.paths:
            ran.clear()
            assert trials.loss(state | {path: Fraction(1, 8)}) == fresh[path]
            counts.append(len(ran))
            # What was measured once is known.
            trials.loss(state | {path: Fraction(1, 8)})
            assert len(ran) == counts[-1]
    # The deeper the block, the less is left to run.
    assert counts[0] > counts[1] > counts[2]


def test_routers_that_changed_are_measured_again():
    _, trials = trials_of("all")
    state = dict.fromkeys(trials.paths, DENSE) | {"layers.1": Fraction(1, 4)}
    trials.settle(state)
    before, router = trials.loss(state), trials.mod.routers["layers.1"]
    with torch.no_grad():
        router.weight.neg_()
    trials.forget()
    assert trials.loss(state) != before
    with torch.no_grad():
        router.weight.neg_()
    trials.forget()
    assert trials.loss(state) == before


def test_a_dropped_block_is_the_pruned_models():
    graph, trials = trials_of("chosen")
    state = dict.fromkeys(trials.paths, DENSE) | {"layers.0": DROPPED, "layers.2": DROPPED}
    pruned = pruned_model(trials.mod, ["layers.0", "layers.2"])
    assert trials.flops(state) == count_flops(pruned, SIZES)
    assert trials.loss(state) == pytest.approx(change(pruned, graph), abs=EAGER)


def test_a_loss_that_is_not_a_number_names_the_block():
    graph, _ = trials_of("chosen")
    config = mc.MoDConfig(blocks="all", gate="straight-through")
    trials = Trials(graph, config, "auto", bind_batches(graph, batches(), config))
    bias = graph.get_parameter("layers.2.mlp.down.bias")
    before = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(torch.nan)
    try:
        with pytest.raises(UsageError, match="the loss is not a number") as raised:
            trials.loss(dict.fromkeys(trials.paths, DENSE), "layers.2")
    finally:
        with torch.no_grad():
            bias.copy_(before)
    assert raised.value.details["where"] == "layers.2"
