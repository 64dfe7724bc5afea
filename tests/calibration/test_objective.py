"""What a change of a model costs, and the random scalars whose gradients stand for it."""

import pytest
import torch
from tiny import Block, Stack, randn
from torch import nn
from torch.nn import functional

from modcompile.calibration.batches import Batch
from modcompile.calibration.objective import Divergence, NextToken, OutputChange, choose_objective
from modcompile.capture import capture
from modcompile.errors import UsageError

# B batch  S rows  V vocabulary
B, S, V = 3, 9, 8


class Words(nn.Module):
    """Words, blocks, logits."""

    def __init__(self, causal=True, kept=V):
        super().__init__()
        self.table, self.stack, self.kept = nn.Embedding(V, 8), Stack(Block(causal), Block(causal)), kept

    def forward(self, ids, attention_mask=None):
        return functional.linear(self.stack(self.table(ids)), self.table.weight)[..., : self.kept]


def words(seed=0):
    return torch.randint(V, (B, S), generator=torch.Generator().manual_seed(seed))


def test_the_next_token_counts_between_valid_rows():
    ids, logits = words(), randn(B, S, V)
    valid = torch.arange(S) < torch.tensor([[S], [4], [1]])
    total, count = NextToken(0, 0).measure((logits,), Batch([ids], valid), ())
    by_hand = [functional.cross_entropy(logits[b, t], ids[b, t + 1]) for b, n in ((0, S), (1, 4), (2, 1))
               for t in range(n - 1)]
    assert (float(total), count) == (pytest.approx(float(sum(by_hand)), rel=1e-5), len(by_hand))


def test_the_divergence_counts_valid_rows():
    dense, made = randn(B, S, V), randn(B, S, V, seed=1)
    valid = torch.arange(S) < torch.tensor([[S], [4], [1]])
    batch = Batch([], valid)
    total, count = Divergence(0).measure((made,), batch, Divergence(0).reference((dense,), batch))
    p, q = (logits[valid].double().softmax(-1) for logits in (dense, made))
    assert (float(total), count) == (pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5), S + 4 + 1)


def test_the_outputs_change_by_their_valid_rows_alone():
    before, after, pooled = randn(B, S, 4), randn(B, S, 4, seed=1), randn(B, 4, seed=2)
    valid = torch.arange(S) < torch.tensor([[S], [4], [1]])
    objective, batch = OutputChange((0, 1), (True, False)), Batch([], valid)
    share, count = objective.measure((after, pooled), batch, objective.reference((before, pooled), batch))
    expected = (after - before)[valid].square().sum() / before[valid].square().sum() / 2
    assert (float(share), count) == (pytest.approx(float(expected), rel=1e-5), 1)


@pytest.mark.parametrize("objective", [NextToken(0, 0), Divergence(0)])
def test_drawn_labels_give_twice_the_divergence_of_a_small_change(objective):
    logits, change = randn(1, 1, V).requires_grad_(), 1e-2 * randn(1, 1, V, seed=1)
    generator, batch, squares = torch.Generator().manual_seed(0), Batch([torch.zeros(1, 1, dtype=torch.long)], None), 0
    for _ in range(2000):
        (grad,) = torch.autograd.grad(objective.draw((logits,), batch, generator), logits)
        squares += float((grad * change).sum() ** 2) / 2000
    with torch.no_grad():
        before, after = logits.double().log_softmax(-1), (logits.double() + change).log_softmax(-1)
    # The mean of 2,000 draws.
    assert squares == pytest.approx(2 * float((before.exp() * (before - after)).sum()), rel=0.2)


def test_drawn_directions_give_the_squared_change():
    output, change = randn(1, 5, 4).requires_grad_(), 0.1 * randn(1, 5, 4, seed=1)
    generator, squares = torch.Generator().manual_seed(0), 0
    for _ in range(2000):
        (grad,) = torch.autograd.grad(OutputChange((0,), (False,)).draw((output,), Batch([], None), generator), output)
        squares += float((grad * change).sum() ** 2) / 2000
    assert squares == pytest.approx(float(change.square().sum() / output.detach().square().sum()), rel=0.2)


@pytest.mark.parametrize("causal", [True, False])
def test_the_divergence_is_for_models_that_predict_words(causal):
    graph = capture(Words(causal), {"ids": words()})
    assert choose_objective(graph, "auto") == choose_objective(graph, "divergence") == Divergence(0, False)
    assert choose_objective(graph, "next-token") == NextToken(0, 0, False)
    assert choose_objective(graph, "outputs") == OutputChange((0,), (False,))


def test_logits_of_another_vocabulary_predict_no_words():
    graph = capture(Words(kept=5), {"ids": words()})
    assert choose_objective(graph, "auto") == OutputChange((0,), (False,))
    for kind in ("divergence", "next-token"):
        with pytest.raises(UsageError, match="the model predicts no words"):
            choose_objective(graph, kind)


def test_outputs_of_integers_cannot_be_compared():
    class Best(Words):
        def forward(self, ids):
            return super().forward(ids).argmax(-1)

    with pytest.raises(UsageError, match="no output can be compared"):
        choose_objective(capture(Best(), {"ids": words()}), "auto")
