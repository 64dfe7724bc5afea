"""The search for blocks and ratios, on losses that are known."""

from fractions import Fraction

import pytest

from modcompile.calibration.choose import Search
from modcompile.calibration.trials import DENSE, DROPPED
from modcompile.errors import UsageError

RATIOS = [Fraction(1, 4), Fraction(1, 2)]


class Known:
    """Blocks of 100 FLOPs beside 100 others; each costs its weight times the rows it lacks, more beside others."""

    def __init__(self, together=0.0, **weights):
        self.paths, self.weights, self.together, self.trials = list(weights), weights, together, 0
        self.dense_flops = 100 + 100 * len(weights)

    def flops(self, state):
        return 100 + sum(int(100 * ratio) for ratio in state.values())

    def settle(self, state):
        pass

    def loss(self, state, suspect=None):
        self.trials += 1
        lacking = {path: float(1 - ratio) for path, ratio in state.items()}
        pairs = sum(share * lacking[other] for path, share in lacking.items() for other in lacking if path < other)
        return sum(self.weights[path] * share for path, share in lacking.items()) + self.together * pairs


def search(trials, ratios, budget):
    made = Search(trials, ratios)
    made.lower(budget)
    return made


def test_the_cheapest_block_goes_first_and_one_gets_what_is_left():
    made = search(Known(a=3.0, b=1.0, c=2.0), RATIOS, 0.7)
    assert made.moves[0].path == "b" and {move.path for move in made.moves} == {"b", "c"}
    # 150 of 400 FLOPs are saved; 120 were to be, and 30 more rows are worth most in c.
    assert made.state == {"a": DENSE, "b": Fraction(1, 4), "c": Fraction(1, 4)}
    made.fill(0.7)
    assert made.state == {"a": DENSE, "b": Fraction(1, 4), "c": Fraction(35, 64)}
    assert made.moves[-1].flops == pytest.approx(0.7, abs=100 / 64 / 400) and made.moves[-1].flops <= 0.7
    assert made.moves[-1].loss == made.loss == pytest.approx(0.75 + 2 * 29 / 64)


def test_a_price_is_measured_again_beside_what_is_routed_already():
    class Twins(Known):
        # b costs next to nothing, but not once a is gone.
        def loss(self, state, suspect=None):
            return super().loss(state) + 50 * (state["a"] < DENSE and state["b"] < DENSE)

    made = search(Twins(a=1.0, b=1.1, c=4.0), [Fraction(1, 4)], 0.65)
    assert [move.path for move in made.moves] == ["a", "c"]


def test_few_trials_are_needed():
    known = Known(together=0.1, **{f"block{i:02}": 1 + i / 10 for i in range(20)})
    made = search(known, RATIOS, 0.6)
    # Trying everything again would cost some 30 trials for each move.
    assert len(made.moves) > 8
    assert known.trials < 42 + 8 * len(made.moves)


def test_dropping_makes_whole_blocks_go():
    made = search(Known(a=3.0, b=1.0, c=2.0), [DROPPED], 0.6)
    assert [(move.path, move.ratio) for move in made.moves] == [("b", DROPPED), ("c", DROPPED)]
    assert made.state == {"a": DENSE, "b": DROPPED, "c": DROPPED}


def test_an_exchange_mends_what_went_wrong():
    class Trap(Known):
        # a is the cheapest alone; b and c together cost nothing.
        def loss(self, state, suspect=None):
            together = state["b"] == state["c"] == DROPPED
            return 0.0 if together and state["a"] == DENSE else super().loss(state)

    made = search(Trap(a=1.0, b=1.5, c=5.0), [DROPPED], 0.6)
    assert made.state == {"a": DROPPED, "b": DROPPED, "c": DENSE} and made.loss == 2.5
    assert made.exchange(0.6)
    assert made.state == {"a": DENSE, "b": DROPPED, "c": DROPPED} and made.loss == 0
    assert not made.exchange(0.6)


def test_no_exchange_leaves_the_budget():
    made = search(Known(a=3.0, b=1.0, c=2.0), RATIOS, 0.7)
    before = dict(made.state)
    assert not made.exchange(0.7)
    assert made.state == before


def test_a_budget_that_cannot_be_met():
    with pytest.raises(UsageError) as raised:
        search(Known(a=1.0, b=1.0, c=1.0), RATIOS, 0.4)
    # 100 + 3 * 25 of 400.
    assert "at least 0.4375: 1/4 of the rows in each of 3 blocks" in str(raised.value)
    assert set(search(Known(a=1.0, b=1.0, c=1.0), RATIOS, 0.4375).state.values()) == {Fraction(1, 4)}
