"""Writes docs/benchmarks.md, docs/quality.md, and the table of README.md, from the figures in docs/benchmarks.

    python docs/make_benchmarks.py            writes them
    python docs/make_benchmarks.py --check    says whether they are what it would write

Each JSON file is what ``modcompile bench --title TITLE -o FILE`` wrote; those in ``kernels`` are from
``tests/runtimes/native/bench_kernels.py``, those in ``trt86`` from ``tests/runtimes/native/trt86_bench.py``, those in
``training`` from ``examples/bench_training.py``, those in ``quality`` from other examples. Those in ``earlier`` are of
engines that are made otherwise now.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path

import quality_tables

from modcompile.bench_check import SHOWS_LITTLE

DOCS = Path(__file__).resolve().parent
README, PAGE, QUALITY = DOCS.parent / "README.md", DOCS / "benchmarks.md", DOCS / "quality.md"
START, END = "<!-- measured -->", "<!-- /measured -->"
TITLES = {"dense": "dense", "dense (again)": "dense, again", "mod": "MoD", "other": "MoD, other attend_to",
          "oracle": "oracle", "pruned": "pruned", "masked": "masked", "compile": "torch.compile"}
# Of TensorRT 8.6, where the routed model is built in more than one way.
TRT86_TITLES = {"dense": "dense", "plugins": "MoD, with plugins", "typed": "MoD, with plugins and the graph's types",
                "standard": "MoD, in standard ops", "oracle": "oracle", "pruned": "pruned"}
# Of a training step.
TASKS = {"blocks": "alone", "language model": "as a language model"}
HEAD = """# Benchmarks

Every table is from one process in which the engines took turns in random order; times are medians, in milliseconds,
with the 10th and 90th percentile. *Dense, again* is the dense engine under a second name: how far the two are apart is
the noise. *Oracle* takes the first K rows and has no router: no routing can be faster. *Pruned* lacks whole blocks, to
the same FLOPs. *Masked* computes every row of every block and keeps the chosen ones, as implementations around a
framework's layers do. *torch.compile* is the dense model under `torch.compile`, with CUDA graphs on a GPU. Routers are
random, so these tables say nothing of quality.

*Largest error* is from the float32 model in PyTorch. Rounding moves some rows of some models far, and a routed engine
in half precision ranks some rows with nearly equal logits otherwise: where rows are far from the float32 model's,
their share stands below the table, and beside it PyTorch's own, on the same graph in the same precision. The
calibrated SmolLM2 is `calibrated-0.6` of `examples/train_budgets.py --budgets 0.6 --ratios 0.5`. AOTInductor's
figures of GPT-2 medium's shape have the activation in the product before it on the H200 and not on the H100, which
was earlier; torch.compile has it apart. They are of engines built with `autotune=false`, as is the default, but for
the last but one, which was timed just after the last: tuning, which times each kernel alone, made the norm of gathered
rows faster and other norms slower, and engines on the whole no faster. *Engine MB* is the engine on disk, *GPU MB* what
the GPU's memory holds for it after a run, weights and what it computes with.

This page is written by `docs/make_benchmarks.py` from `docs/benchmarks/*.json`.
"""

EARLIER = """## Engines whose rows were in memory too early

AOTInductor's figures of GPT-2 medium's shape on the H200 above are of engines in which one kernel chooses rows and the
next one norms them. Those below are of the first ones that do both in one kernel (`passes/route_and_norm.py`), which
saves a launch for each block, and they were slower: rows that the kernel reads and the merge then writes over the
compiler summed in a kernel of its own instead of in the one that norms them, and it merged the rows and their norms
apart. Now what is written over is a second value, and in the code that the compiler writes there is one kernel for each
again; such engines were not timed yet.
"""


def rows(report: dict) -> list[str]:
    """The table of one report, as lines of Markdown."""
    dense = report["timings"].get("dense")
    on_gpu = any(timing["device_bytes"] is not None for timing in report["timings"].values())
    lines = [f"| | GFLOP | median ms | p10 | p90 | dense/this | largest error | engine MB |"
             f"{' GPU MB | beside weights |' if on_gpu else ''}",
             f"|---|---|---|---|---|---|---|---|{'---|---|' if on_gpu else ''}"]
    for name, timing in report["timings"].items():
        share = f"{dense['median_ms'] / timing['median_ms']:.2f}" if dense else ""
        lines.append(f"| {TITLES[name]} | {timing['flops'] / 1e9:.3g} | {timing['median_ms']:.4g} | "
                     f"{timing['p10_ms']:.4g} | {timing['p90_ms']:.4g} | {share} | {timing['max_abs_error']:.1g} |"
                     f" {megabytes(timing['folder_bytes'])} |"
                     + (f" {megabytes(timing['device_bytes'])} | {megabytes(timing['activation_bytes'])} |" if on_gpu
                        else ""))
    return lines


def megabytes(size: int | None) -> str:
    """A size, or nothing where there is none."""
    return "" if size is None else f"{size / 1e6:.0f}"


def notes(report: dict) -> list[str]:
    """What stands below the table: far rows of variants that have any, and variants without figures."""
    lines = []
    for name, timing in report["timings"].items():
        # Figures of before these were told have none.
        if timing.get("far_rows"):
            lines.append(f"{TITLES[name]}: {timing['far_rows']:.2%} of the rows are far from the float32 model's, in "
                         f"PyTorch {timing['torch_far_rows'] or 0:.2%}"
                         + (", which shows little of the engine."
                            if (timing["torch_far_rows"] or 0) > SHOWS_LITTLE else "."))
    lines += [f"{TITLES[name]}: no figures, {message.splitlines()[0]}."
              for name, message in report.get("failed", {}).items()]
    return [*lines, ""] if lines else []


def place(report: dict) -> str:
    """The hardware."""
    host = report["machine"]
    return host["gpu"] or f"{host['cores']} cores of {host['cpu']}"


def machine(report: dict) -> str:
    """What the figures were taken on."""
    host = report["machine"]
    versions = f"torch {host['torch']}, Python {host['python']}"
    return f"{place(report)}; {report['runtime']} {host['runtime_version']}, {versions}"


def section(report: dict) -> str:
    """One report, with how it was taken."""
    config, timings = report["config"], report["timings"]
    shown = dict(report["ratios"])
    if "compile" in timings and "mod" in timings:
        # Reports of before this ratio was one of theirs have the times for it.
        shown["torch.compile/MoD"] = timings["compile"]["median_ms"] / timings["mod"]["median_ms"]
    ratios = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
    routing = report["routing_us_per_block"]
    return "\n".join([
        f"## {report['title']}", "", f"{machine(report)}; {report['precision']}, {report['rounds']} rounds.", "",
        *rows(report), "", *notes(report),
        ratios + ("." if routing is None else f"; routing costs {routing:.0f} us in each routed block."), "",
        f"K = {', '.join(map(str, sorted(set(report['capacities'].values()))))} in {len(report['capacities'])} blocks, "
        f"attend_to {config['attend_to']}, gate {config['gate']}. Load average before it began: "
        f"{report['machine']['load_average']}.", "", "```sh", report["command"], "```", ""])


def kernels(report: dict) -> str:
    """The kernels' times, which tests/runtimes/native/bench_kernels.py wrote."""
    lines = [f"## Kernels, {report['machine']['gpu']}", "",
             f"CUDA {report['machine']['cuda']}, torch {report['machine']['torch']}; inside a CUDA graph, medians of "
             f"{report['machine']['rounds']} rounds. *Again* is the same once more: the noise.", "",
             "| | | us | again | GB/s | of the copy |", "|---|---|---|---|---|---|"]
    for row in report["results"]:
        rate, share = row.get("gb_per_s"), row.get("of_copy")
        lines.append(f"| {row['what']} | {row['who']} | {row['us']:.2f} | {row['us_again']:.2f} | "
                     f"{f'{rate:.0f}' if rate else ''} | {f'{share:.2f}' if share else ''} |")
    return "\n".join([*lines, "", "```sh", "python tests/runtimes/native/bench_kernels.py -o kernels.json", "```", ""])


def trt86(report: dict) -> str:
    """Engines of TensorRT 8.6, which tests/runtimes/native/trt86_bench.py timed."""
    model, figures = report["model"], report["variants"]
    lines = [f"## {report['title']}, TensorRT {report['machine']['tensorrt']}, {report['machine']['gpu']}", "",
             f"{report['precision']}, ONNX of opset {model['opset']}. Each engine is saved, and loaded again for every "
             "round in a process of its own; medians of rounds that go through the engines in random order. *Spread* "
             "is from the fastest round to the slowest. *Far rows* differ from the float32 model by more than 5 %.", "",
             "| | median ms | spread ms | build s | engine MB | GPU MB | layers | reformats | far rows |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, figure in sorted(figures.items(), key=lambda item: list(TRT86_TITLES).index(item[0])):
        far, layers = figure["far_rows"], figure["layers"]
        times = f"{figure['median_ms']:.3f} | {figure['spread_ms']:.3f}" if figure["times_ms"] else "not timed | "
        lines.append(f"| {TRT86_TITLES[name]} | {times} | {figure['build_s']:.0f} | {figure['engine_mb']:.0f} | "
                     f"{figure['device_mb']:.0f} | {sum(layers.values())} | {layers.get('Reformat', 0)} | "
                     f"{'' if far is None else f'{far:.2%}'} |")
    ratios = ", ".join(f"{name} {value:.3f}" for name, value in report.get("ratios", {}).items())
    routing = report.get("routing_us_per_block")
    how = ", ".join(sorted({{"graph": "as a CUDA graph", "enqueue": "without a CUDA graph"}[figure["how"]]
                            for figure in figures.values() if figure["how"]}))
    if ratios:
        lines += ["", ratios + ("." if routing is None else f"; routing costs {routing:.0f} us in each routed block.")]
    return "\n".join([
        *lines, "", f"K = {model['capacity']} in {len(model['routed_blocks'])} of {model['blocks']} blocks, attend_to "
        f"{model['attend_to']}, gate {model['gate']}; run {how or 'not at all'}.", "",
        "```sh", report["command"], "```", ""])


def training(report: dict) -> str:
    """Training steps, which examples/bench_training.py timed."""
    setting = report["setting"]
    graphs = setting.get("graphs", False)
    lines = [f"## Training steps of {setting['batch']} x {setting['length']}, {setting['machine']}, "
             f"{'with' if graphs else 'without'} CUDA graphs", "",
             f"A decoder of GPT-2 medium's shape ({setting['layers']} blocks of width {setting['width']}, "
             f"{setting['precision']}), {' and '.join(TASKS[task] for task in report['cells'])}, under torch.compile; "
             f"medians of {setting['rounds']} rounds. A step is *gradients* and AdamW's update.", "",
             "| | | FLOPs | step ms | of dense | gradients ms | of dense |", "|---|---|---|---|---|---|---|"]
    for task, cell in report["cells"].items():
        dense = cell["models"]["dense"]
        for name, one in cell["models"].items():
            figures = [figure for key in ("step_ms", "gradients_ms") for figure in (
                f"{statistics.median(one[key]):.2f}",
                f"{statistics.median(one[key]) / statistics.median(dense[key]):.2f}")]
            lines.append(f"| {task} | {name} | {one['flops'] / dense['flops']:.3f} | {' | '.join(figures)} |")
    tasks = shlex.join(report["cells"])
    options = f"--tasks {tasks} --batch {setting['batch']} --output training.json{'' if graphs else ' --no-graphs'}"
    command = f"python examples/bench_training.py {options}"
    return "\n".join([*lines, "", "```sh", command, "```", ""])


def summary(reports: list[dict]) -> str:
    """The table of the README: one line a title, of its latest report."""
    lines = ["| ms | machine | dense | MoD | oracle | pruned | dense/MoD | oracle/MoD |",
             "|---|---|---|---|---|---|---|---|"]
    for report in {report["title"]: report for report in reports}.values():
        times = {name: f"{timing['median_ms']:.4g}" for name, timing in report["timings"].items()}
        lines.append(f"| {report['title']} | {place(report)} | "
                     + " | ".join(times.get(name, "") for name in ("dense", "mod", "oracle", "pruned"))
                     + "".join(f" | {report['ratios'][name]:.2f}" if name in report["ratios"] else " | "
                               for name in ("dense/MoD", "oracle/MoD")) + " |")
    return "\n".join(lines)


def written() -> dict[Path, str]:
    """The text of every file that comes from figures."""
    reports, measured, native, steps, earlier = (
        [json.loads(path.read_text(encoding="utf-8")) for path in sorted((DOCS / "benchmarks" / part).glob("*.json"))]
        for part in ("", "kernels", "trt86", "training", "earlier"))
    readme = README.read_text(encoding="utf-8")
    before, rest = readme.split(START)
    after = rest.split(END)[1]
    parts = [HEAD, *map(section, reports), f"{EARLIER}\n{summary(earlier)}\n", *map(trt86, native),
             *map(training, steps), *map(kernels, measured)]
    return {PAGE: "\n".join(parts).rstrip() + "\n", QUALITY: quality_tables.page(DOCS / "benchmarks" / "quality"),
            README: f"{before}{START}\n{summary(reports)}\n{END}{after}"}


def main() -> None:
    """Writes the files, or compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file would change")
    check = parser.parse_args().check
    stale = [path for path, text in written().items()
             if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(DOCS.parent)} {'is not' if check else 'was not'} what the figures say")
        if not check:
            path.write_text(written()[path], encoding="utf-8")
    sys.exit(bool(stale) and check)


if __name__ == "__main__":
    main()
