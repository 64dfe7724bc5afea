"""Measured importance against gradients taken by hand, in the dense model and beside routed blocks."""

from fractions import Fraction

import pytest
import torch
from tiny import WIDTH, Block, Mlp, Stack, randn, randomise_routers
from tolerances import TOLERANCES

import modcompile as mc
from modcompile.calibration.batches import Batch, bind_batches
from modcompile.calibration.measure import Measured, importance, measure
from modcompile.calibration.trials import DENSE, DROPPED, Trials
from modcompile.errors import UsageError

EAGER = TOLERANCES["eager"][torch.float32]
# B batch  S rows
B, S = 2, 9


def trials_of(model, call):
    config = mc.MoDConfig(blocks="all", attend_to="all" if isinstance(model.layers[0], Block) else "chosen")
    graph = mc.capture(model, call)
    trials = Trials(graph, config, "auto", bind_batches(graph, [call], config))
    randomise_routers(trials.mod)
    return graph, config, trials


@pytest.mark.parametrize("ratio", [DENSE, Fraction(1, 3), DROPPED])
def test_it_is_what_an_update_may_move_with_the_state_in_place(ratio):
    model, hidden = Stack(*(Mlp() for _ in range(3))), randn(B, S, WIDTH)
    _, _, trials = trials_of(model, {"hidden": hidden})
    state = dict.fromkeys(trials.paths, DENSE) | {"layers.1": ratio}
    _, scores = importance(Measured.of(trials), state, Batch([hidden], None), 1, torch.Generator().manual_seed(0), "")

    entering = model.layers[0](hidden).detach()
    update = (model.layers[1](entering) - entering).detach()
    chosen = torch.zeros(B, S, dtype=torch.bool)
    if rows := int(ratio * S):
        chosen.scatter_(1, trials.mod.routers["layers.1"](entering).topk(rows).indices, True)
    leaving = (entering + update * chosen[..., None]).requires_grad_()
    outputs = (model.layers[2](leaving),)
    drawn = trials.objective.draw(outputs, Batch([], None), torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(drawn, leaving)
    expected = (grad.norm(dim=-1) * update.norm(dim=-1)).sqrt()
    torch.testing.assert_close(scores["layers.1"], expected, rtol=1e-4, atol=EAGER)


@pytest.mark.long
def test_the_state_in_place_is_the_routed_model():
    model, call = Stack(*(Block() for _ in range(3))), {"hidden": randn(B, S, WIDTH)}
    graph, config, trials = trials_of(model, call)
    state = dict.fromkeys(trials.paths, DENSE) | {"layers.0": Fraction(1, 3), "layers.1": DROPPED}
    (batch,) = bind_batches(graph, [call], config)
    states, _ = importance(Measured.of(trials), state, batch, 1, torch.Generator().manual_seed(0), "")
    mod = mc.convert(graph, config=config.model_copy(update={"blocks": ("layers.0",), "capacity_ratio": 1 / 3}))
    mod.routers["layers.0"].load_state_dict(trials.mod.routers["layers.0"].state_dict())
    seen = {}
    with torch.no_grad():
        entered = mc.convert(graph, config=mod.config.model_copy(update={"gate": "straight-through"}))
        entered.routers["layers.0"].load_state_dict(mod.routers["layers.0"].state_dict())
        entered._observers.append(lambda path, role, value: seen.update({(path, role): value}))
        entered(**call)
    # What enters the last block is what left the first, for the one between them is dropped.
    torch.testing.assert_close(states["layers.2"], seen["layers.0", "output"], rtol=0, atol=EAGER)


def test_padding_does_not_matter():
    model = Stack(*(Block() for _ in range(3)))
    valid = torch.arange(S) < torch.tensor([[S], [5]])
    calls = []
    for noise in (1.0, 100.0):
        hidden = randn(B, S, WIDTH).where(valid[..., None], noise * randn(B, S, WIDTH, seed=1))
        calls.append({"hidden": hidden, "attention_mask": valid.long()})
    graph, config, trials = trials_of(model, calls[0])
    state = dict.fromkeys(trials.paths, DENSE) | {"layers.1": Fraction(1, 3)}
    first, second = (measure(Measured.of(trials), state, bind_batches(graph, [call], config), draws=2, seed=0)
                     for call in calls)
    for path in trials.paths:
        assert first[path].rows == second[path].rows == S + 5
        weights = [fits[path].solve(0.1)[0] for fits in (first, second)]
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_parameters_get_no_gradients():
    model, hidden = Stack(*(Mlp() for _ in range(2))), randn(B, S, WIDTH)
    _, _, trials = trials_of(model, {"hidden": hidden})
    with torch.no_grad():
        measure(Measured.of(trials), dict.fromkeys(trials.paths, DENSE), [Batch([hidden], None)], draws=1, seed=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_output_that_is_not_a_number_names_the_block():
    model, hidden = Stack(*(Mlp() for _ in range(3))), randn(B, S, WIDTH)
    _, _, trials = trials_of(model, {"hidden": hidden})
    with torch.no_grad():
        model.layers[1].down.bias[3] = torch.inf
    with pytest.raises(UsageError, match="a block's output is not a number") as raised:
        measure(Measured.of(trials), dict.fromkeys(trials.paths, DENSE), [Batch([hidden], None)], draws=1, seed=0)
    assert raised.value.details["where"] == "layers.1, batches[0]"
