"""The C++ runtime's back end AOTInductor, on the CPU: C++ and Python compute the same from a package. And what the
runtime's benchmark prints, of this back end and of ONNX Runtime.

It is built where the C++ runtime is, see test_engine.py, with the C++ library of the torch that is installed.
"""

import contextlib
import os
import re
import shutil

import numpy as np
import pytest
import tiny
import torch
from native_driver import Driver, command, overhead, words

import modcompile as mc
from modcompile.errors import UsageError
from modcompile.manifest import read_manifest, write_manifest

# B batch  S rows  D model dim
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def programs(configure, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aoti")
    configure(folder, "-DMODCOMPILE_RUNTIME_AOTI=ON", f"-DTorch_DIR={torch.utils.cmake_prefix_path}/Torch",
              "-DMODCOMPILE_TESTS=ON")
    command("cmake", "--build", folder, "--parallel", 2, "--target", "check_engine", "bench_engine")
    return folder / "runtime"


@pytest.fixture(scope="module")
def driver(programs):
    # Torch has as many threads as the environment says.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("OWN_THREADS", "1")
        started = Driver(programs / "check_engine")
    with contextlib.closing(started) as driver:
        yield driver


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    example = {"hidden": torch.randn(2, 5, tiny.WIDTH), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    model = mc.convert(tiny.Stack(*(tiny.Block() for _ in range(2))), example, mc.MoDConfig(capacity_ratio=0.25))
    return tiny.randomise_routers(model)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    """A routed model whose sizes vary."""
    folder = tmp_path_factory.mktemp("engine")
    mc.build_engine(model, folder / "engine", runtime="aoti").close()
    return folder / "engine"


@pytest.fixture
def altered(engine, tmp_path):
    """Makes the engine again with another target."""
    def make(**target):
        folder = shutil.copytree(engine, tmp_path / "altered", dirs_exist_ok=True)
        manifest = read_manifest(engine)
        write_manifest(folder, {**dict(manifest), "target": {**manifest.target, **target}})
        return folder

    return make


def batch(rows=3, length=63):
    mask = np.ones((rows, length), np.int64)
    mask[-1, length // 2:] = 0
    hidden = np.random.default_rng(0).standard_normal((rows, length, tiny.WIDTH)).astype(np.float32)
    return {"hidden": hidden, "attention_mask": mask}  # [B, S, D], [B, S]


def python_run(folder, inputs):
    with mc.load_engine(folder) as engine:
        return engine.run(inputs)


def test_outputs_are_pythons_bit_for_bit(driver, engine, tmp_path):
    torch.set_num_threads(1)
    for inputs in (batch(), batch(1, 8), batch(2, 100)):
        expected = python_run(engine, inputs)
        for ask in ("run", "run-c"):
            assert driver.ask(ask, engine, tmp_path, *words(inputs, tmp_path)) == "ok"
            for name, array in expected.items():
                assert (tmp_path / name).read_bytes() == array.tobytes()
        buffers = words({f">{name}": np.zeros_like(array) for name, array in expected.items()}, tmp_path)
        assert driver.ask("run", engine, tmp_path, *words(inputs, tmp_path), *buffers) == "ok"
        for name, array in expected.items():
            assert (tmp_path / name).read_bytes() == array.tobytes()


def test_threads_with_a_context_each(driver, engine, tmp_path):
    assert driver.ask("threads", engine, 8, 200, *words(batch(), tmp_path)) == "ok"


def test_what_a_context_keeps_between_runs_shows_in_none(driver, engine, tmp_path):
    assert driver.ask("again", engine, *words(batch(), tmp_path)) == "ok"


def test_sizes_that_the_compiler_did_not_allow_for(driver, altered, tmp_path):
    inputs = batch()
    for target in ({"largest sequence": "32"}, {"elements": f"{2**31} batch, 3 sequence"}):
        folder = altered(**target)
        with pytest.raises(UsageError) as caught:
            python_run(folder, inputs)
        assert driver.ask("run", folder, tmp_path, *words(inputs, tmp_path)).split("\n")[0] == caught.value.problem


@pytest.mark.parametrize("target, problem", [
    ({"platform": "linux abacus"}, "the operating system and processor differs"),
    ({"cpu_features": "avx2 abacus"}, "the processor's instructions differs"),
])
def test_another_machine(driver, altered, target, problem):
    assert driver.ask("load", altered(**target)).startswith(
        f"the engine was compiled for another machine: {problem}\n")


@pytest.mark.parametrize("option, problem", [
    ("graph", "a CUDA graph has one size"), ("stream", "a stream is for an engine on a GPU"),
    ("device=1", "a GPU's number is for an engine on a GPU"),
    ("threads=2", "this runtime has no threads of one engine")])
def test_options_that_do_not_fit(driver, engine, option, problem):
    assert driver.ask("load", engine, option).split("\n")[0] == problem


def test_a_sealed_file_that_is_no_package(driver, engine, tmp_path):
    folder = shutil.copytree(engine, tmp_path / "altered")
    (folder / "model.pt2").write_bytes(b"no package at all")
    write_manifest(folder, {name: value for name, value in dict(read_manifest(engine)).items() if name != "files"})
    assert driver.ask("load", folder).startswith("torch does not open the package\n  found: ")


def test_another_release_of_torch(driver, engine, tmp_path):
    folder = shutil.copytree(engine, tmp_path / "altered")
    write_manifest(folder, {**dict(read_manifest(engine)), "runtime_range": {"minimum": "1.9", "below": "1.10"}})
    answer = driver.ask("load", folder)
    assert re.match(r"AOTInductor packages are bound to the release of torch that compiled them\n"
                    r"  expected: torch>=1\.9,<1\.10\n  found: torch \d", answer)


def test_the_benchmark(programs, model, engine, tmp_path):
    """What it says is plausible; how long a run takes is not for a test that shares its machine."""
    mc.build_engine(model, tmp_path / "ort", runtime="ort", shapes={"hidden": (3, 63, tiny.WIDTH)}).close()
    for folder in (engine, tmp_path / "ort"):
        (figure,) = overhead(programs / "bench_engine", folder, 200, batch(), tmp_path,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
        manifest = read_manifest(folder)
        assert figure["runtime"] == manifest.runtime
        assert manifest.runtime_version.startswith(figure["version"])
        assert (figure["device"], figure["cuda_graph"], figure["runs"]) == ("cpu", False, 200)
        # Microseconds: a run of this model takes more than one, and less than a second.
        assert 1 < figure["bare_us"] < 1e6 and 1 < figure["modcompile_us"] < 1e6
        assert 0 < figure["prepare_us"] < figure["bare_us"]
        assert max(abs(figure["difference_us"]), abs(figure["noise_us"])) < figure["bare_us"]
