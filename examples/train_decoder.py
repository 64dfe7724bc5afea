"""Routes a hand-written decoder, trains it in a plain loop, saves it, and runs it as an ONNX Runtime engine.

    python examples/train_decoder.py                         a minute on two cores
    python examples/train_decoder.py --tiny                  a few seconds
    python examples/train_decoder.py --checkpoints folder    writes checkpoints, and goes on from the last one

The task: after a marker, repeat the letter that came before it. Most positions are noise that no depth can predict, so
a router has something to learn: which rows are worth a block.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import modcompile as mc
from modcompile.training import (
    CapacityAnnealing,
    check_finite,
    load_checkpoint,
    routing_accuracy,
    routing_losses,
    save_checkpoint,
)

# B batch  S rows  D model dim  H heads
MARKER = 0


class Block(nn.Module):
    """Pre-norm attention and MLP, as anybody would write it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, S, D/H]
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """A small causal language model."""

    def __init__(self, vocabulary: int, width: int, heads: int, depth: int, length: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, vocabulary] of ids [B, S]."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(size: int, length: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with markers; the target after a marker is the letter before it, elsewhere none (-100)."""
    ids = torch.randint(1, vocabulary, (size, length))
    marked = (torch.rand(size, length) < 0.1) & (torch.arange(length) > 0)
    ids[marked] = MARKER
    targets = torch.where(marked, ids.roll(1, 1), -100)
    return ids, targets


def main() -> None:
    """Converts, trains, saves, loads, builds, verifies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a smaller model and fewer steps")
    parser.add_argument("--checkpoints", help="a folder for checkpoints, to go on from the last one in it")
    options = parser.parse_args()
    tiny = options.tiny
    torch.manual_seed(0)
    vocabulary, length, steps = 24, 64, 20 if tiny else 300
    model = Decoder(vocabulary, 32 if tiny else 64, 4, 4, length)

    # "raw" is the paper's gate: the router's logit scales the block's update, so the router trains with the model.
    config = mc.MoDConfig(blocks="every-other", capacity_ratio=0.25, gate="raw")
    mod = mc.convert(model, (torch.randint(0, vocabulary, (2, length - 1)),), config)
    print("routed:", ", ".join(mod.routers))

    # The first third starts as the dense model and ends at the capacity asked for.
    annealing = CapacityAnnealing(mod, steps // 3, stages=4)
    optimizer = torch.optim.AdamW(mod.parameters(), lr=3e-3)
    start = load_checkpoint(options.checkpoints, model=mod, optimizer=optimizer) if options.checkpoints else 0
    every = max(1, steps // 5)
    for step in range(start, steps):
        annealing.update(step)
        ids, targets = batch(16, length - 1, vocabulary)
        with mc.trace_routing(mod) as trace:
            losses = {"task": F.cross_entropy(mod(ids).flatten(0, 1), targets.flatten())}
        # Teaches the sign of a logit whether its row is among the K, for decisions that do not look ahead.
        losses |= {f"routing of {path}": 0.01 * loss for path, loss in routing_losses(trace).items()}
        check_finite(losses, step, trace)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        if step % every == 0 or step == steps - 1:
            right = torch.stack(list(routing_accuracy(trace).values())).mean()
            print(f"step {step:4d}  capacity {float(annealing.ratios(step)[0]):.3f}  loss {losses['task'].item():.3f}  "
                  f"{right:.0%} of the choices known from the row alone")
            if options.checkpoints:
                save_checkpoint(options.checkpoints, step + 1, model=mod, optimizer=optimizer)

    ids, _ = batch(8, length - 1, vocabulary)
    with mc.trace_routing(mod.eval()) as trace, torch.no_grad():
        mod(ids)
    for path, choice in trace.items():
        share = (ids.gather(1, choice.positions) == MARKER).float().mean()
        print(f"{path}: {share:.0%} of the rows it took are markers, of which the text has "
              f"{(ids == MARKER).float().mean():.0%}")

    with tempfile.TemporaryDirectory() as folder:
        mod.save_pretrained(Path(folder) / "model")
        loaded = mc.load(Path(folder) / "model")
        engine = mc.build_engine(loaded, Path(folder) / "engine", runtime="ort")
        mc.verify(loaded, engine, {"ids": ids})
        logits = engine.run({"ids": ids.numpy()})["output"]
        print("engine:", engine.runtime, "logits", logits.shape, "verified against the model")


if __name__ == "__main__":
    main()
