"""Times TensorRT 8.6 engines of a GPT-2-medium shape side by side: routed with our plugins, oracle, routed in standard
ops, dense, and pruned to equal FLOPs.

    python trt86_bench.py write FOLDER [--blocks 24] [--batch 8] [--rows 1024] [--variants plugins,oracle,...]
    python trt86_bench.py run FOLDER --runner "TARGET/python TARGET/trt86_run.py" --plugin libmodcompile_trt.so

``write`` exports the ONNX files, of opset 17 and float16, with this package's Python. TensorRT 8.6 has a Python of its
own: ``run`` starts the runner, a script that builds (``model.onnx --fp16 --plan FILE --plugin FILE``) or times
(``--plan FILE``) one engine, a process each, and prints "built in", "device memory" and "latency ms: median". Engines
are built one after the other with one timing cache (``trt86_cache.py``), saved, and loaded again for every round;
rounds go through the variants in random order.

A build of 24 blocks takes about two minutes, of 6 blocks half a minute. FOLDER/trt86.json is written after every step.
With ``--limit-s`` the last quarter of the time is for rounds: no build begins in it, and one that is under way when a
tenth is left is ended. A second ``run`` on the folder goes on where the first stopped: it builds what has no engine
yet, and adds rounds.
"""

import argparse
import collections
import json
import random
import re
import shlex
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np

# In the order they are built: those that answer the most come first. "typed" is "plugins" with the casts around its
# softmaxes left in, as the builders that take types from the graph get it; it is no default.
VARIANTS = ("plugins", "oracle", "standard", "dense", "pruned", "typed")
DEFAULT = ",".join(VARIANTS[:-1])
# A row whose output is further away than this, of its own size, was routed or computed otherwise.
FAR = 0.05
# Shares of --limit-s after which no build begins, and a build is ended.
LAST_BUILD, END_OF_BUILDS = 0.75, 0.9


def write(folder: Path, blocks: int, batch: int, rows: int, width: int, variants: list[str]) -> None:
    import onnx_ir as ir
    import torch
    from modcompile.runtimes.trt.lower import lower
    from modcompile.runtimes.trt.profile import bind_profile
    from transformers import GPT2Config, GPT2Model

    import modcompile as mc
    from modcompile.variants import dense_model, oracle_model, pruned_blocks, pruned_model

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(n_layer=blocks, n_embd=width, n_head=width // 64, n_positions=rows, use_cache=False))
    inputs = {"input_ids": torch.randint(0, model.config.vocab_size, (batch, rows))}
    config = mc.MoDConfig(capacity_ratio=0.125)
    mod = mc.convert(model.eval(), {"input_ids": inputs["input_ids"][:2, :64]}, config)
    with torch.no_grad():
        # As converted, all rows tie and the first K are taken.
        for router in mod.routers.values():
            router.weight.normal_(std=width**-0.5)
    dropped = pruned_blocks(mod, {"batch": batch, "sequence": rows})
    makers = {"dense": lambda: dense_model(mod), "oracle": lambda: oracle_model(mod),
              "pruned": lambda: pruned_model(mod, dropped)}
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"input_ids": (batch, rows)}
    np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    description = {
        "name": "GPT-2 shape", "blocks": blocks, "batch": batch, "rows": rows, "width": width, "precision": "fp16",
        "opset": 17, "capacity": -(-rows // 8), "routed_blocks": list(mod.routers), "pruned_blocks": list(dropped),
        "gate": config.gate, "attend_to": config.attend_to, "torch": torch.__version__}
    (folder / "model.json").write_text(json.dumps(description, indent=1) + "\n")
    exported: dict[str, ir.Model] = {}
    for name in variants:
        # The routed model serves three.
        source = name if name in makers else "mod"
        if source not in exported:
            path = mc.export_onnx(makers[name]() if name in makers else mod, folder / "exported.onnx", opset=17,
                                  precision="fp16", shapes=shapes)
            exported = {source: ir.load(path), **({"mod": exported["mod"]} if "mod" in exported else {})}
        graph = exported[source]
        ir.save(lower(graph, bind_profile(graph.graph.inputs, shapes), plugins=name in ("plugins", "typed"),
                      weakly_typed=name != "typed"), folder / f"{name}.onnx")
        print(f"wrote {name}.onnx", flush=True)
    (folder / "exported.onnx").unlink()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, source in (("expected", mod), ("expected.dense", dense_model(mod))):
        with torch.no_grad():
            (value, *_) = tuple(source.to(device)(inputs["input_ids"].to(device)).values())
        np.save(folder / f"{name}.npy", value.float().cpu().numpy())


def run(folder: Path, runner: str, plugin: Path, variants: list[str], rounds: int, runs: int,
        limit_s: float | None) -> None:
    started = time.monotonic()

    def left(share: float = 1.0) -> float | None:
        """Seconds until a share of the time is over."""
        return None if limit_s is None else started + share * limit_s - time.monotonic()

    def is_over(share: float = 1.0) -> bool:
        seconds = left(share)
        return seconds is not None and seconds <= 0

    command = shlex.split(runner)
    report = _report(folder)
    figures = report["variants"]
    for name in variants:
        plan, source = folder / f"{name}.plan", folder / f"{name}.onnx"
        if name in figures and plan.exists() and plan.stat().st_mtime >= source.stat().st_mtime:
            continue
        figures.pop(name, None)
        if is_over(LAST_BUILD):
            print(f"no time to build {name}", flush=True)
            continue
        print(f"building {name}", flush=True)
        layers = folder / f"{name}.layers.json"
        # The interpreter, and then what it runs.
        text = _start([*command[:-1], Path(__file__).with_name("trt86_cache.py"), folder / "timing.cache", command[-1]],
                      source, "--fp16", "--plan", f"{plan}.partial", "--plugin", plugin, "--inputs",
                      folder / "inputs.npz", "--outputs", folder / f"{name}.npz", "--layers", layers, "--runs", 5,
                      timeout_s=left(END_OF_BUILDS))
        if text is None:
            print(f"no time to end the build of {name}", flush=True)
            continue
        Path(f"{plan}.partial").replace(plan)
        report["machine"]["tensorrt"] = re.search(r"TensorRT ([\d.]+)", text)[1]
        figures[name] = {
            "build_s": _number(r"built in ([\d.]+) s", text), "engine_mb": _number(r"s, ([\d.]+) MB", text),
            "device_mb": _number(r"device memory ([\d.]+) MB", text), "layers": _layer_types(layers),
            "far_rows": _far_rows(folder, name), "how": "", "times_ms": []}
        _save(folder, report)
    built = [name for name in variants if name in figures]
    for _ in range(rounds):
        for name in random.sample(built, len(built)):
            # Saved and loaded again.
            text = None if is_over() else _start(command, "--plan", folder / f"{name}.plan", "--plugin", plugin,
                                                 "--inputs", folder / "inputs.npz", "--runs", runs, timeout_s=left())
            if text is None:
                print("no time for another round", flush=True)
                break
            figures[name]["times_ms"].append(_number(r"latency ms: median ([\d.]+)", text))
            figures[name]["how"] = "graph" if "(graph" in text else "enqueue"
            _save(folder, report)
        else:
            continue
        break
    _print_table(report)


def _report(folder: Path) -> dict:
    """What was measured so far, of the same model."""
    path, model = folder / "trt86.json", json.loads((folder / "model.json").read_text())
    if path.exists() and (known := json.loads(path.read_text()))["model"] == model:
        return known
    gpu = None
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    sizes = " ".join(f"--{name} {model[name]}" for name in ("blocks", "batch", "rows", "width"))
    script = "python tests/runtimes/native/trt86_bench.py"
    return {"title": f"GPT-2 of {model['blocks']} blocks, {model['batch']} x {model['rows']}",
            "runtime": "tensorrt", "precision": model["precision"], "machine": {"gpu": gpu}, "model": model,
            "variants": {},
            "command": f"{script} write FOLDER {sizes}\n{script} run FOLDER --runner RUNNER "
                       "--plugin libmodcompile_trt.so"}


def _save(folder: Path, report: dict) -> None:
    """Writes the figures, with the ratios of what has been timed."""
    times = {}
    for name, figure in report["variants"].items():
        if figure["times_ms"]:
            times[name] = figure["median_ms"] = statistics.median(figure["times_ms"])
            figure["spread_ms"] = max(figure["times_ms"]) - min(figure["times_ms"])
    if "plugins" in times:
        report["ratios"] = {f"{name}/plugins": time / times["plugins"] for name, time in times.items()
                            if name != "plugins"}
        if "oracle" in times:
            report["routing_us_per_block"] = (1000 * (times["plugins"] - times["oracle"])
                                              / len(report["model"]["routed_blocks"]))
    path = folder / "trt86.json"
    path.with_suffix(".partial").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".partial").replace(path)


def _start(command: list, *arguments: object, timeout_s: float | None) -> str | None:
    """What the runner prints; None where it did not end in time."""
    words = [*map(str, command), *map(str, arguments)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise SystemExit(f"the runner did not print {pattern}:\n{text}")
    return float(found[1])


def _layer_types(path: Path) -> dict[str, int]:
    """How many layers of each type the engine has: reformats are what the builder put around others."""
    return dict(collections.Counter(layer["LayerType"] for layer in json.loads(path.read_text())["Layers"]))


def _far_rows(folder: Path, name: str) -> float | None:
    """The share of rows that are far from the float32 model's; None for a model that computes something else."""
    if name in ("oracle", "pruned"):
        return None
    expected = np.load(folder / ("expected.dense.npy" if name == "dense" else "expected.npy"))
    (actual,) = (value.astype(np.float32) for value in np.load(folder / f"{name}.npz").values())
    apart = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float((~(apart < FAR)).mean())


def _print_table(report: dict) -> None:
    head = ("", "build s", "engine MB", "device MB", "layers", "reformats", "median ms", "spread ms", "far rows")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name, figure in report["variants"].items():
        far, layers = figure["far_rows"], figure["layers"]
        cells = (name, f"{figure['build_s']:.0f}", f"{figure['engine_mb']:.0f}", f"{figure['device_mb']:.0f}",
                 str(sum(layers.values())), str(layers.get("Reformat", 0)),
                 f"{figure['median_ms']:.3f} ({figure['how']})" if figure["times_ms"] else "not timed",
                 f"{figure['spread_ms']:.3f}" if figure["times_ms"] else "",
                 "" if far is None else f"{100 * far:.2f} %")
        print("| " + " | ".join(cells) + " |")
    for name, ratio in report.get("ratios", {}).items():
        print(f"{name} {ratio:.3f}")
    if "routing_us_per_block" in report:
        print(f"routing {report['routing_us_per_block']:.0f} us in each routed block")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("write", "run"):
        options = verbs.add_parser(verb)
        options.add_argument("folder", type=Path)
        options.add_argument("--variants", default=DEFAULT)
        if verb == "write":
            for name, value in (("blocks", 24), ("batch", 8), ("rows", 1024), ("width", 1024)):
                options.add_argument(f"--{name}", type=int, default=value)
        else:
            options.add_argument("--runner", required=True)
            options.add_argument("--plugin", type=Path, required=True)
            options.add_argument("--rounds", type=int, default=3)
            options.add_argument("--runs", type=int, default=50)
            options.add_argument("--limit-s", type=float)
    chosen = vars(parser.parse_args())
    verb, variants = chosen.pop("verb"), chosen.pop("variants").split(",")
    if unknown := set(variants) - set(VARIANTS):
        parser.error(f"unknown variants {', '.join(sorted(unknown))}: {', '.join(VARIANTS)}")
    (write if verb == "write" else run)(variants=variants, **chosen)


if __name__ == "__main__":
    main()
