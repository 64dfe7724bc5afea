"""Trains a routed model with the transformers Trainer, distilled from the dense one; can be killed and started again.

    python examples/train_trainer.py --output run --model path/to/model --text corpus.txt
    python examples/train_trainer.py --tiny     a few seconds: a random model on made-up text

The dense model teaches; capacities fall from 1 to the target in the first half. A second start with the same options
goes on from the last whole checkpoint.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import modcompile as mc
from modcompile.training import CapacityAnnealing, Teacher, WithLoss
from modcompile.training.callback import RoutedTraining, complete_checkpoint

# B batch  S tokens


def load(options: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model, and its text as rows of tokens, int64 [rows, S]."""
    if options.tiny:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                             num_attention_heads=4, num_key_value_heads=2)
        # A walk: each token is the one before it plus one of two strides.
        strides = torch.where(torch.rand(64, options.length) < 0.8, 1, 7)
        return LlamaForCausalLM(config), strides.cumsum(1) % 64
    tokens = AutoTokenizer.from_pretrained(options.model)(Path(options.text).read_text(encoding="utf-8")).input_ids
    rows = len(tokens) // options.length
    if rows == 0:
        raise SystemExit(f"{options.text} has {len(tokens)} tokens, which is less than a row of {options.length}")
    return (AutoModelForCausalLM.from_pretrained(options.model),
            torch.tensor(tokens[:rows * options.length]).view(rows, options.length))


def main() -> None:
    """Converts, trains, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a random model, made-up text, a few steps")
    parser.add_argument("--model", help="a folder of transformers")
    parser.add_argument("--text", help="a text file")
    parser.add_argument("--output", help="checkpoints, and at the end the routed model, in its folder model")
    parser.add_argument("--length", type=int, help="tokens of a row", default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args()
    if not options.tiny and not (options.model and options.text and options.output):
        parser.error("give --model, --text and --output, or --tiny")
    options.length = options.length or (33 if options.tiny else 512)
    steps = options.steps or (8 if options.tiny else 1000)
    output = Path(options.output or tempfile.mkdtemp())

    dense, rows = load(options)
    config = mc.MoDConfig(capacity_ratio=0.25, gate="straight-through", attend_to="all")
    mod = mc.convert(dense.eval(), {"input_ids": rows[:2]}, config)
    model = WithLoss(mod, teacher=Teacher(mod), logits_weight=1.0, routing_weight=0.01)
    annealing = CapacityAnnealing(mod, max(1, steps // 2), stages=min(4, max(1, steps // 2)))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output), max_steps=steps, per_device_train_batch_size=options.batch,
            learning_rate=1e-3 if options.tiny else options.learning_rate, logging_steps=max(1, steps // 4),
            save_steps=max(1, steps // 4), save_total_limit=2, report_to=[], disable_tqdm=True,
            # The routed graph takes its inputs by keyword: the Trainer cannot read their names off a signature.
            remove_unused_columns=False, label_names=["labels"],
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[RoutedTraining(model, annealing)],
    )
    # The teacher is no part of what is trained, so the Trainer does not move it.
    model.move_teacher(trainer.args.device)
    trainer.train(resume_from_checkpoint=complete_checkpoint(output))
    print("losses:", ", ".join(f"{name} {loss.item():.3f}" for name, loss in model.losses.items()))
    print("saved:", mod.eval().save_pretrained(output / "model", overwrite=True))


if __name__ == "__main__":
    main()
