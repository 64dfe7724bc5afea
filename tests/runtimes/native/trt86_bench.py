"""Times TensorRT 8.6 engines of a GPT-2-medium shape side by side: dense, routed with our plugins, routed in standard
ops, oracle, and pruned to equal FLOPs.

    python trt86_bench.py write FOLDER [--blocks 24] [--batch 8] [--rows 1024] [--variants dense,plugins,...]
    python trt86_bench.py run FOLDER --runner "TARGET/python TARGET/trt86_run.py" --plugin libmodcompile_trt.so

``write`` exports the ONNX files, of opset 17 and float16, with this package's Python. TensorRT 8.6 has a Python of its
own: ``run`` starts the runner, a script that builds (``model.onnx --fp16 --plan FILE --plugin FILE``) or times
(``--plan FILE``) one engine, a process each, and prints "built in", "device memory" and "latency ms: median". Engines
are built, saved, and loaded again for every round; rounds go through the variants in random order. A build of 24 blocks
takes about two minutes, of 6 blocks half a minute: --blocks 6 is enough to see whether everything works.
"""

import argparse
import json
import random
import re
import shlex
import statistics
import subprocess
from pathlib import Path

import numpy as np

VARIANTS = ("dense", "plugins", "standard", "oracle", "pruned")
# A row whose output is further away than this, of its own size, was routed or computed otherwise.
FAR = 0.05


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
    mod = mc.convert(model.eval(), {"input_ids": inputs["input_ids"][:2, :64]}, mc.MoDConfig(capacity_ratio=0.125))
    with torch.no_grad():
        # As converted, all rows tie and the first K are taken.
        for router in mod.routers.values():
            router.weight.normal_(std=width**-0.5)
    pruned = pruned_model(mod, pruned_blocks(mod, {"batch": batch, "sequence": rows}))
    models = {"dense": dense_model(mod), "plugins": mod, "standard": mod, "oracle": oracle_model(mod), "pruned": pruned}
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"input_ids": (batch, rows)}
    np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    for name in variants:
        exported = mc.export_onnx(models[name], folder / "exported.onnx", opset=17, precision="fp16", shapes=shapes)
        graph = ir.load(exported)
        ir.save(lower(graph, bind_profile(graph.graph.inputs, shapes), plugins=name == "plugins"),
                folder / f"{name}.onnx")
        exported.unlink()
        print(f"wrote {name}.onnx", flush=True)
        if name in ("plugins", "standard") and not (folder / "expected.npy").exists():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            with torch.no_grad():
                (expected, *_) = tuple(mod.to(device)(inputs["input_ids"].to(device)).values())
            np.save(folder / "expected.npy", expected.float().cpu().numpy())
            mod.to("cpu")


def run(folder: Path, runner: str, plugin: Path, variants: list[str], rounds: int, runs: int) -> None:
    figures: dict[str, dict] = {}
    for name in variants:
        print(f"building {name}", flush=True)
        text = _start(runner, folder / f"{name}.onnx", "--fp16", "--plan", folder / f"{name}.plan", "--plugin", plugin,
                      "--inputs", folder / "inputs.npz", "--outputs", folder / f"{name}.npz", "--runs", 5)
        figures[name] = {"build_s": _number(r"built in ([\d.]+) s", text), "mb": _number(r"s, ([\d.]+) MB", text),
                         "device_mb": _number(r"device memory ([\d.]+) MB", text), "times_ms": []}
    for _ in range(rounds):
        for name in random.sample(variants, len(variants)):
            # Saved and loaded again.
            text = _start(runner, "--plan", folder / f"{name}.plan", "--plugin", plugin, "--inputs",
                          folder / "inputs.npz", "--runs", runs)
            figures[name]["times_ms"].append(_number(r"latency ms: median ([\d.]+)", text))
            figures[name]["how"] = "graph" if "(graph" in text else "enqueue"
    for name, figure in figures.items():
        figure["median_ms"] = statistics.median(figure["times_ms"])
        figure["far_rows"] = _far_rows(folder, name)
    (folder / "trt86.json").write_text(json.dumps(figures, indent=1))
    _print_table(figures)


def _start(runner: str, *arguments: object) -> str:
    done = subprocess.run([*shlex.split(runner), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(map(str, done.args))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise SystemExit(f"the runner did not print {pattern}:\n{text}")
    return float(found[1])


def _far_rows(folder: Path, name: str) -> float | None:
    """The share of rows that are far from the float32 model's; None for another model."""
    if name not in ("plugins", "standard"):
        return None
    expected = np.load(folder / "expected.npy")
    (actual,) = (value.astype(np.float32) for value in np.load(folder / f"{name}.npz").values())
    apart = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float((~(apart < FAR)).mean())


def _print_table(figures: dict[str, dict]) -> None:
    head = ("", "build s", "engine MB", "device MB", "median ms", "spread ms", "dense/this", "far rows")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    dense = figures.get("dense", {}).get("median_ms")
    for name, figure in figures.items():
        times, far = figure["times_ms"], figure["far_rows"]
        cells = (name, f"{figure['build_s']:.0f}", f"{figure['mb']:.0f}", f"{figure['device_mb']:.0f}",
                 f"{figure['median_ms']:.3f} ({figure['how']})", f"{max(times) - min(times):.3f}",
                 f"{dense / figure['median_ms']:.3f}" if dense else "", "" if far is None else f"{100 * far:.2f} %")
        print("| " + " | ".join(cells) + " |")
    for one, other in (("oracle", "plugins"), ("standard", "plugins"), ("pruned", "plugins")):
        if one in figures and other in figures:
            print(f"{one}/{other} {figures[one]['median_ms'] / figures[other]['median_ms']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("write", "run"):
        options = verbs.add_parser(verb)
        options.add_argument("folder", type=Path)
        options.add_argument("--variants", default=",".join(VARIANTS))
        if verb == "write":
            for name, value in (("blocks", 24), ("batch", 8), ("rows", 1024), ("width", 1024)):
                options.add_argument(f"--{name}", type=int, default=value)
        else:
            options.add_argument("--runner", required=True)
            options.add_argument("--plugin", type=Path, required=True)
            options.add_argument("--rounds", type=int, default=3)
            options.add_argument("--runs", type=int, default=50)
    chosen = vars(parser.parse_args())
    verb, variants = chosen.pop("verb"), chosen.pop("variants").split(",")
    if unknown := set(variants) - set(VARIANTS):
        parser.error(f"unknown variants {', '.join(sorted(unknown))}: {', '.join(VARIANTS)}")
    (write if verb == "write" else run)(variants=variants, **chosen)


if __name__ == "__main__":
    main()
