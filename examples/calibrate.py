"""Calibrates a pretrained model without training, and compares it with what a user would pick instead, at equal FLOPs.

    python examples/calibrate.py --text prose.txt --held-out plays=plays.txt --held-out code=code.txt -o calibrated.json
    python examples/calibrate.py --tiny     a random model on Python's own sources: that it runs, not what it can do

For each budget, in nats per token of text that was not used: the dense model; pruned, whole blocks dropped, chosen by
measured loss; calibrated, routed to the pruned model's FLOPs; and the same routed model with random routers. Text of
another kind than the calibration text shows most. The default sizes want a GPU (--device cuda); two cores take
--batch 4 --rows 128 --sequences 40 --trial-batches 1 --held-out-sequences 16, and some patience.
"""

import argparse
import doctest
import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from pretrained import SMOLLM2, folder_of, smollm2_model
from torch.nn import functional as F

import modcompile as mc
from modcompile.calibration import calibrate, pruning_order, read_text, text_batches, tokenizer_of
from modcompile.flops import count_flops
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
    weights = folder_of(*SMOLLM2)
    file = next(weights.glob("*.gguf")).name
    return smollm2_model(), hf.AutoTokenizer.from_pretrained(weights, gguf_file=file, local_files_only=True)


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


def randomise(mod: mc.MoDModel, seed: int) -> None:
    """Gives the routers random directions, of the length that the fitted ones have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in mod.routers.values():
            noise = torch.randn(router.weight.shape, generator=generator).to(router.weight)
            router.weight.copy_(noise * router.weight.norm() / noise.norm())


def compare(graph: mc.GraphModel, batches: Batches, texts: dict[str, Batches], options: argparse.Namespace) -> dict:
    """Every figure; what is there so far is written after each budget."""
    base = mc.convert(graph, config=mc.MoDConfig(blocks="all", capacity_ratio=0.5))
    sizes = {"batch": options.batch, "sequence": options.rows}
    flops = count_flops(dense_model(base), sizes)
    report: dict[str, Any] = {
        "model": options.model.name if options.model else "tiny" if options.tiny else "SmolLM2-135M-Instruct",
        "sizes": sizes, "device": options.device, "torch": torch.__version__, "seed": options.seed,
        "calibration": {"text": options.text.name, "rows": sum(batch["input_ids"].numel() for batch in batches),
                        "trial_batches": options.trial_batches},
        "held_out_rows": {name: sum(b["input_ids"].numel() for b in part) for name, part in texts.items()},
        "dense": losses(dense_model(base), texts), "budgets": []}  # fmt: skip
    order = pruning_order(graph, batches, min(options.budgets), trial_batches=options.trial_batches, say=print)
    for budget in sorted(options.budgets, reverse=True):
        pruned = next(model for n in range(1, len(order) + 1)
                      if count_flops(model := pruned_model(base, order[:n]), sizes) <= budget * flops)
        share = count_flops(pruned, sizes) / flops
        result = calibrate(graph, batches, share, attend_to=options.attend_to, trial_batches=options.trial_batches,
                           seed=options.seed, say=print)  # fmt: skip
        row = {"budget": budget, "pruned_flops": share, "pruned": losses(pruned, texts),
               "calibrated_flops": count_flops(result.mod, sizes) / flops, "calibrated": losses(result.mod, texts),
               "report": result.report}  # fmt: skip
        randomise(result.mod, options.seed)
        report["budgets"].append(row | {"random": losses(result.mod, texts)})
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def table(report: dict) -> str:
    """The figures as Markdown."""
    def cells(values: dict[str, float]) -> str:
        return " / ".join(f"{value:.3f}" for value in values.values())

    lines = [f"Loss on {' / '.join(report['dense'])}; dense {cells(report['dense'])}.", "",
             "| FLOPs | pruned | calibrated | random routers |", "|---|---|---|---|"]
    lines += [f"| {row['calibrated_flops']:.3f} | {cells(row['pruned'])} | {cells(row['calibrated'])} | "
              f"{cells(row['random'])} |" for row in report["budgets"]]
    return "\n".join(lines)


def named(text: str) -> tuple[str, Path]:
    """NAME=FILE."""
    name, _, file = text.partition("=")
    return name, Path(file)


def main() -> None:
    """Reads the options and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a transformers folder; SmolLM2-135M from its package by default")
    parser.add_argument("--text", type=Path, help="what to calibrate on")
    parser.add_argument("--held-out", type=named, action="append", metavar="NAME=FILE", help="what to measure loss on")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--attend-to", choices=["auto", "all", "chosen"], default="all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=256, help="of the calibration text")
    parser.add_argument("--trial-batches", type=int, default=4, help="on how many of its batches blocks are chosen")
    parser.add_argument("--held-out-sequences", type=int, default=64, help="of each text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where the figures go, as JSON")
    parser.add_argument("--tiny", action="store_true", help="a random model, small sizes, no files needed")
    options = parser.parse_args()
    if options.tiny:
        options.text, options.held_out = Path(argparse.__file__), [("code", Path(doctest.__file__))]
        options.batch, options.rows, options.sequences, options.held_out_sequences = 2, 32, 8, 4
        options.trial_batches, options.budgets = 1, [0.8]
    if options.text is None or not options.held_out:
        parser.error("--text and --held-out are needed")
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    model, tokenizer = tiny_model() if options.tiny else load_model(options.model)

    def batches_of(path: Path, sequences: int) -> Batches:
        return text_batches(read_text(path), tokenizer, ["input_ids", "attention_mask"], batch=options.batch,
                            rows=options.rows, sequences=sequences)  # fmt: skip

    batches = batches_of(options.text, options.sequences)
    texts = {name: batches_of(path, options.held_out_sequences) for name, path in options.held_out}
    model = model.to(options.device)
    graph = mc.capture(model, {name: value.to(options.device) for name, value in batches[0].items()})
    print(table(compare(graph, batches, texts, options)))


if __name__ == "__main__":
    main()
