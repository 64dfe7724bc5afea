"""benchmark: what is built, checked, timed and told, on engines that are the models themselves."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeEngine
from rich.console import Console
from tiny import Attention, Stack, randomise_routers

import modcompile as mc
from modcompile.errors import ParityError, UsageError
from modcompile.flops import count_flops
from modcompile.model import GraphModel, MoDModel
from modcompile.variants import dense_model, oracle_model, pruned_model

# B batch  S rows  D model dim

B, S, WIDTH = 2, 63, 8
SHAPES = {"hidden": (B, S, WIDTH)}
SIZES = {"batch": B, "sequence": S}
# The package's attribute of this name is the function.
BENCH = importlib.import_module("modcompile.bench")


def converted(**options) -> MoDModel:
    model = Stack(*(Attention() for _ in range(4)))
    example = {"hidden": torch.randn(2, 5, WIDTH), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    return mc.convert(model, example, mc.MoDConfig(capacity_ratio=5 / 63, **options))


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

    def __call__(self, model: GraphModel, path: Path, **options) -> FakeEngine:
        self.models[path.name] = model
        self.options.append(options)
        self.engines[path.name] = engine = FakeEngine(model, self.tamper.get(path.name))
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
    console = Console(width=160)
    with console.capture() as shown:
        console.print(report)
    assert f"dense/MoD {report.ratios['dense/MoD']:.3f}" in shown.get() and "K = 5 in 2 routed blocks" in shown.get()


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
    console = Console(width=160)
    with console.capture() as shown:
        console.print(report)
    assert report.machine["load_average"] == load
    assert ("the machine was busy: load average 3.0" in shown.get()) == busy


def test_inputs_are_random_and_hide_nothing(mod: MoDModel, builder: Builder):
    mc.benchmark(mod, shapes=SHAPES, runs=1, warmup=0)
    inputs = builder.inputs[0]
    assert inputs["attention_mask"].all()
    assert np.unique(inputs["hidden"]).size > 0.9 * inputs["hidden"].size
    assert all(np.array_equal(other["hidden"], inputs["hidden"]) for other in builder.inputs)


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
