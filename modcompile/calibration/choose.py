"""Which blocks to route and how far, for a budget: by measured loss per FLOP saved."""

__all__ = ["Move", "search"]

import dataclasses
import heapq
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from modcompile.calibration.trials import DENSE, DROPPED, State, Trials
from modcompile.errors import UsageError

# What is left of the budget at the end goes to the last block, in steps of this share of its rows.
STEP = Fraction(1, 64)


@dataclasses.dataclass(frozen=True)
class Move:
    """One step of a search: a block gets a smaller ratio.

    Attributes:
        path: The block; ``ratio``: the ratio it gets.
        loss: The loss after it.
        flops: FLOPs after it, as a share of the dense model's.
    """

    path: str
    ratio: Fraction
    loss: float
    flops: float


def search(trials: Trials, ratios: Sequence[Fraction], budget: float, say: Callable[[str], None] = lambda text: None
           ) -> tuple[State, list[Move]]:
    """The ratio of each block, so that the model's FLOPs are at most ``budget`` of the dense model's.

    Greedy: of all moves that give a block a smaller ratio, the one with the least loss for each FLOP saved is taken
    until the budget is met. A move's price is measured again, with the moves taken before it, when it comes to the top;
    prices rarely fall as more blocks are routed, so the others keep their old ones till then. That is a few trials for
    each move instead of one for each candidate.

    Args:
        trials: The model.
        ratios: What a block may get; with ``DROPPED`` alone, the result is a pruned model.
        budget: A share of the dense model's FLOPs.
        say: Told of progress.

    Returns:
        The ratios, and the moves in the order they were taken.

    Raises:
        UsageError: A budget that the smallest ratio in every block does not meet, with the lowest that it does.
    """
    lowest = trials.flops(dict.fromkeys(trials.paths, min(ratios))) / trials.dense_flops
    if budget < lowest:
        least = f"{math.ceil(lowest * 1e4) / 1e4}: {min(ratios)} of the rows in each of {len(trials.paths)} blocks"
        raise UsageError("the budget cannot be met", expected=f"at least {least}", found=budget, where="budget",
                         fix="a higher budget, smaller ratios or more blocks")
    state: State = dict.fromkeys(trials.paths, DENSE)
    loss, flops, target = trials.loss(state), trials.dense_flops, budget * trials.dense_flops
    moves: list[Move] = []
    # By price; with each, what it was measured after: the number of moves, and the loss.
    queue: list[tuple[float, int, Fraction, int, float]] = []

    def push(index: int, ratio: Fraction) -> None:
        path = trials.paths[index]
        trial = state | {path: ratio}
        saved = flops - trials.flops(trial)
        # In a short sequence the router of a block may cost more than the rows that it saves.
        if saved > 0:
            made = trials.loss(trial, path)
            heapq.heappush(queue, ((made - loss) / saved, index, ratio, len(moves), made))

    for index, path in enumerate(trials.paths):
        say(f"trying {path}")
        for ratio in ratios:
            push(index, ratio)
    while flops > target:
        _, index, ratio, age, made = heapq.heappop(queue)
        path = trials.paths[index]
        if ratio >= state[path]:
            continue
        if age < len(moves):
            push(index, ratio)
            continue
        state[path] = ratio
        loss, flops = made, trials.flops(state)
        moves.append(Move(path, ratio, loss, flops / trials.dense_flops))
        say(f"{path} to {ratio}: {moves[-1].flops:.1%} of the FLOPs, loss {loss:.4f}")
    if moves and moves[-1].ratio > DROPPED:
        moves[-1] = _use_up(trials, state, moves[-1], target)
    return state, moves


def _use_up(trials: Trials, state: State, last: Move, target: float) -> Move:
    """Gives the last block as many rows as the budget leaves it: between two steps, its FLOPs are nearly a line."""
    def flops(step: int) -> int:
        return trials.flops(state | {last.path: step * STEP})

    low, high = int(last.ratio / STEP), STEP.denominator
    while high - low > 1:
        below, above = flops(low), flops(high)
        guess = low + int((high - low) * (target - below) / max(1, above - below))
        middle = min(max(guess, low + 1), high - 1)
        if flops(middle) <= target:
            low = middle
        else:
            high = middle
    state[last.path] = max(last.ratio, low * STEP)
    return Move(last.path, state[last.path], trials.loss(state, last.path), trials.flops(state) / trials.dense_flops)
