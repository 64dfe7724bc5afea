"""Times a routed engine beside what it is compared with: dense, oracle, pruned to equal FLOPs, and more.

The engines run in one process, taking turns in random order, so that a slow moment of the machine hits all of them. The
dense engine takes part twice, under two names: how far the two are apart is the noise of every other figure.

The engines run where the model's tensors are: on a GPU the inputs lie there too, and times are between two events on
its stream, see ``modcompile.turns``. Engines hand over outputs that are the caller's own, as ``Engine.run`` says, and
the copy counts; ``torch.compile`` hands over what its next run overwrites.
"""

__all__ = ["USUAL", "VARIANTS", "benchmark"]

import contextlib
import copy
import dataclasses
import functools
import operator
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import modcompile
from modcompile.bench_check import Agreement, check, inputs_for
from modcompile.bench_report import AGAIN, TITLES, BenchReport, Timing
from modcompile.compiled import CompiledModel
from modcompile.convert import padding_mask
from modcompile.engine import Engine, build_engine, load_engine, load_options
from modcompile.errors import UsageError
from modcompile.export.flatten import flatten
from modcompile.flops import count_flops
from modcompile.manifest import MANIFEST_NAME
from modcompile.model import GraphModel, MoDModel, device_of
from modcompile.sample_inputs import index_limits, sample_inputs, shapes_with, symbol_sizes
from modcompile.saving import load
from modcompile.turns import longest_kernels, take_turns
from modcompile.variants import (
    dense_model,
    masked_model,
    oracle_model,
    other_attention_model,
    pruned_blocks,
    pruned_model,
)

# "other" is the routed model with the other attend_to, "masked" the one that computes every row and keeps the chosen,
# "compile" the dense model under torch.compile.
VARIANTS = ("dense", "mod", "oracle", "pruned", "other", "masked", "compile")
USUAL = ("dense", "mod", "oracle", "pruned")
# Without these two there is nothing to compare. The routed one goes first: if it is wrong, nothing else is worth it.
_NEEDED = ("mod", "dense")
_ROUTED = ("mod", "other", "masked")


def benchmark(mod: MoDModel | str | os.PathLike, *, runtime: str = "ort",
              shapes: Mapping[str, Sequence[int]] | None = None, precision: str = "fp32",
              variants: Sequence[str] = USUAL, runs: int = 30, warmup: int = 3, seed: int = 0,
              inputs: Mapping[str, np.ndarray] | None = None,
              options: Mapping[str, Any] | None = None, folder: str | os.PathLike | None = None,
              keep_going: bool = False, limit_s: float | None = None, profile: int = 0,
              progress: Callable[[str], None] | None = None) -> BenchReport:
    """Builds an engine of each variant at static shapes, checks every one against its model, and times them in turns.

    Inputs that are not given are random, masks among them hide nothing. Where all router weights are zero, as a
    conversion leaves them, every logit ties: routers of random weights take their places, on a copy, and the report
    says so.

    Args:
        mod: A routed model, or the folder of a saved one. The engines run on the device that it is on.
        runtime: As for ``build_engine``.
        shapes: Shapes by input name; they fix the size of every symbol.
        precision: "fp32", "fp16" or "bf16".
        variants: What to time: some of ``VARIANTS``. After the routed and the dense one they are built in this order.
        runs: How many times each engine runs.
        warmup: How many times it runs before that.
        seed: Of random inputs, random routers and the order of turns.
        inputs: Some inputs by name, or all. They move no time, but rounding moves a pretrained model less on text than
            on random words. All rows are compared: a mask must hide none.
        options: Of ``build_engine``, the same for all. On a GPU the runtime's own engines for it are the default, see
            ``device_options``; the report has all of them.
        folder: Where the engines go, one folder each; by default they are temporary. One that is there already is
            loaded, and checked like a new one.
        keep_going: A variant other than the routed and the dense one that cannot be built, or is wrong, is reported
            among those that failed, and the others are timed.
        limit_s: After so many seconds no further engine is built; what is left out is reported.
        profile: How many of each engine's longest kernels to report; on a GPU alone.
        progress: Called with what is being done.

    Raises:
        UsageError: Shapes that leave a size open, or an option that does not fit.
        ParityError: An engine differs from its model: nothing is timed.

    Example:
        >>> benchmark(mod, shapes={"input_ids": (8, 256)}).ratios["oracle/MoD"]  # doctest: +SKIP
        0.97
    """
    start_s, say = time.perf_counter(), progress or (lambda text: None)
    _check_counts(variants, runs, warmup)
    if not isinstance(mod, MoDModel | str | os.PathLike):
        raise UsageError("what is timed is a routed model beside what is made of it", where="benchmark",
                         expected="a MoDModel, or its folder", found=type(mod).__name__,
                         fix="convert or calibrate the model first")
    mod = mod if isinstance(mod, MoDModel) else load(mod)
    device = device_of(mod)
    if profile and device.type != "cuda":
        raise UsageError("only a GPU's kernels can be listed", expected="a model on a GPU", found=f"one on {device}",
                         where="benchmark, argument profile", fix="leave it out, or move the model to a GPU")
    machine = _machine(device)
    mod, routers = _with_routers(mod, seed)
    inputs, sizes = _inputs(mod, shapes or {}, inputs or {}, seed)
    say("counting FLOPs")
    dropped = pruned_blocks(mod, sizes) if "pruned" in variants else []
    given = {**device_options(runtime, device), **(options or {})}
    with contextlib.ExitStack() as stack:
        home = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        workshop = _Workshop(mod, tuple(dropped), runtime, precision, inputs, sizes, device, given, home, say)
        entries, failed = _enter(workshop, variants, keep_going, start_s, limit_s)
        for entry in entries.values():
            stack.enter_context(entry.engine)
        calls = {name: functools.partial(entry.engine.run, inputs_for(entry.engine, inputs, device))
                 for name, entry in entries.items()}
        times = take_turns(calls, device, rounds=runs, warmup=warmup, seed=seed, say=say)
        kernels = {name: longest_kernels(call, profile) for name, call in calls.items() if profile}
        some = next((entry.engine for name, entry in entries.items() if name != "compile"), None)
        machine["runtime_version"] = some.manifest.runtime_version if some else torch.__version__
    timings = {name: entries[name].timing(name, times[name], kernels.get(name, ()))
               for name in TITLES if name in entries}
    return BenchReport(
        runtime=runtime, precision=precision, shapes={name: value.shape for name, value in inputs.items()},
        options=given, config=mod.config.model_dump(mode="json"),
        capacities={block.path: block.at(sizes).capacity or 0 for block in mod.routed_blocks}, pruned=tuple(dropped),
        routers=routers, routing=tuple(item for entry in entries.values() for item in entry.agreement.routing),
        machine=machine, rounds=runs, warmup=warmup, timings=timings, failed=failed,
        loaded=tuple(name for name, timing in timings.items() if timing.build_s is None))


def device_options(runtime: str, device: torch.device) -> dict[str, Any]:
    """Options of ``build_engine`` that make the fastest engine for a GPU; none for a CPU.

    Example:
        >>> device_options("aoti", torch.device("cuda", 0))
        {'device': 'cuda:0'}
    """
    if device.type != "cuda":
        return {}
    if runtime == "ort":
        cuda = ("CUDAExecutionProvider", {"device_id": device.index}) if device.index else "CUDAExecutionProvider"
        return {"providers": [cuda, "CPUExecutionProvider"], "cuda_graph": True}
    if runtime == "aoti":
        # It records a CUDA graph wherever it can.
        return {"device": str(device)}
    return load_options(runtime, {"cuda_graph": True})


def _check_counts(variants: Sequence[str], runs: int, warmup: int) -> None:
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown or not variants or min(runs, warmup) < 0 or runs < 1:
        raise UsageError("variants or runs do not fit", expected=f"some of {', '.join(VARIANTS)}, and runs >= 1",
                         found=f"variants {list(variants)}, runs {runs}, warmup {warmup}", where="benchmark")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A variant that is ready to be timed."""

    engine: Engine
    flops: int
    agreement: Agreement
    build_s: float | None
    folder_bytes: int | None
    device_bytes: int | None
    weight_bytes: int

    def timing(self, variant: str, times_ms: Sequence[float], kernels: tuple) -> Timing:
        activations = None if self.device_bytes is None else self.device_bytes - self.weight_bytes
        return Timing(variant, self.flops, tuple(times_ms), self.agreement.max_abs_error, self.agreement.relative_l2,
                      self.agreement.far_rows, self.agreement.torch_far_rows, self.build_s, self.folder_bytes,
                      self.device_bytes, self.weight_bytes, activations, kernels)


@dataclasses.dataclass(frozen=True)
class _Workshop:
    """Makes the variants, each with its model, at one size and with one set of options."""

    mod: MoDModel
    dropped: tuple[str, ...]
    runtime: str
    precision: str
    inputs: dict[str, np.ndarray]
    sizes: dict[str, int]
    device: torch.device
    options: dict[str, Any]
    home: Path
    say: Callable[[str], None]

    def make(self, variant: str) -> _Entry:
        """Builds, or loads, an engine and checks it."""
        model = self._model(variant)
        start_s = time.perf_counter()
        loaded = variant != "compile" and (self.home / variant / MANIFEST_NAME).exists()
        self.say(f"{'loading' if loaded else 'building'} the {TITLES[variant]} engine")
        folder = self.home / variant
        folder_bytes: int | None = None
        device_bytes: int | None = None
        if variant == "compile":
            engine: Engine = CompiledModel(model, self.precision, self._shapes())
        elif loaded:
            engine = self._load(folder)
        else:
            engine = build_engine(model, folder, runtime=self.runtime, precision=self.precision, shapes=self._shapes(),
                                  **self.options)
        build_s = None if loaded else time.perf_counter() - start_s
        if isinstance(engine, CompiledModel):
            if engine.activation_bytes is not None:
                device_bytes = engine.weight_bytes + engine.activation_bytes
        else:
            if self.device.type == "cuda":
                # Once more, so that what the build left behind does not count.
                engine.close()
                engine, device_bytes = self._weighed(folder)
            folder_bytes = sum(path.stat().st_size for path in engine.folder.rglob("*") if path.is_file())
        try:
            self.say(f"checking the {TITLES[variant]} engine")
            agreement = check(model, engine, self.inputs, routed=variant in _ROUTED, options=self.options)
            return _Entry(engine, count_flops(model, self.sizes), agreement, build_s, folder_bytes, device_bytes,
                          self._weight_bytes(model))
        except BaseException:
            engine.close()
            raise

    def _model(self, variant: str) -> GraphModel:
        make: dict[str, Callable[[], GraphModel]] = {
            "dense": lambda: dense_model(self.mod), "mod": lambda: self.mod,
            # The faster form: AOTInductor, and ONNX Runtime's custom ops, merge in place.
            "oracle": lambda: oracle_model(
                self.mod, merge=self.runtime == "aoti" or bool(self.options.get("custom_ops"))),
            "pruned": lambda: pruned_model(self.mod, self.dropped), "masked": lambda: masked_model(self.mod),
            "other": lambda: other_attention_model(self.mod), "compile": lambda: dense_model(self.mod)}
        return make[variant]()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: value.shape for name, value in self.inputs.items()}

    def _weight_bytes(self, model: GraphModel) -> int:
        # Of what the graph uses: a model without some blocks has their weights still.
        flat, half = flatten(model), self.precision != "fp32"
        read = (operator.attrgetter(node.target)(flat) for node in flat.graph.find_nodes(op="get_attr"))
        used = {id(tensor): tensor for tensor in read}
        return sum(tensor.numel() * (2 if half and tensor.is_floating_point() else tensor.itemsize)
                   for tensor in used.values())

    def _load(self, folder: Path) -> Engine:
        engine = load_engine(folder, **load_options(self.runtime, self.options))
        if (engine.runtime, engine.manifest.precision) != (self.runtime, self.precision):
            engine.close()
            raise UsageError("the engine that is there is of another kind", where=folder,
                             expected=f"{self.runtime}, {self.precision}",
                             found=f"{engine.runtime}, {engine.manifest.precision}",
                             fix="name another folder, or remove this one")
        return engine

    def _weighed(self, folder: Path) -> tuple[Engine, int]:
        """The engine, opened again, and how much of the GPU's memory it then takes."""
        before = self._free_bytes()
        engine = self._load(folder)
        engine.run(inputs_for(engine, self.inputs, self.device))
        return engine, before - self._free_bytes()

    def _free_bytes(self) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]


def _enter(workshop: _Workshop, variants: Sequence[str], keep_going: bool, start_s: float, limit_s: float | None,
           ) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Makes the variants, and gives the reason for each that could not be made."""
    asked = dict.fromkeys(variants)
    entries: dict[str, _Entry] = {}
    failed: dict[str, str] = {}
    try:
        for variant in sorted(asked, key=lambda name: _NEEDED.index(name) if name in _NEEDED else len(_NEEDED)):
            if entries and limit_s is not None and time.perf_counter() - start_s > limit_s:
                failed[variant] = f"not built: {limit_s:g} s had passed"
                continue
            try:
                entries[variant] = workshop.make(variant)
            except Exception as error:
                if not keep_going or variant in _NEEDED:
                    raise
                failed[variant] = str(error).strip() or type(error).__name__
    except BaseException:
        for entry in entries.values():
            entry.engine.close()
        raise
    if "dense" in entries:
        entries[AGAIN] = entries["dense"]
    return entries, failed


def _with_routers(mod: MoDModel, seed: int) -> tuple[MoDModel, str]:
    """The model, or a copy on the same weights whose routers tell rows apart."""
    scoring = {path: router for path, router in mod.routers.items() if hasattr(router, "weight")}
    if not scoring or any(router.weight.any() for router in scoring.values()):
        return mod, "as they are in the model"
    # What is in the memo already is shared, not copied; routers are made anew.
    made = copy.deepcopy(mod, {id(tensor): tensor for tensor in mod.tensors().values()})
    generator = torch.Generator().manual_seed(seed)
    for path in scoring:
        router = made.routers[path]
        with torch.no_grad():
            noise = torch.randn(router.weight.shape, generator=generator) * router.weight.shape[1] ** -0.5
            router.weight.copy_(noise)
    return made, "random, on a copy: in the model all weights are zero"


def _inputs(mod: MoDModel, shapes: Mapping[str, Sequence[int]], given: Mapping[str, np.ndarray], seed: int,
            ) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Every input, at random but for those that are given, with all rows valid; and the size of each symbol."""
    sizes = symbol_sizes(mod.inputs, shapes_with(shapes, given))
    left = {dim for spec in mod.inputs for dim in spec.shape if isinstance(dim, str)} - sizes.keys()
    if left:
        raise UsageError("a benchmark needs the size of every dim", expected=mod.interface.summary(),
                         found=f"no size for {', '.join(sorted(left))}", where="benchmark, argument shapes",
                         fix=f'for example shapes={{"{mod.inputs[0].name}": (8, 256)}}')
    return sample_inputs(mod.inputs, shapes, limits=index_limits(mod), seed=seed,
                         padding_mask=padding_mask(mod, mod.config), given=given), sizes


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
