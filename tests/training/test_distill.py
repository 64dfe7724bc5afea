"""The teacher is the dense model and stays it; the distances to it have the gradients of their formulas."""

import pytest
import torch
from tiny import Block, Stack, randn, randomise_routers

from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.trace import BlockTrace, RoutingTrace, trace_routing
from modcompile.training import Teacher, hidden_losses, logits_loss

X = randn(3, 63, 8, seed=1)
VALID = torch.rand(3, 63, generator=torch.Generator().manual_seed(2)) < 0.7


def models(**options):
    model = Stack(Block(causal=True), Block(dropout=0.5), Block(causal=True))
    return model, randomise_routers(convert(model, (randn(2, 5, 8),), MoDConfig(
        blocks=[1, 2], capacity_ratio=0.25, gate="sigmoid", **options)))


def test_the_teacher_stays_the_dense_model():
    model, mod = models(attend_to="all")
    with torch.no_grad():
        expected, after = model(X), model.layers[1](model.layers[0](X))
    teacher = Teacher(mod.train()).train()
    shared = Teacher(mod, share=True)
    for one in (teacher, shared):
        assert torch.equal(one(X), expected) and not one(X).requires_grad
        assert list(one.hidden) == ["layers.1", "layers.2"]
        assert torch.equal(one.hidden["layers.1"], after) and torch.equal(one.hidden["layers.2"], expected)
    assert not any(p.requires_grad for p in teacher.parameters()) and all(p.requires_grad for p in mod.parameters())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in mod.parameters()}
    with torch.no_grad():
        for parameter in mod.parameters():
            parameter.add_(0.1)
    assert torch.equal(teacher(X), expected) and not torch.equal(shared(X), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distance_of_logits(temperature):
    student, teacher = randn(3, 63, 5, seed=1).requires_grad_(), randn(3, 63, 5, seed=2)
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student.detach()))
    each = (p * (p / q).log()).sum(-1)
    loss = logits_loss(student, teacher, VALID, temperature)
    assert torch.allclose(loss, temperature**2 * each[VALID].mean(), atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    # d KL / d student = (q - p) / T, times T^2, over the valid rows.
    expected = torch.where(VALID[..., None], temperature * (q - p) / VALID.sum(), 0)
    assert torch.allclose(gradient, expected, atol=1e-6)
    assert logits_loss(teacher, teacher).abs() < 1e-6 and logits_loss(randn(2, 5), randn(2, 5, seed=1)) > 0


def test_distance_of_hidden_states():
    ours, theirs = randn(3, 63, 8, seed=1).requires_grad_(), randn(3, 63, 8, seed=2)
    trace = RoutingTrace(block=BlockTrace(output=ours))
    loss = hidden_losses(trace, {"block": theirs}, VALID)["block"]
    scale = theirs[VALID].square().sum()
    assert torch.allclose(loss, (ours - theirs)[VALID].square().sum() / scale, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, ours)
    assert torch.allclose(gradient, torch.where(VALID[..., None], 2 * (ours - theirs).detach() / scale, 0), atol=1e-6)


def test_at_full_capacity_there_is_nothing_to_learn():
    model = Stack(Block(causal=True), Block(causal=True))
    mod = convert(model, (randn(2, 5, 8),), MoDConfig(capacity_ratio=1, gate="straight-through"))
    teacher = Teacher(mod)
    expected = teacher(X)
    with trace_routing(mod) as trace:
        out = mod(X)
    assert logits_loss(out, expected).abs() < 1e-6 and hidden_losses(trace, teacher.hidden)["layers.1"] == 0


def test_training_towards_the_teacher_comes_nearer():
    _, mod = models()
    teacher = Teacher(mod)
    expected = teacher(X)
    optimizer = torch.optim.Adam(mod.parameters(), lr=0.01)
    seen = []
    for _ in range(30):
        with trace_routing(mod) as trace:
            mod(X)
        loss = sum(hidden_losses(trace, teacher.hidden).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.5 * seen[0] and torch.equal(teacher(X), expected)
