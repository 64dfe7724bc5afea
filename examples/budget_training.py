"""How a decoder is trained for a budget of FLOPs, and its loss then: for train_budgets.py, and in part for tasks.py."""

import argparse
import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import modcompile as mc
from modcompile.flops import flops_by_module
from modcompile.routers import NoiseRouter, router_path
from modcompile.text_file import read_text
from modcompile.training import (
    CapacityAnnealing,
    QuantileThresholds,
    RouterRefits,
    causal_model,
    logits_loss,
    next_token_loss,
)
from modcompile.variants import dense_model

# B batch  S rows  V vocabulary
WARMUP = 0.05  # of the steps


@dataclasses.dataclass
class Texts:
    """Tokens to train on, and of each held-out text, on the device."""

    train: torch.Tensor  # [N]
    held_out: dict[str, torch.Tensor]  # [batches, B, S] each

    def batches(self, batch: int, rows: int, seed: int) -> Iterator[torch.Tensor]:
        """Random windows [B, S], the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.arange(rows)
        while True:
            starts = torch.randint(len(self.train) - rows, (batch, 1), generator=generator)
            yield self.train[(starts + offsets).to(self.train.device)]

    def calls(self, options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
        """What models are calibrated on, and routers fitted to: sequences spread over what there is to train on."""
        return [{"input_ids": ids} for ids in windows(
            self.train, options.calibration_sequences, options.calibration_batch, options.rows)]


def tokens_of(path: Path, tokenizer: Callable[..., Any]) -> torch.Tensor:
    """A text's tokens [N]. It goes to the tokenizer in parts, for it warns of long ones and slows down."""
    text = read_text(path)
    parts = (text[i:i + 100_000] for i in range(0, len(text), 100_000))
    return torch.cat([torch.tensor(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts])


def windows(tokens: torch.Tensor, count: int, batch: int, rows: int) -> torch.Tensor:
    """As many as ``count`` sequences, spread over a text, [batches, B, S]."""
    whole = tokens[:len(tokens) // rows * rows].view(-1, rows)
    count = min(count, len(whole)) // batch * batch
    return whole[torch.linspace(0, len(whole) - 1, count).long()].view(-1, batch, rows)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def text_loss(model: nn.Module, batches: torch.Tensor) -> float:
    """Of [batches, B, S] tokens."""
    with autocast(batches.device):
        return torch.stack([next_token_loss(model(ids).logits, ids) for ids in batches]).mean().item()


def losses(model: nn.Module, texts: Texts) -> dict[str, float]:
    """By the name of the text."""
    model.eval()
    return {name: text_loss(model, batches) for name, batches in texts.held_out.items()}


@torch.no_grad()
def causal_losses(mod: mc.MoDModel, texts: Texts, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The losses when each row decides for itself, and the FLOPs of that, as a share of the dense model's, by text.

    Thresholds are of the text that the model was trained on: of another one more rows may enter, or fewer.
    """
    thresholds = QuantileThresholds(mod, decay=0.9)
    batches = texts.batches(options.batch, options.rows, seed + 1000)
    for _ in range(options.threshold_batches):
        with mc.trace_routing(mod) as trace, autocast(texts.train.device):
            mod(next(batches))
        thresholds.update(trace)
    causal = causal_model(mod, thresholds)
    sizes = {"batch": options.batch, "sequence": options.rows}
    routed, dense = flops_by_module(mod, sizes), flops_by_module(dense_model(mod), sizes)
    ratios = dict(zip(mod.routers, mod.config.ratios(list(mod.routers)), strict=True))
    found: dict[str, Any] = {"losses": {}, "flops": {}}
    for name, text in texts.held_out.items():
        flops, made = float(routed[""]), []
        for ids in text:
            with mc.trace_routing(causal) as trace:
                made.append(text_loss(causal, ids[None]))
            for path, block in trace.items():
                # A block's cost grows with its rows alike, from what it is at its capacity to the dense block's.
                more = (block.taken().float().mean().item() - ratios[path]) / (1 - ratios[path])
                flops += more * (dense[path] - routed[path]) / len(text)
        found["losses"][name], found["flops"][name] = statistics.fmean(made), flops / dense[""]
    return found


def cosine(optimizer: torch.optim.Optimizer, steps: int, warmup_share: float) -> torch.optim.lr_scheduler.LambdaLR:
    """Rates that rise over a share of the steps, and fall to nothing as a cosine does."""
    warmup = max(1, round(warmup_share * steps))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)))


def train(model: mc.GraphModel, teacher: mc.GraphModel, texts: Texts, seed: int, steps: int,
          options: argparse.Namespace) -> dict[str, float]:
    """Trains in place, on the batches of a seed.

    On the way capacities come down to what they are, and routers are fitted again to what rows matter by then.

    Returns:
        Seconds, and the mean training loss of the last tenth of the steps.
    """
    model.train()
    device = texts.train.device
    routers = {id(p) for router in model.routers.values() for p in router.parameters()}
    groups = [{"params": [p for p in model.parameters() if id(p) not in routers]},
              {"params": [p for p in model.parameters() if id(p) in routers], "lr": options.router_lr}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], options.lr, (0.9, 0.95),
                                  weight_decay=0.0, fused=device.type == "cuda")
    rates = cosine(optimizer, steps, WARMUP)
    batches, last, start = texts.batches(options.batch, options.rows, seed), [], time.perf_counter()

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids).logits
        with torch.no_grad():
            expected = teacher(ids).logits
        return (1 - options.distill) * next_token_loss(logits, ids) + options.distill * logits_loss(logits, expected)

    step_loss = torch.compile(loss_of, dynamic=False) if options.compile else loss_of
    schedules: list[CapacityAnnealing | RouterRefits] = []
    if options.anneal and isinstance(model, mc.MoDModel) and model.routers:
        schedules.append(CapacityAnnealing(model, round(options.anneal * steps), options.anneal_stages))
    if options.refit and routers:
        schedules.append(RouterRefits(model, texts.calls(options), {round(share * steps) for share in options.refit}))
    for step in range(steps):
        for schedule in schedules:
            schedule.update(step)
        ids = next(batches)
        with autocast(device):
            loss = step_loss(ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step >= 0.9 * (steps - 1):
            last.append(loss.detach())
        if step % 100 == 0 and not math.isfinite(norm.item()):
            raise SystemExit(f"the gradients of step {step} are not numbers")
    # What was compiled holds the model.
    torch._dynamo.reset()
    return {"seconds": time.perf_counter() - start, "training_loss": torch.stack(last).mean().item()}


def stochastic(mod: mc.MoDModel) -> mc.MoDModel:
    """The same blocks and capacities, with rows chosen at random at every call."""
    made = copy.deepcopy(mod)
    for path in made.routers:
        made.graph_module.set_submodule(router_path(path), NoiseRouter())
    return made
