"""The C++ runtime: bundles in C++ and in Python, bit for bit and word for word. Built here with sanitizers.

It is built where there are CMake, a compiler, ONNX Runtime's headers and nlohmann_json, which CMAKE_PREFIX_PATH may
name; its library of ONNX Runtime is the Python package's.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from native_driver import ROOT, Driver, command, python_run, word, words
from onnx import TensorProto, helper, numpy_helper

import modcompile.engine
from modcompile.bundle import package
from modcompile.doctor import find_ort_headers
from modcompile.engine import build_engine, load_engine
from modcompile.errors import IntegrityError, ModcompileError, RuntimeUnavailableError, UsageError
from modcompile.manifest import (
    MANIFEST_NAME,
    METADATA_KEY,
    ModelMetadata,
    RoutedBlock,
    _seal,
    read_manifest,
    write_manifest,
)

# B batch  S rows  D model dim
D = 33
pytestmark = pytest.mark.long


@pytest.fixture(scope="session")
def driver(drivers):
    return drivers("address,undefined")


def mask_model():
    """hidden = tanh(table[ids] * mask) @ weight: [B, S, D], and which rows are valid: [B, S]."""
    random = np.random.default_rng(0)
    weights = {"table": random.standard_normal((50, D)).astype(np.float32),
               "weight": random.standard_normal((D, D)).astype(np.float32),
               "last": np.array([-1]), "zero": np.array(0)}
    nodes = [helper.make_node(*node) for node in (
        ("Gather", ["table", "input_ids"], ["rows"]), ("Unsqueeze", ["attention_mask", "last"], ["mask"]))]
    nodes += [helper.make_node("Cast", ["mask"], ["factor"], to=TensorProto.FLOAT)]
    nodes += [helper.make_node(*node) for node in (
        ("Mul", ["rows", "factor"], ["kept"]), ("Tanh", ["kept"], ["squashed"]),
        ("MatMul", ["squashed", "weight"], ["hidden"]), ("Greater", ["attention_mask", "zero"], ["valid"]))]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
              for name in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "sequence", D]),
               helper.make_tensor_value_info("valid", TensorProto.BOOL, ["batch", "sequence"])]
    graph = helper.make_graph(nodes, "graph", inputs, outputs,
                              [numpy_helper.from_array(array, name) for name, array in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    block = RoutedBlock(path="layer.1", capacity_ratio="1/8", attend_to="all", gate="raw", rows="sequence")
    helper.set_model_props(model, {METADATA_KEY: ModelMetadata(precision="fp32", routed_blocks=[block]).to_json()})
    return model


def batch(rows=3, length=63):
    ids = np.random.default_rng(rows * length).integers(0, 50, (rows, length))
    mask = np.arange(length) < length - np.arange(rows)[:, None]
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64)}


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """A bundle with a tokenizer whose sizes vary, and an engine for 3 x 63."""
    folder = tmp_path_factory.mktemp("bündles")
    onnx.save_model(mask_model(), folder / "mask.onnx")
    (folder / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    build_engine(folder / "mask.onnx", folder / "engine").close()
    package(folder / "engine", folder / "dynamic", tokenizer=folder / "tokenizer.json")
    build_engine(folder / "mask.onnx", folder / "static", shapes={"input_ids": (3, 63)}).close()
    return folder


@pytest.fixture
def bundle(bundles, tmp_path):
    """A copy of the bundle to damage."""
    return shutil.copytree(bundles / "dynamic", tmp_path / "bundle")


# Loading and running


def test_sha256_is_the_standards(driver, tmp_path):
    # FIPS 180-4's two, by their published digests; then every size around the ends of blocks.
    for content, digest in ((b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
                            (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")):
        assert hashlib.sha256(content).hexdigest() == digest
    random = np.random.default_rng(0)
    for size in [*range(200), 2**16 - 1, 2**20 + 3]:
        content = b"abc" if size == 3 else random.bytes(size)
        (tmp_path / "file").write_bytes(content)
        assert driver.ask("sha256", tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_an_engine_describes_itself(driver, bundles):
    lines = driver.ask("describe", f"{bundles}/dynamic/").split("\n")
    with load_engine(bundles / "dynamic") as engine:
        assert lines == [str(engine.folder), *map(str, engine.inputs + engine.outputs), "layer.1 1/8 0",
                         "tokenizer.json"]
    assert driver.ask("describe", bundles / "static").split("\n")[-2:] == ["layer.1 1/8 8", ""]


@pytest.mark.parametrize("ask", ["run", "run-c"])
@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_outputs_are_pythons_bit_for_bit(driver, bundles, tmp_path, name, ask):
    for rows, length in [(3, 63), (3, 63)] if name == "static" else [(3, 63), (1, 1), (2, 100)]:
        inputs = batch(rows, length)
        # In any order.
        given = words(inputs, tmp_path)[::-1]
        assert driver.ask(ask, bundles / name, tmp_path, *given) == "ok"
        for output, expected in python_run(bundles / name, inputs).items():
            assert (tmp_path / output).read_bytes() == expected.tobytes()


@pytest.mark.parametrize("ask", ["run", "run-c"])
def test_outputs_go_to_the_callers_buffers(driver, bundles, tmp_path, ask):
    inputs = batch()
    expected = python_run(bundles / "dynamic", inputs)
    buffers = [word(f">{name}", np.zeros_like(array), tmp_path) for name, array in expected.items()]
    for chosen in (buffers, buffers[1:]):
        assert driver.ask(ask, bundles / "dynamic", tmp_path, *words(inputs, tmp_path), *chosen) == "ok"
        for name, array in expected.items():
            assert (tmp_path / name).read_bytes() == array.tobytes()


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_what_a_context_keeps_between_runs_shows_in_none(driver, bundles, tmp_path, name):
    assert driver.ask("again", bundles / name, *words(batch(), tmp_path)) == "ok"


@pytest.mark.parametrize("name, change, parts", [
    ("hidden", {"dtype": np.float64}, ["output hidden has the wrong dtype", "expected: float32"]),
    ("hidden", {"shape": (3, 63)}, ["output hidden has the wrong rank", "shape (3, 63)"]),
    ("hidden", {"shape": (3, 63, D + 1)}, ["output hidden has the wrong size", f"[batch, sequence, {D}]"]),
    ("valid", {"shape": (3, 64)}, ["two outputs disagree about 'sequence'", "sequence = 63, as in input_ids"]),
    ("valit", {}, ["the engine has no output of this name", "did you mean valid?"]),
])
def test_buffers_that_do_not_fit(driver, bundles, tmp_path, name, change, parts):
    inputs = batch()
    expected = python_run(bundles / "dynamic", inputs)
    array = expected.get(name, expected["valid"])
    buffer = np.zeros(change.get("shape", array.shape), change.get("dtype", array.dtype))
    answer = driver.ask("run", bundles / "dynamic", tmp_path, *words(inputs, tmp_path),
                        word(f">{name}", buffer, tmp_path))
    for part in parts:
        assert part in answer


def without_advice(error):
    """An error's text without what it advises, which is about the language."""
    return re.sub(r"\n  fix: .*", "", str(error))


@pytest.mark.parametrize("name, change", [
    ("dynamic", {"input_idz": np.ones((3, 63), np.int64)}),
    ("dynamic", {"input_ids": None}),
    ("dynamic", {"input_ids": None, "attention_mask": None}),
    ("dynamic", {"input_ids": np.ones((3, 63), np.int32)}),
    ("dynamic", {"input_ids": np.ones((3, 63), np.float16)}),
    ("dynamic", {"input_ids": np.ones(63, np.int64)}),
    ("dynamic", {"input_ids": np.ones((1, 3, 63), np.int64)}),
    ("dynamic", {"input_ids": np.ones((3, 0), np.int64)}),
    ("dynamic", {"attention_mask": np.ones((3, 64), np.int64)}),
    ("dynamic", {"attention_mask": np.ones((2, 63), np.int64)}),
    ("static", {"input_ids": np.ones((3, 64), np.int64)}),
    ("static", {"attention_mask": np.ones((4, 63), np.int64)}),
    # ONNX Runtime itself finds this out.
    ("dynamic", {"input_ids": np.full((3, 63), 99)}),
])
def test_inputs_that_do_not_fit_are_told_as_in_python(driver, bundles, tmp_path, name, change):
    inputs = {key: value for key, value in {**batch(), **change}.items() if value is not None}
    with pytest.raises(ModcompileError) as caught:
        python_run(bundles / name, inputs)
    given = words(inputs, tmp_path)
    for ask in ("run", "run-c"):
        answer = driver.ask(ask, bundles / name, tmp_path, *given)
        if "Non-zero status code" not in str(caught.value):
            assert isinstance(caught.value, UsageError)
            assert without_advice(answer) == without_advice(caught.value)
        else:
            # Before ONNX Runtime's own message Python's package has words of its own.
            assert answer.split("\n")[:2] == str(caught.value).split("\n")[:2]
            assert "input_ids (3, 63), attention_mask (3, 63): " in answer


def test_advice_is_the_same_where_it_is_about_names(driver, bundles, tmp_path):
    inputs = batch()
    for wrong in ("attention_masks", "input_id", "ids", "mask_attention", "x", "attention_mask_", "inputids"):
        given = {"input_ids": inputs["input_ids"], wrong: inputs["attention_mask"]}
        if wrong.startswith("input"):
            given = {wrong: inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        with pytest.raises(UsageError) as caught:
            python_run(bundles / "dynamic", given)
        assert driver.ask("run", bundles / "dynamic", tmp_path, *words(given, tmp_path)) == str(caught.value)


@pytest.mark.parametrize("tensor, part", [
    ("input_ids:int64:3x63:null", "input input_ids has no data\n  expected: a pointer to 1512 bytes\n"),
    ("input_ids:int64:3x-63:null", "input input_ids has a negative size"),
    ("input_ids:int64:4611686018427387904x63:null", "input input_ids is larger than memory can be"),
    ("attention_mask:int64:3x63:zeros", "input attention_mask is given twice"),
])
def test_what_only_pointers_can_get_wrong(driver, bundles, tmp_path, tensor, part):
    for ask in ("run", "run-c"):
        assert part in driver.ask(ask, bundles / "dynamic", tmp_path, "attention_mask:int64:3x63:zeros", tensor)


def test_null_pointers_of_the_c_api(driver, bundles):
    lines = driver.ask("misuse-c", bundles / "dynamic").split("\n")
    assert lines == ["2 the engine's folder is missing", "2 there is no place for the engine",
                     "2 the engine is missing", "2 the context is missing", "2 there is no place for the context",
                     "2 the tensors are missing", "2 a tensor has no name", "2 a tensor has no dtype",
                     "2 a tensor has no shape", "2 a tensor is in no memory", "2 the providers are missing",
                     "2 a provider has no name", ""]


@pytest.mark.parametrize("option, problem", [
    ("stream", "a stream is for an engine on a GPU"),
    ("graph", "a CUDA graph is for an engine on a GPU"),
    ("device=1", "a GPU's number is for an engine on a GPU"),
    ("device=-1", "device does not fit"),
    ("provider=CUDAExecutionProvider", "this ONNX Runtime does not have the execution provider"),
    ("provider=NoSuchProvider", "this ONNX Runtime does not have the execution provider"),
])
def test_options_that_do_not_fit(driver, bundles, option, problem):
    if option.removeprefix("provider=") in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the provider")
    assert driver.ask("load", bundles / "static", option).split("\n")[0] == problem


def test_a_cuda_graph_of_a_size_that_varies(driver, bundles):
    assert driver.ask("load", bundles / "dynamic", "graph").startswith(
        "a CUDA graph has one size\n  expected: an engine of static shapes\n"
        "  found: input_ids int64 [batch, sequence], ")


def test_a_cuda_graph_of_a_constant(driver, bundles, tmp_path):
    folder = shutil.copytree(bundles / "static", tmp_path / "altered")
    write_manifest(folder, {**dict(read_manifest(folder)), "target": {"constant outputs": "gate"}})
    assert driver.ask("load", folder, "graph").startswith(
        "a CUDA graph has no constants among its outputs\n  expected: outputs that follow from inputs\n  found: gate\n")


def test_device_memory_of_an_engine_on_the_cpu(driver, bundles, tmp_path):
    for ask in ("run", "run-c"):
        for name, given in (("input_ids", ["input_ids:int64:3x63:device", "attention_mask:int64:3x63:zeros"]),
                            ("valid", [*words(batch(), tmp_path), ">valid:bool:3x63:device"])):
            role = "output" if name == "valid" else "input"
            assert driver.ask(ask, bundles / "static", tmp_path, *given).startswith(
                f"{role} {name} is on a device that the engine does not run on\n  expected: host memory\n")


# Damage


def refused(driver, folder):
    """The error that Python refuses a bundle with, and the text of the C++ runtime's: the same but for details."""
    with pytest.raises(ModcompileError) as caught:
        load_engine(folder)
    answer = driver.ask("load", folder)
    assert answer.split("\n")[0] == caught.value.problem
    return caught.value, answer


@pytest.fixture
def no_backend(monkeypatch):
    """Fails where a back end is asked to load anything."""
    backend = modcompile.engine._backend("ort")

    def load(folder, manifest):
        raise AssertionError("the back end saw the bundle")

    monkeypatch.setattr(backend, "load", load)


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_every_flip_and_truncation_is_refused(driver, bundle, no_backend):
    random = np.random.default_rng(0)
    names = files_of(bundle)
    assert names == ["manifest.json", "model.onnx", "model.onnx.data", "tokenizer.json"]
    for name in names:
        path = bundle / name
        whole = path.read_bytes()
        flips = [(int(at), 1 << int(bit)) for at, bit in zip(random.integers(0, len(whole), 256),
                                                             random.integers(0, 8, 256), strict=True)]
        cuts = [whole[:int(at)] for at in random.integers(0, len(whole), 62)] + [b"", whole[:-1]]
        for content in [whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:] for at, bit in flips] + cuts:
            path.write_bytes(content)
            error, answer = refused(driver, bundle)
            assert isinstance(error, IntegrityError)
            assert answer == str(error)
            assert str(path) in answer
        path.write_bytes(whole)
    assert driver.ask("load", bundle) == "ok"


def edit(folder, change):
    """Changes the manifest's JSON and gives it a digest that fits again: what an attacker could do."""
    path = folder / MANIFEST_NAME
    payload = json.loads(path.read_bytes())
    change(payload)
    path.write_bytes(_seal(json.dumps(payload, indent=2).encode() + b"\n"))


def test_files_that_are_missing_foreign_or_no_files(driver, bundle, tmp_path, no_backend):
    def check(*kinds):
        error, answer = refused(driver, bundle)
        assert isinstance(error, kinds or IntegrityError)
        assert answer == str(error)

    for name in files_of(bundle):
        kept = (bundle / name).rename(tmp_path / "kept")
        check()
        (bundle / name).symlink_to(kept)
        check()
        (bundle / name).unlink()
        os.mkfifo(bundle / name)
        check()
        (bundle / name).unlink()
        (bundle / name).mkdir()
        check()
        (bundle / name).rmdir()
        kept.rename(bundle / name)
    for foreign in ("more.bin", "it's.bin", "weights/é.bin", 'both"\'.bin'):
        (bundle / foreign).parent.mkdir(exist_ok=True)
        (bundle / foreign).write_bytes(b"")
        check()
        (bundle / foreign).unlink()
    (bundle / "weights").rmdir()
    (bundle / "folder").symlink_to(tmp_path)
    check()
    (bundle / "folder").unlink()
    assert driver.ask("load", bundle) == "ok"
    shutil.rmtree(bundle)
    check(UsageError)
    bundle.write_bytes(b"")
    check(UsageError)


def test_manifests_that_are_sealed_and_do_not_fit(driver, bundle, no_backend):
    whole = (bundle / MANIFEST_NAME).read_bytes()
    record = {"sha256": "0" * 64, "size": 0}
    changes = [
        *[lambda p, path=path: p["files"].update({path: record}) for path in (
            "/etc/passwd", "../x", "a/../../x", "a\\b", "C:/x", "", ".", "..", "a//b", "a/", "./a", "a\nb",
            MANIFEST_NAME)],
        *[lambda p, key=key: p.pop(key) for key in (
            "format_version", "runtime", "runtime_version", "runtime_range", "precision", "entry", "inputs", "outputs",
            "files", "modcompile_version")],
        *[lambda p, key=key, value=value: p.update({key: value}) for key, value in (
            ("format_version", 0), ("format_version", "1"), ("format_version", None), ("entry", "absent.onnx"),
            ("entry", "../model.onnx"), ("entry", 5), ("tokenizer", "absent.json"), ("tokenizer", "/tokenizer.json"),
            ("runtime", "caffe"), ("precision", "fp4"), ("outputs", []), ("inputs", {}), ("inputs", [5]),
            ("inputs", [{"name": "x", "dtype": "float31", "shape": []}]),
            ("inputs", [{"name": "", "dtype": "float32", "shape": []}]),
            ("inputs", [{"name": "x", "dtype": "float32", "shape": [0]}]),
            ("inputs", [{"name": "x", "dtype": "float32", "shape": [-1]}]),
            ("inputs", [{"name": "x", "dtype": "float32", "shape": [1.5]}]),
            ("inputs", [{"name": "x", "dtype": "float32", "shape": [""]}]),
            ("inputs", [{"name": "x", "dtype": "float32", "shape": [1]}] * 2),
            ("runtime_range", {"minimum": "a"}), ("runtime_range", {"minimum": "1."}), ("runtime_range", "1.24"),
            ("runtime_range", {"minimum": "1..2"}), ("providers", [""]), ("providers", "CPU"), ("target", {"a": 1}),
            ("files", []), ("files", {"model.onnx": {"sha256": "A" * 64, "size": 1}}),
            ("files", {"model.onnx": {"sha256": "0" * 63, "size": 1}}),
            ("files", {"model.onnx": {"sha256": "0" * 64, "size": -1}}),
            ("files", {"model.onnx": {"sha256": "0" * 64, "size": 2.5}}))],
        lambda p: p["routed_blocks"][0].update(rows=63),
        lambda p: p["routed_blocks"][0].update(rows=63, capacity=64),
    ]
    for number, change in enumerate(changes):
        (bundle / MANIFEST_NAME).write_bytes(whole)
        edit(bundle, change)
        error, answer = refused(driver, bundle)
        assert (error.problem, type(error)) == ("the manifest is not one this package wrote", IntegrityError), number
        assert f"  where: {bundle / MANIFEST_NAME}" in answer


@pytest.mark.parametrize("text", [
    b"", b"[" * 100_000, b'{"a": ' * 100_000, b'  "files": {"a": 1, "a": 2}}', b'  "format_version": 1', b"  \xff}",
    b'  "a": "\\ud800"}', b'  "format_version": 99999999999999999999}'])
def test_text_that_is_no_manifest(driver, bundle, no_backend, text):
    sealed = _seal(b'{\n  "sha256": "' + b"0" * 64 + b'",\n' + text)
    (bundle / MANIFEST_NAME).write_bytes(sealed)
    assert driver.ask("load", bundle).split("\n")[0] in (
        "the manifest is not one this package wrote", "the engine was written in a newer format")
    with pytest.raises((IntegrityError, RuntimeUnavailableError)):
        load_engine(bundle)


def test_a_manifest_that_is_too_large(driver, bundle, no_backend):
    (bundle / MANIFEST_NAME).write_bytes(b" " * (4 * 2**20 + 1))
    error, answer = refused(driver, bundle)
    assert answer == str(error) and "larger than it can be" in answer


def test_a_newer_format(driver, bundle, no_backend):
    edit(bundle, lambda payload: payload.update(format_version=2, something={"new": [1]}, inputs="otherwise"))
    error, answer = refused(driver, bundle)
    assert isinstance(error, RuntimeUnavailableError)
    assert answer == str(error)


@pytest.mark.slow
def test_random_bytes_in_a_sealed_manifest_crash_nothing(driver, bundle):
    """A fuzzer's work in small: thousands of manifests whose digest fits and whose text does not."""
    random = np.random.default_rng(0)
    whole = bytearray((bundle / MANIFEST_NAME).read_bytes())
    pieces = [b"[", b"]", b"{", b"}", b'"', b",", b":", b"null", b"-1", b"1e999", b"9" * 40, b"\\u0000", b"\xc3", b""]
    answers = set()
    for _ in range(3000):
        text = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            start = int(random.integers(82, len(text)))
            text[start:start + int(random.integers(0, 9))] = pieces[random.integers(len(pieces))]
        (bundle / MANIFEST_NAME).write_bytes(_seal(bytes(text)))
        answers.add(driver.ask("load", bundle).split("\n")[0])
    assert len(answers) > 3


# What the bundle needs and the machine lacks


def test_other_versions_runtimes_and_providers(driver, bundle):
    whole = (bundle / MANIFEST_NAME).read_bytes()

    def change(**fields):
        (bundle / MANIFEST_NAME).write_bytes(whole)
        edit(bundle, lambda payload: payload.update(fields))

    change(runtime_range={"minimum": "1.20.0", "below": "1.24"})
    error, answer = refused(driver, bundle)
    assert isinstance(error, RuntimeUnavailableError)
    assert without_advice(answer) == without_advice(error)
    change(runtime_range={"minimum": "1.99", "below": None})
    error, answer = refused(driver, bundle)
    assert without_advice(answer) == without_advice(error)
    change(providers=["CUDAExecutionProvider"])
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        answer = driver.ask("load", bundle)
        assert answer.startswith("this ONNX Runtime does not have the execution provider")
        assert "found: CUDAExecutionProvider" in answer
    change(runtime="aoti")
    assert driver.ask("load", bundle).startswith("this library was built without the runtime of the engine\n  "
                                                 "expected: ort\n  found: aoti")


def test_a_model_that_is_not_its_manifests(driver, bundle):
    edit(bundle, lambda payload: payload["inputs"][0].update(dtype="int32"))
    error, answer = refused(driver, bundle)
    assert answer == str(error)


def test_a_sealed_file_that_is_no_model(driver, bundle):
    def replace(content):
        (bundle / "model.onnx").write_bytes(content)
        edit(bundle, lambda payload: payload["files"].update({"model.onnx": {
            "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}}))

    for content in (b"", b"no model at all", (bundle / "model.onnx").read_bytes()[:-40]):
        replace(content)
        error, _ = refused(driver, bundle)
        assert isinstance(error, IntegrityError)


# The custom-op library


@pytest.fixture(scope="session")
def routed(configure, tmp_path_factory):
    """A routed model's bundle with the custom-op library within, and inputs."""
    import tiny
    import torch

    import modcompile as mc

    folder = tmp_path_factory.mktemp("routed")
    configure(folder / "native", "-DMODCOMPILE_RUNTIME=OFF", "-DMODCOMPILE_ORT=ON")
    command("cmake", "--build", folder / "native", "--parallel", 2)
    example = {"hidden": torch.randn(2, 5, tiny.WIDTH), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    model = mc.convert(tiny.Stack(*(tiny.Block() for _ in range(4))), example, mc.MoDConfig(capacity_ratio=0.25))
    tiny.randomise_routers(model)
    build_engine(model, folder / "engine", custom_ops=folder / "native" / "ort" / "libmodcompile_ort.so").close()
    mask = np.ones((3, 63), np.int64)
    mask[1, 40:] = 0
    hidden = np.random.default_rng(0).standard_normal((3, 63, tiny.WIDTH)).astype(np.float32)
    return package(folder / "engine", folder / "bundle").folder, {"hidden": hidden, "attention_mask": mask}


def memory_of_cycles(drivers, folder, count, inputs, scratch):
    """KiB before and after so many loads: in a process of its own, whose heap nothing else has left gaps in."""
    with contextlib.closing(Driver(drivers("").path)) as fresh:
        return map(int, fresh.ask("cycles", folder, count, *words(inputs, scratch)).split())


def test_the_custom_op_library_runs(driver, drivers, routed, tmp_path):
    folder, inputs = routed
    for ask, custom_ops in (("run", None), ("run-c", None), ("run-bodies", False)):
        assert driver.ask(ask, folder, tmp_path, *words(inputs, tmp_path)) == "ok"
        for output, expected in python_run(folder, inputs, custom_ops=custom_ops).items():
            assert (tmp_path / output).read_bytes() == expected.tobytes()
    # A library that was loaded anew each time would leave 4 MiB.
    before, after = memory_of_cycles(drivers, folder, 300, inputs, tmp_path)
    assert after < before + 2048
    # The private copies do not stay.
    assert not list(Path(tempfile.gettempdir()).glob("modcompile-??????/library.so"))


@pytest.mark.parametrize("content, part", [
    (b"not a library", "the custom-op library does not load\n  expected: a shared library for this machine\n  found: "),
    (None, "the library is not modcompile's custom-op library"),
])
def test_what_is_no_custom_op_library(driver, routed, tmp_path, content, part, ort_library):
    folder = shutil.copytree(routed[0], tmp_path / "bundle")
    content = (next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime_providers_shared.so")).read_bytes()
               if content is None else content)
    (folder / "libmodcompile_ort.so").write_bytes(content)
    edit(folder, lambda payload: payload["files"].update({"libmodcompile_ort.so": {
        "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}}))
    assert part in driver.ask("load", folder)
    with pytest.raises(RuntimeUnavailableError) as caught:
        load_engine(folder)
    assert part.split("\n")[0] == caught.value.problem


# Threads and memory


def test_threads_with_a_context_each(drivers, bundles, tmp_path):
    assert drivers("").ask("threads", bundles / "dynamic", 8, 1000, *words(batch(), tmp_path)) == "ok"


@pytest.mark.parametrize("sanitizers", ["address,undefined", pytest.param("thread", marks=pytest.mark.slow)])
def test_threads_under_sanitizers(drivers, bundles, tmp_path, sanitizers):
    """ONNX Runtime itself is not instrumented: what is looked at is this library."""
    assert drivers(sanitizers).ask("threads", bundles / "dynamic", 4, 50, *words(batch(), tmp_path)) == "ok"


def test_loading_and_freeing_leaves_nothing(drivers, bundles, tmp_path):
    before, after = memory_of_cycles(drivers, bundles / "dynamic", 1000, batch(), tmp_path)
    assert after < 1.01 * before


# The package for CMake, and the example


@pytest.fixture(scope="session", params=["static", pytest.param("shared", marks=pytest.mark.slow)])
def example(request, configure, tmp_path_factory):
    """examples/cpp, built as another project, with a package that was moved after its installation."""
    folder = tmp_path_factory.mktemp("example")
    configure(folder / "native", f"-DBUILD_SHARED_LIBS={request.param == 'shared'}")
    command("cmake", "--build", folder / "native", "--parallel", 2)
    command("cmake", "--install", folder / "native", "--prefix", folder / "first")
    (folder / "first").rename(folder / "prefix")
    command("cmake", "-S", ROOT / "examples" / "cpp", "-B", folder / "build",
            f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}", f"-DONNXRUNTIME_INCLUDE_DIR={find_ort_headers()}")
    command("cmake", "--build", folder / "build")
    return folder / "build" / "run_bundle"


def save(folder, arrays):
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def test_the_example_runs_a_bundle(example, bundles, tmp_path):
    inputs = batch()
    given = save(tmp_path / "in", inputs)
    expected = python_run(bundles / "dynamic", inputs)
    printed = command(example, bundles / "dynamic", given, save(tmp_path / "out", expected), 5, 1)
    assert printed.count("as expected, bit for bit") == 2
    assert "latency of 5 runs: median" in printed
    expected["hidden"][0, 0, 0] += 1
    save(tmp_path / "out", expected)
    done = subprocess.run([example, bundles / "dynamic", given, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 4 and "not as expected: differs by up to 1" in done.stdout
    done = subprocess.run([example, tmp_path, given, given], capture_output=True, text=True)
    assert done.returncode == 6 and done.stderr.startswith("error: a file is missing")


@pytest.mark.weights
def test_the_example_runs_minilm(example, tmp_path):
    import torch
    from weights import minilm

    import modcompile as mc

    inputs = {"input_ids": torch.randint(1000, 20_000, (2, 64)), "attention_mask": torch.ones(2, 64, dtype=torch.long)}
    inputs["attention_mask"][1, 50:] = 0
    model = mc.convert(minilm(), inputs, mc.MoDConfig(attend_to="all", gate="straight-through"))
    with mc.build_engine(model, tmp_path / "engine", shapes={"input_ids": (2, 64)}, intra_op_threads=1) as engine:
        arrays = {name: value.numpy() for name, value in inputs.items()}
        arrays = {spec.name: arrays.get(spec.name, np.zeros((2, 64), np.int64)) for spec in engine.inputs}
        expected = engine.run(arrays)
    save(tmp_path / "in", arrays)
    save(tmp_path / "out", expected)
    printed = command(example, tmp_path / "engine", tmp_path / "in", tmp_path / "out", 3, 1)
    assert printed.count("as expected, bit for bit") == len(expected)


@pytest.mark.weights
def test_the_example_embeds_text(example, tmp_path):
    """MiniLM on sentences, in C++ from the text on, and in Python with the tokenizers package."""
    import torch
    from tokenizers import Tokenizer
    from weights import minilm, minilm_folder

    import modcompile as mc

    extensions = importlib.util.find_spec("onnxruntime_extensions")
    library = next(Path(sysconfig.get_config_var("LIBDIR")).glob("libpython3.*.so.*"), None)
    if extensions is None or library is None:
        pytest.skip("there is no onnxruntime-extensions, or no libpython that its library needs")
    extensions = next(Path(extensions.origin).parent.glob("_extensions_pydll*.so"))
    rows, length = 4, 32
    inputs = {"input_ids": torch.randint(1000, 20_000, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    model = mc.convert(minilm(), inputs, mc.MoDConfig(attend_to="all", gate="straight-through"))
    mc.build_engine(model, tmp_path / "engine", shapes={"input_ids": (rows, length)}).close()
    tokenizer = minilm_folder() / "tokenizer.json"
    command(sys.executable, ROOT / "examples" / "tokenizer_onnx.py", tokenizer, "-o", tmp_path / "tokenizer.onnx")
    package(tmp_path / "engine", tmp_path / "bundle", tokenizer=tmp_path / "tokenizer.onnx")
    texts = ["It was raining.", "Il pleuvait à Liège, c'était l'été!", "", "word " * 99, "Others pass by: 50 % (of 2)."]
    printed = command(example.with_name("embed_text"), tmp_path / "bundle", extensions, input="\n".join(texts) + "\n",
                      env={**os.environ, "LD_PRELOAD": str(library)})
    found = np.array([line.split() for line in printed.splitlines()], np.float64)

    python = Tokenizer.from_file(str(tokenizer))
    python.enable_truncation(length)
    python.enable_padding(length=length)
    with load_engine(tmp_path / "bundle") as engine:
        assert len(found) == len(texts) > rows
        for text, vector in zip(texts, found, strict=True):
            encoding = python.encode(text)
            given = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask,
                     "token_type_ids": encoding.type_ids}
            arrays = {spec.name: np.tile(given[spec.name], (rows, 1)) for spec in engine.inputs}
            hidden = engine.run(arrays)["last_hidden_state"][0]  # [S, D]
            expected = hidden[np.array(encoding.attention_mask) > 0].sum(0, dtype=np.float64)
            np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)


@pytest.mark.slow
def test_a_library_without_a_back_end_says_so(configure, tmp_path, bundles):
    configure(tmp_path / "native", "-DMODCOMPILE_RUNTIME_ORT=OFF", "-DMODCOMPILE_TESTS=ON")
    command("cmake", "--build", tmp_path / "native", "--parallel", 2, "--target", "check_engine")
    with contextlib.closing(Driver(tmp_path / "native" / "runtime" / "check_engine")) as driver:
        assert driver.ask("load", bundles / "dynamic").startswith("this library was built without the runtime")
