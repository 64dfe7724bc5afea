"""The regression of routers, against planted answers and a plain solution."""

import pytest
import torch
from tiny import randn

from modcompile.calibration.fit import RouterFit

# B batch  S rows  D model dim
B, S, D = 3, 63, 8

# Sums of float64 products, solved: what rounding leaves.
ROUNDING = 1e-6


def fit_of(states, scores, strength=1e-12, valid=None):
    fit = RouterFit(D)
    for i in range(len(states)):
        fit.add(states[i : i + 1], scores[i : i + 1], None if valid is None else valid[i : i + 1])
    return fit.solve(strength)


def test_a_planted_linear_importance_is_found_whatever_each_sequence_adds():
    states, planted = randn(B, S, D), randn(D, seed=1)
    scores = states @ planted + randn(B, 1, seed=2) * 10
    weight, bias, r2 = fit_of(states, scores)
    torch.testing.assert_close(weight, planted.double(), rtol=0, atol=ROUNDING)
    assert r2 == pytest.approx(1)
    # The mean logit is 0.
    assert (states.double() @ weight + bias).mean().abs() < ROUNDING


def test_it_is_ridge_regression_on_rows_less_their_sequences_mean():
    states, scores, strength = randn(B, S, D), randn(B, S, seed=1), 0.1
    x = (states - states.mean(1, keepdim=True)).flatten(0, 1).double()
    y = (scores - scores.mean(1, keepdim=True)).flatten().double()
    size = strength * (x**2).sum(0).mean()
    expected = torch.linalg.lstsq(torch.cat([x, size.sqrt() * torch.eye(D)]), torch.cat([y, torch.zeros(D)])).solution
    weight, _, r2 = fit_of(states, scores, strength)
    torch.testing.assert_close(weight, expected, rtol=0, atol=ROUNDING)
    assert r2 == pytest.approx(float(1 - (y - x @ expected).square().sum() / y.square().sum()))


def test_padding_does_not_matter_even_where_it_is_not_a_number():
    states, scores = randn(B, S, D), randn(B, S, seed=1)
    valid = torch.arange(S) < torch.tensor([[S], [31], [2]])
    bare = RouterFit(D)
    for row, length in enumerate((S, 31, 2)):
        bare.add(states[row : row + 1, :length], scores[row : row + 1, :length])
    states[~valid], scores[~valid] = torch.nan, torch.inf
    for made, expected in zip(fit_of(states, scores, 0.1, valid), bare.solve(0.1), strict=True):
        assert made == pytest.approx(expected, abs=ROUNDING) if isinstance(made, float) else torch.allclose(
            made, expected, atol=ROUNDING)


def test_rows_that_are_all_alike_give_no_preference():
    weight, bias, r2 = fit_of(torch.ones(B, S, D), randn(B, S), 0.1)
    assert not weight.any() and not bias.any() and r2 == 0
