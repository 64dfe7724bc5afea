"""examples/train_budgets.py and budget_training.py: how they train a routed model, which the tiny run has none of."""

import argparse
import copy
from fractions import Fraction

import pytest
import torch
from scripts import EXAMPLES, load_script

import modcompile as mc
from modcompile.flops import count_flops
from modcompile.training import QuantileThresholds, causal_model
from modcompile.variants import dense_model

pytest.importorskip("transformers")

B, S = 2, 32


@pytest.fixture(scope="module")
def script():
    return load_script(EXAMPLES / "train_budgets.py")


@pytest.fixture(scope="module")
def training():
    return load_script(EXAMPLES / "budget_training.py")


@pytest.fixture(scope="module")
def made(script, training):
    """A captured decoder, the same with two routed blocks, and bytes that repeat."""
    model, _ = script.tiny_model()
    tokens = torch.arange(4000) % 7 + 40
    graph = mc.capture(model, {"input_ids": tokens[:2 * S].view(2, S)})
    mod = mc.convert(graph, config=mc.MoDConfig(gate="straight-through", attend_to="all", capacity_ratio=0.25))
    generator = torch.Generator().manual_seed(1)
    for router in mod.routers.values():
        with torch.no_grad():
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    return graph, mod, training.Texts(tokens, {"bytes": tokens[:2 * B * S].view(2, B, S)})


def options(**changed):
    return argparse.Namespace(**{"lr": 1e-2, "router_lr": 0.0, "batch": B, "rows": S, "distill": 0.5, "compile": False,
                                 "anneal": 0.0, "anneal_stages": 2, "threshold_batches": 2, "refit": [],
                                 "calibration_sequences": 4, "calibration_batch": 2} | changed)


def trained(training, made, **changed):
    graph, mod, texts = made
    mod = copy.deepcopy(mod)
    before = training.losses(mod, texts)["bytes"]
    training.train(mod, copy.deepcopy(graph), texts, 0, 8, options(**changed))
    assert training.losses(mod, texts)["bytes"] < before - 0.1
    return mod


def test_one_process_adapts_the_dense_model_and_others_read_it(script, training, made, tmp_path, monkeypatch):
    graph, _, texts = made
    given = options(adapt=8, folder=tmp_path, device="cpu")
    first = script.adapted(graph, texts, given)
    assert training.losses(first, texts)["bytes"] < training.losses(graph, texts)["bytes"] - 0.1
    monkeypatch.setattr(script, "train", None)
    second = script.adapted(graph, texts, given)
    assert not second.training
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(SystemExit, match=r"other options \(steps\)"):
        script.adapted(graph, texts, options(adapt=9, folder=tmp_path, device="cpu"))


def test_routers_stay_as_they_were_fitted(training, made):
    mod = trained(training, made)
    for path, router in made[1].routers.items():
        assert torch.equal(mod.routers[path].weight, router.weight)
    assert not torch.equal(mod.get_parameter("transformer.h.1.mlp.c_fc.weight"),
                           made[1].get_parameter("transformer.h.1.mlp.c_fc.weight"))


def test_routers_are_fitted_again_on_the_way(training, made, monkeypatch):
    seen = []
    monkeypatch.setattr(training.RouterRefits, "update", lambda self, step, old=training.RouterRefits.update: (
        seen.append(step if old(self, step) else None)))
    mod = trained(training, made, refit=[0.25, 0.5])
    assert seen == [None, None, 2, None, 4, None, None, None]
    for path, router in made[1].routers.items():
        assert not torch.equal(mod.routers[path].weight, router.weight)
    # There is nothing to fit in a model whose rows are random.
    noise = training.stochastic(made[1])
    seen.clear()
    training.train(noise, copy.deepcopy(made[0]), made[2], 0, 2, options(refit=[0.0]))
    assert not seen


def test_routers_that_are_trained(training, made):
    mod = trained(training, made, router_lr=1e-2)
    for path, router in made[1].routers.items():
        assert not torch.equal(mod.routers[path].weight, router.weight)


def test_capacities_come_down(training, made, monkeypatch):
    seen = []
    monkeypatch.setattr(mc.MoDModel, "set_capacity", lambda self, ratio, old=mc.MoDModel.set_capacity: (
        seen.append(ratio), old(self, ratio))[1])
    mod = trained(training, made, anneal=0.5)
    assert seen == [[1.0, 1.0], [0.625, 0.625], 0.25]
    assert [block.capacity_ratio for block in mod.routed_blocks] == ["1/4", "1/4"]
    assert mod.config == made[1].config


def test_a_structure_that_is_given(script, made, tmp_path):
    graph, _, texts = made
    calibration = [{"input_ids": ids} for ids in texts.held_out["bytes"]]
    given = options(folder=tmp_path, budgets=[0.8], structure=[script.block_ratio("1:5/8"), script.block_ratio("0:0")],
                    attend_to="all", ratios=[0.5], calibration_sequences=4, calibration_batch=B, trial_batches=1,
                    exchanges=1)  # fmt: skip
    sizes = {"batch": B, "sequence": S}
    found = script.prepare(graph, calibration, sizes, given)[0.8]
    mod = mc.load(tmp_path / "calibrated-0.8")
    assert mod.config.dropped == ("transformer.h.0",) and [*mod.config.ratios(list(mod.routers))] == [Fraction(5, 8)]
    assert {path: block["ratio"] for path, block in found["calibrated"]["blocks"].items()} == {
        "transformer.h.0": "0", "transformer.h.1": "5/8"}  # fmt: skip
    assert len(found["pruned"]) == 1
    # A block that gets all its rows is not routed.
    given.structure, given.folder = [script.block_ratio("1:1"), script.block_ratio("0:0")], tmp_path / "whole"
    given.folder.mkdir()
    script.prepare(graph, calibration, sizes, given)
    assert not mc.load(tmp_path / "whole" / "calibrated-0.8").routers
    with pytest.raises(argparse.ArgumentTypeError, match="from 0 to 1"):
        script.block_ratio("1:9/8")
    given.structure, given.folder = [(1, 0.9)], tmp_path / "dear"
    given.folder.mkdir()
    with pytest.raises(SystemExit, match="the structure costs"):
        script.prepare(graph, calibration, sizes, given)


def test_rows_that_decide_for_themselves(training, made):
    _, mod, texts = made
    seen = []

    class Watched(training.QuantileThresholds):
        def update(self, trace):
            super().update(trace)
            seen.append(self.values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "QuantileThresholds", Watched)
        found = training.causal_losses(mod, texts, 0, options())
    assert 4 < found["losses"]["bytes"] < 8 and len(seen) == 2
    thresholds = QuantileThresholds(mod)
    thresholds.values = seen[-1]
    causal, entered = causal_model(mod, thresholds), []
    for ids in texts.held_out["bytes"]:
        with torch.no_grad(), mc.trace_routing(causal) as trace:
            causal(ids)
        entered.append([block.taken().float().mean().item() for block in trace.values()])
    ratios = torch.tensor(entered).mean(0)
    assert (ratios - 0.25).abs().max() > 0.01
    sizes = {"batch": B, "sequence": S}
    same_rows = mod.with_capacity([round(S * ratio) / S for ratio in ratios.tolist()])
    share = [count_flops(model, sizes) / count_flops(dense_model(mod), sizes) for model in (same_rows, mod)]
    assert found["flops"]["bytes"] == pytest.approx(share[0], abs=0.5 / S) and abs(share[0] - share[1]) > 0.005


def test_random_rows(training, made):
    _, mod, texts = made
    noise, ids = training.stochastic(mod), texts.held_out["bytes"][0]
    assert not list(noise.routers["transformer.h.1"].parameters())
    assert not torch.equal(noise(ids).logits, noise(ids).logits)
    assert torch.equal(mod(ids).logits, mod(ids).logits)
