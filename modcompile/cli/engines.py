"""Verbs on engines: build, package, run, verify, bench."""

__all__ = ["BENCH_EXAMPLES", "bench", "build", "package", "run", "verify"]

import json
import time
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Group
from rich.text import Text

from modcompile.cli import options as opt
from modcompile.cli.console import emit, engineering, settings, shape_text, table, working
from modcompile.errors import UsageError
from modcompile.files import write_whole

if TYPE_CHECKING:
    import numpy as np

EngineArgument = Annotated[Path, typer.Argument(metavar="ENGINE", help="A folder that build wrote.")]
Runtime = Annotated[Literal["ort", "tensorrt", "tensorrt-rtx", "torch-tensorrt", "aoti"],
                    typer.Option(help="What runs the engine.")]
Seed = Annotated[int, typer.Option(help="Of random inputs.")]
Inputs = Annotated[list[str] | None, typer.Option(
    "--input", metavar="NAME=FILE.npy|FILE.npz", help="One input, or several by their names. May be repeated.")]


def build(
    model: Annotated[str, typer.Argument(metavar="MODEL|FILE.onnx", help="A model, or an ONNX file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the engine goes.")],
    runtime: Runtime = "ort",
    precision: Annotated[Literal["fp32", "fp16", "bf16"] | None, typer.Option(
        help="Of weights and arithmetic. By default fp32, or what the ONNX file has.")] = None,
    shape: Annotated[list[str] | None, typer.Option(
        "--shape", metavar="NAME=SIZES", help="An input's static shape, as input_ids=8x1024; for TensorRT also a "
        "range, as input_ids=1x1024:8x1024:16x1024. May be repeated.")] = None,
    provider: Annotated[list[str] | None, typer.Option(
        help="ONNX Runtime's execution provider, CPUExecutionProvider by default. May be repeated, in order.",
    )] = None,
    custom_ops: Annotated[Path | None, typer.Option(
        metavar="FILE", help="The custom-op library for ONNX Runtime, which goes into the engine folder.")] = None,
    device: Annotated[str | None, typer.Option(
        help="What AOTInductor compiles for: cpu (the default), cuda, or one of several GPUs, as cuda:1. ONNX Runtime "
        "takes --provider instead.")] = None,
    option: opt.Options = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Builds an engine folder from a model or an ONNX file."""
    from modcompile.engine import build_engine
    from modcompile.load_source import load_source

    shapes, options = opt.read_profiles(shape), opt.read_options(option)
    _check_runtime(runtime, provider, custom_ops, device)
    given = {"providers": provider, "custom_ops": custom_ops, "device": device}
    for name, value in given.items():
        if value and name in options:
            raise UsageError(f"the option {name} is given twice", found=f"{value} and {options[name]}",
                             where=f"--option {name}")
    options |= {name: value for name, value in given.items() if value}
    with working("loading the model") as say:
        source: Any = Path(model)
        # Folders are models; a file can only be ONNX.
        if not source.is_file():
            loaded = load_source(model)
            source = loaded.model
            if loaded.example_inputs is not None:
                options["example_inputs"] = loaded.example_inputs
        say(f"building for {runtime}")
        engine = build_engine(source, output, runtime=runtime, precision=precision, shapes=shapes, overwrite=overwrite,
                              **options)
    with engine:
        manifest = engine.manifest
    blocks = [(b.path, b.capacity_ratio, b.capacity or f"of {b.rows}") for b in manifest.routed_blocks]
    facts = (f"runtime     {manifest.runtime} {manifest.runtime_version}, {manifest.precision}\n"
             f"inputs      {', '.join(map(str, manifest.inputs))}\n"
             f"outputs     {', '.join(map(str, manifest.outputs))}\n"
             f"size        {engineering(sum(record.size for record in manifest.files.values()))} bytes\n")
    emit(as_json, {"output": str(output), **manifest.model_dump(mode="json")},
         Group(Text(str(output), "bold"), Text(facts),
               table("routed blocks", ("path", "K/S", "K"), blocks) if blocks else Text("a dense model")))


def package(
    engine: EngineArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the bundle goes; with "
        "--triton the model's folder in a model repository, as models/minilm.")],
    tokenizer: Annotated[Path | None, typer.Option(
        metavar="FILE", help="The model's tokenizer.json, or an ONNX model that takes texts: it goes into the bundle."
    )] = None,
    triton: Annotated[bool, typer.Option("--triton", help="Write a model for Triton Inference Server.")] = False,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Packs an engine into one folder to ship: a bundle, for C++ and Python programs or for Triton."""
    from modcompile.bundle import package as make_bundle

    with working("packing"):
        made = make_bundle(engine, output, tokenizer=tokenizer, triton=triton, overwrite=overwrite)
    rows = [(name, engineering(record.size)) for name, record in made.manifest.files.items()]
    start = [Text(f"start Triton with\n  {made.triton_command}")] if made.triton_command else []
    data = {"output": str(output), "bundle": str(made.folder), "triton_command": made.triton_command,
            **made.manifest.model_dump(mode="json")}
    emit(as_json, data, Group(table(str(made.folder), ("file", "bytes"), rows), *start))


def run(
    engine: EngineArgument,
    inputs: Inputs = None,
    random: Annotated[bool, typer.Option("--random", help="Random inputs where no --input gives one.")] = False,
    shape: opt.Shapes = None,
    seed: Seed = 0,
    option: opt.Options = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE.npz", help="Keep the outputs.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Runs an engine once."""
    from modcompile.engine import load_engine
    from modcompile.sample_inputs import sample_inputs

    shapes, options = opt.read_shapes(shape), opt.read_options(option)
    arrays = _read_arrays(inputs)
    with working("loading the engine") as say, load_engine(engine, **options) as loaded:
        if random:
            arrays = sample_inputs(loaded.inputs, shapes, seed=seed, given=arrays)
        elif shapes:
            raise UsageError("--shape is the shape of random inputs", expected="--random", where="--shape")
        say("running")
        start_s = time.perf_counter()
        results = loaded.run(arrays)
        taken_ms = (time.perf_counter() - start_s) * 1e3
    if output is not None:
        _save_arrays(output, results)
    rows = [(name, value.dtype.name, shape_text(value.shape)) for name, value in results.items()]
    data = {"milliseconds": taken_ms, "output": None if output is None else str(output),
            "outputs": {name: {"dtype": value.dtype.name, "shape": value.shape} for name, value in results.items()}}
    emit(as_json, data, table(f"{engine}: {taken_ms:.1f} ms for the first run", ("output", "dtype", "shape"), rows))


def verify(
    model: opt.ModelArgument,
    engine: EngineArgument,
    per_block: Annotated[bool, typer.Option("--per-block", help="Compare at every block's border, too.")] = False,
    tolerance: Annotated[float | None, typer.Option(
        min=0, help="Of errors relative to the model's numbers. By default 1e-4 in fp32, 1e-2 in fp16, 5e-2 in bf16.",
    )] = None,
    inputs: Inputs = None,
    shape: opt.Shapes = None,
    seed: Seed = 0,
    option: opt.Options = None,
    as_json: opt.AsJson = False,
) -> None:
    """Compares an engine's outputs with its model's, on random inputs or yours; exits with 4 where they differ."""
    import modcompile as mc
    from modcompile.convert import padding_mask
    from modcompile.load_source import load_graph
    from modcompile.sample_inputs import index_limits, sample_inputs

    shapes, options, given = opt.read_shapes(shape), opt.read_options(option), _read_arrays(inputs)
    with working("loading the model") as say:
        graph = load_graph(model)
        say("loading the engine")
        with mc.load_engine(engine, **options) as loaded:
            say("comparing")
            config = graph.config if isinstance(graph, mc.MoDModel) else mc.MoDConfig()
            arrays = sample_inputs(loaded.inputs, shapes, limits=index_limits(graph), seed=seed,
                                   padding_mask=padding_mask(graph, config), given=given)
            report = mc.verify(graph, loaded, arrays, per_block=per_block, tolerance=tolerance, options=options)
    emit(as_json, report.to_dict(), report)


# One paragraph of lines as they are.
BENCH_EXAMPLES = "\b\n" + "\n".join([
    "Examples:",
    "  modcompile bench FOLDER --shape input_ids=8x256 --option intra_op_threads=2 -o bench.json",
    "  modcompile bench examples.pretrained:gpt2_medium --runtime aoti --device cuda --precision fp16 \\",
    "    --shape input_ids=8x1024 --variants dense,mod,oracle,pruned,compile --keep-going --limit-s 300",
    "  modcompile bench examples.pretrained:gpt2_medium --runtime ort --device cuda --precision fp16 \\",
    "    --shape input_ids=8x1024 --option custom_ops=libmodcompile_ort.so --profile 8",
])


@opt.takes_conversion
def bench(
    model: opt.ModelArgument,
    runtime: Runtime = "ort",
    precision: opt.Precision = "fp32",
    inputs: Inputs = None,
    shape: opt.Shapes = None,
    runs: Annotated[int, typer.Option(min=1, help="How many times each engine runs.")] = 30,
    variants: Annotated[str, typer.Option(help="What is timed, separated by commas, in the order in which it is built: "
        "also other, with the other --attend-to; masked, which computes every row; and compile, the dense model under "
        "torch.compile.")] = "dense,mod,oracle,pruned",
    option: opt.Options = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="Where the model and the engines are: cpu, cuda or cuda:N.")] = "cpu",
    engines: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Keep the engines there; those of an earlier "
        "call are loaded, not built.")] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Leave out a variant that cannot be built or is "
        "wrong, but for the dense and the routed engine; the exit code then is 7.")] = False,
    limit_s: Annotated[float | None, typer.Option(metavar="SECONDS", help="Build nothing further after so many "
        "seconds, and time what there is; what was left out makes the exit code 7.")] = None,
    profile: Annotated[int, typer.Option(min=0, help="List so many of each variant's longest kernels; on a GPU.")] = 0,
    title: Annotated[str | None, typer.Option(help="What the kept figures are called; by default MODEL.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Keep the figures, as JSON.",
                                                )] = None,
    *,
    conversion: opt.Conversion,
    as_json: opt.AsJson = False,
) -> None:
    """Times dense, routed, oracle and pruned engines side by side; a dense model is converted first."""
    import modcompile as mc
    from modcompile.load_source import load_source, on_device

    config, shapes, options = opt.config_from(**conversion), opt.read_shapes(shape), opt.read_options(option)
    given = _read_arrays(inputs)
    with working("loading the model") as say:
        source = load_source(model)
        if source.converted and conversion:
            raise UsageError("a converted model keeps the options it was converted with", where=model,
                             found=", ".join(conversion),
                             fix="name the dense model it came from, or leave these options out")
        say("converting")
        mod = on_device(source.converted or mc.convert(source.model, source.example_inputs, config), device)
        report = mc.benchmark(mod, runtime=runtime, precision=precision, shapes=shapes, runs=runs, seed=seed,
                              variants=[name.strip() for name in variants.split(",")], inputs=given, options=options,
                              folder=engines, keep_going=keep_going, limit_s=limit_s, profile=profile, progress=say)
    if output is not None:
        kept = {"title": title or model, "command": settings.command_line, **report.to_dict()}
        write_whole(output, lambda file: file.write(json.dumps(kept, indent=1).encode()))
    emit(as_json, report.to_dict(), report)
    if report.failed:
        raise typer.Exit(7)


def _check_runtime(runtime: str, provider: list[str] | None, custom_ops: Path | None, device: str | None) -> None:
    """Refuses an option of one runtime for another, before anything is loaded.

    Raises:
        UsageError: There is one, with what to write instead.
    """
    if runtime == "ort" and device:
        kind, _, index = device.partition(":")
        name = "CUDAExecutionProvider" if kind == "cuda" else "CPUExecutionProvider"
        one = f"""--option 'providers=[["{name}", {{"device_id": {index}}}]]'""" if index else f"--provider {name}"
        raise UsageError("ONNX Runtime has execution providers, not a device", expected="--provider", where="--device",
                         found=device, fix=one)
    for option, value in (("--provider", provider), ("--custom-ops", custom_ops)):
        if runtime != "ort" and value:
            raise UsageError(f"{option} is ONNX Runtime's", expected="--runtime ort", found=f"--runtime {runtime}",
                             where=option, fix="leave it out")


def _read_arrays(texts: list[str] | None) -> dict[str, "np.ndarray"]:
    import numpy as np

    arrays: dict[str, np.ndarray] = {}
    for text in texts or ():
        # A path may have a "=" in it, an input's name has none.
        name, _, path = text.partition("=") if "=" in text and not Path(text).exists() else ("", "", text)
        try:
            # Never a pickle: an array of objects is an error.
            content = np.load(path, allow_pickle=False)
            found = {name: content} if isinstance(content, np.ndarray) else dict(content)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UsageError("an input cannot be read", expected="NAME=FILE.npy, or FILE.npz", found=error,
                             where=text) from error
        if isinstance(content, np.ndarray) != bool(name):
            raise UsageError("an array has a name and an archive has the names in it", found=text,
                             expected="--input NAME=FILE.npy or --input FILE.npz", where="--input")
        if twice := arrays.keys() & found:
            raise UsageError("an input is given twice", found=", ".join(sorted(twice)), where=text,
                             expected="each input once")
        arrays |= found
    return arrays


def _save_arrays(path: Path, arrays: dict[str, "np.ndarray"]) -> None:
    import numpy as np

    # The file format has no bfloat16; as float32 it keeps every bit.
    kept = {name: array.astype(np.float32) if array.dtype.name == "bfloat16" else array
            for name, array in arrays.items()}
    write_whole(path, lambda file: np.savez(file, allow_pickle=False, **kept))
