"""benchmark: what is built, checked, timed and told, on engines that are the models themselves."""

import copy
import importlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeEngine
from rich.console import Console
from tiny import Attention, Mlp, Stack, randomise_routers

import modcompile as mc
from modcompile.bench import VARIANTS, device_options
from modcompile.bench_check import check
from modcompile.errors import ParityError, UnsupportedGraphError, UsageError
from modcompile.flops import count_flops
from modcompile.model import GraphModel, MoDModel
from modcompile.variants import dense_model, oracle_model, pruned_model

# B batch  S rows  D model dim

B, S, WIDTH = 2, 63, 8
SHAPES = {"hidden": (B, S, WIDTH)}
SIZES = {"batch": B, "sequence": S}
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
# The package's attribute of this name is the function.
BENCH = importlib.import_module("modcompile.bench")


def converted(**options) -> MoDModel:
    model = Stack(*(Attention() for _ in range(4)))
    example = {"hidden": torch.randn(2, 5, WIDTH), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    return mc.convert(model, example, mc.MoDConfig(capacity_ratio=5 / 63, **options))


def shown(report) -> str:
    console = Console(width=160)
    with console.capture() as text:
        console.print(report)
    return text.get()


@pytest.fixture(scope="module")
def mod() -> MoDModel:
    return randomise_routers(converted())


class Builder:
    """Takes the place of build_engine, and keeps what it was asked for."""

    def __init__(self):
        self.models: dict[str, GraphModel] = {}
        self.engines: dict[str, FakeEngine] = {}
        self.inputs: list[dict] = []
        self.turns: list[str] = []
        self.options: list[dict] = []
        self.tamper: dict[str, Callable] = {}
        self.broken: set[str] = set()

    def __call__(self, model: GraphModel, path: Path, **options) -> FakeEngine:
        if path.name in self.broken:
            raise UnsupportedGraphError("does not build", found=path.name)
        self.models[path.name] = model
        self.options.append(options)
        self.engines[path.name] = engine = FakeEngine(model, self.tamper.get(path.name), options["precision"])
        run = engine.run

        def noted(inputs):
            self.turns.append(path.name)
            self.inputs.append(dict(inputs))
            return run(inputs)

        engine.run = noted  # type: ignore[method-assign]
        return engine


@pytest.fixture
def builder(monkeypatch) -> Builder:
    made = Builder()
    monkeypatch.setattr(BENCH, "build_engine", made)
    monkeypatch.setattr(importlib.import_module("modcompile.verify"), "build_engine", made)
    return made


def test_every_variant_is_built_checked_and_timed(mod: MoDModel, builder: Builder):
    said: list[str] = []
    report = mc.benchmark(mod, shapes=SHAPES, runs=7, warmup=2, options={"opset": 18}, progress=said.append)
    assert list(report.timings) == ["dense", "dense (again)", "mod", "oracle", "pruned"]
    # The routed engine first: if it is wrong nothing else is built.
    assert list(builder.engines) == ["mod", "dense", "oracle", "pruned"]
    shapes = {"hidden": (B, S, WIDTH), "attention_mask": (B, S)}
    assert builder.options == [{"runtime": "ort", "precision": "fp32", "shapes": shapes, "opset": 18}] * 4
    assert [len(timing.times_ms) for timing in report.timings.values()] == [7] * 5
    # One run to check it, two to warm up, seven that count.
    assert {name: engine.runs for name, engine in builder.engines.items()} == {
        "mod": 10, "dense": 19, "oracle": 10, "pruned": 10}
    assert (report.shapes, report.rounds, report.warmup) == (shapes, 7, 2)
    assert "building the oracle engine" in said and said[-1] == "round 7 of 7"


def test_engines_take_turns_in_random_order(mod: MoDModel, builder: Builder):
    mc.benchmark(mod, shapes=SHAPES, runs=9, warmup=1)
    turns = builder.turns[4:]
    rounds = [turns[i:i + 5] for i in range(0, len(turns), 5)]
    assert len(rounds) == 10
    assert all(sorted(one) == ["dense", "dense", "mod", "oracle", "pruned"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 3
    first = list(builder.turns)
    builder.turns.clear()
    mc.benchmark(mod, shapes=SHAPES, runs=9, warmup=1)
    assert builder.turns == first


def test_flops_are_the_graphs(mod: MoDModel, builder: Builder):
    report = mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0)
    flops = {name: timing.flops for name, timing in report.timings.items()}
    assert flops["mod"] == count_flops(mod, SIZES)
    assert flops["dense"] == flops["dense (again)"] == count_flops(dense_model(mod), SIZES)
    assert flops["oracle"] == count_flops(oracle_model(mod), SIZES)
    assert flops["pruned"] == count_flops(pruned_model(mod, report.pruned), SIZES)
    # 4 blocks, of which 2 at 5 rows of 63: nothing comes nearer than 2 of 4.
    assert report.pruned == ("layers.1", "layers.3")
    assert flops["pruned"] < flops["oracle"] < flops["mod"] < flops["dense"]
    assert report.capacities == {"layers.1": 5, "layers.3": 5}


def test_ratios_are_those_of_the_medians(mod: MoDModel, builder: Builder):
    report = mc.benchmark(mod, shapes=SHAPES, runs=5, warmup=0)
    median = {name: np.median(timing.times_ms) for name, timing in report.timings.items()}
    assert report.ratios == pytest.approx({
        "dense/MoD": median["dense"] / median["mod"], "oracle/MoD": median["oracle"] / median["mod"],
        "pruned/MoD": median["pruned"] / median["mod"],
        "dense (again)/dense": median["dense (again)"] / median["dense"]})
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["ratios"] == report.ratios
    timing = data["timings"]["mod"]
    assert timing["p10_ms"] <= timing["p25_ms"] <= timing["median_ms"] <= timing["p75_ms"] <= timing["p90_ms"]
    assert data["machine"]["cores"] >= 1 and data["machine"]["cpu"] and data["machine"]["runtime_version"] == "0"
    text = shown(report)
    assert f"dense/MoD {report.ratios['dense/MoD']:.3f}" in text and "K = 5 in 2 routed blocks" in text


@pytest.mark.parametrize("variants", [("mod", "oracle"), ("dense",)])
def test_some_variants(mod: MoDModel, builder: Builder, variants: tuple[str, ...]):
    report = mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, variants=variants)
    assert set(builder.engines) == set(variants)
    assert list(report.ratios) == (["oracle/MoD"] if "mod" in variants else ["dense (again)/dense"])


@pytest.mark.parametrize(("load", "busy"), [(0.3, False), (3.0, True)])
def test_a_busy_machine_is_told(mod: MoDModel, builder: Builder, monkeypatch, load: float, busy: bool):
    monkeypatch.setattr(BENCH.os, "getloadavg", lambda: (load, 9.0, 9.0), raising=False)
    monkeypatch.setattr(BENCH.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    report = mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, variants=("mod",))
    assert report.machine["load_average"] == load
    assert ("the machine was busy: load average 3.0" in shown(report)) == busy


def test_inputs_are_random_and_hide_nothing(mod: MoDModel, builder: Builder):
    mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0)
    inputs = builder.inputs[0]
    assert inputs["attention_mask"].all()
    assert np.unique(inputs["hidden"]).size > 0.9 * inputs["hidden"].size
    assert all(np.array_equal(other["hidden"], inputs["hidden"]) for other in builder.inputs)


def test_inputs_that_are_given_reach_every_engine(mod: MoDModel, builder: Builder):
    hidden = np.random.default_rng(0).standard_normal((2, 11, WIDTH)).astype(np.float32)
    report = mc.benchmark(mod, inputs={"hidden": hidden}, runs=1, warmup=0)
    assert report.shapes["attention_mask"] == (2, 11)
    assert len(builder.inputs) > 1 and all(np.array_equal(given["hidden"], hidden) for given in builder.inputs)


def test_routers_that_cannot_tell_rows_apart_are_replaced_on_a_copy(builder: Builder):
    mod = converted()
    report = mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, variants=("mod",))
    assert report.routers == "random, on a copy: in the model all weights are zero"
    timed = builder.models["mod"]
    assert all(router.weight.abs().min() > 0 for router in timed.routers.values())
    assert not any(router.weight.any() for router in mod.routers.values())
    # Weights of the blocks are not copied.
    assert timed.get_parameter("layers.0.query.weight") is mod.get_parameter("layers.0.query.weight")


def test_routers_of_a_trained_model_stay(mod: MoDModel, builder: Builder):
    assert mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, variants=("mod",)).routers == "as they are in the model"
    assert builder.models["mod"] is mod


def test_a_saved_model(mod: MoDModel, builder: Builder, tmp_path: Path):
    mod.save_pretrained(tmp_path / "model")
    report = mc.benchmark(tmp_path / "model", shapes=SHAPES, runs=1, warmup=0, variants=("mod",))
    assert report.timings["mod"].max_abs_error == 0


@pytest.mark.parametrize("variant", ["mod", "oracle"])
def test_an_engine_that_is_wrong_is_not_timed(mod: MoDModel, builder: Builder, variant: str):
    def tamper(outputs):
        outputs["output"] += 0.1

    builder.tamper[variant] = tamper
    with pytest.raises(ParityError):
        mc.benchmark(mod, shapes=SHAPES, runs=3, warmup=0)
    assert all(engine.runs <= 1 for engine in builder.engines.values())
    # Nothing is built after it, but what verify looks into it with.
    assert [name for name in builder.engines if name != "probe"][-1] == variant


def test_a_variant_that_fails_does_not_lose_the_others(mod: MoDModel, builder: Builder):
    def tamper(outputs):
        outputs["output"] += 0.1

    builder.broken, builder.tamper["masked"] = {"oracle"}, tamper
    given = {"shapes": SHAPES, "runs": 1, "warmup": 0, "variants": ("dense", "mod", "oracle", "masked", "pruned")}
    with pytest.raises(UnsupportedGraphError, match="does not build"):
        mc.benchmark(mod, **given)
    report = mc.benchmark(mod, **given, keep_going=True)
    assert list(report.timings) == ["dense", "dense (again)", "mod", "pruned"]
    assert report.failed["oracle"] == "does not build\n  found: oracle"
    assert "masked" in report.failed and "differs from the model" in report.failed["masked"]
    assert report.to_dict()["failed"] == report.failed
    assert "oracle failed: does not build" in shown(report)
    assert builder.engines["masked"]._closed


@pytest.mark.parametrize("variant", ["mod", "dense"])
def test_without_the_dense_and_the_routed_engine_there_is_nothing_to_compare(mod: MoDModel, builder: Builder,
                                                                             variant: str):
    builder.broken = {variant}
    with pytest.raises(UnsupportedGraphError, match="does not build"):
        mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, keep_going=True)
    assert all(engine._closed for engine in builder.engines.values())


def test_what_is_not_built_in_time_is_told(mod: MoDModel, builder: Builder, monkeypatch):
    # Every build takes ten seconds.
    monkeypatch.setattr(BENCH.time, "perf_counter", lambda: 10.0 * len(builder.engines))
    report = mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, limit_s=15,
                          variants=("oracle", "pruned", "dense", "mod"))
    assert list(builder.engines) == ["mod", "dense"]
    assert report.failed == {name: "not built: 15 s had passed" for name in ("oracle", "pruned")}
    assert [timing.build_s for timing in report.timings.values()] == [10] * 3
    # The first one is built in any case.
    builder.engines.clear()
    assert list(mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, limit_s=-1).timings) == ["mod"]


def test_variants_are_built_in_the_order_asked_for(mod: MoDModel, builder: Builder):
    mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, variants=("pruned", "other", "dense", "masked", "oracle", "mod"))
    assert list(builder.engines) == ["mod", "dense", "pruned", "other", "masked", "oracle"]


def test_torch_compile_takes_part(mod: MoDModel, builder: Builder):
    report = mc.benchmark(mod, shapes=SHAPES, runs=2, warmup=0, variants=("dense", "mod", "compile"))
    assert list(builder.engines) == ["mod", "dense"]
    timing = report.timings["compile"]
    assert timing.flops == report.timings["dense"].flops
    assert timing.relative_l2 < 1e-5 and timing.build_s is not None and timing.folder_bytes is None
    assert timing.weight_bytes == sum(tensor.nbytes for tensor in dense_model(mod).tensors().values())
    assert {"torch.compile/dense", "torch.compile/MoD"} <= set(report.ratios) and "torch.compile" in shown(report)


def test_the_weights_of_dropped_blocks_do_not_count(mod: MoDModel, builder: Builder):
    timings = mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, variants=("dense", "mod", "pruned")).timings
    dropped = mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, variants=("mod", "pruned")).pruned
    block = sum(tensor.nbytes for name, tensor in mod.named_parameters() if name.startswith(f"{dropped[0]}."))
    assert timings["dense"].weight_bytes - timings["pruned"].weight_bytes == len(dropped) * block > 0


def test_rows_that_near_ties_send_elsewhere_are_counted(mod: MoDModel, builder: Builder):
    """In half precision few rows may be far where PyTorch has none; in float32, and without routing, none at all."""
    def swap(rows):
        def tamper(outputs):
            outputs["output"][0, :rows] += 1

        return tamper

    builder.tamper["mod"] = swap(1)
    report = mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, variants=("mod",), precision="fp16")
    assert report.timings["mod"].far_rows == pytest.approx(1 / (B * S))
    assert report.timings["mod"].torch_far_rows == 0
    assert report.timings["mod"].max_abs_error > 0.9
    assert "MoD: 0.79% of the rows are far from the float32 model's" in shown(report)
    for precision, rows, variant in (("fp16", 2, "mod"), ("fp32", 1, "mod"), ("fp16", 1, "oracle")):
        builder.tamper = {variant: swap(rows)}
        with pytest.raises(ParityError):
            mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, variants=(variant,), precision=precision)
    builder.tamper = {}
    assert mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, precision="fp16").timings["mod"].far_rows == 0


def test_an_engine_may_be_as_far_as_pytorch_in_its_precision(mod: MoDModel, monkeypatch):
    """Where near ties are everywhere, PyTorch has far rows of its own; then more of the engine's are let pass."""
    inputs = {"hidden": np.random.default_rng(0).standard_normal((B, S, WIDTH), np.float32),
              "attention_mask": np.ones((B, S), np.int64)}

    def tamper(outputs):
        outputs["output"][0, :3] += 1

    engine = FakeEngine(mod, tamper, "fp16")
    outside = importlib.import_module("modcompile.bench_check")
    in_torch = outside._in_torch
    with pytest.raises(ParityError):
        check(mod, engine, inputs, routed=True, options={"opset": 18})
    with monkeypatch.context() as patch:
        patch.setattr(outside, "_in_torch", lambda *given: [
            value.float().index_add(1, torch.arange(1), torch.ones(B, 1, WIDTH)) for value in in_torch(*given)])
        found = check(mod, engine, inputs, routed=True, options={})
    assert (found.far_rows, found.torch_far_rows) == pytest.approx((3 / (B * S), 2 / (B * S)))
    # Without tampering they agree with the model, and so does PyTorch.
    assert check(mod, FakeEngine(mod, None, "fp16"), inputs, routed=True, options={}).far_rows == 0
    (own,) = in_torch(mod, engine, inputs, torch.device("cpu"))
    assert own.dtype == torch.float16


def test_where_counting_shows_nothing_it_is_said(mod: MoDModel, builder: Builder, monkeypatch):
    """Where most of PyTorch's own rows are far, counting passes any engine."""
    def tamper(outputs):
        outputs["output"] += 1

    outside = importlib.import_module("modcompile.bench_check")
    in_torch = outside._in_torch
    builder.tamper["mod"] = tamper
    with pytest.raises(ParityError):
        mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, variants=("mod",), precision="fp16")
    monkeypatch.setattr(outside, "_in_torch", lambda *given: [value + 1 for value in in_torch(*given)])
    report = mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, variants=("mod",), precision="fp16")
    assert "of the engine this shows little, see modcompile verify" in shown(report)


def test_a_model_in_training_is_compared_without_dropout():
    mod = mc.convert(Stack(Mlp(dropout=0.5), Mlp(dropout=0.5)), (torch.randn(2, 5, WIDTH),))
    inputs = {"hidden": np.random.default_rng(0).standard_normal((B, S, WIDTH), np.float32)}
    engine = FakeEngine(copy.deepcopy(mod), None, "fp16")
    mod.train()
    assert check(mod, engine, inputs, routed=True, options={}).far_rows == 0
    assert mod.training


def test_rows_that_are_not_numbers_are_no_rounding(mod: MoDModel):
    def tamper(outputs):
        outputs["output"][0, 3] = np.nan

    inputs = {"hidden": np.random.default_rng(0).standard_normal((B, S, WIDTH), np.float32),
              "attention_mask": np.ones((B, S), np.int64)}
    with pytest.raises(ParityError, match="NaN"):
        check(mod, FakeEngine(mod, tamper, "fp16"), inputs, routed=True, options={})


def test_options_for_a_gpu():
    cpu, first, second = (torch.device(name) for name in ("cpu", "cuda:0", "cuda:1"))
    assert device_options("ort", cpu) == device_options("aoti", cpu) == {}
    assert device_options("ort", first) == {
        "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda_graph": True}
    assert device_options("ort", second)["providers"][0] == ("CUDAExecutionProvider", {"device_id": 1})
    assert device_options("aoti", second) == {"device": "cuda:1"}


def test_every_option_for_a_gpu_is_one_of_the_runtime():
    for runtime in ("ort", "aoti"):
        backend = importlib.import_module(f"modcompile.runtimes.{runtime}")
        known = {name for function in (backend.build, backend.load) for name in inspect.signature(function).parameters}
        assert device_options(runtime, torch.device("cuda:0")).keys() <= known


def test_options_in_the_report(mod: MoDModel, builder: Builder, tmp_path: Path):
    report = mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0, variants=("mod",),
                          options={"custom_ops": str(tmp_path / "library.so"), "opset": 18})
    assert builder.options[0]["custom_ops"] == str(tmp_path / "library.so")
    assert report.to_dict()["options"] == {"custom_ops": "library.so", "opset": 18}


def test_kernels_are_listed_on_a_gpu_alone(mod: MoDModel):
    with pytest.raises(UsageError, match=r"(?s)only a GPU's kernels.*found: one on cpu"):
        mc.benchmark(mod, shapes=SHAPES, profile=3)


def test_what_does_not_fit(mod: MoDModel):
    with pytest.raises(UsageError, match=r"(?s)size of every dim.*no size for batch, sequence.*fix: for example"):
        mc.benchmark(mod)
    with pytest.raises(UsageError, match="no size for sequence"):
        mc.benchmark(mc.convert(Two(), {"x": torch.randn(2, 5, WIDTH), "scale": torch.randn(2)}),
                     shapes={"scale": (3,)})
    for wrong in ({"variants": ("dense", "sparse")}, {"variants": ()}, {"runs": 0}, {"warmup": -1}):
        with pytest.raises(UsageError, match="variants or runs do not fit"):
            mc.benchmark(mod, shapes=SHAPES, **wrong)


class Two(Stack):
    """A stack with a second input, which has the batch's size alone."""

    def __init__(self):
        super().__init__(Attention(), Attention())

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * scale[:, None, None]


def test_onnx_runtime(mod: MoDModel, tmp_path: Path):
    """From end to end; the engines stay where they were asked for."""
    report = mc.benchmark(mod, shapes=SHAPES, runs=3, warmup=1, variants=("mod", "oracle"), folder=tmp_path,
                          options={"intra_op_threads": 1})
    assert 0 < report.timings["mod"].relative_l2 < 1e-5
    assert report.timings["mod"].median_ms > 0
    assert report.machine["runtime_version"].count(".") == 2
    with mc.load_engine(tmp_path / "oracle") as engine:
        assert [spec.shape for spec in engine.inputs] == [(B, S, WIDTH), (B, S)]


def test_engines_that_are_there_are_loaded(mod: MoDModel, tmp_path: Path, monkeypatch):
    given = {"shapes": SHAPES, "runs": 1, "warmup": 0, "folder": tmp_path, "options": {"intra_op_threads": 1}}
    built = mc.benchmark(mod, **given, variants=("mod",))
    assert built.loaded == () and built.timings["mod"].build_s > 0
    monkeypatch.setattr(BENCH, "build_engine", None)
    loaded = mc.benchmark(mod, **given, variants=("mod",))
    assert loaded.loaded == ("mod",) and loaded.timings["mod"].build_s is None
    assert "loaded, not built with these options: MoD" in shown(loaded)
    with pytest.raises(UsageError, match=r"(?s)of another kind.*expected: ort, fp16.*found: ort, fp32"):
        mc.benchmark(mod, **given, variants=("mod",), precision="fp16")
    # An engine of other weights does not pass for this model's.
    other = copy.deepcopy(mod)
    with torch.no_grad():
        other.get_parameter("layers.0.query.weight").mul_(-2)
    with pytest.raises(ParityError):
        mc.benchmark(other, **given, variants=("mod",))


@pytest.mark.parametrize("runtime", [
    pytest.param("ort", marks=[*GPU, pytest.mark.slow]), pytest.param("aoti", marks=[*GPU, pytest.mark.slow])])
def test_on_a_gpu(runtime: str, tmp_path: Path):
    if runtime == "ort":
        onnxruntime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("no CUDA provider")
    mod = randomise_routers(converted()).to("cuda")
    report = mc.benchmark(mod, runtime=runtime, shapes=SHAPES, precision="fp16", runs=5, warmup=1, variants=VARIANTS,
                          profile=2)
    assert report.failed == {} and len(report.timings) == len(VARIANTS) + 1
    assert report.options.keys() >= device_options(runtime, torch.device("cuda:0")).keys()
    for timing in report.timings.values():
        assert timing.device_bytes is not None and timing.median_ms > 0
        assert 1 <= len(timing.kernels) <= 2 and timing.kernels[0].total_us >= timing.kernels[-1].total_us > 0
    compiled = report.timings["compile"]
    assert compiled.device_bytes == compiled.weight_bytes + compiled.activation_bytes
    assert re.search(r"GPU MB", shown(report)) and json.dumps(report.to_dict(), allow_nan=False)
