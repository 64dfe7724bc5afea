"""Is a routed decoder worth its FLOPs? Trains dense, routed and control models from scratch at equal training FLOPs.

    python examples/scaling.py --text corpus/*.txt --output scaling      all of it; --minutes 9 stops in time, and the
                                                                         same command again goes on from there; other
                                                                         processes may add other --models or --seeds
    python examples/scaling.py --tiny                                    seconds, on a CPU

The models are Llama-shaped decoders of bytes, or of the tokens of --tokenizer:

    dense    every row through every block
    small    dense, of fewer blocks, so that its forward costs what the routed one's does: what else a user would train
    mod      every other block takes an eighth of the rows; the paper's gate and loss, a predictor beside each router
    noise    the same with Gaussian noise in the place of routers: what routing is worth without knowing anything

Every model gets the same number of training FLOPs, forward and backward as counted, and so as many tokens as these pay
for: a cheaper model sees more. Batches, their order, the optimizer and the shape of the schedule are the same for all.
This is the question of figure 3 of Raposo et al. 2024 at a small scale. There the budgets are 6e18 to 1e20 FLOPs and
every model's size is fitted to its budget; here they are a thousandth of that, the size is one, and far too little is
trained for it. So what counts is the difference at equal FLOPs, not the losses, nor how the difference goes on.

Held-out loss is given with top-k, which looks ahead, and with the causal decision: the sign of the router's logit, a
predictor's, or a threshold. The shares tell how many rows those let in.

The plan. At 32 million parameters and 512 tokens a step of the dense model takes about 0.22 GFLOP a token, 64 x 512
tokens a batch. Budgets of 2.5e15 and 7.5e15 are 340 and 1,030 steps of it; four models, two seeds: 8e16 in all. An H100
reaches perhaps 90 TFLOP/s in products this small, which makes 15 minutes, and compiling four models 3 or 4 more.
"""

import argparse
import dataclasses
import math
import platform
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cells import Cells
from transformers import LlamaConfig, LlamaForCausalLM

import modcompile as mc
from modcompile.errors import UsageError
from modcompile.flops import count_flops
from modcompile.model import GraphModel, MoDModel
from modcompile.trace import RoutingTrace, trace_routing
from modcompile.training import (
    Predictors,
    QuantileThresholds,
    WithLoss,
    causal_model,
    load_checkpoint,
    next_token_loss,
    routing_accuracy,
    save_checkpoint,
    step_flops,
)
from modcompile.variants import pruned_blocks

# B batch  S tokens
VARIANTS = ("dense", "small", "mod", "noise")
HELD_OUT = 20


def corpus(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Tokens to train on, tokens held out, each int64 [tokens], and the size of the vocabulary.

    Every 20th file is held out; of fewer files, the last twentieth of each.
    """
    paths = [Path(path) for path in options.text] if options.text else standard_library()[:options.limit_files]
    encode, vocabulary = reader(options.tokenizer)
    kept: list[torch.Tensor] = []
    held: list[torch.Tensor] = []
    for index, path in enumerate(paths):
        content = path.read_bytes()
        if b"\0" in content:
            raise UsageError("a file of the corpus is not text", expected="no NUL bytes", found="some", where=path)
        tokens = torch.tensor(encode(content), dtype=torch.int64)
        border = len(tokens) - len(tokens) // HELD_OUT
        if len(paths) >= HELD_OUT:
            border = 0 if index % HELD_OUT == HELD_OUT - 1 else len(tokens)
        kept.append(tokens[:border])
        held.append(tokens[border:])
    train, test = torch.cat(kept), torch.cat(held)
    for name, part in (("train on", train), ("hold out", test)):
        if len(part) <= options.length:
            raise UsageError(f"the corpus is too short to {name}", expected=f"more than {options.length} tokens",
                             found=f"{len(part)} tokens in {len(paths)} files", where="--text")
    return train, test, vocabulary


def standard_library() -> list[Path]:
    """Python's own sources, which every machine has: some 13 MB of text."""
    root = Path(sysconfig.get_path("stdlib"))
    return [path for path in sorted(root.rglob("*.py"))
            if not {"site-packages", "dist-packages", "test", "tests"} & set(path.relative_to(root).parts)]


def reader(tokenizer: str | None):
    """What turns a file's bytes into tokens, and how many tokens there are."""
    if tokenizer is None:
        return list, 256
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(tokenizer)
    return lambda content: loaded.encode(content.decode(errors="replace")).ids, loaded.get_vocab_size()


@dataclasses.dataclass
class Subject:
    """A model of the comparison, with what trains beside it."""

    name: str
    layers: int
    model: WithLoss
    flops: int  # of a training step of one sequence, forward and backward
    forward: int  # of a sequence

    @property
    def mod(self) -> GraphModel:
        """The model without its loss."""
        return self.model.mod


def decoder(options: argparse.Namespace, layers: int, vocabulary: int) -> LlamaForCausalLM:
    """A dense decoder with random weights."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=options.width, intermediate_size=options.width * 11 // 4,
        num_hidden_layers=layers, num_attention_heads=options.heads, num_key_value_heads=options.heads,
        max_position_embeddings=options.length, use_cache=False))


def build(options: argparse.Namespace, vocabulary: int) -> dict[str, Subject]:
    """The four, on the device."""
    example = {"input_ids": torch.zeros(2, options.length, dtype=torch.int64)}
    sizes = {"batch": 1, "sequence": options.length}

    def routed(**kind) -> MoDModel:
        config = mc.MoDConfig(blocks="every-other", capacity_ratio=0.125, **kind)
        return mc.convert(decoder(options, options.layers, vocabulary), example, config).to(options.device)

    def subject(name: str, mod: GraphModel, layers: int = options.layers, **losses) -> Subject:
        model = WithLoss(mod, **losses).train()
        ids = example["input_ids"][:1].to(options.device)
        flops = step_flops(lambda: model(labels=ids, input_ids=ids)["loss"])
        return Subject(name, layers, model, flops, count_flops(mod, sizes))

    def dense(name: str, layers: int) -> Subject:
        return subject(name, mc.capture(decoder(options, layers, vocabulary), example).to(options.device), layers)

    mod = routed(gate=options.gate)
    return {"dense": dense("dense", options.layers),
            "small": dense("small", options.layers - len(pruned_blocks(mod, sizes))),
            "mod": subject("mod", mod, routing_weight=options.routing_weight, predictors=Predictors(mod)),
            "noise": subject("noise", routed(router="noise", gate="straight-through"))}


def initialise(subject: Subject, options: argparse.Namespace, vocabulary: int, seed: int) -> None:
    """The weights of a seed: new ones in the same tensors, so that what is compiled stays so."""
    torch.manual_seed(seed)
    state = subject.mod.state_dict() | decoder(options, subject.layers, vocabulary).state_dict()
    subject.mod.load_state_dict(state)
    if subject.model.predictors is not None:
        assert isinstance(subject.mod, MoDModel)
        for router in subject.mod.routers.values():
            # All zeros would choose the first rows of every sequence, and learn that they are the ones.
            torch.nn.init.normal_(router.weight, std=0.02)
            torch.nn.init.ones_(router.bias)
        subject.model.predictors.load_state_dict(Predictors(subject.mod).state_dict())


def train(subject: Subject, step_model, tokens: torch.Tensor, steps: int, seed: int, folder: Path,
          options: argparse.Namespace, deadline: float) -> dict[str, float] | None:
    """Trains from where the folder's checkpoints end; None if the time is up before it is done."""
    # Predictors see a hidden state that moves, and are small enough to follow it.
    beside = list(subject.model.predictors.parameters()) if subject.model.predictors is not None else []
    own = list(subject.mod.parameters())
    optimizer = torch.optim.AdamW([
        {"params": [p for p in own if p.dim() > 1], "weight_decay": 0.1, "times": 1.0},
        {"params": [p for p in own if p.dim() < 2], "weight_decay": 0.0, "times": 1.0},
        *([{"params": beside, "weight_decay": 0.0, "times": options.predictor_rate}] if beside else []),
    ], lr=options.learning_rate, betas=(0.9, 0.95), fused=options.device == "cuda")
    objects = {"model": subject.model, "optimizer": optimizer}
    times: list[float] = []
    columns = torch.arange(options.length, device=options.device)
    saved, warmup = time.monotonic(), max(1, steps // 20)
    for step in range(load_checkpoint(folder, **objects), steps):
        if time.monotonic() > deadline or time.monotonic() - saved > options.save_every_s:
            save_checkpoint(folder, step, **objects)
            saved = time.monotonic()
            if saved > deadline:
                return None
        began = time.perf_counter()
        rate = min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate * group["times"]
        # The rows of a step, whatever the model, and whether it was interrupted.
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        first = torch.randint(len(tokens) - options.length, (options.batch, 1), generator=generator)
        ids = tokens[first.to(options.device) + columns]  # [B, S]
        subject.model.step = step
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            loss = step_model(labels=ids, input_ids=ids)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(subject.model.parameters(), 1.0)
        optimizer.step()
        times.append(time.perf_counter() - began)
    step_s = statistics.median(times[3:] or times or [math.nan])
    return {"step_ms": 1e3 * step_s, "tflops_per_s": subject.flops * options.batch / step_s / 1e12}


@torch.no_grad()
def held_out(model: GraphModel, rows: torch.Tensor, options: argparse.Namespace,
             watch: Callable[[RoutingTrace], None] = lambda trace: None) -> float:
    """The loss of rows [rows, S], in nats a token; every batch's trace is shown to ``watch``."""
    total = 0.0
    for ids in rows.split(options.batch):
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            if isinstance(model, MoDModel):
                with trace_routing(model) as trace:
                    logits = model(input_ids=ids).logits
                watch(trace)
            else:
                logits = model(input_ids=ids).logits
        total += len(ids) * next_token_loss(logits, ids).item()
    return total / len(rows)


def mean_over_blocks(values: dict[str, torch.Tensor]) -> float:
    """Of what is known of each block."""
    return torch.stack(list(values.values())).mean().item()


@torch.no_grad()
def evaluate(subject: Subject, tokens: torch.Tensor, held: torch.Tensor, options: argparse.Namespace) -> dict:
    """Held-out losses; of a routed model also with rows that decide for themselves, and how well they know."""
    mod, predictors = subject.mod.eval(), subject.model.predictors
    rows = held[:len(held) // options.length * options.length].view(-1, options.length)
    rows = rows[:options.held_out_rows].to(options.device)
    result: dict = {"held_out_tokens": rows.numel()}
    if predictors is None:
        result["loss"] = held_out(mod, rows, options)
    else:
        assert isinstance(mod, MoDModel)
        thresholds = QuantileThresholds(mod, decay=0.9)
        some = tokens[:options.batch * options.length * 32]
        held_out(mod, some[:len(some) // options.length * options.length].view(-1, options.length), options,
                 thresholds.update)
        known: dict[str, list[float]] = {"sign": [], "predictor": [], "threshold": []}

        def compare(trace: RoutingTrace) -> None:
            known["sign"].append(mean_over_blocks(routing_accuracy(trace)))
            known["predictor"].append(mean_over_blocks(predictors.accuracy(trace)))
            known["threshold"].append(mean_over_blocks({
                path: (decided == trace[path].taken()).float().mean()
                for path, decided in thresholds.decide(trace).items()}))

        result["loss"] = held_out(mod, rows, options, compare)
        result["causal"] = {}
        for kind, by in (("sign", None), ("predictor", predictors), ("threshold", thresholds)):
            entered: list[float] = []

            def count(trace: RoutingTrace, entered=entered) -> None:
                entered.append(mean_over_blocks({path: block.taken().float().mean() for path, block in trace.items()}))

            loss = held_out(causal_model(mod, by), rows, options, count)
            result["causal"][kind] = {"loss": loss, "accuracy": statistics.fmean(known[kind]),
                                      "rows_that_enter": statistics.fmean(entered)}
    mod.train()
    return result


def cell_name(model: str, budget: float, seed: int) -> str:
    """Of a cell in the results."""
    return f"{model} {budget:.2e} seed {seed}"


def table(cells: list[dict]) -> str:
    """A line for each model and budget, means over the seeds, and one for each causal decision below it."""
    lines = [f"{'FLOPs':>9} {'model':<12} {'blocks':>6} {'forward':>8} {'Mtokens':>8} {'loss':>7} {'+-':>6} "
             f"{'step ms':>8} {'TFLOP/s':>8}"]
    groups: dict[tuple, list[dict]] = {}
    for cell in cells:
        groups.setdefault((cell["budget"], cell["model"]), []).append(cell)
    for (budget, name), group in sorted(groups.items(), key=lambda item: (item[0][0], VARIANTS.index(item[0][1]))):
        def mean(read, group=group):
            return statistics.fmean(read(cell) for cell in group)

        losses = [cell["loss"] for cell in group]
        lines.append(f"{budget:9.2e} {name:<12} {group[0]['layers']:6d} {group[0]['forward_share']:8.3f} "
                     f"{group[0]['tokens'] / 1e6:8.2f} {mean(lambda cell: cell['loss']):7.4f} "
                     f"{(max(losses) - min(losses)) / 2:6.4f} {mean(lambda cell: cell['step_ms']):8.2f} "
                     f"{mean(lambda cell: cell['tflops_per_s']):8.1f}")
        for kind in group[0].get("causal", ()):
            loss, accuracy, share = (mean(lambda cell, kind=kind, key=key: cell["causal"][kind][key])
                                     for key in ("loss", "accuracy", "rows_that_enter"))
            lines.append(f"{'':>9} - {kind:<32} {loss:7.4f}   as top-k for {accuracy:.1%}, {share:.1%} enter")
    return "\n".join(lines)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what depends on the machine filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models, a few steps")
    parser.add_argument("--text", nargs="+", help="text files; by default the sources of Python's standard library")
    parser.add_argument("--tokenizer", help="a tokenizer.json; without one, a token is a byte")
    parser.add_argument("--output", help="a folder for results.json and checkpoints; scaling-out, but for --tiny")
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--budgets", nargs="+", type=float, help="training FLOPs")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--predictor-rate", type=float, default=3.0, help="of the learning rate, for predictors")
    parser.add_argument("--gate", default="raw", choices=("raw", "sigmoid", "tanh", "straight-through"))
    parser.add_argument("--routing-weight", type=float, default=0.01, help="of the router's own loss")
    parser.add_argument("--held-out-rows", type=int, default=512)
    parser.add_argument("--save-every-s", type=float, default=60.0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then, to go on at the next start")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="by default on a GPU, but for --tiny")
    options = parser.parse_args(arguments)
    sizes = {"seeds": [0], "width": 32, "layers": 2, "heads": 2, "length": 32, "batch": 4} if options.tiny else {
        "seeds": [0, 1], "width": 512, "layers": 10, "heads": 8, "length": 512, "batch": 64,
        "budgets": [2.5e15, 7.5e15], "output": "scaling-out"}
    for name, value in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.bf16 = options.device == "cuda"
    if options.compile is None:
        options.compile = options.device == "cuda" and not options.tiny
    options.limit_files = None
    if options.tiny:
        options.held_out_rows, options.limit_files = 16, HELD_OUT
        options.output = options.output or tempfile.mkdtemp()
    return options


def main() -> None:
    """Trains what is not in the results yet, and prints them."""
    options = options_of()
    deadline = time.monotonic() + 60 * options.minutes
    torch.set_float32_matmul_precision("high")
    tokens, held, vocabulary = corpus(options)
    tokens = tokens.to(options.device)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(f"{len(tokens):,} tokens to train on, {len(held):,} held out; {where}")
    cells = Cells(output / "results.json", {
        **{name: value for name, value in sorted(vars(options).items())
           if name not in ("output", "minutes", "save_every_s", "models", "budgets", "seeds")},
        "machine": where, "torch": torch.__version__})  # fmt: skip
    subjects = build(options, vocabulary)
    dense = subjects["dense"]
    budgets = options.budgets or [float(6 * options.batch * dense.flops)]
    for name in options.models:
        pending = [(budget, seed) for budget in budgets for seed in options.seeds
                   if cell_name(name, budget, seed) not in cells]
        if not pending:
            continue
        subject = subjects[name]
        step_model = torch.compile(subject.model, dynamic=False) if options.compile else subject.model
        for budget, seed in pending:
            steps = round(budget / (subject.flops * options.batch))
            folder = output / f"{name}-{budget:.2e}-{seed}"
            initialise(subject, options, vocabulary, seed)
            spent = train(subject, step_model, tokens, steps, seed, folder, options, deadline)
            if spent is None:
                print(table(list(cells.report["cells"].values())))
                print(f"the time is up in {folder.name}: the same command goes on from there")
                return
            cell = {"model": name, "budget": budget, "seed": seed, "layers": subject.layers, "steps": steps,
                    "parameters": sum(p.numel() for p in subject.mod.parameters()),
                    "tokens": steps * options.batch * options.length,
                    "training_flops": steps * options.batch * subject.flops,
                    "forward_share": subject.forward / dense.forward, **spent,
                    **evaluate(subject, tokens, held, options)}
            cells.write(cell_name(name, budget, seed), cell)
            shutil.rmtree(folder, ignore_errors=True)
            print(f"{name} {budget:.2e} seed {seed}: {steps} steps, loss {cell['loss']:.4f}", flush=True)
        # Compiled graphs and their memory.
        torch._dynamo.reset()
    print(table(list(cells.report["cells"].values())))
    print("written:", cells.file)


if __name__ == "__main__":
    main()
