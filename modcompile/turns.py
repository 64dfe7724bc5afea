"""Times callables in turns, on a CPU by the clock, on a GPU by events on the current stream.

On a GPU, runs are queued behind each other, and the host waits for none of them: what the host takes to launch a run is
hidden by the run before, as long as that takes longer. It is the time of the GPU that is measured, and that of the host
where a callable itself waits for the GPU, as ONNX Runtime's engines do, or where the host falls behind, as it does
where no CUDA graph is recorded.
"""

__all__ = ["longest_kernels", "take_turns"]

import contextlib
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from modcompile.bench_report import Kernel

Run = Callable[[], Any]

_PROFILED_RUNS = 5


def take_turns(runs: Mapping[str, Run], device: torch.device, *, rounds: int, warmup: int, seed: int,
               say: Callable[[str], None]) -> dict[str, list[float]]:
    """Milliseconds of every round, by name; each runs once a round, in random order.

    Args:
        runs: What to time.
        device: Where it computes.
        rounds: How many rounds count.
        warmup: How many go before.
        seed: Of the order.
        say: Called with what is being done.
    """
    moment = _event if device.type == "cuda" else time.perf_counter
    pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(seed).shuffle
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for turn in range(-warmup, rounds):
            say(f"round {turn + 1} of {rounds}" if turn >= 0 else "warming up")
            shuffle(order)
            for name in order:
                begin = moment()
                runs[name]()
                end = moment()
                if turn >= 0:
                    pairs[name].append((begin, end))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return {name: [begin.elapsed_time(end) for begin, end in found] for name, found in pairs.items()}
    return {name: [(end - begin) * 1e3 for begin, end in found] for name, found in pairs.items()}


def longest_kernels(run: Run, count: int) -> tuple[Kernel, ...]:
    """The GPU's kernels that take the longest in a run, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_PROFILED_RUNS):
            run()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)[:count]
    return tuple(Kernel(event.key, event.count / _PROFILED_RUNS, event.device_time_total / _PROFILED_RUNS)
                 for event in events)


def _event() -> torch.cuda.Event:
    """The moment when the GPU comes to this place of the stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
