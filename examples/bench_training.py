"""Times a training step under torch.compile: the routed model, the dense one, a pruned one, and the oracle.

    python examples/bench_training.py --output bench-training.json    GPT-2 medium's shape, 8 x 1024: minutes of an H100
    python examples/bench_training.py --tiny                          seconds, on a CPU and without compiling

Two tasks. "blocks" is the decoder without a head, under a loss that costs nothing: what routing saves of what it
routes. "language model" has a head over 50,257 words and its cross-entropy, which no routing makes cheaper, and the
router's own loss. A step is the forward, the backward and AdamW's update; "gradients" is a step without the update.

Every model is on the same tensors, in bfloat16 (--precision autocast: in float32, computed in bfloat16), and compiled
with CUDA graphs (--no-graphs: without): the kernels of a block that sees an eighth of the rows are over before the host
has launched the next, so that without graphs the host is what is timed. The models take turns in one process. The
FLOPs are those of forward and backward as they run, so a ratio of times above their share is what routing costs, and
what it does not touch.
"""

import argparse
import platform
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from cells import Cells
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

import modcompile as mc
from modcompile.model import GraphModel
from modcompile.training import WithLoss, next_token_loss, step_flops
from modcompile.turns import take_turns
from modcompile.variants import dense_model, oracle_model, pruned_blocks, pruned_model

# B batch  S tokens  D model dim


class Blocks(nn.Module):
    """A decoder without a head."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.decoder = GPT2Model(config)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The last hidden state, [B, S, D]."""
        return self.decoder(input_ids).last_hidden_state


def mean_square(hidden: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """A loss of a hidden state that costs nothing."""
    return hidden.float().square().mean()


TASKS: dict[str, tuple[Callable[[GPT2Config], nn.Module], Callable, float]] = {
    "blocks": (Blocks, mean_square, 0.0),
    "language model": (GPT2LMHeadModel, next_token_loss, 0.01),
}


def measure(task: str, options: argparse.Namespace) -> dict:
    """Milliseconds and FLOPs of every model in one task."""
    make, loss, routing_weight = TASKS[task]
    config = GPT2Config(vocab_size=options.vocabulary, n_positions=options.length, n_embd=options.width,
                        n_layer=options.layers, n_head=options.heads, use_cache=False, bos_token_id=0, eos_token_id=0,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    device, autocast = torch.device(options.device), options.precision == "autocast"
    torch.manual_seed(0)
    ids = torch.randint(options.vocabulary, (options.batch, options.length))
    mod = mc.convert(make(config), {"input_ids": ids[:2]}, mc.MoDConfig(
        blocks="every-other", capacity_ratio=options.capacity_ratio, attend_to=options.attend_to,
        gate="straight-through"))
    for router in mod.routers.values():
        nn.init.normal_(router.weight, std=0.02)
    mod.to(device, torch.float32 if autocast else torch.bfloat16).train()
    dropped = pruned_blocks(mod, {"batch": 1, "sequence": options.length})
    models: dict[str, GraphModel] = {"dense": dense_model(mod), "MoD": mod, "oracle": oracle_model(mod),
                                     "pruned": pruned_model(mod, dropped)}
    optimizer = torch.optim.AdamW(mod.parameters(), lr=1e-5, fused=device.type == "cuda")
    ids = ids.to(device)
    runs: dict[str, Callable[[], None]] = {}
    flops: dict[str, int] = {}
    for name, model in models.items():
        subject = WithLoss(model, loss, routing_weight=routing_weight if name == "MoD" else 0.0).train()
        flops[name] = options.batch * step_flops(lambda s=subject: s(labels=ids[:1], input_ids=ids[:1])["loss"])
        mode = "reduce-overhead" if options.graphs else "default"
        compiled = torch.compile(subject, dynamic=False, mode=mode) if options.compile else subject

        def gradients(compiled=compiled) -> None:
            optimizer.zero_grad()
            # What the graphs of the step before wrote may be written over.
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                value = compiled(labels=ids, input_ids=ids)["loss"]
            value.backward()

        def step(gradients=gradients) -> None:
            gradients()
            optimizer.step()

        runs |= {f"{name} gradients": gradients, f"{name} step": step}
    times = take_turns(runs, device, rounds=options.rounds, warmup=options.warmup, seed=0, say=lambda _: None)
    results = {name: {"step_ms": times[f"{name} step"], "gradients_ms": times[f"{name} gradients"],
                      "flops": flops[name]} for name in models}
    return {"dropped_blocks": len(dropped), "models": results}


def table(tasks: dict[str, dict]) -> str:
    """Medians, and each over the dense model's."""
    lines = [f"{'task':<15} {'model':<7} {'FLOPs':>6} {'step ms':>9} {'/dense':>7} {'gradients':>10} {'/dense':>7}"]
    for task, measured in tasks.items():
        dense = measured["models"]["dense"]
        for name, one in measured["models"].items():
            step, gradients, of_step, of_gradients = (
                statistics.median(m[key]) for m in (one, dense) for key in ("step_ms", "gradients_ms"))
            lines.append(f"{task:<15} {name:<7} {one['flops'] / dense['flops']:6.3f} {step:9.2f} "
                         f"{step / of_step:7.3f} {gradients:10.2f} {gradients / of_gradients:7.3f}")
    return "\n".join(lines)


def main() -> None:
    """Measures each task that is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model, few rounds, not compiled")
    parser.add_argument("--output", help="a JSON file, which a second start completes")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--precision", choices=("bf16", "autocast"), default="bf16")
    parser.add_argument("--capacity-ratio", type=float, default=0.125)
    parser.add_argument("--attend-to", choices=("chosen", "all"), default="chosen")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="by default, but for --tiny")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="CUDA graphs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    shape = {"width": 32, "layers": 2, "heads": 2, "length": 64, "vocabulary": 64, "warmup": 1} if options.tiny else \
        {"width": 1024, "layers": 24, "heads": 16, "length": 1024, "vocabulary": 50257, "warmup": 5}
    vars(options).update(shape)
    if options.tiny:
        options.batch, options.rounds = 2, 2
    if options.compile is None:
        options.compile = not options.tiny
    path = Path(options.output or Path(tempfile.mkdtemp()) / "bench-training.json")

    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    cells = Cells(path, {"machine": where, "torch": torch.__version__, **{
        name: value for name, value in sorted(vars(options).items()) if name not in ("output", "tasks")}})
    for task in options.tasks:
        if task not in cells:
            cells.write(task, measure(task, options))
            torch._dynamo.reset()
    print(f"{where}, {options.batch} x {options.length}, {options.precision}")
    print(table(cells.report["cells"]))
    print("written:", path)


if __name__ == "__main__":
    main()
