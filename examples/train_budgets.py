"""Trains a pretrained decoder for budgets of FLOPs, routed and pruned alike, and compares what is left of its quality.

    python examples/train_budgets.py --train docs.txt plays.txt --held-out docs=docs2.txt news=news.txt --device cuda
        --seeds 0 1 --compile
    python examples/train_budgets.py --tiny     a random model on Python's own sources: that it runs, not what it can do

For each budget: *calibrated*, what ``modcompile.calibrate`` makes; *pruned*, whole blocks dropped by measured loss;
*stochastic*, the calibrated model's blocks and capacities with top-k of Gaussian noise. Each is trained on the same
batches with the same steps: next-token loss and the distance to the dense model's predictions. The dense model is there
as it was, and trained on the same batches too. Of the calibrated model there is also the loss when each row decides for
itself, by a threshold, as generation must, and the FLOPs of that.

All begin with the same dense model, and learn from its predictions: the one that came, or with ``--adapt 300`` that one
trained on the text for so many steps before. What it then loses is what was cut, not what it had not read yet.

Losses are nats per token of text that was not trained on; text of another kind than the training text shows most.
Calibration is done once; seeds are of the training, and say how far its figures move by chance. Calibrated models and
cells are written when they are done, and a second call goes on with the next. Several processes with the same options
may share a folder, and with it the work: each takes the next cell that none has.
"""

import argparse
import copy
import doctest
import itertools
import math
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers as hf
from budget_training import Texts, causal_losses, losses, stochastic, tokens_of, train, windows
from calibrate import load_model, named, tiny_model
from cells import Cells
from filelock import FileLock
from torch import nn

import modcompile as mc
from modcompile.calibration import CalibrationResult, calibrate_each, fit_routers, pruning_order
from modcompile.flops import count_flops, flops_by_module
from modcompile.variants import pruned_model

# B batch  S rows  V vocabulary
ADAPT = {"lr": 1e-3, "distill": 0.5, "seed": 500}  # how, whatever the models that are made of it are trained with
MODELS = ("dense", "pruned", "calibrated", "stochastic")


def prune_to(graph: mc.GraphModel, calibration: list[dict[str, torch.Tensor]], budgets: list[float],
             sizes: dict[str, int], options: argparse.Namespace) -> list[tuple[list[str], float]]:
    """For each budget, the fewest blocks to leave out, by measured loss, that keep it, and the share of FLOPs left."""
    flops = flops_by_module(graph, sizes)
    order = pruning_order(graph, calibration, min(budgets), trial_batches=options.trial_batches)
    left = [1 - sum(flops[path] for path in order[:n]) / flops[""] for n in range(len(order) + 1)]
    return [next((order[:n], share) for n, share in enumerate(left) if share <= budget) for budget in budgets]


def adapted(graph: mc.GraphModel, texts: Texts, options: argparse.Namespace) -> mc.GraphModel:
    """The dense model trained on the text and its own predictions as it came. One process trains, others read that."""
    made = Cells(options.folder / "adapted.json", {"steps": options.adapt, **ADAPT})
    weights = options.folder / "adapted.safetensors"
    model = copy.deepcopy(graph)
    with FileLock(options.folder / "adapting.lock"):
        if "dense" in made:
            safetensors.torch.load_model(model, weights, device=options.device)
        else:
            usual = argparse.Namespace(**vars(options) | ADAPT)
            spent = train(model, graph, texts, usual.seed, options.adapt, usual)
            safetensors.torch.save_model(model, str(weights))
            made.write("dense", spent)
    return model.eval()


def prepare(graph: mc.GraphModel, calibration: list[dict[str, torch.Tensor]], sizes: dict[str, int],
            options: argparse.Namespace) -> dict[float, dict[str, Any]]:
    """Calibrates for the budgets that the folder has no model for. One process does it, others wait.

    Args:
        graph: Where pruned and calibrated models begin.
        calibration: The batches to calibrate on.
        sizes: The size of each symbol.
        options: The command's.

    Returns:
        By budget, the largest first, the blocks that are pruned, and the calibrated model's report.
    """
    budgets = sorted(options.budgets, reverse=True)
    prepared = Cells(options.folder / "prepared.json", {key: getattr(options, key) for key in (
        "attend_to", "ratios", "structure", "calibration_sequences", "calibration_batch", "trial_batches",
        "exchanges")})
    with FileLock(options.folder / "preparing.lock"):
        if missing := [budget for budget in budgets if str(budget) not in prepared]:
            started = time.perf_counter()
            pruned = prune_to(graph, calibration, missing, sizes, options)
            shares = [share for _, share in pruned]
            results = [fit_structure(graph, calibration, shares[0], options)] if options.structure else calibrate_each(
                graph, calibration, shares, attend_to=options.attend_to, ratios=options.ratios,
                trial_batches=options.trial_batches, exchanges=options.exchanges)
            for budget, (blocks, _), result in zip(missing, pruned, results, strict=True):
                result.mod.save_pretrained(options.folder / f"calibrated-{budget}", overwrite=True)
                prepared.write(str(budget), {"pruned": blocks, "calibrated": result.report,
                                             "seconds": time.perf_counter() - started})
    return {budget: prepared.report["cells"][str(budget)] for budget in budgets}


def fit_structure(graph: mc.GraphModel, calibration: list[dict[str, torch.Tensor]], share: float,
                  options: argparse.Namespace) -> CalibrationResult:
    """The structure that is given instead of searched for, of at most a share of the FLOPs, its routers fitted."""
    paths = [block.path for block in mc.find_blocks(graph).routable]
    ratios = {paths[i]: ratio for i, ratio in sorted(options.structure)}
    routed = {path: ratio for path, ratio in ratios.items() if 0 < ratio < 1}
    result = fit_routers(graph, calibration, trial_batches=options.trial_batches, config=mc.MoDConfig(
        blocks=tuple(routed), capacity_ratio=tuple(routed.values()), attend_to=options.attend_to,
        dropped=tuple(path for path, ratio in ratios.items() if ratio == 0), gate="straight-through"))
    if result.report["flops"] > share:
        raise SystemExit(f"the structure costs {result.report['flops']:.4f} of the FLOPs, the pruned model "
                         f"{share:.4f}: give it fewer rows")
    return result


def block_ratio(text: str) -> tuple[int, float]:
    """Reads "9:5/8": a block's number and what it gets of its rows."""
    index, _, given = text.partition(":")
    ratio = Fraction(given)
    if not 0 <= ratio <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a block gets from 0 to 1 of its rows")
    return int(index), float(ratio)


def compare(model: nn.Module, tokenizer: Callable[..., Any], options: argparse.Namespace) -> dict[str, Any]:
    """Every cell."""
    device = torch.device(options.device)
    train_tokens = torch.cat([tokens_of(path, tokenizer) for path in options.train])
    texts = Texts(train_tokens.to(device), {
        name: windows(tokens_of(path, tokenizer), options.held_out_sequences, options.batch, options.rows).to(device)
        for name, path in options.held_out})
    calibration = texts.calls(options)
    graph = mc.capture(model.to(device), {"input_ids": texts.train[:2 * options.rows].view(2, -1)})
    sizes = {"batch": options.batch, "sequence": options.rows}
    flops = count_flops(graph, sizes)
    if options.adapt:
        graph = adapted(graph, texts, options)
    cells = Cells(options.folder / "budgets.json", {
        "model": options.model.name if options.model else "tiny" if options.tiny else "SmolLM2-135M-Instruct",
        "train": [path.name for path in options.train], "train_tokens": len(train_tokens),
        "held_out_tokens": {name: part.numel() for name, part in texts.held_out.items()}, "sizes": sizes,
        "ratios": options.ratios, "structure": options.structure, "steps": options.steps,
        "adapt": options.adapt, "lr": options.lr,
        "router_lr": options.router_lr, "refit": options.refit, "distill": options.distill,
        "anneal": options.anneal, "anneal_stages": options.anneal and options.anneal_stages,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"})

    def cell(candidate: mc.GraphModel, seed: int, **further: Any) -> dict[str, Any]:
        before = losses(candidate, texts)
        spent = train(candidate, graph, texts, seed, options.steps, options)
        made = {"flops": count_flops(candidate, sizes) / flops, "untrained": before,
                "trained": losses(candidate, texts), **spent, **further}  # fmt: skip
        decides = isinstance(candidate, mc.MoDModel) and any(list(r.parameters()) for r in candidate.routers.values())
        return made | ({"causal": causal_losses(candidate, texts, seed, options)} if decides else {})

    def add(name: str, seed: int, make: Callable[[], mc.GraphModel], **further: Any) -> None:
        name = f"{name}, seed {seed}"
        with cells.claim(name) as is_ours:
            if is_ours:
                cells.write(name, made := cell(make(), seed, **further))
                print(f"{name:24} {made['flops']:.3f}  " + "  ".join(
                    f"{k} {v:.3f}" for k, v in made["trained"].items()), flush=True)

    if "dense" in options.models:
        for seed in options.seeds:
            add("dense", seed, lambda: copy.deepcopy(graph))
    if set(options.models) == {"dense"}:
        return cells.report
    prepared = prepare(graph, calibration, sizes, options)
    # What is to be told apart comes first, then the control.
    for kinds in (("pruned", "calibrated"), ("stochastic",)):
        for seed, (budget, made), kind in itertools.product(options.seeds, prepared.items(), kinds):
            if kind not in options.models:
                continue

            def make(budget=budget, made=made, kind=kind) -> mc.GraphModel:
                if kind == "pruned":
                    return copy.deepcopy(pruned_model(graph, made["pruned"]))
                mod = mc.load(options.folder / f"calibrated-{budget}").to(device)
                return mod if kind == "calibrated" else stochastic(mod)

            further = {"calibration": made["calibrated"]} if kind == "calibrated" else {}
            add(f"{kind} {budget}", seed, make, **further)
    return cells.report


def place(name: str) -> tuple[float, int, str]:
    """Where a cell such as "pruned 0.9, seed 0" stands: the larger budget first, and in the order of MODELS."""
    what, seed = name.split(", ")
    kind, *budget = what.split()
    return -float(budget[0]) if budget else -math.inf, MODELS.index(kind), seed


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    names = list(report["setting"]["held_out_tokens"])
    lines = [f"| | FLOPs | {' | '.join(names)} | seconds |", "|---" * (len(names) + 3) + "|"]
    for name in sorted(report["cells"], key=place):
        cell = report["cells"][name]
        figures = [f"{cell['untrained'][text]:.3f} -> {cell['trained'][text]:.3f}" for text in names]
        lines.append(f"| {name} | {cell['flops']:.3f} | {' | '.join(figures)} | {cell['seconds']:.0f} |")
        if "causal" in cell:
            figures = [f"{cell['causal']['losses'][text]:.3f} at {cell['causal']['flops'][text]:.3f}" for text in names]
            lines.append(f"| each row decides | | {' | '.join(figures)} | |")
    return "\n".join(lines)


def main() -> None:
    """Reads the options and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a transformers folder; SmolLM2-135M from its package by default")
    parser.add_argument("--train", type=Path, nargs="+", metavar="FILE", help="text to calibrate and train on")
    parser.add_argument("--held-out", type=named, nargs="+", metavar="NAME=FILE", help="what to measure loss on")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="of a folder's second call, "
                        "what it adds")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--adapt", type=int, default=0, metavar="STEPS", help="that the dense model is trained for "
                        "before anything is made of it")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--router-lr", type=float, default=0.0, help="what routers learn with; at 0 they are fitted "
                        "again instead")
    parser.add_argument("--refit", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.3, 0.5], metavar="SHARE",
                        help="after these shares of the steps routers are fitted again; none: they stay as they were")
    parser.add_argument("--anneal", type=float, default=0.0, metavar="SHARE", help="routed blocks begin with all rows, "
                        "and have their capacity after this share of the steps")
    parser.add_argument("--anneal-stages", type=int, default=2, help="how often capacities change till then")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1 / 8, 1 / 4, 1 / 2], help="what a block may get "
                        "of its rows")
    parser.add_argument("--structure", type=block_ratio, nargs="+", metavar="I:RATIO", help="for one budget, what "
                        "these blocks get of their rows, such as 9:5/8, or 12:0 to leave one out: instead of a search")
    parser.add_argument("--distill", type=float, default=0.5, help="the weight of the dense model's predictions; the "
                        "rest is the text's")
    parser.add_argument("--attend-to", choices=["auto", "all", "chosen"], default="all")
    parser.add_argument("--calibration-sequences", type=int, default=128)
    parser.add_argument("--calibration-batch", type=int, default=8)
    parser.add_argument("--trial-batches", type=int, default=4)
    parser.add_argument("--exchanges", type=int, default=1, help="how often rows go from block to block at each stage")
    parser.add_argument("--held-out-sequences", type=int, default=64, help="of each text")
    parser.add_argument("--threshold-batches", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="the training step, with torch.compile")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the training batches")
    parser.add_argument("--folder", type=Path, default=Path("budgets"), help="where the figures go, as budgets.json")
    parser.add_argument("--tiny", action="store_true", help="a random model, small sizes, no files needed")
    options = parser.parse_args()
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    # Losses are compared, not written down to their last digit: a GPU's products may round factors to 10 bits.
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    if options.tiny:
        options.train, options.held_out = [Path(argparse.__file__)], [("code", Path(doctest.__file__))]
        options.batch, options.rows, options.steps, options.adapt, options.budgets = 2, 32, 4, 2, [0.6]
        options.calibration_sequences, options.calibration_batch, options.held_out_sequences = 4, 2, 4
        options.trial_batches, options.refit = 1, [0.5]
    if options.router_lr:
        options.refit = []
    if not options.train or not options.held_out:
        parser.error("--train and --held-out are needed")
    if options.structure and len(options.budgets) != 1:
        parser.error("--structure is for one of --budgets")
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = Path(scratch) if options.tiny else options.folder
        options.folder.mkdir(parents=True, exist_ok=True)
        model, tokenizer = tiny_model() if options.tiny else load_model(options.model)
        print(table(compare(model, tokenizer, options)))


if __name__ == "__main__":
    main()
