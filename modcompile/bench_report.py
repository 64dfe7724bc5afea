"""What a benchmark found: one variant's figures, and those of variants that were timed side by side."""

__all__ = ["AGAIN", "TITLES", "BenchReport", "Kernel", "Timing"]

import dataclasses
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modcompile.bench_check import SHOWS_LITTLE

if TYPE_CHECKING:
    from rich.console import RenderableType

AGAIN = "dense (again)"
# In the order of the table.
TITLES = {"dense": "dense", AGAIN: AGAIN, "mod": "MoD", "other": "MoD, other attend_to", "oracle": "oracle",
          "pruned": "pruned", "masked": "masked", "compile": "torch.compile"}
_RATIOS = [("dense", "mod"), ("oracle", "mod"), ("pruned", "mod"), ("compile", "mod"), ("compile", "dense"),
           (AGAIN, "dense")]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of the GPU in one run of an engine: how often it runs, and how long all of these take."""

    name: str
    count: float
    total_us: float


@dataclasses.dataclass(frozen=True)
class Timing:
    """One variant's figures.

    Attributes:
        variant: "dense (again)", or one of ``modcompile.bench.VARIANTS``.
        flops: Of one call, counted from the graph.
        times_ms: Each run, in the order of the rounds.
        max_abs_error: How far its outputs are from its model's in PyTorch, at most; ``relative_l2``: on the whole.
        far_rows: The share of rows whose output is further from the model's than the tolerance, see
            ``modcompile.bench_check``; ``torch_far_rows``: of PyTorch's in this precision, where there are any.
        build_s: How long the build took; None for an engine that was there already.
        folder_bytes: The size of the engine's folder; None where there is none.
        device_bytes: What the GPU's memory lost when the engine was loaded and had run once; None on a CPU.
        weight_bytes: The model's weights in this precision; ``activation_bytes``: the rest of ``device_bytes``:
            what a run computes with, its libraries' workspaces, and memory that the runtime keeps for later.
        kernels: Those of one run that take the longest, if they were asked for.
    """

    variant: str
    flops: int
    times_ms: tuple[float, ...]
    max_abs_error: float
    relative_l2: float
    far_rows: float = 0.0
    torch_far_rows: float | None = None
    build_s: float | None = None
    folder_bytes: int | None = None
    device_bytes: int | None = None
    weight_bytes: int | None = None
    activation_bytes: int | None = None
    kernels: tuple[Kernel, ...] = ()

    @property
    def median_ms(self) -> float:
        """The time that half of the runs took at most."""
        return statistics.median(self.times_ms)

    def percentile_ms(self, percent: float) -> float:
        """The time that ``percent`` of the runs took at most."""
        return float(np.percentile(self.times_ms, percent))


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """Variants timed side by side.

    Attributes:
        runtime: The runtime; ``precision``, ``shapes`` and ``options``: what the engines were built with.
        config: The conversion's options.
        capacities: K of each routed block.
        pruned: The blocks that the pruned model lacks.
        routers: Where the routers' weights came from.
        routing: Near ties that the engine decided unlike the model, see ``modcompile.verify``.
        machine: What the figures were taken on; ``load_average``: how many processes wanted a core before it began.
        rounds: How many times each engine ran, after ``warmup`` times that do not count.
        timings: By variant, in the order of the table.
        failed: Variants that were asked for and have no figures, with the reason.
        loaded: Variants whose engine was there already, and was not built with these options now.
    """

    runtime: str
    precision: str
    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any]
    config: dict[str, Any]
    capacities: dict[str, int]
    pruned: tuple[str, ...]
    routers: str
    routing: tuple[str, ...]
    machine: dict[str, Any]
    rounds: int
    warmup: int
    timings: dict[str, Timing]
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    loaded: tuple[str, ...] = ()

    @property
    def ratios(self) -> dict[str, float]:
        """Ratios of medians: how many times as long as the routed engine, or as the dense one, another takes."""
        return {f"{TITLES[a]}/{TITLES[b]}": self.timings[a].median_ms / self.timings[b].median_ms
                for a, b in _RATIOS if a in self.timings and b in self.timings}

    @property
    def routing_us(self) -> float | None:
        """Microseconds that routing costs in each routed block: by how much the routed engine exceeds the oracle."""
        if "oracle" not in self.timings or "mod" not in self.timings or not self.capacities:
            return None
        return (self.timings["mod"].median_ms - self.timings["oracle"].median_ms) * 1e3 / len(self.capacities)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values; it holds no date, and of a path among the options the last part."""
        made = dataclasses.asdict(self)
        made["options"] = {name: _without_folder(value) for name, value in self.options.items()}
        for name, timing in self.timings.items():
            made["timings"][name] |= {"median_ms": timing.median_ms, **{
                f"p{percent}_ms": timing.percentile_ms(percent) for percent in (10, 25, 75, 90)}}
            made["timings"][name]["times_ms"] = [round(value, 4) for value in timing.times_ms]
        return {**made, "ratios": self.ratios, "routing_us_per_block": self.routing_us}

    def __rich__(self) -> "RenderableType":
        from rich.console import Group
        from rich.text import Text

        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.shapes.items())
        machine = self.machine
        place = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
        head = f"{self.runtime} {machine['runtime_version']}, {self.precision}, {shapes}; {place}; {self.rounds} rounds"
        ratios = "   ".join(f"{name} {value:.3f}" for name, value in self.ratios.items())
        return Group(Text(head), self._table(), Text("\n".join([ratios, *self._notes(), *self._kernels()])))

    def _table(self) -> "RenderableType":
        from rich.table import Table

        on_gpu = any(timing.device_bytes is not None for timing in self.timings.values())
        table = Table("", box=None, header_style="bold", pad_edge=False)
        for column in ("GFLOP", "median ms", "p10", "p90", "dense/this", "largest error", "engine MB",
                       *(["GPU MB", "beside weights"] if on_gpu else [])):
            table.add_column(column, justify="right")
        dense = self.timings.get("dense")
        for name, timing in self.timings.items():
            table.add_row(TITLES[name], f"{timing.flops / 1e9:.3g}", f"{timing.median_ms:.4g}",
                          *(f"{timing.percentile_ms(percent):.4g}" for percent in (10, 90)),
                          f"{dense.median_ms / timing.median_ms:.2f}" if dense else "", f"{timing.max_abs_error:.1g}",
                          _megabytes(timing.folder_bytes), *(map(_megabytes, (
                              timing.device_bytes, timing.activation_bytes)) if on_gpu else ()))
        return table

    def _notes(self) -> list[str]:
        counts = ", ".join(map(str, sorted(set(self.capacities.values()))))
        notes = [f"K = {counts} in {len(self.capacities)} routed blocks; routers: {self.routers}", *self.routing]
        notes += [f"{TITLES[name]}: {timing.far_rows:.2%} of the rows are far from the float32 model's; in PyTorch in "
                  f"{self.precision} {timing.torch_far_rows or 0:.2%}"
                  + (": of the engine this shows little, see modcompile verify"
                     if (timing.torch_far_rows or 0) > SHOWS_LITTLE else "")
                  for name, timing in self.timings.items() if timing.far_rows]
        if self.routing_us is not None:
            notes.append(f"routing: {self.routing_us:.0f} us in each routed block")
        if self.pruned:
            notes.append(f"pruned: {', '.join(self.pruned)}")
        notes += [f"{TITLES[name]} failed: {message.partition(chr(10))[0]}" for name, message in self.failed.items()]
        if self.loaded:
            notes.append(f"loaded, not built with these options: {', '.join(TITLES[name] for name in self.loaded)}")
        if self.machine["load_average"] > self.machine["cores"] / 2:
            notes.append(f"the machine was busy: load average {self.machine['load_average']:.1f} before it began")
        return notes

    def _kernels(self) -> list[str]:
        lines = []
        for name, timing in self.timings.items():
            if timing.kernels:
                lines += ["", f"{TITLES[name]}: the kernels of one run that take the longest"]
                lines += [f"{kernel.total_us:10.1f} us {kernel.count:6g} x  {kernel.name[:90]}"
                          for kernel in timing.kernels]
        return lines


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f}"


def _without_folder(value: Any) -> Any:
    """An option as it may be published: the name of a file, not where one machine has it."""
    if isinstance(value, os.PathLike) or (isinstance(value, str) and os.path.isabs(value)):
        return Path(value).name
    return value
