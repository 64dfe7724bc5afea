"""Times AOTInductor engines of a GPT-2 shape beside ``torch.compile``: dense, MoD, oracle and pruned, interleaved.

    python tests/runtimes/aoti/bench_aoti.py -o aoti.json                     8 x 1024 tokens, GPT-2-medium, fp16
    python tests/runtimes/aoti/bench_aoti.py --sizes 1x1024 --engines /tmp/e  another size; engines stay for a next call
    python tests/runtimes/aoti/bench_aoti.py --variants dense,mod --profile 8

Weights and inputs are random. The dense engine is timed twice, under two names: how far the two are apart is the noise
of every other figure. All engines are built in one process: kernels that were tuned for one serve the next.
"""

import argparse
import copy
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import modcompile as mc
from modcompile.engine import build_engine, load_engine
from modcompile.flops import count_flops
from modcompile.model import GraphModel, MoDModel
from modcompile.variants import dense_model, oracle_model, pruned_blocks, pruned_model

COMPILE = "torch.compile"
AGAIN = "dense (again)"
# In the order in which they are built: what a limit of time leaves out is of the least use.
VARIANTS = ("dense", "mod", "oracle", "compile", "pruned")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", default="8x1024", help="batch and rows, several separated by commas")
    add("--variants", default=",".join(VARIANTS), help="what to time")
    add("--layers", type=int, default=24)
    add("--width", type=int, default=1024)
    add("--heads", type=int, default=16)
    add("--vocabulary", type=int, default=50257)
    add("--precision", default="fp16", choices=["fp32", "fp16", "bf16"])
    add("--capacity-ratio", type=float, default=0.125)
    add("--capacity-multiple", type=int, default=1)
    add("--attend-to", default="chosen", choices=["chosen", "all"])
    add("--gate", default="raw")
    add("--device", default="cuda")
    add("--no-autotune", action="store_true", help="compile with the first kernels that come to mind")
    add("--rounds", type=int, default=50)
    add("--warmup", type=int, default=5)
    add("--limit-s", type=float, default=200, help="no build begins later than this after the start")
    add("--engines", type=Path, help="a folder to keep engines in; those that are there are loaded")
    add("--profile", type=int, default=0, help="print this many of each variant's kernels, those that take the longest")
    add("--output", "-o", type=Path, help="a JSON file for the figures")
    return parser.parse_args()


def main() -> None:
    """Builds, checks and times, one size after another."""
    given, start_s = options(), time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start_s:6.1f} s] {text}", file=sys.stderr, flush=True)

    wanted = given.variants.split(",")
    if unknown := set(wanted) - set(VARIANTS):
        raise SystemExit(f"no such variants: {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    say("making the model")
    source = model_of(given)
    rows = max(int(size.split("x")[1]) for size in given.sizes.split(","))
    say("converting it")
    config = mc.MoDConfig(capacity_ratio=given.capacity_ratio, capacity_multiple=given.capacity_multiple,
                          attend_to=given.attend_to, gate=given.gate)
    mod = mc.convert(source, {"input_ids": torch.zeros(2, min(rows, 64), dtype=torch.long)}, config)
    randomise(mod)
    reports = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in given.sizes.split(","):
            batch, rows = map(int, size.split("x"))
            ids = torch.randint(given.vocabulary, (batch, rows), generator=torch.Generator().manual_seed(1))
            runs, facts = prepare(given, wanted, source, mod, ids, given.engines or Path(scratch),
                                  say, lambda: time.perf_counter() - start_s > given.limit_s)
            say(f"timing {size}")
            times = take_turns(runs, given.rounds, given.warmup, given.device)
            reports.append(report(size, times, facts, mod))
            print(table(reports[-1]))
            for name, run in runs.items() if given.profile and given.device != "cpu" else ():
                print(f"\n{name}\n{kernels(run, given.profile)}")
    say("done")
    if given.output:
        machine = {"device": torch.cuda.get_device_name() if given.device != "cpu" else "cpu",
                   "torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__}
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
        given.output.write_text(json.dumps({"machine": machine, "options": arguments, "sizes": reports}, indent=1))


def model_of(given: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    rows = max(int(size.split("x")[1]) for size in given.sizes.split(","))
    config = transformers.GPT2Config(
        n_layer=given.layers, n_embd=given.width, n_head=given.heads, vocab_size=given.vocabulary,
        n_positions=max(rows, 1024), use_cache=False, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2Model(config).eval()


def randomise(mod: MoDModel) -> None:
    """Gives every router random weights: as a conversion leaves them, all logits tie."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for router in mod.routers.values():
            noise = torch.randn(router.weight.shape, generator=generator)
            router.weight.copy_(noise * router.weight.shape[1] ** -0.5)


def prepare(given: argparse.Namespace, wanted: list[str], source: nn.Module, mod: MoDModel, ids: Tensor, home: Path,
            say: Callable[[str], None], late: Callable[[], bool]
            ) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
    """What to time, by name, and what is known of it."""
    sizes = dict(zip(mod.inputs[0].shape, ids.shape, strict=True))
    makers: dict[str, Callable[[], GraphModel]] = {
        "dense": lambda: dense_model(mod), "mod": lambda: mod, "oracle": lambda: oracle_model(mod),
        "pruned": lambda: pruned_model(mod, pruned_blocks(mod, sizes))}
    on_device = {"input_ids": ids.to(given.device)}
    runs: dict[str, Callable[[], Any]] = {}
    facts: dict[str, dict[str, Any]] = {}
    outputs: dict[str, Tensor] = {}
    for name in (variant for variant in VARIANTS if variant in wanted):
        begun_s = time.perf_counter()
        if name == "compile":
            if late():
                say(f"no time is left for {COMPILE}")
                continue
            say(f"compiling with {COMPILE}")
            runs[COMPILE] = compiled(given, source, on_device["input_ids"])
            outputs[COMPILE] = runs[COMPILE]().float().clone()
            facts[COMPILE] = {"build_s": time.perf_counter() - begun_s}
            continue
        made_for = f"{given.layers}x{given.width}-{given.precision}-{given.attend_to}-{given.capacity_ratio:g}"
        folder = home / f"{name}-{ids.shape[0]}x{ids.shape[1]}-{made_for}"
        kept = folder.exists()
        if late() and not kept:
            say(f"no time is left for {name}")
            continue
        model = makers[name]()
        if kept:
            say(f"loading the {name} engine")
            engine = load_engine(folder, device=given.device)
        else:
            say(f"building the {name} engine")
            engine = build_engine(model, folder, runtime="aoti", precision=given.precision, device=given.device,
                                  shapes={"input_ids": tuple(ids.shape)}, autotune=not given.no_autotune)
        outputs[name] = next(iter(engine.run(on_device).values())).float()
        runs[name] = lambda engine=engine: engine.run(on_device)
        facts[name] = {"build_s": time.perf_counter() - begun_s, "gflop": count_flops(model, sizes) / 1e9,
                       "passes": [record.name for record in engine.manifest.passes if record.modified]}
    if "dense" in runs:
        runs[AGAIN], facts[AGAIN] = runs["dense"], facts["dense"]
    for name, value in outputs.items():
        facts[name]["finite"] = bool(value.isfinite().all())
        if COMPILE in outputs and name == "dense":
            difference = (value - outputs[COMPILE]).norm() / outputs[COMPILE].norm()
            facts[name][f"relative_l2_to_{COMPILE}"] = difference.item()
    return runs, facts


def compiled(given: argparse.Namespace, source: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """The dense model under torch.compile: max-autotune, which records CUDA graphs."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[given.precision]
    model = copy.deepcopy(source).to(given.device, dtype)
    mode = "max-autotune" if given.device != "cpu" and not given.no_autotune else "default"
    forward = torch.compile(lambda ids: model(input_ids=ids).last_hidden_state, mode=mode)

    def run() -> Tensor:
        with torch.no_grad():
            return forward(ids)

    for _ in range(4):
        run()
    return run


def take_turns(runs: Mapping[str, Callable[[], Any]], rounds: int, warmup: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of every round; each variant runs once a round, in random order."""
    measured: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for turn in range(-warmup, rounds):
        shuffle(order)
        for name in order:
            begin = moment(device)
            runs[name]()
            end = moment(device)
            if turn >= 0:
                measured[name].append((begin, end))
    if device == "cpu":
        return {name: [(end - begin) * 1e3 for begin, end in pairs] for name, pairs in measured.items()}
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) for begin, end in pairs] for name, pairs in measured.items()}


def moment(device: str) -> Any:
    """Now, or when the GPU comes to this place of the stream."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def report(size: str, times: Mapping[str, list[float]], facts: Mapping[str, dict[str, Any]], mod: MoDModel
           ) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    pairs = [("dense", "mod"), ("oracle", "mod"), ("pruned", "mod"), (COMPILE, "dense"), (AGAIN, "dense")]
    made: dict[str, Any] = {
        "size": size,
        "variants": {name: {**facts[name], "median_ms": medians[name], **{
            f"p{percent}_ms": float(np.percentile(values, percent)) for percent in (10, 90)}, "times_ms": values}
            for name, values in times.items()},
        "ratios": {f"{a}/{b}": medians[a] / medians[b] for a, b in pairs if a in medians and b in medians}}
    if {"mod", "oracle"} <= medians.keys():
        made["routing_us_per_block"] = (medians["mod"] - medians["oracle"]) * 1e3 / len(mod.routed_blocks)
    return made


def table(made: Mapping[str, Any]) -> str:
    lines = [f"{made['size']:16}{'median ms':>10}{'p10':>9}{'p90':>9}{'GFLOP':>9}{'build s':>9}"]
    for name, figures in made["variants"].items():
        lines.append(f"{name:16}{figures['median_ms']:10.3f}{figures['p10_ms']:9.3f}{figures['p90_ms']:9.3f}"
                     f"{figures.get('gflop', float('nan')):9.0f}{figures['build_s']:9.1f}"
                     + ("" if figures.get("finite", True) else "  NOT FINITE"))
    lines.append("   ".join(f"{name} {value:.3f}" for name, value in made["ratios"].items()))
    dense = made["variants"].get("dense", {})
    if f"relative_l2_to_{COMPILE}" in dense:
        lines.append(f"dense: relative L2 to {COMPILE} {dense[f'relative_l2_to_{COMPILE}']:.2g}")
    if "routing_us_per_block" in made:
        lines.append(f"routing: {made['routing_us_per_block']:.1f} us a routed block")
    return "\n".join(lines)


def kernels(run: Callable[[], Any], count: int) -> str:
    """The kernels of a run that take the longest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)[:count]
    return "\n".join(f"{event.device_time_total / 5e3:8.3f} ms {event.count // 5:5} x  {event.key[:90]}"
                     for event in found)


if __name__ == "__main__":
    main()
