"""Verbs that only tell: report, doctor, passes."""

__all__ = ["doctor", "passes", "report"]

import dataclasses
import importlib
import pkgutil

import typer
from rich.text import Text

from modcompile.cli import options as opt
from modcompile.cli.console import emit, table, working
from modcompile.cli.summary import summarise, summary_table
from modcompile.errors import UsageError


def report(model: opt.ModelArgument, shape: opt.Shapes = None, as_json: opt.AsJson = False) -> None:
    """Sums up a converted model: routed blocks, capacities, parameters, and FLOPs for the given shape."""
    from modcompile.load_source import load_source

    shapes = opt.read_shapes(shape)
    with working("loading the model") as say:
        source = load_source(model)
        if source.converted is None:
            raise UsageError("the model is not converted", expected="a folder that convert wrote", where=model,
                             fix=f"modcompile convert {model} -o FOLDER, or modcompile inspect {model}")
        say("counting")
        summary = summarise(source.converted, shapes)
    emit(as_json, summary, summary_table(model, summary))


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
