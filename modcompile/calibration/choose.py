"""Which blocks to route or drop, and how far, for a budget: by measured loss per FLOP saved."""

__all__ = ["Move", "Search", "check_budget"]

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from modcompile.calibration.trials import DENSE, State, Trials
from modcompile.errors import UsageError

# What is left of a budget goes to one block, in steps of this share of its rows.
STEP = Fraction(1, 64)

# Of the exchanges that look best, as many are tried; one that wins less than this share of the loss is none.
TRIED, WORTH = 6, 1e-3


@dataclasses.dataclass(frozen=True)
class Move:
    """One step of a search: a block gets another ratio.

    Attributes:
        path: The block; ``ratio``: the ratio it gets.
        loss: The loss after it.
        flops: FLOPs after it, as a share of the dense model's.
    """

    path: str
    ratio: Fraction
    loss: float
    flops: float


def check_budget(trials: Trials, ratio: Fraction, budget: float) -> None:
    """Whether this ratio in every block meets a budget.

    Raises:
        UsageError: It does not; with the lowest budget that it meets.
    """
    lowest = trials.flops(dict.fromkeys(trials.paths, ratio)) / trials.dense_flops
    if budget < lowest:
        rows = f"{ratio} of the rows" if ratio else "nothing"
        least = f"{math.ceil(lowest * 1e4) / 1e4}: {rows} in each of {len(trials.paths)} blocks"
        raise UsageError("the budget cannot be met", expected=f"at least {least}", found=budget, where="budget",
                         fix="a higher budget, or more blocks")


class Search:
    """A way down from the dense model, on which every step is measured with those before it in place.

    Args:
        trials: The model.
        ratios: What a block may get beside all its rows; with ``DROPPED`` alone, the result is a pruned model.
        say: Told of progress.

    Attributes:
        state: The ratio of each block.
        loss: The loss with it.
        moves: The steps taken.
    """

    def __init__(self, trials: Trials, ratios: Sequence[Fraction], say: Callable[[str], None] = lambda text: None):
        self.trials, self.ratios, self.moves, self._say = trials, sorted({*ratios}), list[Move](), say
        self.state: State = dict.fromkeys(trials.paths, DENSE)
        self._candidates = [(path, ratio) for path in trials.paths for ratio in self.ratios]
        # The loss per FLOP saved of each candidate, and after how many changes it was measured.
        self._prices: dict[tuple[str, Fraction], tuple[float, int]] = {}
        self._changes = 0
        self.take(self.state)

    @property
    def flops(self) -> int:
        """FLOPs with the state."""
        return self.trials.flops(self.state)

    def take(self, state: State) -> None:
        """Goes on from another state, or from the same with other routers."""
        self.state = dict(state)
        self._changes += 1
        self.trials.settle(self.state)
        self.loss = self.trials.loss(self.state)

    def lower(self, budget: float) -> None:
        """Takes steps until the FLOPs are at most ``budget`` of the dense model's.

        Of all steps that give a block a smaller ratio, the one with the least loss for each FLOP saved is taken. Its
        price is measured again, with the steps before it in place, when it comes to the top; prices rarely fall as more
        blocks are routed, so the others keep their old ones till then.

        Raises:
            UsageError: A budget that the smallest ratio in every block does not meet, with the lowest that it does.
        """
        check_budget(self.trials, self.ratios[0], budget)
        while self.flops > budget * self.trials.dense_flops:
            options = [key for key in self._candidates if key[1] < self.state[key[0]]]
            if not self._prices:
                self._say(f"trying {len(options)} ratios of blocks")
            for key in options:
                if key not in self._prices:
                    self._price(key)
            best = min(options, key=lambda key: self._prices[key][0])
            if self._prices[best][1] < self._changes:
                self._price(best)
            else:
                self._change({best[0]: best[1]})

    def exchange(self, budget: float) -> bool:
        """Takes more rows of one block into another where that lowers the loss; says whether it did.

        Steps that were right when they were taken may be wrong beside later ones. Every block's next ratio up and all
        its ratios down are tried; of the pairs that promise most, the best is kept if it keeps its promise.
        """
        up: dict[tuple[str, Fraction], float] = {}
        down: dict[tuple[str, Fraction], float] = {}
        for path, ratio in self.state.items():
            higher = [each for each in [*self.ratios, DENSE] if each > ratio]
            up |= {(path, each): self._trial(path, each) for each in higher[:1]}
            down |= {(path, each): self._trial(path, each) for each in self.ratios if each < ratio}
        limit = budget * self.trials.dense_flops
        promises = [(first + second, dict([one, other])) for one, first in up.items() for other, second in down.items()
                    if one[0] != other[0]]
        promises = [each for each in promises if self.trials.flops(self.state | each[1]) <= limit]
        promises.sort(key=lambda each: each[0])
        tried = [(self.trials.loss(self.state | changes), changes) for _, changes in promises[:TRIED]]
        loss, changes = min(tried, key=lambda each: each[0], default=(math.inf, {}))
        if loss >= self.loss * (1 - WORTH):
            return False
        self._change(changes)
        return True

    def fill(self, budget: float) -> None:
        """Gives what is left of the budget to the block where it lowers the loss most."""
        limit = budget * self.trials.dense_flops
        rooms: list[tuple[float, str, int]] = []
        for path, ratio in self.state.items():
            # Of a short sequence two ratios may be the same rows.
            dearer = ((each, cost) for each in [*self.ratios, DENSE] if each > ratio
                      and (cost := self.trials.flops(self.state | {path: each}) - self.flops) > 0)
            if (first := next(dearer, None)) is None:
                continue
            # One row more costs nearly the same everywhere between two ratios: it is counted for the best block alone.
            above, cost = first
            price = cost / (above - ratio)
            steps = min(int((ratio + Fraction(limit - self.flops) / price) / STEP), STEP.denominator - 1)
            if steps * STEP > ratio:
                rooms.append((self._trial(path, steps * STEP), path, steps))
        if not rooms:
            return
        _, path, steps = min(rooms)
        while self.trials.flops(self.state | {path: steps * STEP}) > limit:
            steps -= 1
        if steps * STEP > self.state[path] and self._trial(path, steps * STEP) < self.loss:
            self._change({path: steps * STEP})

    def _trial(self, path: str, ratio: Fraction) -> float:
        return self.trials.loss(self.state | {path: ratio}, path)

    def _price(self, key: tuple[str, Fraction]) -> None:
        saved = self.trials.flops(self.state) - self.trials.flops(self.state | {key[0]: key[1]})
        # In a short sequence the router of a block may cost more than the rows that it saves.
        price = (self._trial(*key) - self.loss) / saved if saved > 0 else math.inf
        self._prices[key] = price, self._changes

    def _change(self, changes: State) -> None:
        self.take(self.state | changes)
        for path, ratio in changes.items():
            self.moves.append(Move(path, ratio, self.loss, self.flops / self.trials.dense_flops))
            self._say(f"{path} to {ratio}: {self.moves[-1].flops:.1%} of the FLOPs, loss {self.loss:.4g}")
