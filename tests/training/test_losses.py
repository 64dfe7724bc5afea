"""The routers' loss, predictors and thresholds: targets, values, gradients, and how NaN stops a training."""

import pytest
import torch
from tiny import Block, Stack, randn, randomise_routers

from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.errors import ModcompileError, UsageError
from modcompile.trace import BlockTrace, RoutingTrace, trace_routing
from modcompile.training import Predictors, QuantileThresholds, check_finite, routing_accuracy, routing_losses

# B batch  S rows  D model dim

X, MASK = randn(3, 63, 8, seed=1), torch.ones(3, 63, dtype=torch.long)
MASK[1, 2:], MASK[2, :40] = 0, 0
VALID = MASK.bool()


@pytest.fixture(scope="module")
def mod():
    example = {"hidden": randn(2, 5, 8), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    return randomise_routers(convert(Stack(Block(), Block()), example,
                                     MoDConfig(blocks="all", capacity_ratio=[5 / 63, 0.5], gate="sigmoid")))


@pytest.fixture
def trace(mod):
    with trace_routing(mod) as trace:
        mod(X, MASK)
    return trace


def cross_entropy(logits, targets):
    """Of each row, from its definition."""
    p = torch.sigmoid(logits.double())
    return -torch.where(targets, p.log(), (1 - p).log())


def test_targets_are_the_rows_that_went_through(trace):
    for path, k in (("layers.0", 5), ("layers.1", 32)):
        block = trace[path]
        targets = torch.zeros(3, 63, dtype=torch.bool)
        for b in range(3):
            # The K best of the valid rows; where fewer are valid, all of those.
            order = block.logits[b].masked_fill(~VALID[b], -torch.inf).argsort(descending=True)
            targets[b, order[:min(k, int(VALID[b].sum()))]] = True
        assert targets.sum(1).tolist() == [k, 2, min(k, 23)]
        each = cross_entropy(block.logits, targets)
        assert torch.allclose(routing_losses(trace)[path].double(), each.mean(), atol=1e-6)
        assert torch.allclose(routing_losses(trace, VALID)[path].double(), each[VALID].mean(), atol=1e-6)
        right = ((block.logits > 0) == targets)[VALID].double().mean()
        assert torch.allclose(routing_accuracy(trace, VALID)[path].double(), right, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences():
    logits = randn(2, 9).double().requires_grad_()
    positions = torch.tensor([[1, 4, 7], [0, 2, 3]])
    valid = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])

    def loss(values):
        block = BlockTrace(values, positions, torch.ones(2, 3, dtype=torch.bool))
        # Single precision would be too coarse for differences: the targets take the logits' type.
        return routing_losses(RoutingTrace(block=block), valid)["block"].double()

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    step = 1e-5
    for i in range(18):
        delta = torch.zeros(18, dtype=torch.float64)
        delta[i] = step
        delta = delta.view(2, 9)
        numeric = (loss(logits + delta) - loss(logits - delta)) / (2 * step)
        assert abs(numeric - gradient.flatten()[i]) < 1e-6
    assert (gradient[~valid] == 0).all() and (gradient[valid] != 0).all()


def test_the_loss_reaches_routers_and_what_is_before_them(mod, trace):
    loss = routing_losses(trace)["layers.1"]
    router, block = mod.routers["layers.1"].weight, mod.get_parameter("layers.0.mlp.up.weight")
    gradients = torch.autograd.grad(loss, [router, block, mod.get_parameter("layers.1.mlp.up.weight")],
                                    allow_unused=True)
    # By hand: the mean over rows of (sigmoid(r) - target) x.
    seen = trace["layers.1"]
    expected = ((seen.logits.sigmoid() - seen.taken().float())[..., None] * seen.seen).mean((0, 1))
    assert torch.allclose(gradients[0][0], expected, atol=1e-6)
    assert gradients[1].abs().sum() > 0 and gradients[2] is None


def test_sequences_are_rows_of_one_choice():
    example = {"hidden": randn(2, 5, 8), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    mod = randomise_routers(convert(Stack(Block(), Block()), example, MoDConfig(capacity_ratio=0.5, axis="sequence")))
    mask = MASK.clone()
    mask[0] = 0
    with trace_routing(mod) as trace:
        mod(X, mask)
    block = trace["layers.1"]
    each = cross_entropy(block.logits, block.taken())
    assert torch.allclose(routing_losses(trace, mask)["layers.1"].double(), each[0, 1:].mean(), atol=1e-6)


# Predictors


def test_predictors_train_themselves_alone(mod, trace):
    predictors = Predictors(mod, hidden=4)
    for network in predictors.networks:
        torch.nn.init.normal_(network.weight)
    losses = predictors.losses(trace, VALID)
    for network, (path, loss) in zip(predictors.networks, losses.items(), strict=True):
        predicted = network(trace[path].seen)
        expected = cross_entropy(predicted, trace[path].taken())[VALID].mean()
        assert torch.allclose(loss.double(), expected, atol=1e-6)
        right = ((predicted > 0) == trace[path].taken())[VALID].float().mean()
        assert torch.allclose(predictors.accuracy(trace, VALID)[path], right)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in predictors.parameters())
    assert all(p.grad is None for p in mod.parameters())


def test_a_predictor_learns_what_the_router_does(mod, trace):
    torch.manual_seed(0)
    predictors = Predictors(mod, hidden=8)
    optimizer = torch.optim.Adam(predictors.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        sum(predictors.losses(trace, VALID).values()).backward()
        optimizer.step()
    assert all(share > 0.9 for share in predictors.accuracy(trace, VALID).values())


def test_predictors_are_for_tokens():
    mod = convert(Stack(Block(), Block()), (randn(2, 5, 8),), MoDConfig(axis="sequence"))
    with pytest.raises(UsageError, match="predictors are for routed tokens"):
        Predictors(mod)


# Thresholds


def test_thresholds_follow_the_quantile(mod, trace):
    thresholds = QuantileThresholds(mod, decay=0.75)
    assert thresholds.values.isnan().all() and not thresholds.decide(trace)["layers.0"].any()
    thresholds.update(trace, VALID)
    for i, path in enumerate(("layers.0", "layers.1")):
        # As many of the valid rows are above as were taken.
        assert thresholds.decide(trace)[path][VALID].sum() == trace[path].taken().sum()
        assert thresholds.values[i].isfinite()
    before = thresholds.values.clone()
    shifted = RoutingTrace({path: BlockTrace(block.logits + 4, block.positions, block.filled)
                            for path, block in trace.items()})
    thresholds.update(shifted, VALID)
    assert torch.allclose(thresholds.values, before + 1, atol=1e-5)
    again = QuantileThresholds(mod)
    again.load_state_dict(thresholds.state_dict())
    assert torch.equal(again.values, thresholds.values)
    with pytest.raises(UsageError, match="decay of an average"):
        QuantileThresholds(mod, decay=1.0)


def test_a_batch_whose_rows_were_all_taken_tells_nothing_of_a_threshold(mod, trace):
    """Sequences so short that no row was left out."""
    thresholds = QuantileThresholds(mod, decay=0.75)
    short = RoutingTrace({path: BlockTrace(block.logits, block.positions, block.filled)
                          for path, block in trace.items()})
    chosen = {path: block.taken() for path, block in trace.items()}
    thresholds.update(short, chosen)
    assert thresholds.values.isnan().all()
    thresholds.update(trace, VALID)
    before = thresholds.values.clone()
    thresholds.update(short, chosen)
    thresholds.update(short, {path: torch.zeros_like(taken) for path, taken in chosen.items()})
    assert torch.equal(thresholds.values, before)


def test_masks_by_block(mod, trace):
    """Such as an encoder's, which says nothing of its decoder's rows."""
    one = routing_losses(trace, {"layers.1": VALID})
    assert one["layers.1"] == routing_losses(trace, VALID)["layers.1"]
    assert one["layers.0"] == routing_losses(trace)["layers.0"] != routing_losses(trace, VALID)["layers.0"]
    with pytest.raises(UsageError, match="not of these rows"):
        routing_losses(trace, VALID[:1, :4])


# NaN


def test_what_is_not_finite_is_named(mod):
    x = X.clone()
    with trace_routing(mod) as trace, torch.no_grad():
        mod(x, MASK)
    check_finite({"task": torch.tensor(1.0)}, 3, trace)
    weight = mod.get_parameter("layers.1.mlp.up.weight")
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = torch.nan
            with trace_routing(mod) as trace:
                out = mod(x, MASK)
    finally:
        weight.data.copy_(kept)
    with pytest.raises(ModcompileError, match="a loss is not finite") as caught:
        check_finite({"task": out.sum(), "routing": torch.tensor(0.5)}, 17, trace)
    assert caught.value.details["where"] == "step 17, block layers.1" and "task nan" in caught.value.details["found"]
    bias = mod.routers["layers.0"].bias
    with torch.no_grad():
        old = bias.clone()
        bias.fill_(torch.nan)
        with trace_routing(mod) as trace:
            mod(x, MASK)
        bias.copy_(old)
    with pytest.raises(ModcompileError) as caught:
        check_finite(routing_losses(trace), 2, trace)
    assert caught.value.details["where"] == "step 2, the router of block layers.0"
    with pytest.raises(ModcompileError) as caught:
        check_finite({"task": torch.tensor(torch.inf)}, 2)
    assert caught.value.details["where"] == "step 2, the loss"
