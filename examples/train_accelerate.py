"""Trains a routed decoder with accelerate, in one process or several.

    accelerate launch --num_processes 2 examples/train_accelerate.py     on two GPUs, with accelerate's own options
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/train_accelerate.py --tiny        without GPUs
    python examples/train_accelerate.py --tiny                           one process, a few seconds

The loop is the one of any module. What a routed model adds, its router's loss, is computed in the forward of
``WithLoss``, where DDP sees it.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import modcompile as mc
from modcompile.training import Predictors, WithLoss

# B batch  S tokens


def walks(rows: int, length: int, vocabulary: int) -> torch.Tensor:
    """Made-up text, int64 [rows, S]: each token is the one before it plus one of two strides."""
    return torch.where(torch.rand(rows, length) < 0.8, 1, 7).cumsum(1) % vocabulary


def main() -> None:
    """Converts, trains, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a smaller model and fewer steps")
    parser.add_argument("--output", help="where the routed model is saved")
    options = parser.parse_args()
    steps, length, vocabulary = (6, 33, 64) if options.tiny else (500, 256, 512)
    width, layers = (32, 2) if options.tiny else (256, 8)

    accelerator = Accelerator()
    # The same weights and data in every process; accelerate gives each its share of the batches.
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers,
                                       n_head=4, bos_token_id=0, eos_token_id=0))
    text = walks(16 * steps, length, vocabulary)
    mod = mc.convert(dense, {"input_ids": text[:2]}, mc.MoDConfig(capacity_ratio=0.125, gate="raw"))
    model = WithLoss(mod.train(), routing_weight=0.01, predictors=Predictors(mod))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader([{"input_ids": row, "labels": row} for row in text], batch_size=8)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for step, batch in enumerate(loader):
        if step == steps:
            break
        loss = model(**batch)["loss"]
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if step % max(1, steps // 5) == 0:
            mean = accelerator.gather(loss.detach().reshape(1)).mean().item()
            accelerator.print(f"step {step:4d}  loss {mean:.3f}, of {accelerator.num_processes} processes")
    if accelerator.is_main_process:
        output = Path(options.output or tempfile.mkdtemp()) / "model"
        print("saved:", mod.eval().save_pretrained(output, overwrite=True))
    accelerator.end_training()


if __name__ == "__main__":
    main()
