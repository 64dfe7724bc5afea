"""Rows that decide for themselves: what a loop over sequences gives, whatever comes later in a text."""

import pytest
import torch
from tiny import Block, Mlp, Stack, randn, randomise_routers
from tolerances import TOLERANCES, deviation

from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.engine import build_engine
from modcompile.errors import UnsupportedGraphError, UsageError
from modcompile.ops import merge_rows
from modcompile.saving import load
from modcompile.trace import trace_routing
from modcompile.training import Predictors, QuantileThresholds, causal_model
from modcompile.variants import masked_model, other_attention_model
from modcompile.verify import verify

# B batch  S rows  D model dim

X, EXAMPLE = randn(3, 63, 8, seed=1), (randn(2, 5, 8),)


def converted(attend_to, **options):
    model = Stack(Block(causal=True), Block(causal=True, fused=True))
    return model, randomise_routers(convert(model, EXAMPLE, MoDConfig(**{
        "blocks": "all", "capacity_ratio": 0.3, "gate": "sigmoid", "attend_to": attend_to, **options})))


def predictors_of(mod):
    made = Predictors(mod)
    with torch.no_grad():
        for seed, network in enumerate(made.networks):
            network.weight.copy_(randn(*network.weight.shape, seed=seed))
            network.bias.zero_()
    return made


def by_hand(model, mod, takes, attend_to):
    """Sequence by sequence, the rows that enter and nothing else, through the dense model's own blocks."""
    out = []
    for row in X:
        hidden = row[None]
        for layer, (path, router) in zip(model.layers, mod.routers.items(), strict=True):
            logits = router(hidden)
            positions = takes(path, hidden, logits)[0].nonzero().T
            if positions.numel():
                made = layer(hidden[:, positions[0]]) if attend_to == "chosen" else layer(hidden)[:, positions[0]]
                hidden = merge_rows(hidden, made, positions, logits.gather(1, positions).sigmoid())
        out.append(hidden)
    return torch.cat(out)


@pytest.mark.parametrize("attend_to", ["chosen", "all"])
@torch.no_grad()
def test_it_is_the_loop_over_sequences(attend_to):
    model, mod = converted(attend_to)
    assert deviation(causal_model(mod)(X), by_hand(model, mod, lambda _, __, logits: logits > 0, attend_to)
                     ) <= TOLERANCES["eager"][torch.float32]
    predictors = predictors_of(mod)
    networks = dict(zip(mod.routers, predictors.networks, strict=True))
    causal = causal_model(mod, predictors)
    with trace_routing(causal) as trace:
        out = causal(X)
    assert deviation(out, by_hand(model, mod, lambda path, x, _: networks[path](x) > 0, attend_to)
                     ) <= TOLERANCES["eager"][torch.float32]
    shares = [block.taken().float().mean().item() for block in trace.values()]
    assert all(0.05 < share < 0.95 for share in shares) and (predictors.accuracy(trace)["layers.0"] == 1)


@pytest.mark.parametrize("attend_to", ["chosen", "all"])
@torch.no_grad()
def test_no_row_sees_a_later_one(attend_to):
    _, mod = converted(attend_to)
    causal, changed = causal_model(mod), X.clone()
    changed[:, 40:] = randn(3, 23, 8, seed=9)
    assert torch.allclose(causal(changed)[:, :40], causal(X)[:, :40], atol=1e-6)
    assert not torch.allclose(mod(changed)[:, :40], mod(X)[:, :40], atol=0.1)


@torch.no_grad()
def test_thresholds_at_the_capacity_are_what_top_k_takes():
    _, mod = converted("chosen", blocks=[1])
    thresholds, one = QuantileThresholds(mod, decay=0), X[:1]
    with pytest.raises(UsageError, match="a threshold was never updated"):
        causal_model(mod, thresholds)
    with trace_routing(mod) as trace:
        expected = mod(one)
    thresholds.update(trace)
    causal = causal_model(mod, thresholds)
    assert deviation(causal(one), expected) <= TOLERANCES["eager"][torch.float32]
    # Of other texts more or fewer rows enter.
    with trace_routing(causal) as other:
        causal(X)
    assert len(set(other["layers.1"].taken().sum(1).tolist())) > 1


@torch.no_grad()
def test_slots_overflow_and_stay_empty():
    _, mod = converted("chosen", blocks=[1])
    whole, narrow = causal_model(mod), causal_model(mod, capacity_ratio=0.3)
    with trace_routing(mod) as trace:
        mod(X)
    logits = trace["layers.1"].logits
    # In the first sequence half of the rows are alike, and want to enter.
    eager = X[0, logits[0].argmax()]
    x = torch.where((torch.arange(63) % 2 == 0)[None, :, None] & (torch.arange(3) == 0)[:, None, None], eager, X)
    with trace_routing(whole) as wanted, trace_routing(narrow) as trace:
        whole(x), narrow(x)
    wish, block = wanted["layers.1"], trace["layers.1"]
    assert block.positions.shape == (3, 19) and narrow.routed_blocks[0].capacity_ratio == "3/10"
    counts = wish.taken().sum(1)
    assert counts.min() < counts.max() and counts.max() > 19
    for b in range(3):
        best = wish.logits[b].masked_fill(~wish.taken()[b], -torch.inf).topk(min(19, int(counts[b]))).indices
        assert torch.equal(block.taken()[b].nonzero()[:, 0], best.sort().values)


@pytest.mark.parametrize("mix", [
    lambda x: torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1], lambda x: x.cumsum(1),
    lambda x: torch.nn.functional.conv1d(torch.nn.functional.pad(x.transpose(1, 2), (2, 0)),
                                         torch.eye(8)[..., None].expand(8, 8, 3)).transpose(1, 2)],
    ids=["shift", "cumsum", "conv"])
def test_a_block_that_mixes_rows_outside_of_attention_is_refused(mix):
    """Empty slots hold rows that did not enter: what looks at its neighbours would see them, and later ones."""
    class Mixing(Block):
        def forward(self, hidden):
            return super().forward(hidden) + mix(hidden)

    mod = convert(Stack(Mixing(causal=True), Mixing(causal=True)), EXAMPLE, MoDConfig(blocks=(1,), capacity_ratio=0.3))
    with pytest.raises(UnsupportedGraphError, match=r"(?s)cannot decide for themselves.*sees several rows at once"):
        causal_model(mod)


def test_it_is_the_models_tensors_and_is_not_routed_anew(tmp_path):
    _, mod = converted("all")
    causal = causal_model(mod, predictors_of(mod))
    assert {id(p) for p in mod.parameters()} < {id(p) for p in causal.parameters()}
    assert causal.thresholds == {"layers.0": 0.0, "layers.1": 0.0} and not mod.thresholds
    causal.save_pretrained(tmp_path / "model")
    # From the dense graph it would be a model of top-k, which looks ahead.
    for made in (causal, load(tmp_path / "model")):
        for again in (lambda made=made: made.with_capacity(0.3), lambda made=made: made.set_capacity(0.3),
                      lambda made=made: masked_model(made), lambda made=made: other_attention_model(made)):
            with pytest.raises(UsageError, match="decides for itself cannot be routed anew"):
                again()


def test_it_is_saved_with_its_predictors(tmp_path):
    _, mod = converted("chosen", blocks=[1])
    causal = causal_model(mod, predictors_of(mod))
    causal.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert torch.equal(loaded(X), causal(X)) and loaded.passes == causal.passes


@pytest.mark.long
@pytest.mark.parametrize("attend_to", ["chosen", "all"])
def test_it_becomes_an_engine(attend_to, tmp_path):
    _, mod = converted(attend_to, blocks=[1])
    for ratio in (1.0, 0.3):
        causal = causal_model(mod, predictors_of(mod), capacity_ratio=ratio)
        engine = build_engine(causal, tmp_path / f"engine-{ratio}", runtime="ort")
        verify(causal, engine, {"hidden": X})
        engine.close()


def test_what_cannot_decide():
    mod = convert(Stack(Block(), Block()), EXAMPLE, MoDConfig(axis="sequence"))
    with pytest.raises(UsageError, match="sequences do not decide row by row"):
        causal_model(mod)
    mod = convert(Stack(Mlp(), Mlp()), EXAMPLE, MoDConfig())
    with pytest.raises(UnsupportedGraphError, match=r"rows of block layers\.1 cannot decide"):
        causal_model(mod)


@pytest.mark.parametrize("attend_to", ["chosen", "all"])
def test_it_is_where_the_model_is(attend_to):
    _, mod = converted(attend_to)
    causal = causal_model(mod.to("meta"))
    assert "device(type='cpu')" not in causal.format() and causal(X.to("meta")).is_meta


def test_attention_that_rows_receive_looks_ahead():
    mod = convert(Stack(*(Block(causal=True) for _ in range(3))), EXAMPLE,
                  MoDConfig(blocks=(1,), router="attention", gate="straight-through"))
    with pytest.raises(UsageError, match=r"known when all later rows are there(.|\n)*router=.attention"):
        causal_model(mod)


def test_a_threshold_takes_all_rows_where_top_k_does():
    _, mod = converted("chosen", capacity_ratio=1.0)
    thresholds = QuantileThresholds(mod, decay=0.5)
    for _ in range(2):
        with trace_routing(mod) as trace:
            mod(X)
        thresholds.update(trace)
    assert all(taken.all() for taken in thresholds.decide(trace).values())
    assert deviation(causal_model(mod, thresholds)(X), mod(X)) < TOLERANCES["eager"][torch.float32]
    # The average begins anew at lower capacities.
    lower = mod.with_capacity(0.5)
    with trace_routing(lower) as trace:
        lower(X)
    thresholds.update(trace)
    assert all(abs(taken.float().mean() - 0.5) < 0.02 for taken in thresholds.decide(trace).values())
