"""Verbs on models: inspect, convert, diff, export."""

__all__ = ["convert", "diff", "export", "inspect"]

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from modcompile.cli import options as opt
from modcompile.cli.console import emit, engineering, shape_text, sizes_text, table, working
from modcompile.cli.summary import summarise, summary_table
from modcompile.errors import UsageError

if TYPE_CHECKING:
    from modcompile.config import MoDConfig
    from modcompile.model import MoDModel


def inspect(model: opt.ModelArgument, shape: opt.Shapes = None, as_json: opt.AsJson = False) -> None:
    """Shows a dense model's blocks: what can be routed, the reason for what cannot, and FLOPs for the given shape."""
    from modcompile.blocks import find_blocks
    from modcompile.capture import capture
    from modcompile.flops import flops_by_module
    from modcompile.load_source import load_source
    from modcompile.sample_inputs import symbol_sizes

    shapes = opt.read_shapes(shape)
    with working("loading the model") as say:
        source = load_source(model)
        if source.converted:
            raise UsageError("the model is converted already", where=model, fix=f"modcompile report {model}")
        say("capturing the graph")
        graph = capture(source.model, source.example_inputs)
        report = find_blocks(graph)
        sizes = {**graph.hints, **symbol_sizes(graph.inputs, shapes)}
        flops = flops_by_module(graph, sizes)
    parameters = {name: parameter.numel() for name, parameter in source.model.named_parameters()}
    data: dict[str, Any] = {
        "model": model,
        "sizes": sizes,
        "parameters": sum(parameters.values()),
        "flops": flops[""],
        "blocks": [{
            "path": block.path,
            "hidden_shape": block.hidden_shape,
            "routable": block.routable,
            "reason": block.reason,
            "note": block.note,
            "parameters": sum(size for name, size in parameters.items() if name.startswith(block.path + ".")),
            "flops": flops.get(block.path, 0),
        } for block in report],
    }
    rows = [(row["path"], shape_text(row["hidden_shape"]), engineering(row["parameters"]), engineering(row["flops"]),
             f"{row['flops'] / max(1, flops['']):.1%}", row["reason"] or "; ".join(filter(None, ("yes", row["note"]))))
            for row in data["blocks"]]
    title = (f"{model}: {len(report.routable)} of {len(report)} blocks can be routed; "
             f"{engineering(data['parameters'])} parameters, {engineering(flops[''])} FLOPs for {sizes_text(sizes)}")
    emit(as_json, data, table(title, ("block", "hidden state", "parameters", "FLOPs", "share", "can be routed"), rows))


@opt.takes_conversion
def convert(
    model: opt.ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the converted model goes.")],
    conversion: opt.Conversion,
    calibrate: Annotated[Path | None, typer.Option(
        metavar="TEXT", help="A UTF-8 text to calibrate on. With --budget blocks, ratios and routers are measured, and "
        "of the options of a conversion it goes with --blocks, --attend-to and --padding-mask. Without, routers are "
        "fitted for the --blocks and the --capacity-ratio that are given.")] = None,
    budget: Annotated[float | None, typer.Option(
        help="With --calibrate: the share of the dense model's FLOPs to stay within, such as 0.6.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(
        metavar="FOLDER", help="With --calibrate: the folder of the tokenizer, if it is not MODEL.")] = None,
    sequences: Annotated[int | None, typer.Option(
        min=1, help="With --calibrate: the largest number of sequences to take; 256 by default.")] = None,
    device: Annotated[str | None, typer.Option(
        help="With --calibrate: where the model runs, cpu (the default), cuda or cuda:N.")] = None,
    shape: opt.Shapes = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Converts a dense model into Mixture-of-Depths form and saves it.

    A pretrained model is best converted with --calibrate TEXT --budget 0.7: that needs no training, and is better than
    leaving out blocks. --shape input_ids=8x512 says how the text is cut. Without it routers know nothing until they are
    trained.
    """
    from modcompile.files import check_new_folder
    from modcompile.saving import MODEL_FILE

    report = None
    check_new_folder(output, marker=MODEL_FILE, overwrite=overwrite)
    with working("loading the model") as say:
        if calibrate is None:
            for option, value in (("--budget", budget), ("--tokenizer", tokenizer), ("--sequences", sequences),
                                  ("--device", device), ("--shape", shape)):
                if value not in (None, []):
                    raise UsageError(f"{option} is for calibration", found=value, where=option,
                                     fix="add --calibrate TEXT, or leave it out")
            mod = _converted(model, opt.config_from(**conversion), say)
        else:
            mod, report = _calibrated(model, calibrate, budget, tokenizer or Path(model), sequences or 256,
                                      device or "cpu", opt.read_shapes(shape), conversion, say)
        say("saving")
        mod.save_pretrained(output, overwrite=overwrite)
        say("counting")
        summary = summarise(mod)
    data = {"output": str(output), **summary}
    shown = summary_table(str(output), summary)
    if report is not None:
        data["calibration"] = report
        loss = report["loss"]
        dropped = sum(block["ratio"] == "0" for block in report["blocks"].values())
        shown = Group(shown, Text(
            f"calibrated on {report['rows']} rows: {report['flops']:.1%} of the FLOPs, {dropped} blocks left out, "
            f"{report['objective']} loss {loss['calibrated']:.4g} (" + ", ".join(
                f"{name} {loss[name]:.4g}" for name in ("pruned", "dense") if name in loss) + ")"))
    elif any(list(router.parameters()) for router in mod.routers.values()):
        shown = Group(shown, Text("its routers know nothing: train it, or convert with --calibrate TEXT --budget 0.7"))
    emit(as_json, data, shown)


@opt.takes_conversion
def diff(
    model: opt.ModelArgument,
    conversion: opt.Conversion,
    context: Annotated[int, typer.Option(min=0, help="Unchanged lines around each change.")] = 3,
    as_json: opt.AsJson = False,
) -> None:
    """Shows what conversion with these options changes in a dense model's graph, as a unified diff."""
    config = opt.config_from(**conversion)
    with working("loading the model") as say:
        mod = _converted(model, config, say)
        before, after = mod.variant(mod.dense_program).format(), mod.format()
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), "dense", "routed", lineterm="",
                                      n=context))
    colours = {"+": "green", "-": "red", "@": "cyan"}
    text = Text("\n").join(Text(line, colours.get(line[:1], "")) for line in lines)
    emit(as_json, {"model": model, "diff": lines}, text)


def export(
    model: opt.ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The ONNX file to write.")],
    opset: Annotated[int, typer.Option(help="17 to 23.")] = 18,
    inline: Annotated[bool, typer.Option("--inline", help="Flatten functions, for older readers.")] = False,
    precision: opt.Precision = "fp32",
    shape: opt.Shapes = None,
    external_data: Annotated[bool, typer.Option("--external-data", help="Put the weights in FILE.data.")] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Writes a dense or converted model as ONNX."""
    from modcompile.export import export_onnx
    from modcompile.load_source import load_source

    shapes = opt.read_shapes(shape)
    with working("loading the model") as say:
        source = load_source(model)
        say("exporting")
        path = export_onnx(source.model, output, example_inputs=source.example_inputs, opset=opset, inline=inline,
                           precision=precision, shapes=shapes, external_data=external_data)
    written = [path, *([path.with_name(f"{path.name}.data")] if external_data else [])]
    files = {str(file): file.stat().st_size for file in written if file.exists()}
    emit(as_json, {"output": str(path), "opset": opset, "precision": precision, "files": files},
         table(f"opset {opset}, {precision}", ("file", "bytes"), [(n, engineering(size)) for n, size in files.items()]))


def _calibrated(model: str, text: Path, budget: float | None, tokenizer: Path, sequences: int, device: str,
                shapes: dict[str, tuple[int, ...]] | None, conversion: opt.Conversion, say: Callable[[str], None]
                ) -> tuple["MoDModel", dict[str, Any]]:
    """A dense model calibrated on a text, and the report of it."""
    from modcompile.calibration import calibrate, fit_routers, text_batches
    from modcompile.capture import capture
    from modcompile.load_source import load_source, on_device
    from modcompile.text_file import read_text, tokenizer_of

    if budget is None and {"blocks", "capacity_ratio"} & set(conversion):
        run = partial(fit_routers, config=opt.config_from(**{"gate": "straight-through"} | conversion))
    else:
        run = partial(calibrate, budget=_given(budget), say=say, **_left_open(conversion))
    size = (shapes or {}).get("input_ids", (8, 512))
    if set(shapes or {}) - {"input_ids"} or len(size) != 2:
        raise UsageError("a text is cut into batches of one shape", expected="--shape input_ids=8x512", found=shapes,
                         where="--shape")
    words, reader = read_text(text), tokenizer_of(tokenizer)
    source = load_source(model)
    if source.converted:
        raise UsageError("the model is converted already", where=model, fix="name the dense model it came from")
    say("capturing the graph")
    graph = on_device(capture(source.model, source.example_inputs), device)
    batches = text_batches(words, reader, [spec.name for spec in graph.inputs], batch=size[0],
                           rows=size[1], sequences=sequences)
    result = run(graph, batches)
    return result.mod, result.report


def _given(budget: float | None) -> float:
    if budget is None:
        raise UsageError("calibration needs a budget", expected="--budget 0.6, a share of the dense model's FLOPs",
                         found="none", where="--calibrate", fix="add it; or name the --blocks to fit routers for")
    return budget


def _left_open(conversion: opt.Conversion) -> dict[str, Any]:
    """The options of a conversion that calibration for a budget takes."""
    kept: dict[str, Any] = {name: conversion[name] for name in ("blocks", "attend_to", "padding_mask")
                            if name in conversion}
    if further := set(conversion) - set(kept):
        raise UsageError("calibration chooses this itself", expected="--blocks, --attend-to and --padding-mask",
                         found=", ".join(f"--{name.replace('_', '-')}" for name in conversion if name in further),
                         where="--calibrate", fix="leave it out, or leave out --budget")
    if "blocks" in kept:
        kept["blocks"] = opt.config_from(blocks=kept["blocks"]).blocks
    return kept


def _converted(model: str, config: "MoDConfig", say: Callable[[str], None]) -> "MoDModel":
    from modcompile.convert import convert
    from modcompile.load_source import load_source

    source = load_source(model)
    if source.converted:
        raise UsageError("the model is converted already", where=model, fix="name the dense model it came from")
    say("converting")
    return convert(source.model, source.example_inputs, config)
