"""Times a routed engine beside what it is compared with: dense, oracle, pruned to equal FLOPs, and more.

The engines run in one process, taking turns in random order, so that a slow moment of the machine hits all of them. The
dense engine takes part twice, under two names: how far the two are apart is the noise of every other figure.

The engines run where the model's tensors are: on a GPU the inputs lie there too, and times are between two events on
its stream.
"""

__all__ = ["VARIANTS", "BenchReport", "Timing", "benchmark"]

import contextlib
import copy
import dataclasses
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import modcompile
from modcompile.convert import padding_mask
from modcompile.engine import Engine, build_engine, load_engine, load_options
from modcompile.errors import UsageError
from modcompile.flops import count_flops
from modcompile.model import GraphModel, MoDModel
from modcompile.sample_inputs import index_limits, sample_inputs, symbol_sizes
from modcompile.saving import load
from modcompile.variants import (
    dense_model,
    masked_model,
    oracle_model,
    other_attention_model,
    pruned_blocks,
    pruned_model,
)
from modcompile.verify import VerifyReport, verify

if TYPE_CHECKING:
    from rich.console import RenderableType

# "other" is the routed model with the other attend_to, "masked" the one that computes every row and keeps the chosen.
VARIANTS = ("dense", "mod", "other", "oracle", "pruned", "masked")
USUAL = ("dense", "mod", "oracle", "pruned")
AGAIN = "dense (again)"
TITLES = {"dense": "dense", AGAIN: AGAIN, "mod": "MoD", "other": "MoD, other attend_to", "oracle": "oracle",
          "pruned": "pruned", "masked": "masked"}


@dataclasses.dataclass(frozen=True)
class Timing:
    """One engine's figures.

    Attributes:
        variant: "dense (again)", or one of ``VARIANTS``.
        flops: Of one call, counted from the graph.
        times_ms: Each run, in the order of the rounds.
        max_abs_error: How far its outputs are from its model's in PyTorch, at most; ``relative_l2``: on the whole.
        folder_bytes: The size of the engine's folder.
        device_bytes: What the GPU's memory lost when the engine was loaded and had run once; None on a CPU.
    """

    variant: str
    flops: int
    times_ms: tuple[float, ...]
    max_abs_error: float
    relative_l2: float
    folder_bytes: int
    device_bytes: int | None

    @property
    def median_ms(self) -> float:
        """The time that half of the runs took at most."""
        return statistics.median(self.times_ms)

    def percentile_ms(self, percent: float) -> float:
        """The time that ``percent`` of the runs took at most."""
        return float(np.percentile(self.times_ms, percent))


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """Engines timed side by side.

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

    @property
    def ratios(self) -> dict[str, float]:
        """Ratios of medians: how many times as long as the routed engine, or as the dense one, another takes."""
        pairs = [("dense", "mod"), ("oracle", "mod"), ("pruned", "mod"), (AGAIN, "dense")]
        return {f"{TITLES[a]}/{TITLES[b]}": self.timings[a].median_ms / self.timings[b].median_ms
                for a, b in pairs if a in self.timings and b in self.timings}

    @property
    def routing_us(self) -> float | None:
        """Microseconds that routing costs in each routed block: by how much the routed engine exceeds the oracle."""
        if "oracle" not in self.timings or "mod" not in self.timings or not self.capacities:
            return None
        return (self.timings["mod"].median_ms - self.timings["oracle"].median_ms) * 1e3 / len(self.capacities)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values; it holds no date and no path of this machine."""
        made = dataclasses.asdict(self)
        for name, timing in self.timings.items():
            made["timings"][name] |= {"median_ms": timing.median_ms, **{
                f"p{percent}_ms": timing.percentile_ms(percent) for percent in (10, 25, 75, 90)}}
            made["timings"][name]["times_ms"] = [round(value, 4) for value in timing.times_ms]
        return {**made, "ratios": self.ratios, "routing_us_per_block": self.routing_us}

    def __rich__(self) -> "RenderableType":
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("", box=None, header_style="bold", pad_edge=False)
        on_gpu = any(timing.device_bytes is not None for timing in self.timings.values())
        for column in ("GFLOP", "median ms", "p10", "p90", "dense/this", "largest error",
                       *(["GPU MB"] if on_gpu else [])):
            table.add_column(column, justify="right")
        dense = self.timings.get("dense")
        for name, timing in self.timings.items():
            table.add_row(TITLES[name], f"{timing.flops / 1e9:.3g}", f"{timing.median_ms:.4g}",
                          *(f"{timing.percentile_ms(percent):.4g}" for percent in (10, 90)),
                          f"{dense.median_ms / timing.median_ms:.2f}" if dense else "", f"{timing.max_abs_error:.1g}",
                          *([f"{timing.device_bytes / 1e6:.0f}"] if timing.device_bytes is not None else []))
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.shapes.items())
        machine = self.machine
        place = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
        head = f"{self.runtime} {machine['runtime_version']}, {self.precision}, {shapes}; {place}; {self.rounds} rounds"
        ratios = "   ".join(f"{name} {value:.3f}" for name, value in self.ratios.items())
        return Group(Text(head), table, Text("\n".join([ratios, *self._notes()])))

    def _notes(self) -> list[str]:
        counts = ", ".join(map(str, sorted(set(self.capacities.values()))))
        notes = [f"K = {counts} in {len(self.capacities)} routed blocks; routers: {self.routers}", *self.routing]
        if self.routing_us is not None:
            notes.append(f"routing: {self.routing_us:.0f} us in each routed block")
        if self.pruned:
            notes.append(f"pruned: {', '.join(self.pruned)}")
        if self.machine["load_average"] > self.machine["cores"] / 2:
            notes.append(f"the machine was busy: load average {self.machine['load_average']:.1f} before it began")
        return notes


def benchmark(mod: MoDModel | str | os.PathLike, *, runtime: str = "ort",
              shapes: Mapping[str, Sequence[int]] | None = None, precision: str = "fp32",
              variants: Sequence[str] = USUAL, runs: int = 30, warmup: int = 3, seed: int = 0,
              options: Mapping[str, Any] | None = None, folder: str | os.PathLike | None = None,
              progress: Callable[[str], None] | None = None) -> BenchReport:
    """Builds an engine of each variant at static shapes, checks every one against its model, and times them in turns.

    Inputs are random, masks hide nothing. Where all router weights are zero, as a conversion leaves them, every logit
    ties: routers of random weights take their places, on a copy, and the report says so.

    Args:
        mod: A routed model, or the folder of a saved one. The engines run on the device that it is on.
        runtime: As for ``build_engine``.
        shapes: Shapes by input name; they fix the size of every symbol.
        precision: "fp32", "fp16" or "bf16".
        variants: What to time: some of ``VARIANTS``.
        runs: How many times each engine runs.
        warmup: How many times it runs before that.
        seed: Of inputs, random routers and the order of turns.
        options: Of ``build_engine``, the same for all.
        folder: Where the engines go, one folder each, which must not exist; by default they are temporary.
        progress: Called with what is being done.

    Raises:
        UsageError: Shapes that leave a size open, or an option that does not fit.
        ParityError: An engine differs from its model: nothing is timed.

    Example:
        >>> benchmark(mod, shapes={"input_ids": (8, 256)}).ratios["oracle/MoD"]  # doctest: +SKIP
        0.97
    """
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown or not variants or min(runs, warmup) < 0 or runs < 1:
        raise UsageError("variants or runs do not fit", expected=f"some of {', '.join(VARIANTS)}, and runs >= 1",
                         found=f"variants {list(variants)}, runs {runs}, warmup {warmup}", where="benchmark")
    say = progress or (lambda text: None)
    mod = mod if isinstance(mod, MoDModel) else load(mod)
    device = next((tensor.device for tensor in mod.tensors().values()), torch.device("cpu"))
    machine = _machine(device)
    mod, routers = _with_routers(mod, seed)
    inputs, sizes = _inputs(mod, shapes or {}, seed)
    say("counting FLOPs")
    dropped = pruned_blocks(mod, sizes) if "pruned" in variants else []
    make: dict[str, Callable[[], GraphModel]] = {
        "dense": lambda: dense_model(mod), "mod": lambda: mod, "oracle": lambda: oracle_model(mod),
        "pruned": lambda: pruned_model(mod, dropped), "masked": lambda: masked_model(mod),
        "other": lambda: other_attention_model(mod)}
    with contextlib.ExitStack() as stack:
        home = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        engines: dict[str, Engine] = {}
        flops: dict[str, int] = {}
        checks: dict[str, VerifyReport] = {}
        device_bytes: dict[str, int | None] = {}
        # The routed one first: if it is wrong, nothing else is worth building.
        for name in sorted(set(variants), key=lambda name: (name != "mod", VARIANTS.index(name))):
            model = make[name]()
            say(f"building the {TITLES[name]} engine")
            engine = build_engine(model, home / name, runtime=runtime, precision=precision, shapes={
                key: value.shape for key, value in inputs.items()}, **(options or {}))
            if device.type == "cuda":
                # Once more, so that what the build left behind does not count.
                engine.close()
                engine, device_bytes[name] = _reloaded(home / name, engine.runtime, inputs, device, options or {})
            engines[name] = stack.enter_context(engine)
            say(f"checking the {TITLES[name]} engine")
            checks[name] = verify(model, engine, inputs, options=options)
            flops[name] = count_flops(model, sizes)
        if "dense" in engines:
            engines[AGAIN], device_bytes[AGAIN] = engines["dense"], device_bytes.get("dense")
            flops[AGAIN], checks[AGAIN] = flops["dense"], checks["dense"]
        times = _take_turns(engines, _on_device(inputs, device), runs, warmup, seed, say)
        some = next(iter(engines.values()))
        machine["runtime_version"] = some.manifest.runtime_version
        folder_bytes = {name: sum(path.stat().st_size for path in engine.folder.rglob("*") if path.is_file())
                        for name, engine in engines.items()}
    timings = {name: Timing(name, flops[name], tuple(times[name]),
                            max(item.max_abs_error for item in checks[name].outputs),
                            max(item.relative_l2 for item in checks[name].outputs),
                            folder_bytes[name], device_bytes.get(name))
               for name in TITLES if name in engines}
    return BenchReport(
        runtime=runtime, precision=precision, shapes={name: value.shape for name, value in inputs.items()},
        options=dict(options or {}), config=mod.config.model_dump(mode="json"),
        capacities={block.path: block.at(sizes).capacity or 0 for block in mod.routed_blocks}, pruned=tuple(dropped),
        routers=routers, routing=tuple(str(item) for check in checks.values() for item in check.routing),
        machine=machine, rounds=runs, warmup=warmup, timings=timings)


def _with_routers(mod: MoDModel, seed: int) -> tuple[MoDModel, str]:
    """The model, or a copy on the same weights whose routers tell rows apart."""
    if any(router.weight.any() for router in mod.routers.values()):
        return mod, "as they are in the model"
    # What is in the memo already is shared, not copied; routers are made anew.
    made = copy.deepcopy(mod, {id(tensor): tensor for tensor in mod.tensors().values()})
    generator = torch.Generator().manual_seed(seed)
    for router in made.routers.values():
        with torch.no_grad():
            noise = torch.randn(router.weight.shape, generator=generator) * router.weight.shape[1] ** -0.5
            router.weight.copy_(noise)
    return made, "random, on a copy: in the model all weights are zero"


def _inputs(mod: MoDModel, shapes: Mapping[str, Sequence[int]], seed: int,
            ) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Random inputs in which every row is valid, and the size of each symbol."""
    sizes = symbol_sizes(mod.inputs, shapes)
    left = {dim for spec in mod.inputs for dim in spec.shape if isinstance(dim, str)} - sizes.keys()
    if left:
        raise UsageError("a benchmark needs the size of every dim", expected=mod.interface.summary(),
                         found=f"no size for {', '.join(sorted(left))}", where="benchmark, argument shapes",
                         fix=f'for example shapes={{"{mod.inputs[0].name}": (8, 256)}}')
    return sample_inputs(mod.inputs, shapes, limits=index_limits(mod), seed=seed,
                         padding_mask=padding_mask(mod, mod.config)), sizes


def _on_device(inputs: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return dict(inputs)
    return {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}


def _reloaded(folder: Path, runtime: str, inputs: Mapping[str, np.ndarray], device: torch.device,
              options: Mapping[str, Any]) -> tuple[Engine, int]:
    """The engine, opened again, and how much of the GPU's memory it then takes."""
    def free_bytes() -> int:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]

    given = _on_device(inputs, device)
    before = free_bytes()
    engine = load_engine(folder, **load_options(runtime, options))
    results = engine.run(given)
    torch.cuda.synchronize(device)
    del results
    return engine, before - free_bytes()


def _take_turns(engines: Mapping[str, Engine], inputs: Mapping[str, Any], runs: int, warmup: int, seed: int,
                say: Callable[[str], None]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in engines}
    order = list(engines)
    shuffle = random.Random(seed).shuffle
    measure = _event_ms if any(isinstance(value, torch.Tensor) for value in inputs.values()) else _wall_ms
    for turn in range(-warmup, runs):
        say(f"round {turn + 1} of {runs}" if turn >= 0 else "warming up")
        shuffle(order)
        for name in order:
            taken_ms = measure(engines[name], inputs)
            if turn >= 0:
                times[name].append(taken_ms)
    return times


def _wall_ms(engine: Engine, inputs: Mapping[str, Any]) -> float:
    start_s = time.perf_counter()
    engine.run(inputs)
    return (time.perf_counter() - start_s) * 1e3


def _event_ms(engine: Engine, inputs: Mapping[str, Any]) -> float:
    """From the moment the GPU could begin to the moment it is done: what the host takes to launch counts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    engine.run(inputs)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _machine(device: torch.device) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"gpu": gpu, "cpu": _cpu(), "cores": cores, "load_average": round(load, 2),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(), "modcompile": modcompile.__version__, "torch": torch.__version__}


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
