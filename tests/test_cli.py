"""The command line on tiny models: each verb once for real, exit codes, messages, and what goes to which stream."""

import dataclasses
import inspect
import json
import re
import shutil
import typing

import numpy as np
import pytest
import torch
from torch import nn

import modcompile
from modcompile.cli import main, options
from modcompile.cli.console import settings
from modcompile.config import MoDConfig
from modcompile.errors import (
    IntegrityError,
    ModcompileWarning,
    ParityError,
    RuntimeUnavailableError,
    UnsupportedGraphError,
    UsageError,
)

VERBS = "inspect convert diff export build package run verify bench report doctor passes".split()


@pytest.fixture
def call(capfd, monkeypatch):
    """Runs a command line in this process; returns exit code, stdout and stderr, native libraries' output included."""
    monkeypatch.setattr(settings, "debug", False)

    def run(*arguments):
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def report(call):
    """Runs a command line that must succeed; returns what its --json prints.

    No terminal, no progress: whatever else were printed, a library's warning for example, would be in the way.
    """

    def run(*arguments):
        code, out, err = call(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return run


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """A transformers folder; its path has a space and more than ASCII in it."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("a módel") / "dense"
    config = BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=99,
                        max_position_embeddings=96, pad_token_id=0)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def converted(dense):
    folder = dense.parent / "converted"
    with pytest.raises(SystemExit) as exit:
        main(["convert", str(dense), "-o", str(folder), "--capacity-ratio", "1/4", "--blocks", "1,3"])
    assert not exit.value.code
    return folder


@pytest.fixture(scope="session")
def engine(converted):
    folder = converted.parent / "engine"
    with pytest.raises(SystemExit) as exit:
        main(["build", str(converted), "-o", str(folder)])
    assert not exit.value.code
    return folder


# The program


def test_help_lists_the_verbs_in_the_order_of_use(call):
    code, out, _ = call("--help")
    assert code == 0
    assert re.findall(r"^  ([a-z]+) +[A-Z]", out.partition("Commands:")[2], re.MULTILINE) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(call, verb):
    code, out, _ = call(verb, "--help")
    assert code == 0
    assert "--json" in out
    # Kebab-case throughout.
    assert not re.search(r"--\w+_", out)


def test_version(call):
    assert call("--version")[:2] == (0, f"modcompile {modcompile.__version__}\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(call, shell, monkeypatch):
    # The shell that runs the tests may be none that completion knows.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, out, _ = call("--show-completion", shell)
    assert code == 0
    assert "_MODCOMPILE_COMPLETE" in out


@pytest.mark.parametrize("line", ["nosuchverb", "convert", "convert x", "build x -o y --runtime z", "run x --nosuch"])
def test_usage_errors_of_the_parser(call, line):
    code, out, err = call(*line.split())
    assert (code, out) == (2, "")
    assert "Usage: modcompile" in err


@pytest.mark.parametrize("error, code", [
    (UsageError("no"), 2),
    (UnsupportedGraphError("no"), 3),
    (ParityError("no"), 4),
    (RuntimeUnavailableError("no"), 5),
    (IntegrityError("no"), 6),
    (OSError(28, "No space left on device"), 5),
    (ZeroDivisionError("no"), 1),
])
def test_exit_codes(call, monkeypatch, error, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("modcompile.load_source.load_source", fail)
    found, out, err = call("inspect", "x")
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert ("defect" in err) == (code == 1)


def test_debug_shows_the_traceback(call, tmp_path):
    code, _, err = call("--debug", "inspect", tmp_path)
    assert code == 2
    assert "Traceback" in err and "the folder holds no model" in err


def test_square_brackets_are_no_markup(call, tmp_path):
    folder = tmp_path / "[red]x[/red]"
    _, _, err = call("inspect", folder)
    assert f"where: {folder}" in err


def test_the_choices_are_those_of_the_configuration():
    for name, option in {"gate": options.Gate, "attend_to": options.AttendTo, "axis": options.Axis}.items():
        choices = typing.get_args(typing.get_args(option)[0])[0]
        assert choices == MoDConfig.model_fields[name].annotation, name


def test_every_conversion_option_is_there():
    from modcompile.cli import models

    taken = {name for name, _ in models.convert.__annotations__.items()}
    assert MoDConfig.model_fields.keys() <= taken


# The verbs


def test_inspect(call, report, dense):
    found = report("inspect", dense)
    assert [block["path"] for block in found["blocks"]] == [f"encoder.layer.{i}" for i in range(4)]
    assert all(block["routable"] and block["hidden_shape"] == ["batch", "sequence", 32] for block in found["blocks"])
    code, out, _ = call("inspect", dense)
    assert code == 0
    assert "encoder.layer.3" in out and "[batch, sequence, 32]" in out and "4 of 4 blocks" in out


def odd_one_out():
    """A function as MODEL: its second block has another width."""

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 8)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return Blocks(), (torch.randn(2, 5, 8),)


def test_inspect_gives_reasons(report):
    blocks = report("inspect", f"{__name__}:odd_one_out")["blocks"]
    assert [block["routable"] for block in blocks] == [True, False, False]
    assert "no value enters and leaves with one shape" in blocks[1]["reason"]


def convolutions():
    """A function as MODEL: blocks that look at neighbouring rows."""

    class Convolution(nn.Conv1d):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    return nn.Sequential(*(Convolution(8, 8, 3, padding=1) for _ in range(2))), (torch.randn(2, 5, 8),)


def test_blocks_that_look_at_neighbouring_rows(report, call, tmp_path):
    model = f"{__name__}:convolutions"
    assert ["conv1d" in block["note"] for block in report("inspect", model)["blocks"]] == [True, True]
    assert "yes; conv1d looks at rows by their place" in call("inspect", model)[1]
    # What libraries warn of is not shown.
    with pytest.warns(ModcompileWarning, match="block 1: conv1d_1 looks at rows by their place"):
        assert call("convert", model, "-o", tmp_path / "out")[0] == 0


def test_convert_saves_what_was_asked_for(report, dense, tmp_path):
    found = report("convert", dense, "-o", tmp_path / "out", "--blocks", "encoder.layer.0, encoder.layer.2",
                   "--gate", "tanh", "--capacity-ratio", "0.5,1/3", "--attend-to", "all", "--capacity-multiple", "2",
                   "--dropped", "encoder.layer.3")
    assert [(b["path"], b["capacity_ratio"], b["multiple"]) for b in found["routed_blocks"]] == [
        ("encoder.layer.0", "1/2", 2), ("encoder.layer.2", "1/3", 2)]
    mod = modcompile.load(tmp_path / "out")
    assert (mod.config.gate, mod.config.attend_to, mod.config.dropped) == ("tanh", "all", ("encoder.layer.3",))


def test_convert_does_not_overwrite(call, dense, converted):
    code, _, err = call("convert", dense, "-o", converted)
    assert code == 2
    assert "exists and is not empty" in err
    assert modcompile.load(converted).config.blocks == (1, 3)


def test_a_converted_model_is_not_converted_again(call, converted, tmp_path):
    for arguments in (["convert", converted, "-o", tmp_path / "x"], ["inspect", converted], ["diff", converted],
                      ["bench", converted, "--gate", "raw"]):
        code, _, err = call(*arguments)
        assert code == 2
        assert "converted" in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--blocks", "nosuch.*"], "blocks names no block"),
    (["--blocks", "9"], "blocks names no block"),
    (["--capacity-ratio", "0"], "capacity_ratio"),
    (["--capacity-ratio", "-0.5"], "capacity_ratio"),
    (["--capacity-ratio", "1.5"], "capacity_ratio"),
    (["--capacity-ratio", "nan"], "not a number"),
    (["--capacity-ratio", "1/0"], "not a number"),
    (["--capacity-ratio", "0.5,0.5,0.5"], "wrong length"),
    (["--padding-mask", "nosuch"], "padding_mask names no input"),
])
def test_conversion_options_that_do_not_fit(call, dense, tmp_path, arguments, message):
    code, out, err = call("convert", dense, "-o", tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_diff(call, report, dense):
    code, out, _ = call("diff", dense, "--blocks", "2", "--context", "0")
    assert code == 0
    assert out.startswith("--- dense\n+++ routed\n@@")
    assert re.search(r"^\+.*modcompile\.route", out, re.MULTILINE)
    assert not re.search(r"^-.*modcompile\.route", out, re.MULTILINE)
    assert report("diff", dense, "--blocks", "2", "--context", "0")["diff"] == out.splitlines()


def test_export(report, dense, converted, tmp_path):
    import onnx

    found = report("export", converted, "-o", tmp_path / "routed.onnx", "--opset", "20")
    model = onnx.load(tmp_path / "routed.onnx")
    assert {function.name for function in model.functions} >= {"MaskedRoute", "GatherRows", "MergeRows"}
    assert found["files"] == {str(tmp_path / "routed.onnx"): (tmp_path / "routed.onnx").stat().st_size}
    report("export", dense, "-o", tmp_path / "dense.onnx", "--inline", "--shape", "input_ids=3x7", "--external-data")
    assert (tmp_path / "dense.onnx.data").exists()
    dims = onnx.load(tmp_path / "dense.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [3, 7]


@pytest.mark.parametrize("text", ["input_ids", "=3x7", "input_ids=3*7", "input_ids=0x7", "input_ids=3x", "nosuch=3x7",
                                  "input_ids=1x7:2x7:3x7", "input_ids=1x7:2x7"])
def test_shapes_that_cannot_be(call, dense, tmp_path, text):
    code, _, err = call("export", dense, "-o", tmp_path / "x.onnx", "--shape", text)
    assert code == 2, err
    assert list(tmp_path.iterdir()) == []


def test_build_from_a_model_and_from_a_file(report, engine, dense, tmp_path):
    assert json.loads((engine / "manifest.json").read_text())["runtime"] == "ort"
    report("export", dense, "-o", tmp_path / "dense.onnx")
    found = report("build", tmp_path / "dense.onnx", "-o", tmp_path / "engine", "--shape", "input_ids=3x7")
    assert found["routed_blocks"] == []
    assert [spec["shape"] for spec in found["inputs"]] == [[3, 7], [3, 7]]
    assert report("build", tmp_path / "dense.onnx", "-o", tmp_path / "engine", "--overwrite")["precision"] == "fp32"


def test_a_provider_that_is_missing(call, dense, tmp_path):
    code, _, err = call("build", dense, "-o", tmp_path / "x", "--provider", "NoSuchExecutionProvider")
    assert (code, "NoSuchExecutionProvider" in err) == (5, True)
    assert list(tmp_path.iterdir()) == []


def test_build_takes_a_range_of_shapes(call, dense, tmp_path, monkeypatch):
    asked = []

    def build_engine(model, path, **options):
        asked.append(options["shapes"])
        raise UsageError("enough")

    monkeypatch.setattr("modcompile.engine.build_engine", build_engine)
    assert call("build", dense, "-o", tmp_path / "x", "--shape", "input_ids=1x7:2x7:4x7")[0] == 2
    assert asked == [{"input_ids": ((1, 7), (2, 7), (4, 7))}]


def test_run_with_random_inputs(call, report, engine, tmp_path):
    found = report("run", engine, "--random", "--shape", "input_ids=3x7", "-o", tmp_path / "out.npz")
    assert found["outputs"]["last_hidden_state"] == {"dtype": "float32", "shape": [3, 7, 32]}
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["last_hidden_state"].shape == (3, 7, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]
    assert "[2, 16, 32]" in call("run", engine, "--random")[1]


def test_package(call, report, engine, tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text('{"model": {}}')
    made = report("package", engine, "-o", tmp_path / "models/tiny", "--triton", "--tokenizer", tokenizer)
    assert made["bundle"] == str(tmp_path / "models/tiny/1") and made["tokenizer"] == "tokenizer.json"
    assert made["triton_command"] == f"tritonserver --model-repository={tmp_path / 'models'}"
    # A bundle is an engine.
    assert report("run", made["bundle"], "--random")["outputs"].keys() >= {"last_hidden_state"}
    code, out, _ = call("package", engine, "-o", tmp_path / "bundle")
    assert code == 0 and "model.onnx" in out and "Triton" not in out
    code, _, err = call("package", engine, "-o", tmp_path / "bundle")
    assert (code, "not empty" in err) == (2, True)


def test_run_with_files(call, report, engine, tmp_path):
    ids = np.arange(14).reshape(2, 7)
    np.save(tmp_path / "ids.npy", ids)
    np.savez(tmp_path / "all.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    by_name = ["--input", f"input_ids={tmp_path}/ids.npy", "--random", "--shape", "attention_mask=2x7"]
    (tmp_path / "a=b").mkdir()
    shutil.copy(tmp_path / "ids.npy", tmp_path / "a=b")
    report("run", engine, "--input", f"input_ids={tmp_path}/a=b/ids.npy", *by_name[2:])
    shutil.copy(tmp_path / "all.npz", tmp_path / "a=b")
    report("run", engine, "--input", f"{tmp_path}/a=b/all.npz")
    report("run", engine, *by_name, "-o", tmp_path / "first.npz")
    report("run", engine, "--input", f"{tmp_path}/all.npz", "-o", tmp_path / "second.npz")
    with np.load(tmp_path / "first.npz") as first, np.load(tmp_path / "second.npz") as second:
        np.testing.assert_array_equal(first["last_hidden_state"], second["last_hidden_state"])


def test_run_refuses_what_it_cannot_read(call, engine, tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "all.npz", input_ids=np.ones((2, 7), np.int64))
    (tmp_path / "empty.npy").touch()
    whole = (tmp_path / "all.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-40])
    (tmp_path / "flipped.npz").write_bytes(whole[:140] + bytes([whole[140] ^ 1]) + whole[141:])
    for text in ("input_ids=nosuch.npy", f"input_ids={tmp_path}/objects.npy", f"input_ids={tmp_path}/empty.npy",
                 f"input_ids={tmp_path}/all.npz", f"{tmp_path}/empty.npy", f"{tmp_path}/cut.npz",
                 f"{tmp_path}/flipped.npz", "nosuch.npz"):
        code, _, err = call("run", engine, "--input", text)
        assert code == 2, err
        assert err.startswith("error: ")
    code, _, err = call("run", engine, *["--input", f"{tmp_path}/all.npz"] * 2)
    assert (code, "given twice" in err) == (2, True)
    code, _, err = call("run", engine, "--input", f"{tmp_path}/all.npz")
    assert (code, "attention_mask is missing" in err) == (2, True)
    code, _, err = call("run", engine, "--shape", "input_ids=2x7")
    assert (code, "--random" in err) == (2, True)


def test_an_output_that_cannot_be_written(call, engine, tmp_path):
    code, _, err = call("run", engine, "--random", "-o", tmp_path / "nosuch" / "out.npz")
    assert code == 2
    assert "cannot be written" in err


def test_an_edited_engine_is_an_integrity_error(call, engine, tmp_path):
    import shutil

    copy = shutil.copytree(engine, tmp_path / "copy")
    with open(copy / "model.onnx", "r+b") as file:
        file.seek(100)
        file.write(b"\0\0")
    code, _, err = call("run", copy, "--random")
    assert code == 6
    assert "model.onnx" in err


def test_verify(call, report, converted, dense, engine, tmp_path):
    assert report("verify", converted, engine, "--shape", "input_ids=3x9")
    assert call("verify", converted, engine, "--per-block")[0] == 0
    np.savez(tmp_path / "text.npz", input_ids=np.arange(27).reshape(3, 9))
    assert report("verify", converted, engine, "--input", tmp_path / "text.npz")
    # The routed engine is not the dense model's.
    code, _, err = call("verify", dense, engine)
    assert code == 4, err


def test_bench(call, report, dense, converted, tmp_path):
    found = report("bench", dense, "--shape", "input_ids=3x17", "--capacity-ratio", "0.5", "--runs", "2",
                   "--option", "intra_op_threads=1", "-o", tmp_path / "out.json")
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept.pop("title") == str(dense) and kept.pop("command").startswith("modcompile bench ")
    assert found == kept
    assert (found["config"]["capacity_ratio"], found["options"]) == (0.5, {"intra_op_threads": 1})
    assert {"dense", "mod", "oracle", "pruned"} <= found["timings"].keys()
    assert {"dense/MoD", "oracle/MoD"} <= found["ratios"].keys()
    code, out, _ = call("bench", converted, "--shape", "input_ids=3x17", "--runs", "1", "--variants", "mod")
    assert code == 0
    assert "3x17" in out
    code, _, err = call("bench", converted)
    assert code == 2
    assert "no size for" in err


def test_bench_hands_over_what_was_asked(call, converted, tmp_path, monkeypatch):
    asked = []

    def benchmark(model, **options):
        asked.append(options)
        raise UsageError("enough")

    monkeypatch.setattr(modcompile, "benchmark", benchmark)
    assert call("bench", converted, "--runtime", "aoti", "--precision", "fp16", "--variants", "dense, mod,compile",
                "--engines", tmp_path, "--keep-going", "--limit-s", "30", "--profile", "4",
                "--option", "autotune=false", "--option", "device=cpu")[0] == 2
    del asked[0]["progress"]
    assert asked == [{"runtime": "aoti", "precision": "fp16", "inputs": {}, "shapes": None, "runs": 30, "seed": 0,
                      "variants": ["dense", "mod", "compile"], "options": {"autotune": False, "device": "cpu"},
                      "folder": tmp_path, "keep_going": True, "limit_s": 30, "profile": 4}]


@pytest.mark.long
def test_bench_that_lacks_a_variant_says_so_with_its_exit_code(call, converted, tmp_path):
    line = ("bench", converted, "--shape", "input_ids=3x17", "--runs", "1", "--variants", "dense,mod,oracle")
    code, out, _ = call(*line, "--limit-s", "1e-9", "-o", tmp_path / "bench.json")
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert (code, "oracle failed: not built" in out, "oracle" in kept["failed"]) == (7, True, True)
    assert call(*line)[0] == 0


def test_bench_shows_examples(call):
    out = call("bench", "--help")[1]
    assert len(re.findall(r"^ *modcompile bench ", out, re.MULTILINE)) == 3
    assert "--variants dense,mod,oracle,pruned,compile" in out


def test_bench_lists_no_kernels_of_a_cpu(call, converted):
    code, _, err = call("bench", converted, "--shape", "input_ids=3x17", "--profile", "3")
    assert (code, "only a GPU's kernels can be listed" in err) == (2, True)


@pytest.mark.parametrize("verb", ["build", "run", "verify", "bench"])
def test_options_go_to_the_runtime(call, report, dense, converted, engine, tmp_path, verb):
    line = {"build": [converted, "-o", tmp_path / "out"], "run": [engine, "--random"], "verify": [converted, engine],
            "bench": [converted, "--shape", "input_ids=3x17", "--runs", "1", "--variants", "mod"]}[verb]
    assert report(verb, *line, "--option", "intra_op_threads=1", "--option", 'session_config={"session.x": "1"}')
    code, _, err = call(verb, *line, "--option", "intra_op_thread=1", *(["--overwrite"] if verb == "build" else []))
    assert code == 2
    assert "there is no such option" in err and "did you mean intra_op_threads?" in err
    code, _, err = call(verb, *line, "--option", "intra_op_threads=0", *(["--overwrite"] if verb == "build" else []))
    assert (code, "a number of threads" in err) == (2, True)


@pytest.mark.parametrize("texts, message", [
    (["intra_op_threads"], "NAME=VALUE"),
    (["=2"], "NAME=VALUE"),
    (["--intra=2"], "NAME=VALUE"),
    (["x=1", "x=2"], "x is given twice"),
    (["cuda_graph=True"], "fix: --option cuda_graph=true"),
    (["cuda_graph=None"], "fix: --option cuda_graph=null"),
])
def test_options_that_cannot_be_read(texts, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        options.read_options(texts)


def test_options_are_json_or_text():
    assert options.read_options(None) == {}
    assert options.read_options(["a=2", "b=true", "c=null", 'd=["x", 1]', "e=build/x=y.so", "f=", 'g="2"', "h=cuda:1",
                                 ]) == {"a": 2, "b": True, "c": None, "d": ["x", 1], "e": "build/x=y.so", "f": "",
                                        "g": "2", "h": "cuda:1"}


def test_build_takes_an_option_once(call, dense, tmp_path):
    code, _, err = call("build", dense, "-o", tmp_path / "x", "--runtime", "aoti", "--device", "cpu", "--option",
                        "device=cpu")
    assert (code, "the option device is given twice" in err) == (2, True)


@pytest.mark.parametrize(("given", "problem", "fix"), [
    (("--device", "cuda"), "ONNX Runtime has execution providers, not a device", "--provider CUDAExecutionProvider"),
    (("--device", "cpu"), "ONNX Runtime has execution providers, not a device", "--provider CPUExecutionProvider"),
    (("--device", "cuda:1"), "ONNX Runtime has execution providers, not a device",
     """--option 'providers=[["CUDAExecutionProvider", {"device_id": 1}]]'"""),
    (("--runtime", "aoti", "--provider", "CPUExecutionProvider"), "--provider is ONNX Runtime's", "leave it out"),
    (("--runtime", "tensorrt", "--custom-ops", "library.so"), "--custom-ops is ONNX Runtime's", "leave it out"),
], ids=["cuda", "cpu", "second GPU", "provider", "custom ops"])
def test_build_says_what_a_runtime_takes_instead(call, dense, tmp_path, given, problem, fix):
    code, _, err = call("build", dense, "-o", tmp_path / "x", *given)
    assert (code, f"error: {problem}" in err, f"fix: {fix}" in err) == (2, True, True), err


def test_a_verb_that_takes_a_conversion_gets_what_was_given():
    asked = []

    @options.takes_conversion
    def verb(model: str, conversion: options.Conversion, count: int = 3) -> None:
        """What it does."""
        asked.append((model, conversion, count))

    names = list(inspect.signature(verb).parameters)
    assert names == ["model", *MoDConfig.model_fields, "count"] == list(verb.__annotations__)
    assert verb.__doc__ == "What it does."
    verb(model="m", **dict.fromkeys(MoDConfig.model_fields), count=4)
    verb(model="m", **dict.fromkeys(MoDConfig.model_fields) | {"gate": "tanh"})
    assert asked == [("m", {}, 4), ("m", {"gate": "tanh"}, 3)]


def test_report(call, report, converted, dense):
    found = report("report", converted)
    assert [(b["path"], b["capacity_ratio"]) for b in found["routed_blocks"]] == [
        ("encoder.layer.1", "1/4"), ("encoder.layer.3", "1/4")]
    assert found["router_parameters"] == 2 * 33
    flops = found["flops"]
    assert flops["routed"] < flops["dense"]
    assert abs(flops["pruned"] - flops["routed"]) < flops["dense"] / 8
    code, _, err = call("report", dense)
    assert (code, "modcompile convert" in err) == (2, True)


def test_report_on_a_text(call, report, converted, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<unk>": 1, "the": 2, "dog": 3, "barks": 4}
    made = Tokenizer(models.WordLevel(words, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("the dog barks\n\nthe dog\n")
    line = ("report", converted, "--text", tmp_path / "text.txt", "--tokenizer", tmp_path, "-o", tmp_path / "page.html")
    found = report(*line, "--by-line", "--shape", "input_ids=2x9")
    assert (found["tokens"], found["passages"], found["padding"]) == (5, 2, pytest.approx(1 / 6))
    assert "barks" in (tmp_path / "page.html").read_text(encoding="utf-8")
    for wrong, message in ((line[:4], "no --output"), (line[:2] + line[6:], "is for a report on a text"),
                           ((*line, "--shape", "input_ids=9"), "batches of one shape")):
        code, _, err = call(*wrong)
        assert (code, message in err) == (2, True), err


def test_doctor(call, report, monkeypatch):
    findings = report("doctor")
    assert {"python", "torch", "onnxruntime", "cmake"} <= {finding["name"] for finding in findings}
    from modcompile.doctor import Finding

    missing = Finding("torch", "missing", required=True, fix="pip install torch")
    monkeypatch.setattr("modcompile.doctor.diagnose", lambda: [missing])
    code, out, _ = call("doctor")
    assert code == 5
    assert "pip install torch" in out


def test_passes(call, report):
    import modcompile.passes.route_blocks

    found = {entry["name"]: entry for entry in report("passes")}
    assert {"outline-blocks", "route-blocks", "prune-blocks", "hoist-sizes"} <= found.keys()
    fields = {field.name for field in dataclasses.fields(modcompile.passes.route_blocks.RouteBlocks)}
    assert found["route-blocks"]["options"].keys() == fields
    assert all(entry["summary"].endswith((".", ":")) for entry in found.values())
    assert "route-blocks" in call("passes")[1]
