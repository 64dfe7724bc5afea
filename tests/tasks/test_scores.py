"""Scores, against values worked out by hand."""

import pytest
import torch

from modcompile.tasks import accuracy, exact_match, overlap, spearman


def test_accuracy():
    assert accuracy(torch.tensor([0, 2, 1, 1]), torch.tensor([0, 1, 1, 1])) == 0.75


def test_spearman():
    values = torch.tensor([0.3, -2.0, 7.5, 1.0])
    assert spearman(values, values.exp()) == pytest.approx(1)
    assert spearman(values, -values) == pytest.approx(-1)
    # Ranks 1.5 1.5 3 4 against 1 2 4 3: their deviations' products add up to 3.5, squares to 4.5 and 5.
    assert spearman(torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 9.0, 5.0])) == pytest.approx(
        3.5 / (4.5 * 5) ** 0.5)
    assert spearman(torch.ones(4), values) == 0


@pytest.mark.parametrize(
    ("found", "answers", "exact", "shared"),
    [
        ("The Mill!", ["mill"], 1, 1),
        ("old mill", ["mill", "the old stone mill"], 0, 0.8),
        ("mill mill", ["mill"], 0, 2 / 3),
        ("river", ["mill"], 0, 0),
        ("", [], 1, 1),
        ("mill", [], 0, 0),
        ("", ["mill"], 0, 0),
        ("the", ["a"], 1, 1),
    ],
)
def test_spans(found, answers, exact, shared):
    assert exact_match(found, answers) == exact
    assert overlap(found, answers) == pytest.approx(shared)
