"""The bench of TensorRT 8.6 engines, against a runner and a builder that are written here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scripts import load_script

BENCH = Path(__file__).with_name("trt86_bench.py")
# Takes the options of the real one, and no others; what it prints has the same form.
RUNNER = '''
import argparse, json, os
import numpy as np
import tensorrt as trt

parser = argparse.ArgumentParser()
parser.add_argument("onnx", nargs="?")
for name in ("plan", "inputs", "outputs", "layers"):
    parser.add_argument("--" + name)
parser.add_argument("--plugin", action="append", default=[])
parser.add_argument("--fp16", action="store_true")
parser.add_argument("--runs", type=int, default=50)
args = parser.parse_args()
assert args.plugin == ["lib.so"]
name = os.path.basename(args.onnx or args.plan).split(".")[0]
if args.onnx:
    assert args.fp16
    plan = trt.Builder().build_serialized_network("network of " + name, trt.Config())
    print("built in 1.5 s, 20.0 MB", flush=True)
    open(args.plan, "wb").write(plan)
else:
    plan = open(args.plan, "rb").read()
assert plan == b"network of " + name.encode()
print("device memory 30.0 MB", flush=True)
if args.layers:
    json.dump({"Layers": [{"LayerType": "PluginV2"}, {"LayerType": "Reformat"}, {"LayerType": "Reformat"}],
               "Bindings": []}, open(args.layers, "w"))
if args.outputs:
    given = np.load(args.inputs)["input_ids"]
    value = np.repeat(given[..., None], 4, axis=-1).astype(np.float16)
    # One row in six is routed otherwise.
    value[0, 0] += name == "plugins"
    np.savez(args.outputs, hidden=value)
ms = {"plugins": 10.0, "oracle": 9.8, "standard": 12.0, "dense": 20.0, "pruned": 10.5}[name]
print("latency ms: median %.4f min 1.0 max 30.0 (graph, %d runs)" % (ms, args.runs))
'''
TENSORRT = '''
import os
__version__ = "8.6.0"

class Cache:
    def __init__(self, known):
        self.known = known
    def serialize(self):
        return self.known + b"+"

class Config:
    def create_timing_cache(self, known):
        return Cache(known)
    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        self.cache = cache
        return not cache.known.startswith(b"other")
    def get_timing_cache(self):
        return self.cache

class Builder:
    def build_serialized_network(self, network, config):
        return network.encode()
'''
SIZES = {"batch": 2, "rows": 3, "width": 4, "precision": "fp16"}


@pytest.fixture
def bench(tmp_path):
    """Runs the bench on a folder as ``write`` leaves it, and gives its figures."""
    scripts, folder = tmp_path / "scripts", tmp_path / "folder"
    scripts.mkdir()
    folder.mkdir()
    (scripts / "tensorrt.py").write_text(TENSORRT)
    (scripts / "runner.py").write_text(RUNNER)
    ids = np.arange(6).reshape(2, 3) + 1
    np.savez(folder / "inputs.npz", input_ids=ids)
    for name in ("expected", "expected.dense"):
        np.save(folder / f"{name}.npy", np.repeat(ids[..., None], 4, axis=-1).astype(np.float32))
    (folder / "model.json").write_text(json.dumps({**SIZES, "blocks": 2, "routed_blocks": ["h.1", "h.3"]}))
    for name in ("plugins", "oracle", "standard", "dense", "pruned"):
        (folder / f"{name}.onnx").write_text(name)

    def run(*options, returncode=0):
        done = subprocess.run(
            [sys.executable, BENCH, "run", folder, "--runner", f"'{sys.executable}' '{scripts / 'runner.py'}'",
             "--plugin", "lib.so", "--runs", "7", *options], capture_output=True, text=True,
            env={"PYTHONPATH": str(scripts), "PATH": ""})
        assert done.returncode == returncode, done.stdout + done.stderr
        path = folder / "trt86.json"
        return json.loads(path.read_text()) if path.exists() else None, done.stdout + done.stderr

    run.folder = folder
    return run


def test_every_variant_is_built_once_and_timed_in_rounds(bench):
    report, text = bench("--rounds", "2")
    assert list(report["variants"]) == ["plugins", "oracle", "standard", "dense", "pruned"]
    assert report["machine"] == {"gpu": None, "tensorrt": "8.6.0"} and report["model"]["blocks"] == 2
    plugins = report["variants"]["plugins"]
    assert plugins == {
        "build_s": 1.5, "engine_mb": 20.0, "device_mb": 30.0, "layers": {"PluginV2": 1, "Reformat": 2},
        "far_rows": pytest.approx(1 / 6), "how": "graph", "times_ms": [10.0, 10.0], "median_ms": 10.0, "spread_ms": 0.0}
    assert {name: figure["far_rows"] for name, figure in report["variants"].items() if name != "plugins"} == {
        "oracle": None, "standard": 0.0, "dense": 0.0, "pruned": None}
    assert report["ratios"] == pytest.approx(
        {"oracle/plugins": 0.98, "standard/plugins": 1.2, "dense/plugins": 2.0, "pruned/plugins": 1.05})
    assert report["routing_us_per_block"] == pytest.approx(100)
    assert "| plugins | 2 | 20 | 30 | 3 | 2 | 10.000 (graph) | 0.000 | 16.67 % |" in text
    assert "oracle/plugins 0.980" in text and "routing 100 us" in text
    # Five builds have added to one cache.
    assert (bench.folder / "timing.cache").read_bytes() == b"+++++"


def test_a_second_run_builds_what_is_missing_and_adds_rounds(bench):
    bench("--rounds", "1", "--variants", "plugins,oracle")
    report, text = bench("--rounds", "1", "--variants", "plugins,oracle,dense")
    assert "building dense" in text and "building plugins" not in text
    assert [len(figure["times_ms"]) for figure in report["variants"].values()] == [2, 2, 1]
    # Another model is another bench.
    (bench.folder / "model.json").write_text(json.dumps({**SIZES, "blocks": 3, "routed_blocks": ["h.1"]}))
    report, text = bench("--rounds", "1", "--variants", "plugins")
    assert list(report["variants"]) == ["plugins"] and "building plugins" in text


@pytest.mark.parametrize(("limit_s", "built", "rounds"), [
    # A build takes 20 s and a round 2 s. Builds begin before 75 % of the limit, and are ended at 90 %.
    (None, 3, 3), (1000, 3, 3), (50, 2, 2), (70, 3, 1), (22, 0, 0), (30, 1, 1)])
def test_time_that_is_over_ends_builds_and_then_rounds(bench, monkeypatch, capsys, limit_s, built, rounds):
    module = load_script(BENCH)
    now = [100.0]

    def start(command, *arguments, timeout_s):
        name = Path(arguments[0] if arguments[0] != "--plan" else arguments[1]).stem
        cost = 2 if arguments[0] == "--plan" else 20
        if timeout_s is not None and timeout_s < cost:
            now[0] += timeout_s
            return None
        now[0] += cost
        if cost == 2:
            return "latency ms: median 3.0 min 1.0 max 4.0 (enqueue, 5 runs)"
        (bench.folder / f"{name}.plan.partial").write_text("plan")
        (bench.folder / f"{name}.layers.json").write_text('{"Layers": []}')
        return "TensorRT 8.6.0\nbuilt in 20.0 s, 1.0 MB\ndevice memory 1.0 MB\n"

    monkeypatch.setattr(module, "_start", start)
    monkeypatch.setattr(module, "_far_rows", lambda folder, name: None)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    module.run(bench.folder, "python runner.py", Path("lib.so"), ["plugins", "oracle", "dense"], 3, 5, limit_s)
    assert limit_s is None or now[0] <= 100 + limit_s
    path = bench.folder / "trt86.json"
    figures = json.loads(path.read_text())["variants"] if path.exists() else {}
    assert len(figures) == built
    # The last round may have been cut off in the middle.
    assert all(len(figure["times_ms"]) in (rounds, rounds + 1) for figure in figures.values()), figures
    said = capsys.readouterr().out
    assert ("no time" in said) == (built < 3 or rounds < 3)


def test_a_cut_off_run_leaves_figures(bench):
    # The runner fails at the third variant.
    (bench.folder / "standard.onnx").rename(bench.folder / "typed.onnx")
    report, text = bench("--variants", "plugins,oracle,typed", returncode=1)
    assert "KeyError" in text
    assert list(report["variants"]) == ["plugins", "oracle"]


def test_a_cache_of_another_machine_is_not_used(bench):
    (bench.folder / "timing.cache").write_bytes(b"other")
    _, text = bench(returncode=1)
    assert "is a timing cache of another GPU or release" in text
