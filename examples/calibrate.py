"""Calibrates a pretrained model without training, and compares it with what a user would pick instead, at equal FLOPs.

    python examples/calibrate.py --text prose.txt code.txt --held-out plays=plays.txt news=news.txt -o calibrated.json
    python examples/calibrate.py --tiny     a random model on Python's own sources: that it runs, not what it can do

For each budget, in nats per token of text that was not used: the dense model; pruned, whole blocks dropped, chosen by
measured loss (of the text, and as divergence from the dense model: both, for neither is always better); calibrated, for
the pruned model's FLOPs; and the same routed model with random routers, the mean of several. Held-out text of another
kind than the calibration text shows most. The default sizes are some minutes of a large GPU (--device cuda). Two cores
take --batch 4 --rows 64 --sequences 40 --trial-batches 1 --exchanges 1 --held-out-sequences 16, and an hour.
"""

import argparse
import doctest
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from pretrained import smollm2_model, smollm2_tokenizer
from torch.nn import functional as F

import modcompile as mc
from modcompile.calibration import calibrate_each, pruning_order, text_batches
from modcompile.flops import count_flops
from modcompile.text_file import read_text, tokenizer_of
from modcompile.variants import dense_model, pruned_model

# B batch  S rows  V vocabulary
Batches = list[dict[str, torch.Tensor]]


def tiny_model() -> tuple[torch.nn.Module, Any]:
    """A random model of bytes, and its tokenizer."""
    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=256, n_positions=64)
    return hf.GPT2LMHeadModel(config).eval(), lambda text, **_: {"input_ids": list(text.encode())}


def load_model(folder: Path | None) -> tuple[torch.nn.Module, Any]:
    """A causal model and its tokenizer: from a transformers folder, or SmolLM2-135M from its package."""
    if folder is not None:
        return hf.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval(), tokenizer_of(folder)
    return smollm2_model(), smollm2_tokenizer()


@torch.no_grad()
def losses(model: torch.nn.Module, texts: dict[str, Batches]) -> dict[str, float]:
    """Cross entropy of the next token, in nats, by the name of the text."""
    device = next(model.parameters()).device
    found = {}
    for name, batches in texts.items():
        total = count = 0
        for batch in batches:
            inputs = {key: value.to(device) for key, value in batch.items()}
            logits, words = model(**inputs).logits[:, :-1], inputs["input_ids"][:, 1:]  # [B, S - 1, V], [B, S - 1]
            total += F.cross_entropy(logits.flatten(0, 1).float(), words.flatten(), reduction="sum").item()
            count += words.numel()
        found[name] = total / count
    return found


def random_losses(mod: mc.MoDModel, texts: dict[str, Batches], seeds: int) -> list[dict[str, float]]:
    """The losses with random routers, of each seed: the same blocks and capacities, rows by chance."""
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for router in mod.routers.values():
                router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        found.append(losses(mod, texts))
    return found


def compare(graph: mc.GraphModel, batches: Batches, texts: dict[str, Batches], options: argparse.Namespace) -> dict:
    """Every figure; what is there so far is written after each budget."""
    started = time.perf_counter()
    base = mc.convert(graph, config=mc.MoDConfig(blocks="all", capacity_ratio=0.5))
    sizes = {"batch": options.batch, "sequence": options.rows}
    flops = count_flops(dense_model(base), sizes)
    report: dict[str, Any] = {
        "model": options.model.name if options.model else "tiny" if options.tiny else "SmolLM2-135M-Instruct",
        "sizes": sizes, "device": device_name(options.device), "torch": torch.__version__,
        "options": {name: getattr(options, name) for name in ("attend_to", "trial_batches", "exchanges", "seed")},
        "calibration": {"texts": [path.name for path in options.text],
                        "rows": sum(batch["input_ids"].numel() for batch in batches)},
        "held_out_rows": {name: sum(b["input_ids"].numel() for b in part) for name, part in texts.items()},
        "dense": losses(dense_model(base), texts), "budgets": []}  # fmt: skip
    orders = {objective: pruning_order(graph, batches, min(options.budgets), objective=objective, say=print,
                                       trial_batches=options.trial_batches)
              for objective in ("next-token", "divergence")}  # fmt: skip

    def pruned(order: list[str], budget: float) -> mc.GraphModel:
        return next(model for n in range(1, len(order))
                    if count_flops(model := pruned_model(base, order[:n]), sizes) <= budget * flops)  # fmt: skip

    budgets = sorted(options.budgets, reverse=True)
    shares = [min(count_flops(pruned(order, budget), sizes) / flops for order in orders.values()) for budget in budgets]
    results = calibrate_each(graph, batches, shares, attend_to=options.attend_to, trial_batches=options.trial_batches,
                             exchanges=options.exchanges, seed=options.seed, say=print)  # fmt: skip
    for budget, share, result in zip(budgets, shares, results, strict=True):
        row = {"budget": budget, "pruned_flops": share,
               "pruned": {objective: losses(pruned(order, budget), texts) for objective, order in orders.items()},
               "calibrated_flops": count_flops(result.mod, sizes) / flops, "calibrated": losses(result.mod, texts),
               "report": result.report}  # fmt: skip
        row |= {"random": random_losses(result.mod, texts, options.random_seeds),
                "seconds": time.perf_counter() - started}
        report["budgets"].append(row)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(table(report), flush=True)
    return report


def device_name(device: str) -> str:
    """What the figures were taken on."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def table(report: dict) -> str:
    """The figures as Markdown."""
    def cells(*values: dict[str, float]) -> str:
        return " / ".join(f"{sum(each[name] for each in values) / len(values):.3f}" for name in report["dense"])

    lines = [f"Loss on {' / '.join(report['dense'])}; dense {cells(report['dense'])}.", "",
             "| FLOPs | pruned by the text's loss | pruned by divergence | random rows | calibrated |",
             "|---|---|---|---|---|"]  # fmt: skip
    lines += [f"| {row['calibrated_flops']:.3f} | {' | '.join(map(cells, row['pruned'].values()))} | "
              f"{cells(*row['random'])} | {cells(row['calibrated'])} |" for row in report["budgets"]]
    return "\n".join(lines)


def named(text: str) -> tuple[str, Path]:
    """NAME=FILE."""
    name, _, file = text.partition("=")
    return name, Path(file)


def main() -> None:
    """Reads the options and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a transformers folder; SmolLM2-135M from its package by default")
    parser.add_argument("--text", type=Path, nargs="+", help="what to calibrate on: files, mixed in equal parts")
    parser.add_argument("--held-out", type=named, nargs="+", metavar="NAME=FILE", help="what to measure loss on")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--attend-to", choices=["auto", "all", "chosen"], default="all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=128, help="of the calibration text")
    parser.add_argument("--trial-batches", type=int, default=2, help="on how many of its batches losses are measured")
    parser.add_argument("--exchanges", type=int, default=2, help="how often rows go from block to block at each stage")
    parser.add_argument("--random-seeds", type=int, default=3)
    parser.add_argument("--held-out-sequences", type=int, default=64, help="of each text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where the figures go, as JSON")
    parser.add_argument("--tiny", action="store_true", help="a random model, small sizes, no files needed")
    options = parser.parse_args()
    if options.tiny:
        options.text, options.held_out = [Path(argparse.__file__)], [("code", Path(doctest.__file__))]
        options.batch, options.rows, options.sequences, options.held_out_sequences = 2, 32, 8, 4
        options.trial_batches, options.budgets, options.exchanges, options.random_seeds = 1, [0.8], 1, 1
    if not options.text or not options.held_out:
        parser.error("--text and --held-out are needed")
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    # Losses are compared, not written down to their last digit: a GPU's products may round factors to 10 bits.
    torch.set_float32_matmul_precision("high")
    model, tokenizer = tiny_model() if options.tiny else load_model(options.model)

    def batches_of(path: Path, sequences: int, batch: int) -> Batches:
        return text_batches(read_text(path), tokenizer, ["input_ids", "attention_mask"], batch=batch,
                            rows=options.rows, sequences=sequences)  # fmt: skip

    # Every batch holds sequences of every text, so that the few batches of the trials do too.
    kinds = len(options.text)
    if options.batch % kinds:
        parser.error(f"--batch must be a multiple of the number of texts, {kinds}")
    parts = [batches_of(path, options.sequences // kinds, options.batch // kinds) for path in options.text]
    # As far as the shortest text goes.
    together = zip(*parts, strict=False)
    batches = [{name: torch.cat([part[name] for part in each]) for name in each[0]} for each in together]
    texts = {name: batches_of(path, options.held_out_sequences, options.batch) for name, path in options.held_out}
    model = model.to(options.device)
    graph = mc.capture(model, {name: value.to(options.device) for name, value in batches[0].items()})
    compare(graph, batches, texts, options)


if __name__ == "__main__":
    main()
