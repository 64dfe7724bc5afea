"""What all engines share: dispatch, options, and the checks of inputs before a runtime sees them."""

import collections
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import WIDTH, Mlp, Stack, randn, randomise_routers
from torch import nn

import modcompile.engine
from modcompile.bench import benchmark
from modcompile.capture import capture
from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.engine import Engine, build_engine, load_engine
from modcompile.errors import IntegrityError, RuntimeUnavailableError, UsageError
from modcompile.manifest import Manifest, TensorSpec, write_manifest
from modcompile.saving import MODEL_FILE, load
from modcompile.verify import verify

FIELDS = {
    "runtime": "ort",
    "runtime_version": "1.32.0",
    "runtime_range": {"minimum": "1.24"},
    "precision": "fp32",
    "entry": "model.onnx",
    "inputs": [
        TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence")),
        TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "sequence")),
        TensorSpec(name="pixels", dtype="float32", shape=("batch", 3)),
    ],
    "outputs": [TensorSpec(name="y", dtype="float32", shape=("batch",))],
}


class Recorder(Engine):
    """An engine that gives back what reached it."""

    def _run(self, inputs):
        return dict(inputs)


@pytest.fixture
def engine(tmp_path):
    manifest = Manifest(modcompile_version="0", files={"model.onnx": {"sha256": "0" * 64, "size": 0}}, **FIELDS)
    return Recorder(tmp_path / "some-engine", manifest)


def inputs(rows=2, length=7):
    ids = np.ones((rows, length), np.int64)
    return {"input_ids": ids, "attention_mask": ids, "pixels": np.ones((rows, 3), np.float32)}


def torch_inputs(**changed):
    return {name: torch.from_numpy(value) for name, value in inputs().items()} | changed


def test_an_engine_describes_itself(engine):
    assert (engine.name, engine.runtime) == ("some-engine", "ort")
    assert [spec.name for spec in engine.inputs] == ["input_ids", "attention_mask", "pixels"]
    assert "input_ids int64 [batch, sequence]" in repr(engine)


def test_inputs_that_fit_reach_the_runtime(engine):
    assert engine.run(inputs()).keys() == inputs().keys()
    assert engine.run(torch_inputs()).keys() == inputs().keys()
    # What tokenizers return is a mapping and no dict.
    assert engine.run(collections.UserDict(inputs(rows=1))).keys() == inputs().keys()


@pytest.mark.parametrize(("change", "parts"), [
    ({"input_idz": np.ones((2, 7), np.int64)}, ["input_idz", "input_ids, attention_mask, pixels"]),
    ({"pixels": np.ones((2, 3))}, ["pixels", "expected: float32", "found: float64", '.astype("float32")']),
    ({"pixels": np.ones((2, 3), ">f4")}, ["expected: float32", "found: >f4"]),
    ({"input_ids": np.ones((2, 7), np.int32)}, ["expected: int64", "found: int32", 'input_ids.astype("int64")']),
    ({"input_ids": np.ones(7, np.int64)}, ["rank", "[batch, sequence]", "(7,)", "2 dims"]),
    ({"pixels": np.ones((2, 4), np.float32)}, ["[batch, 3]", "(2, 4)", "axis 1", "pad or cut it to 3"]),
    ({"attention_mask": np.ones((2, 9), np.int64)},
     ["'sequence'", "sequence = 7, as in input_ids", "sequence = 9", "attention_mask, axis 1"]),
    ({"pixels": np.ones((3, 3), np.float32)}, ["'batch'", "batch = 2, as in input_ids", "batch = 3"]),
    ({"input_ids": np.ones((2, 0), np.int64)}, ["empty", "(2, 0)"]),
    ({"input_ids": [[1, 2], [3, 4]]}, ["not a tensor", "builtins.list", "numpy.asarray"]),
    ({"input_ids": np.int64(3)}, ["not a tensor", "numpy.int64"]),
    ({"input_ids": torch.ones(2, 7, dtype=torch.int64)}, ["different kinds", "torch on cpu", "numpy"]),
])
def test_inputs_that_do_not_fit(engine, change, parts):
    with pytest.raises(UsageError) as caught:
        engine.run(inputs() | change)
    for part in parts:
        assert part in str(caught.value)


def test_torch_inputs_that_do_not_fit(engine):
    with pytest.raises(UsageError, match=r"input_ids\.to\(torch\.int64\)"):
        engine.run(torch_inputs(input_ids=torch.ones(2, 7, dtype=torch.int32)))
    with pytest.raises(UsageError, match="different devices"):
        engine.run(torch_inputs(pixels=torch.ones(2, 3, device="meta")))


def test_names(engine):
    given = inputs()
    given["attention_masks"] = given.pop("attention_mask")
    with pytest.raises(UsageError, match="did you mean attention_mask"):
        engine.run(given)
    given.pop("attention_masks")
    with pytest.raises(UsageError, match="attention_mask is missing"):
        engine.run(given)
    with pytest.raises(UsageError, match="by name"):
        engine.run(inputs()["input_ids"])


def test_a_closed_engine_does_not_run(engine):
    with engine:
        engine.run(inputs())
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.run(inputs())


def test_runtimes_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(RuntimeUnavailableError, match="did you mean tensorrt"):
        build_engine("model.onnx", tmp_path / "engine", runtime="tensort")
    monkeypatch.setitem(modcompile.engine._BACKENDS, "ort", ("modcompile.runtimes.absent", "pip install onnxruntime"))
    with pytest.raises(RuntimeUnavailableError, match="fix: pip install onnxruntime"):
        build_engine("model.onnx", tmp_path / "engine")
    assert os.listdir(tmp_path) == []


def test_an_engine_of_a_runtime_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"")
    write_manifest(tmp_path, FIELDS | {"runtime": "aoti"})
    monkeypatch.delitem(modcompile.engine._BACKENDS, "aoti")
    with pytest.raises(RuntimeUnavailableError, match="found: aoti"):
        load_engine(tmp_path)


def test_options_are_checked_before_any_work(tmp_path):
    with pytest.raises(UsageError, match="did you mean intra_op_threads"):
        build_engine("absent.onnx", tmp_path / "engine", intra_op_thread=1)
    # The file is taken as it is: options of the export have nothing to act on.
    with pytest.raises(UsageError, match="found: opset"):
        build_engine("absent.onnx", tmp_path / "engine", opset=23)
    (tmp_path / "model.onnx").write_bytes(b"")
    write_manifest(tmp_path, FIELDS)
    with pytest.raises(UsageError, match="found: bogus"):
        load_engine(tmp_path, bogus=1)


@pytest.mark.parametrize("options", [
    {"intra_op_threads": "two"}, {"optimization": "foo"}, {"session_config": {"session.x": 1}},
    {"session_config": "fast"}], ids=lambda options: "-".join(options))
def test_an_option_that_cannot_be_loaded_with_replaces_nothing(tmp_path, options):
    mod = convert(Stack(Mlp(), Mlp()), (randn(2, 7, WIDTH),))
    build_engine(mod, tmp_path / "old", shapes={"hidden": (2, 7, WIDTH)}).close()
    before = (tmp_path / "old" / "manifest.json").read_bytes()
    for folder in ("old", "new"):
        with pytest.raises(UsageError, match=next(iter(options))):
            build_engine(mod, tmp_path / folder, overwrite=True, **options)
    assert (tmp_path / "old" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_model_is_no_engine(tmp_path):
    folder = convert(Stack(Mlp(), Mlp()), (randn(2, 7, WIDTH),)).save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match=r"(?s)holds a model, and no engine.*modcompile build"):
        load_engine(folder)


def test_an_index_that_the_model_has_nothing_for(tmp_path):
    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words = torch.nn.Embedding(17, WIDTH)

        def forward(self, input_ids):
            return self.words(input_ids)

    with build_engine(capture(Words().eval(), (torch.zeros(2, 7, dtype=torch.int64),)), tmp_path / "engine") as engine:
        with pytest.raises(UsageError, match=r"(?s)index that the model has nothing for.*vocabulary"):
            engine.run({"input_ids": torch.full((3, 5), 17)})


def test_a_model_is_exported_first(tmp_path, monkeypatch):
    """The export gets its own options, the backend its own, and the folder of the export does not stay."""
    import types

    seen = {}

    def export_onnx(model, path, *, example_inputs=None, opset=18, inline=False, precision="fp32", shapes=None,
                    external_data=False):
        seen["export"] = (model, opset, precision, shapes)
        path.write_bytes(b"onnx")

    def build(onnx_path, folder, *, runtime, precision, shapes, level=0):
        seen["build"] = (onnx_path.read_bytes(), runtime, precision, shapes, level)
        (folder / "model.onnx").write_bytes(b"engine")
        return FIELDS

    def load(folder, manifest, *, threads=None):
        seen["load"] = threads
        return Recorder(folder, manifest)

    monkeypatch.setitem(sys.modules, "modcompile.export", types.SimpleNamespace(export_onnx=export_onnx))
    monkeypatch.setitem(sys.modules, "modcompile.runtimes.fake", types.SimpleNamespace(
        build=build, load=load, takes="onnx", opset=20))
    monkeypatch.setitem(modcompile.engine._BACKENDS, "ort", ("modcompile.runtimes.fake", ""))
    model, shapes = object(), {"input_ids": (2, 7)}
    engine = build_engine(model, tmp_path / "e", precision="fp16", shapes=shapes, opset=23, level=5, threads=3)
    assert seen == {"export": (model, 23, "fp16", shapes), "build": (b"onnx", "ort", "fp16", shapes, 5), "load": 3}
    assert sorted(os.listdir(tmp_path / "e")) == ["manifest.json", "model.onnx"]
    assert engine.folder == tmp_path / "e"
    build_engine(model, tmp_path / "f")
    assert seen["export"] == (model, 20, "fp32", None)


def test_a_runtime_that_takes_models_gets_the_model(tmp_path, monkeypatch):
    import types

    seen = {}

    def build(source, folder, *, runtime, precision, shapes):
        seen["source"] = source
        (folder / "model.onnx").write_bytes(b"engine")
        return FIELDS

    fake = types.SimpleNamespace(build=build, load=lambda folder, manifest: Recorder(folder, manifest), takes="model")
    monkeypatch.setitem(sys.modules, "modcompile.runtimes.fake", fake)
    monkeypatch.setitem(modcompile.engine._BACKENDS, "ort", ("modcompile.runtimes.fake", ""))
    model = object()
    build_engine(model, tmp_path / "e")
    assert seen["source"] is model
    with pytest.raises(UsageError, match="made from a model, not from an ONNX file"):
        build_engine(tmp_path / "model.onnx", tmp_path / "f")


def test_import_is_quick_and_imports_no_runtime():
    script = """
import sys, time
# Processor time: other processes do not count. How fast this processor is at the moment, pydantic tells.
start = time.process_time()
import pydantic; pydantic.BaseModel
middle = time.process_time()
import modcompile.engine
end = time.process_time()
heavy = {"torch", "numpy", "onnx", "onnxruntime", "transformers"} & sys.modules.keys()
print((end - middle) / (middle - start), *heavy)
"""
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
            for _ in range(3)]
    assert all(len(run) == 1 for run in runs)
    # About 0.45: with 0.1 s for pydantic, that is 0.15 s in all.
    assert min(float(run[0]) for run in runs) < 1


class States(nn.Module):
    """Returns its input beside what it makes of it, and one value by two names."""

    def __init__(self):
        super().__init__()
        self.stack = Stack(Mlp(), Mlp())

    def forward(self, hidden):
        states = [hidden]
        for layer in self.stack.layers:
            states.append(layer(states[-1]))
        return {"last": states[-1], "states": states}


@pytest.mark.parametrize("options", [{}, {"opset": 17}, {"shapes": {"hidden": (2, 7, WIDTH)}}])
def test_an_input_that_is_an_output_keeps_its_name(tmp_path, options):
    x = randn(2, 7, WIDTH)
    mod = randomise_routers(convert(States().eval(), {"hidden": x}, MoDConfig(capacity_ratio=0.5)))
    with build_engine(mod, tmp_path / "engine", **options) as engine:
        assert [spec.name for spec in engine.inputs] == ["hidden"]
        assert [spec.name for spec in engine.outputs] == ["last", "states.0", "states.1", "states.2"]
        verify(mod, engine, {"hidden": x})


def test_an_output_that_is_called_as_an_input_is(tmp_path):
    class Same(States):
        def forward(self, hidden):
            return {"hidden": super().forward(hidden)["last"]}

    x = randn(2, 7, WIDTH)
    mod = randomise_routers(convert(Same().eval(), {"hidden": x}, MoDConfig(capacity_ratio=0.5)))
    with build_engine(mod, tmp_path / "engine") as engine:
        assert [spec.name for spec in (*engine.inputs, *engine.outputs)] == ["hidden", "hidden_out"]
        verify(mod, engine, {"hidden": x})


@pytest.mark.parametrize("runtime", ["ort", pytest.param("aoti", marks=pytest.mark.long)])
def test_a_half_model_is_taken_as_it_is_or_refused(tmp_path, runtime):
    x = randn(2, 7, WIDTH)
    mod = randomise_routers(convert(Stack(Mlp(), Mlp()).half().eval(), (x.half(),), MoDConfig(capacity_ratio=0.5)))
    with build_engine(mod, tmp_path / "own", runtime=runtime) as engine:
        assert engine.manifest.precision == "fp16" and engine.outputs[0].dtype == "float16"
        verify(mod, engine, {"hidden": x.half()})
    for precision in ("fp32", "bf16"):
        with pytest.raises(UsageError, match=r"only a model in float32 is cast(.|\n)*float16"):
            build_engine(mod, tmp_path / precision, runtime=runtime, precision=precision)
    with pytest.raises(UsageError, match="parameters in float64"):
        build_engine(convert(Stack(Mlp(), Mlp()).double().eval(), (x.double(),)), tmp_path / "double", runtime=runtime)


@pytest.mark.parametrize("shapes", [{"hidden": 5}, {"hidden": (2, "a", WIDTH)}, (2, 7, WIDTH)])
def test_shapes_that_are_none(tmp_path, shapes):
    mod = convert(Stack(Mlp(), Mlp()), (randn(2, 7, WIDTH),))
    with pytest.raises(UsageError, match="shapes are sizes by the input's name"):
        build_engine(mod, tmp_path / "engine", shapes=shapes)


def test_other_arguments_than_are_asked_for(tmp_path):
    mod = convert(Stack(Mlp(), Mlp()), (randn(2, 7, WIDTH),))
    with build_engine(mod, tmp_path / "engine") as engine:
        for inputs in ([randn(2, 7, WIDTH)], randn(2, 7, WIDTH), {"hidden": [1.0]}):
            with pytest.raises(UsageError, match="the inputs are not arrays by name"):
                verify(mod, engine, inputs)
    with pytest.raises(UsageError, match="found: dict"):
        convert(Stack(Mlp(), Mlp()), (randn(2, 7, WIDTH),), {"gate": "raw"})
    with pytest.raises(UsageError, match="found: Stack"):
        benchmark(Stack(Mlp(), Mlp()))


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, '"text"', "{}"])
def test_a_description_that_is_none(tmp_path, content):
    folder = convert(Stack(Mlp(), Mlp()), (randn(2, 7, WIDTH),)).save_pretrained(tmp_path / "saved")
    (folder / MODEL_FILE).write_text(content)
    with pytest.raises(IntegrityError, match="the model's description cannot be read"):
        load(folder)
