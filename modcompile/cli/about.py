"""Verbs that only tell: report, doctor, passes."""

__all__ = ["doctor", "passes", "report"]

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from modcompile.cli import options as opt
from modcompile.cli.console import emit, table, working
from modcompile.cli.summary import summarise, summary_table
from modcompile.errors import UsageError

if TYPE_CHECKING:
    from modcompile.model import MoDModel


def report(
    model: opt.ModelArgument,
    text: Annotated[Path | None, typer.Option(
        metavar="FILE", help="A UTF-8 text to run the model over: -o FILE.html is written, a page that shows which "
        "tokens go through which blocks.")] = None,
    output: Annotated[Path | None, typer.Option(
        "--output", "-o", metavar="FILE.html", help="With --text: the page; one that exists is replaced.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(
        metavar="FOLDER", help="With --text: the folder of the tokenizer, which is the dense model's.")] = None,
    by_line: Annotated[bool, typer.Option(
        "--by-line", help="With --text: every line is read by itself, with the tokenizer's special tokens, and padded. "
        "By default the text is cut into passages of full length.")] = False,
    passages: Annotated[int | None, typer.Option(
        min=1, help="With --text: the largest number of passages to read; 16 by default.")] = None,
    shape: opt.Shapes = None,
    as_json: opt.AsJson = False,
) -> None:
    """Sums up a converted model: routed blocks, capacities, parameters, and FLOPs for the given shape.

    With --text it also runs the model over a text, beside the dense model and a pruned one, and writes a page about the
    routing; --shape input_ids=4x256 says how the text is cut, four passages of at most 256 tokens a call.
    """
    from modcompile.load_source import load_source

    shapes = opt.read_shapes(shape)
    if text is None:
        for option, value in (("--output", output), ("--tokenizer", tokenizer), ("--by-line", by_line),
                              ("--passages", passages)):
            if value:
                raise UsageError(f"{option} is for a report on a text", found=value, where=option,
                                 fix="add --text FILE, or leave it out")
    elif output is None or tokenizer is None:
        raise UsageError("a report on a text needs a page to write and a tokenizer",
                         expected="--text FILE --tokenizer FOLDER -o FILE.html",
                         found=f"no {'--output' if output is None else '--tokenizer'}", where="--text")
    with working("loading the model") as say:
        source = load_source(model)
        if source.converted is None:
            raise UsageError("the model is not converted", expected="a folder that convert wrote", where=model,
                             fix=f"modcompile convert {model} -o FOLDER, or modcompile inspect {model}")
        say("counting")
        if text is None or output is None or tokenizer is None:
            summary = summarise(source.converted, shapes)
            shown = summary_table(model, summary)
        else:
            summary = _report_on(source.converted, model, text, output, tokenizer, by_line, passages or 16, shapes, say)
            shown = Text(f"{output}: {summary['tokens']} tokens in {summary['passages']} passages, of which "
                         f"{summary['overall']['rate']:.1%} go through a routed block")
    emit(as_json, summary, shown)


def _report_on(mod: "MoDModel", model: str, text: Path, output: Path, tokenizer: Path, by_line: bool, passages: int,
               shapes: dict[str, tuple[int, ...]] | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes the page, and returns what it says in short."""
    from modcompile.insight import measure, read_passages, write_page
    from modcompile.text_file import read_text, tokenizer_of

    size = next(iter(shapes.values())) if shapes else (4, 256)
    if len(shapes or ()) > 1 or len(size) != 2:
        raise UsageError("a text is cut into batches of one shape", expected="--shape input_ids=4x256", found=shapes,
                         where="--shape")
    batch, rows = size
    words, reader = read_text(text), tokenizer_of(tokenizer)
    read = read_passages(words, reader, rows=rows, count=passages, by_line=by_line)
    insight = measure(mod, read, batch=batch, pad=reader.pad_token_id or 0, say=say)
    write_page(output, mod, insight, model=Path(model).name, text=text.name)
    return {"output": str(output), **insight.to_dict()}


def doctor(as_json: opt.AsJson = False) -> None:
    """Examines the environment: what is installed, what works, what to install."""
    from modcompile.doctor import diagnose, is_broken

    with working("examining the environment"):
        findings = diagnose()
    colours = {"ok": "green", "missing": "dim", "broken": "red"}
    rows = [(item.name, Text(item.state, "red" if item.required and item.state != "ok" else colours[item.state]),
             item.found, item.needed, item.fix) for item in findings]
    emit(as_json, [dataclasses.asdict(item) for item in findings],
         table("environment", ("", "state", "found", "needed", "to mend it"), rows))
    if is_broken(findings):
        raise typer.Exit(5)


def passes(as_json: opt.AsJson = False) -> None:
    """Lists the graph passes with their options."""
    with working("importing the passes"):
        found = _passes()
    rows = [(item["name"], ", ".join(f"{name}={default}" for name, default in item["options"].items()), item["summary"])
            for item in found]
    emit(as_json, found, table("passes", ("pass", "options", "what it does"), rows))


def _passes() -> list[dict]:
    """Every pass of ``modcompile.passes``, by name."""
    import modcompile.passes
    from modcompile.pass_manager import Pass

    found = {}
    for module_info in pkgutil.iter_modules(modcompile.passes.__path__):
        module = importlib.import_module(f"modcompile.passes.{module_info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Pass) and value.__module__ == module.__name__:
                found[value.name] = {
                    "name": value.name,
                    "options": {field.name: _default(field) for field in dataclasses.fields(value)},
                    # A dataclass without a docstring of its own has a made-up one; a module has its own or none.
                    "summary": (module.__doc__ or "").strip().partition("\n")[0],
                }
    return [found[name] for name in sorted(found)]


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "required"
