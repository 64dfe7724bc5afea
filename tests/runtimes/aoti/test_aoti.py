"""AOTInductor engines from end to end: build, load, run, and everything that must be refused.

Each compilation takes a C++ compiler ten seconds, so that most tests share one engine; those that need more are slow.
"""

import copy
import gc
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from modcompile.runtimes.aoti import AotiEngine, builder
from modcompile.runtimes.aoti import engine as engine_module
from modcompile.runtimes.aoti.target import check_target, find_device, target_of
from tiny import Block, Mlp, Stack, randn, randomise_routers
from tolerances import EXACT, TOLERANCES, deviation, farthest
from torch._inductor.exc import InvalidCxxCompiler

import modcompile as mc
import modcompile.engine
from modcompile.engine import build_engine, load_engine
from modcompile.errors import (
    IntegrityError,
    ModcompileError,
    RuntimeUnavailableError,
    UnsupportedGraphError,
    UsageError,
)
from modcompile.export.flatten import flatten
from modcompile.manifest import read_manifest, write_manifest
from modcompile.pass_manager import PassManager
from modcompile.variants import dense_model, oracle_model, with_routing_outputs

# B batch  S rows  K capacity  D model dim

D = 8
ROUTE = torch.ops.modcompile.route.default
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MERGE, PUT, NORM = (torch.ops.modcompile.merge_rows.default, torch.ops.aten.index_put.default,
                    torch.ops.aten.layer_norm.default)
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")


def inputs_of(batch, rows, seed=0):
    """Hidden states, and a mask that hides the end of every sequence but the first."""
    mask = torch.arange(rows) < (rows - torch.arange(batch)[:, None] * rows // (2 * batch))
    return {"hidden": randn(batch, rows, D, seed=seed), "attention_mask": mask.long()}


def expected_of(model, inputs):
    with torch.no_grad():
        return model.run_graph([inputs[spec.name].to("cpu", getattr(torch, spec.dtype)) for spec in model.inputs])


def assert_parity(engine, model, inputs, valid=None):
    """An engine's outputs are its model's, on valid rows."""
    outputs = engine.run(inputs)
    dtype = getattr(torch, engine.outputs[0].dtype)
    found = [output.float().cpu() for output in outputs.values()]
    assert farthest(found, list(expected_of(model, inputs)), valid) <= TOLERANCES["aoti"][dtype]


@pytest.fixture(scope="module")
def model():
    """A routed block behind a dense one, each with a padding mask."""
    made = mc.convert(Stack(Block(), Block()), inputs_of(2, 5), mc.MoDConfig(capacity_ratio=0.25))
    return randomise_routers(made)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("engines") / "engine with späces"
    build_engine(model, path, runtime="aoti").close()
    return path


@pytest.fixture(scope="module")
def engine(folder):
    with load_engine(folder) as engine:
        yield engine


@pytest.fixture
def altered(folder, tmp_path):
    """Makes a copy of the engine whose sealed manifest says something else."""
    def alter(**fields):
        shutil.copytree(folder, tmp_path / "altered")
        manifest = read_manifest(folder)
        kept = {name: getattr(manifest, name) for name in type(manifest).model_fields if name != "files"}
        write_manifest(tmp_path / "altered", {**kept, **fields})
        return tmp_path / "altered"

    return alter


@pytest.fixture
def unopened(monkeypatch):
    """Fails the test if a package is opened."""
    monkeypatch.setattr(engine_module, "open_package", lambda *_, **__: pytest.fail("a package was opened"))


@pytest.fixture
def no_compiler(monkeypatch):
    """Fails the test if something is compiled."""
    monkeypatch.setattr(builder, "_compile", lambda *_: pytest.fail("the compiler ran"))


# Build and manifest


def test_a_built_engine_says_what_it_is(model, folder, engine):
    manifest = read_manifest(folder)
    assert isinstance(engine, AotiEngine) and engine.manifest == manifest
    assert (manifest.runtime, manifest.precision, manifest.entry) == ("aoti", "fp32", "model.pt2")
    assert (manifest.runtime_version, manifest.created_with["torch"]) == (torch.__version__,) * 2
    assert manifest.runtime_range.contains(torch.__version__)
    assert [str(spec) for spec in manifest.inputs] == ["hidden float32 [batch, sequence, 8]",
                                                       "attention_mask int64 [batch, sequence]"]
    assert [str(spec) for spec in manifest.outputs] == ["output float32 [batch, sequence, 8]"]
    assert list(manifest.routed_blocks) == model.routed_blocks
    assert [record.name for record in manifest.passes][-9:] == [
        "fold-straight-through", "fuse-attention", "simplify-masks", "fuse-rms-norm", "norm-before-merge",
        "fuse-gelu", "sum-columns", "overwrite-rows", "expand-gelu"]
    assert target_of(torch.device("cpu")).items() <= manifest.target.items()
    # Neither generated code nor a second copy of the weights stays.
    assert sorted(os.listdir(folder)) == ["manifest.json", "model.pt2"]


@pytest.mark.parametrize(("batch", "rows"), [(2, 5), (3, 63), (1, 33), (5, 4), (1, 1)])
def test_any_batch_and_sequence(model, engine, batch, rows):
    inputs = inputs_of(batch, rows)
    assert_parity(engine, model, inputs, inputs["attention_mask"].bool())


def test_nothing_of_python_is_left_in_the_package(folder):
    """No op goes through the executor that looks ops up by name, and none of ours is named anywhere."""
    with zipfile.ZipFile(folder / "model.pt2") as package:
        names = package.namelist()
        (library,) = (package.read(name) for name in names if name.endswith(".so"))
        wrapper = "".join(package.read(name).decode() for name in names if name.endswith(".wrapper.cpp"))
    assert not [name for name in names if name.endswith(".json") and not name.endswith("_metadata.json")]
    assert "aoti_torch_proxy_executor_call_function" not in wrapper
    assert "modcompile::" not in wrapper and b"modcompile::" not in library


def test_a_process_with_torch_alone_runs_the_package(model, folder, tmp_path):
    inputs = inputs_of(3, 33)
    torch.save(list(inputs.values()), tmp_path / "inputs")
    script = """
import sys, torch
package, given, result = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
torch.save(run(*torch.load(given)), result)
assert "modcompile" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, folder / "model.pt2", tmp_path / "inputs", tmp_path / "outputs"],
                   check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "outputs")
    assert farthest(found, expected_of(model, inputs), inputs["attention_mask"].bool()) <= 1e-4


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_program_in_cpp_runs_the_package(model, folder, tmp_path):
    """With torch's C++ library and no Python in the process."""
    torch_folder = Path(torch.__file__).parent
    program = tmp_path / "run_package"
    libraries = ["torch", "torch_cpu", "c10", *(["torch_cuda", "c10_cuda"] if torch.version.cuda else [])]
    built = subprocess.run(
        ["g++", "-std=c++20", "-O0", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
         Path(__file__).with_name("run_package.cc"), "-o", program, "-isystem", torch_folder / "include",
         "-isystem", torch_folder / "include/torch/csrc/api/include", f"-L{torch_folder / 'lib'}",
         f"-Wl,-rpath,{torch_folder / 'lib'}", "-Wl,--no-as-needed", *(f"-l{name}" for name in libraries)],
        capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    inputs = inputs_of(3, 33)
    torch.save(list(inputs.values()), tmp_path / "inputs")
    done = subprocess.run([program, folder / "model.pt2", tmp_path / "inputs", tmp_path / "outputs"],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = torch.load(tmp_path / "outputs")
    with load_engine(folder) as engine:
        assert torch.equal(found, engine.run(inputs)["output"])
    assert farthest([found], expected_of(model, inputs), inputs["attention_mask"].bool()) <= 1e-4


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(("options", "error", "part"), [
    ({"precision": "int8"}, UsageError, "fp32, fp16, bf16"),
    ({"device": "meta"}, UsageError, '"cpu", "cuda" or "cuda:1"'),
    ({"device": "gpu"}, UsageError, "'gpu'"),
    ({"shapes": {"hiden": (2, 63, D)}}, UsageError, "found: hiden"),
    ({"shapes": {"hidden": (2, 63, D), "attention_mask": (2, 62)}}, UsageError, "'sequence': 63"),
    ({"auto_tune": True}, UsageError, "did you mean autotune"),
    ({"opset": 18}, UsageError, "found: opset"),
    pytest.param({"device": "cuda"}, RuntimeUnavailableError, "no such GPU", marks=CPU_ONLY),
])
def test_options_that_do_not_fit(model, tmp_path, options, error, part):
    with pytest.raises(error) as caught:
        build_engine(model, tmp_path / "engine", runtime="aoti", **options)
    assert part in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("no_compiler")
def test_sources_that_are_no_model(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    with pytest.raises(UsageError, match="pass the model that the file was exported from"):
        build_engine(tmp_path / "model.onnx", tmp_path / "engine", runtime="aoti")
    with pytest.raises(UsageError, match="example_inputs"):
        build_engine(torch.nn.Linear(2, 2), tmp_path / "engine", runtime="aoti")
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize(("failure", "error", "part"), [
    (InvalidCxxCompiler(), RuntimeUnavailableError, "install g++"),
    (torch.OutOfMemoryError("out of memory"), ModcompileError, "too little memory"),
    (RuntimeError("no lowering of aten.foo\nand a long story"), UnsupportedGraphError, "RuntimeError: no lowering of"),
])
def test_a_failed_compilation_leaves_nothing(model, tmp_path, monkeypatch, failure, error, part):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(torch._inductor, "aot_compile", fail)
    with pytest.raises(error) as caught:
        build_engine(model, tmp_path / "engine", runtime="aoti")
    assert part in str(caught.value) and caught.value.__cause__ is failure
    assert os.listdir(tmp_path) == []


def test_ops_that_only_python_has_are_refused(tmp_path):
    nodes = '{"nodes": [{"name": "buf1", "node": {"target": "%s"}}]}'
    (tmp_path / "metadata.json").write_text('{"AOTI_DEVICE_KEY": "cpu"}')
    files = [str(tmp_path / name) for name in ("metadata.json", "model.json")]
    for target in ("aten::sort.stable", "torch.ops.aten.sort.stable"):
        (tmp_path / "model.json").write_text(nodes % target)
        builder._check_calls(files)
    for target in ("modcompile::route", "torch.ops.modcompile.route.default"):
        (tmp_path / "model.json").write_text(nodes % target)
        with pytest.raises(UnsupportedGraphError, match=f"found: {target}"):
            builder._check_calls(files)


@pytest.mark.parametrize(("run", "part"), [
    (lambda tensors: [torch.zeros(2, 5, D + 1)], "gives something else than the graph"),
    (lambda tensors: [tensors[1]], "gives something else than the graph"),
    (lambda tensors: torch.zeros(2) @ torch.zeros(3), "does not run"),
])
def test_a_package_that_fails_its_first_run_is_not_kept(model, tmp_path, monkeypatch, run, part):
    monkeypatch.setattr(builder, "_compile", lambda *_: [])
    monkeypatch.setattr(builder, "package_aoti", lambda path, files: None)
    monkeypatch.setattr(builder, "open_package", lambda *_: run)
    with pytest.raises(UnsupportedGraphError, match=part):
        build_engine(model, tmp_path / "engine", runtime="aoti")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [lambda mod: mod, dense_model, lambda mod: with_routing_outputs(mod, outputs=True)],
                         ids=["routed", "dense", "with routing outputs"])
def test_the_model_stays_where_and_as_it_is(model, make):
    model = copy.deepcopy(make(model)).train()
    before = {name: (tensor.data_ptr(), tensor.device) for name, tensor in model.tensors().items()}
    shared = builder._at(model, torch.device("cpu"))
    assert {name: tensor.data_ptr() for name, tensor in shared.tensors().items() if "router" not in name} == {
        name: pointer for name, (pointer, _) in before.items() if "router" not in name}
    moved = builder._at(model, torch.device("meta"))
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert {name: (tensor.data_ptr(), tensor.device) for name, tensor in model.tensors().items()} == before
    assert model.training and not shared.training and not moved.training
    # Its graph is for that device from the inputs on, whatever it was captured on.
    values = [node.meta.get("val") for node in flatten(moved).graph.nodes]
    assert {value.device.type for value in values if isinstance(value, torch.Tensor)} == {"meta"}


def test_sizes_that_the_compiler_allows_for_are_kept(model):
    flat = flatten(model)
    nodes = builder._inputs(flat)
    assert builder._largest(model.inputs, nodes) == {}
    torch._check(nodes[0].meta["val"].shape[1] <= 4096)
    assert builder._largest(model.inputs, nodes) == {"largest sequence": "4096"}


# Load


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize("damage", ["edited", "truncated", "foreign"])
def test_a_tampered_package_is_refused_unopened(folder, tmp_path, damage):
    shutil.copytree(folder, tmp_path / "engine")
    path = tmp_path / "engine" / "model.pt2"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "foreign":
        (tmp_path / "engine" / "model.so").write_bytes(b"")
    else:
        path.write_bytes(content if damage == "edited" else content[:-1])
    with pytest.raises(IntegrityError, match="model.so" if damage == "foreign" else "truncated or edited"):
        load_engine(tmp_path / "engine")


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize("as_link", [False, True])
def test_a_package_put_there_after_the_check_is_refused(folder, tmp_path, monkeypatch, as_link):
    shutil.copytree(folder, tmp_path / "engine")
    path = tmp_path / "engine" / "model.pt2"

    def check_then_replace(*given):
        verify(*given)
        path.unlink()
        (tmp_path / "other").write_bytes(b"another package")
        path.symlink_to(tmp_path / "other") if as_link else shutil.copy(tmp_path / "other", path)

    verify = modcompile.engine.verify_files
    monkeypatch.setattr(modcompile.engine, "verify_files", check_then_replace)
    with pytest.raises(IntegrityError, match="not a regular file" if as_link else "truncated or edited"):
        load_engine(tmp_path / "engine")


def test_what_is_opened_is_a_private_copy_that_goes(model, folder, monkeypatch):
    opened = []

    def open_package(path, *given, **options):
        opened.append((path, path.parent.stat().st_mode & 0o777))
        return original(path, *given, **options)

    original = engine_module.open_package
    monkeypatch.setattr(engine_module, "open_package", open_package)
    with load_engine(folder) as engine:
        ((path, mode),) = opened
        assert folder not in path.parents and mode == 0o700 and not path.exists()
        inputs = inputs_of(2, 5)
        assert_parity(engine, model, inputs, inputs["attention_mask"].bool())


@pytest.mark.usefixtures("unopened")
def test_another_release_of_torch(altered):
    path = altered(runtime_range={"minimum": "2.9", "below": "2.10"})
    with pytest.raises(RuntimeUnavailableError, match="bound to the release of torch") as caught:
        load_engine(path)
    assert "expected: torch>=2.9,<2.10" in str(caught.value)


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize(("change", "part"), [
    ({"platform": "plan9 pdp11"}, "expected: plan9 pdp11"),
    ({"cpu_features": "avx2 warp_drive"}, "expected: warp_drive"),
])
def test_another_machine(altered, change, part):
    path = altered(target={**target_of(torch.device("cpu")), **change})
    with pytest.raises(RuntimeUnavailableError, match="compiled for another machine") as caught:
        load_engine(path)
    assert part in str(caught.value)


@pytest.mark.usefixtures("unopened")
def test_another_kind_of_device(altered, tmp_path):
    with pytest.raises(UsageError, match='device="cpu"'):
        load_engine(altered(target={**target_of(torch.device("cpu")), "device": "cuda"}), device="cpu")
    with pytest.raises(UsageError, match="no device that engines are compiled for"):
        load_engine(tmp_path / "altered", device="tpu")


def test_another_gpu_or_cuda(monkeypatch, tmp_path):
    """On the figures of a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    place = torch.device("cuda", 0)
    check_target(target_of(place), place, tmp_path)
    for change, what in (({"compute_capability": "8.6"}, "compute capability"), ({"cuda": "11.8"}, "CUDA version")):
        with pytest.raises(RuntimeUnavailableError, match=what):
            check_target({**target_of(place), **change}, place, tmp_path)


@CPU_ONLY
def test_without_a_gpu(altered):
    with pytest.raises(RuntimeUnavailableError, match="0 GPUs that torch sees"):
        load_engine(altered(target={"device": "cuda"}))
    with pytest.raises(RuntimeUnavailableError, match="expected: cuda:1"):
        find_device("cuda:1")


@pytest.mark.parametrize(("options", "part"), [
    ({"cuda_graph": True}, "cannot be recorded as a CUDA graph"),
    ({"reuse_outputs": True}, "only a CUDA graph has outputs to reuse"),
])
def test_options_of_cuda_graphs_on_a_cpu(folder, options, part):
    with pytest.raises(UsageError, match=part):
        load_engine(folder, **options)
    load_engine(folder, cuda_graph=False).close()


def test_a_package_that_does_not_open(altered, folder):
    path = altered()
    (path / "model.pt2").write_bytes(b"no archive")
    manifest = read_manifest(folder)
    write_manifest(path, {name: getattr(manifest, name) for name in type(manifest).model_fields if name != "files"})
    with pytest.raises(RuntimeUnavailableError, match="torch does not open the package"):
        load_engine(path)


# Run


def test_arrays_in_arrays_out(engine):
    inputs = inputs_of(3, 63)
    expected = engine.run(inputs)["output"]
    arrays = {name: value.numpy() for name, value in inputs.items()}
    for given in (arrays, {name: np.asfortranarray(value) for name, value in arrays.items()}):
        found = engine.run(given)["output"]
        assert isinstance(found, np.ndarray) and deviation(torch.from_numpy(found), expected) == EXACT
    arrays["hidden"].flags.writeable = False
    assert deviation(torch.from_numpy(engine.run(arrays)["output"]), expected) == EXACT


def test_strides_and_gradients_do_not_matter(engine):
    inputs = inputs_of(3, 63)
    expected = engine.run(inputs)["output"]
    spread = {"hidden": inputs["hidden"].mT.contiguous().mT.requires_grad_(),
              "attention_mask": inputs["attention_mask"].repeat(1, 2)[:, :63]}
    found = engine.run(spread)["output"]
    assert not found.requires_grad and deviation(found, expected) == EXACT


def test_each_run_gives_new_outputs(engine):
    inputs = inputs_of(3, 63)
    first, second = engine.run(inputs)["output"], engine.run(inputs)["output"]
    before = second.clone()
    first.zero_()
    assert torch.equal(second, before) and torch.equal(engine.run(inputs)["output"], before)


@pytest.mark.parametrize(("change", "part"), [
    ({"hidden": torch.zeros(2, 5, D + 1)}, "wrong size"),
    ({"hidden": torch.zeros(2, 5, D, dtype=torch.float16)}, "wrong dtype"),
    ({"attention_mask": torch.ones(2, 6, dtype=torch.int64)}, "two inputs disagree"),
    ({"attention_mask": np.ones((2, 5), np.int64)}, "different kinds"),
    ({"mask": torch.ones(2, 5)}, "no input of this name"),
    ({"hidden": torch.zeros(2, 5, D, device="meta"), "attention_mask": torch.zeros(2, 5, dtype=torch.int64,
                                                                                   device="meta")}, "another device"),
])
def test_inputs_that_do_not_fit(engine, change, part):
    with pytest.raises(UsageError, match=part):
        engine.run({**inputs_of(2, 5), **change})


def test_sizes_that_the_compiler_did_not_allow_for(altered):
    with load_engine(altered(target={**target_of(torch.device("cpu")), "largest sequence": "32"})) as engine:
        engine.run(inputs_of(2, 32))
        with pytest.raises(UsageError, match="expected: sequence <= 32"):
            engine.run(inputs_of(2, 33))


def test_a_closed_engine_does_not_run(folder):
    with load_engine(folder) as engine:
        engine.run(inputs_of(2, 5))
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.run(inputs_of(2, 5))


def test_a_failure_names_the_inputs(folder, monkeypatch):
    def fail(tensors):
        raise RuntimeError("a kernel failed")

    with load_engine(folder) as engine:
        monkeypatch.setattr(engine, "_model", fail)
        with pytest.raises(ModcompileError, match=r"hidden \(2, 5, 8\).*a kernel failed"):
            engine.run(inputs_of(2, 5))


@pytest.mark.parametrize("failure", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 20 GiB."),
    MemoryError(),
])
def test_memory_that_runs_out(folder, monkeypatch, failure):
    def fail(tensors):
        raise failure

    with load_engine(folder) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_model", fail)
            with pytest.raises(ModcompileError, match=r"too little memory(.|\n)*hidden \(2, 5, 8\)") as caught:
                engine.run(inputs_of(2, 5))
        assert str(failure) in str(caught.value) and "fewer or shorter sequences" in caught.value.details["fix"]
        engine.run(inputs_of(2, 5))


def test_a_package_that_does_not_say_why_it_failed(folder, monkeypatch):
    """On a GPU a package names the call that failed alone; torch's count says that memory ran out."""
    def fail(tensors):
        raise RuntimeError("aoti_torch_empty_strided(...) API call failed")

    counts = iter([0, 1, 1])
    monkeypatch.setattr(engine_module, "_ooms", lambda device: next(counts))
    with load_engine(folder) as engine:
        monkeypatch.setattr(engine, "_model", fail)
        with pytest.raises(ModcompileError, match="too little memory"):
            engine.run(inputs_of(2, 5))
        with pytest.raises(ModcompileError, match="AOTInductor failed to run"):
            engine.run(inputs_of(2, 5))


def test_memory_that_is_too_little_to_load(folder, monkeypatch, tmp_path):
    """On the figures of a GPU that is not there."""
    def fail(*_):
        raise RuntimeError("create_func_(...) API call failed")

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", fail)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 80 * 2**30))
    with pytest.raises(ModcompileError, match="too little GPU memory") as caught:
        engine_module.open_package(folder / "model.pt2", torch.device("cuda", 0))
    assert "0 of 81920 MiB are free on cuda:0" in str(caught.value)
    with pytest.raises(RuntimeUnavailableError, match="does not open the package"):
        engine_module.open_package(folder / "model.pt2", torch.device("cpu"))


def test_more_elements_than_indices_reach(altered, model):
    """For a GPU the compiler may take 32-bit indices, so the sizes of all tensors are known to the engine."""
    flat = flatten(model)
    # Its widest tensors are inside the MLP.
    assert builder._elements(model.inputs, flat) == {"elements": f"{2 * D} batch sequence"}
    assert builder._elements(model.inputs, flatten(model, {"hidden": (2, 5, D)})) == {}
    text = f"{2**31 // 10} batch sequence, 9 batch"
    with load_engine(altered(target={**target_of(torch.device("cpu")), "elements": text})) as engine:
        engine.run(inputs_of(1, 10))
        with pytest.raises(UsageError, match="32-bit indices reach"):
            engine.run(inputs_of(2, 6))


def test_threads_share_an_engine(engine):
    cases = [inputs_of(3, 30 + seed, seed) for seed in range(4)]
    expected = [engine.run(case)["output"] for case in cases]
    wrong = []

    def run(case, result):
        for _ in range(25):
            if not torch.equal(engine.run(case)["output"], result):
                wrong.append(case)

    threads = [threading.Thread(target=run, args=each) for each in zip(cases, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Other models, each with a compilation of its own


def family(name):
    """A member of the zoo. What is not slow does without transformers."""
    from families import family

    return family(name)


def of_kind(name, kind):
    """A family's model, routed or not, with random routers; a switch is a gate of 0 or 1."""
    member = family(name)
    config = mc.MoDConfig(capacity_ratio=0.25, attend_to="all" if kind == "all" else "chosen",
                          gate="straight-through" if kind == "switch" else "raw")
    routed = randomise_routers(mc.convert(member.build(), member.example(), config))
    return {"dense": dense_model, "oracle": oracle_model}.get(kind, lambda mod: mod)(routed)


@pytest.mark.parametrize(("name", "kind", "static"), [
    ("gpt2", "dense", False), ("gpt2", "all", True), ("gpt2-unmasked", "chosen", True), ("llama", "chosen", False),
    ("llama", "oracle", True), ("bert", "chosen", True), ("bert", "all", False), ("vit", "dense", True),
    ("vit", "all", True), ("vit", "oracle", False), ("gpt2", "switch", True), ("llama", "switch", True),
])
@pytest.mark.long
def test_families(tmp_path, name, kind, static):
    member, model = family(name), of_kind(name, kind)
    inputs = member.inputs(3, member.rows or 33, member.paddings[0] if member.paddings else None, seed=5)
    shapes = {key: tuple(value.shape) for key, value in inputs.items()} if static else None
    with build_engine(model, tmp_path / "engine", runtime="aoti", shapes=shapes) as engine:
        assert_parity(engine, model, inputs, member.valid(inputs))
        if static:
            assert [spec.shape for spec in engine.inputs] == [value.shape for value in inputs.values()]
            assert all(isinstance(dim, int) for spec in engine.outputs for dim in spec.shape)
            assert all(block.capacity == block.capacity_for(block.rows) for block in engine.manifest.routed_blocks)
        else:
            other = member.inputs(1, member.rows or 63, None, seed=6)
            assert_parity(engine, model, other, member.valid(other))


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), pytest.param("bf16", torch.bfloat16,
                                                                                        marks=pytest.mark.long)])
def test_half_precision_and_static_shapes(tmp_path, precision, dtype):
    # Every row is chosen, so that no rounding can choose another.
    model = randomise_routers(mc.convert(Stack(Mlp(), Mlp()), {"hidden": randn(2, 5, D)},
                                         mc.MoDConfig(capacity_ratio=1.0, gate="sigmoid")))
    inputs = {"hidden": randn(3, 63, D).to(dtype)}
    with build_engine(model, tmp_path / "engine", runtime="aoti", precision=precision,
                      shapes={"hidden": (3, 63, D)}) as engine:
        name = str(dtype).removeprefix("torch.")
        assert [str(spec) for spec in engine.inputs] == [f"hidden {name} [3, 63, 8]"]
        assert [str(spec) for spec in engine.outputs] == [f"output {name} [3, 63, 8]"]
        assert engine.manifest.precision == precision and engine.manifest.routed_blocks[0].capacity == 63
        assert_parity(engine, model, inputs)
        if precision == "bf16":
            import ml_dtypes

            array = inputs["hidden"].view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            found = engine.run({"hidden": array})["output"]
            assert found.dtype == ml_dtypes.bfloat16
            assert np.array_equal(found.view(np.int16), engine.run(inputs)["output"].view(torch.int16).numpy())


@pytest.mark.long
def test_a_plain_module_is_captured_first(tmp_path):
    module = Stack(Block(), Block()).train()
    with build_engine(module, tmp_path / "engine", runtime="aoti", example_inputs=inputs_of(2, 5)) as engine:
        inputs = inputs_of(3, 33)
        assert farthest(engine.run(inputs), module.eval()(**inputs)) <= TOLERANCES["aoti"][torch.float32]
    assert not engine.manifest.routed_blocks


@pytest.mark.long
def test_the_bench_times_it(model, tmp_path):
    shapes = {"hidden": (2, 63, D), "attention_mask": (2, 63)}
    report = mc.benchmark(model, runtime="aoti", shapes=shapes, runs=2, folder=tmp_path / "bench")
    assert set(report.timings) == {"dense", "dense (again)", "mod", "oracle", "pruned"}
    assert all(timing.max_abs_error <= 1e-4 for timing in report.timings.values())
    assert report.machine["runtime_version"] == torch.__version__
    with load_engine(tmp_path / "bench" / "mod") as engine:
        inputs = {name: value.numpy() for name, value in inputs_of(2, 63).items()}
        assert len(mc.verify(model, engine, inputs, per_block=True).blocks) > 0


# On a GPU


@pytest.fixture(scope="module")
def gpu(tmp_path_factory, request):
    """A routed causal model, and the folder of its static engine in half precision, which workers share."""
    model = of_kind("gpt2-unmasked", "chosen")
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if hasattr(request.config, "workerinput") else base) / "gpu-engine"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            build_engine(model, path, runtime="aoti", precision="fp16", shapes={"input_ids": (3, 33)}, device="cuda"
                         ).close()
    return model, path


def ids_of(seed, device="cuda"):
    return {"input_ids": family("gpt2-unmasked").inputs(3, 33, None, seed=seed)["input_ids"].to(device)}


def test_rows_are_written_in_place():
    """With a straight-through gate and no padding, nothing that follows a routed block touches all rows."""
    member = family("gpt2-unmasked")
    routed = mc.convert(member.build(), member.example(), mc.MoDConfig(
        capacity_ratio=0.25, gate="straight-through"))
    flat = flatten(routed, {"input_ids": (3, 33)})
    norms = len(flat.graph.find_nodes(op="call_function", target=NORM))
    PassManager(builder.lowering_passes("fp16"))(flat)
    found = {target: flat.graph.find_nodes(op="call_function", target=target) for target in (MERGE, PUT, NORM)}
    blocks = len(routed.routed_blocks)
    # Each block's rows and their norm are put into what is not read again; of the last block, the norm alone.
    assert (len(found[MERGE]), len(found[PUT]), len(found[NORM])) == (0, 2 * blocks - 1, norms + blocks)
    order = list(flat.graph.nodes)
    for put in found[PUT]:
        assert max(map(order.index, put.args[0].users)) == order.index(put)


@pytest.mark.parametrize(("name", "kind", "precision", "device", "expected"), [
    *(("gpt2-unmasked", kind, "fp16", CUDA, "_addmm_activation") for kind in ("dense", "chosen", "all")),
    ("gpt2-unmasked", "dense", "bf16", CUDA, "_addmm_activation"),
    ("gpt2-unmasked", "all", "fp32", CUDA, "sigmoid"), ("gpt2-unmasked", "dense", "fp16", CPU, "sigmoid"),
    ("bert", "dense", "fp16", CUDA, "gelu"), ("bert", "dense", "fp32", CPU, "gelu"),
    # As it is written, for what an engine is compared with.
    ("gpt2-unmasked", "dense", "fp16", None, "tanh"),
])
def test_how_activations_are_computed(name, kind, precision, device, expected):
    model = of_kind(name, kind)
    for shapes in (None, {spec.name: (3, 33) for spec in model.inputs}):
        flat = PassManager(builder.lowering_passes(precision, device))(flatten(model, shapes))
        found = {op: len(flat.graph.find_nodes(op="call_function", target=getattr(torch.ops.aten, op).default))
                 for op in ("_addmm_activation", "gelu", "sigmoid", "tanh")}
        # One in each block, and BERT's head has one more.
        assert found == {**dict.fromkeys(found, 0), expected: 4 + (name == "bert")}


def wrapper_of(folder):
    with zipfile.ZipFile(folder / "model.pt2") as package:
        return "".join(package.read(n).decode() for n in package.namelist() if n.endswith("wrapper.cpp"))


@pytest.mark.parametrize("shapes", [None, {"input_ids": (3, 33)}], ids=["symbolic", "static"])
@pytest.mark.long
def test_a_package_calls_a_product_with_its_activation(tmp_path, monkeypatch, shapes):
    """With the pipeline for CUDA on a CPU, where the op is the exact form: it is a few thousandths away."""
    passes = builder.lowering_passes("fp16", CUDA)
    monkeypatch.setattr(builder, "lowering_passes", lambda *_: passes)
    model = of_kind("gpt2-unmasked", "dense")
    with build_engine(model, tmp_path / "engine", runtime="aoti", precision="fp16", shapes=shapes) as engine:
        assert_parity(engine, model, ids_of(5, "cpu"))
    assert wrapper_of(tmp_path / "engine").count("aoti_torch_cpu__addmm_activation(") == 4


class TestGpu:
    """The same engine with and without a CUDA graph."""

    pytestmark = GPU

    @pytest.fixture(params=[True, False], ids=["graph", "no graph"])
    def engine(self, gpu, request):
        with load_engine(gpu[1], cuda_graph=request.param) as engine:
            yield engine

    def test_parity(self, gpu, engine):
        ids = ids_of(0, "cpu")
        given_as = {"torch": ids, "cuda": ids_of(0), "numpy": {"input_ids": ids["input_ids"].numpy()}}
        found = {kind: engine.run(given)["logits"] for kind, given in given_as.items()}
        assert isinstance(found["numpy"], np.ndarray)
        assert (found["torch"].device.type, found["cuda"].device.type) == ("cpu", "cuda")
        for value in found.values():
            assert torch.equal(torch.as_tensor(value).cpu(), found["torch"])

    def test_verify(self, gpu):
        ids = {name: value.numpy() for name, value in ids_of(0, "cpu").items()}
        with load_engine(gpu[1]) as engine:
            assert mc.verify(gpu[0], engine, ids).outputs

    def test_the_route_is_a_kernel(self, gpu):
        wrapper = wrapper_of(gpu[1])
        assert "route_and_norm_kernel" in wrapper and "aoti_torch_proxy_executor_call_function" not in wrapper
        # Both take the causal flag; the kernel for masks does not.
        assert "flash_attention" in wrapper or "cudnn_attention" in wrapper
        assert "efficient_attention" not in wrapper

    def test_outputs_are_the_callers(self, engine):
        first = engine.run(ids_of(1))["logits"]
        kept = first.clone()
        engine.run(ids_of(2))
        assert torch.equal(first, kept)

    def test_streams_and_threads(self, engine):
        cases = [ids_of(seed) for seed in range(4)]
        expected = [engine.run(case)["logits"].clone() for case in cases]
        torch.cuda.synchronize()
        wrong = []

        def run(case, result):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(50):
                    found = engine.run(case)["logits"]
                    if not torch.equal(found, result):
                        wrong.append(case)

        threads = [threading.Thread(target=run, args=each) for each in zip(cases, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_it_runs_on_the_callers_stream(self, engine):
        """Inputs that are still being computed on the caller's stream are waited for, and nothing else is."""
        ids, expected = ids_of(3), engine.run(ids_of(3))["logits"].clone()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            # An allocation may wait for the GPU: this run leaves what the next one needs.
            engine.run(ids)
            late = torch.zeros_like(ids["input_ids"])
            torch.cuda.synchronize()
            torch.cuda._sleep(500_000_000)
            late.copy_(ids["input_ids"])
            found = engine.run({"input_ids": late})["logits"]
            assert not stream.query()
        stream.synchronize()
        assert torch.equal(found, expected)

    def test_reused_outputs(self, gpu):
        with load_engine(gpu[1], reuse_outputs=True) as engine:
            first = engine.run(ids_of(1))["logits"]
            kept = first.clone()
            second = engine.run(ids_of(2))["logits"]
            assert first.data_ptr() == second.data_ptr() and not torch.equal(first, kept)

    def test_memory_is_freed(self, gpu):
        # What earlier tests left behind may go at any time, and is not this engine's.
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        with load_engine(gpu[1]) as engine:
            engine.run(ids_of(0))
            assert torch.cuda.memory_allocated() > before
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before

    def test_dynamic_sizes(self, gpu, tmp_path):
        with build_engine(gpu[0], tmp_path / "engine", runtime="aoti", device="cuda") as engine:
            for batch, rows in ((3, 33), (1, 63), (5, 128)):
                inputs = family("gpt2-unmasked").inputs(batch, rows, None, seed=5)
                assert_parity(engine, gpu[0], {name: value.cuda() for name, value in inputs.items()})
            with pytest.raises(UsageError, match="cannot be recorded"):
                load_engine(tmp_path / "engine", cuda_graph=True)
            assert "batch sequence" in engine.manifest.target["elements"]
            # Memory that runs out is said to, and a smaller input runs all the same.
            inputs = family("gpt2-unmasked").inputs(5, 128, None, seed=5)
            many = {name: value.repeat(2000, 1).cuda() for name, value in inputs.items()}
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
            try:
                for _ in range(2):
                    with pytest.raises(ModcompileError, match="too little memory") as caught:
                        engine.run(many)
                    assert "input_ids (10000, 128)" in str(caught.value) and "MiB are free" in str(caught.value)
                assert_parity(engine, gpu[0], {name: value.cuda() for name, value in inputs.items()})
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
            assert engine.run(many)["logits"].shape[0] == 10000
            with pytest.raises(UsageError, match="32-bit indices"):
                engine.run({"input_ids": torch.zeros(1, 128, dtype=torch.long).expand(2**24, 128)})

    @pytest.mark.parametrize("name", ["gpt2-unmasked", "llama"])
    def test_rows_that_are_written_in_place(self, name, tmp_path):
        """As of a straight-through gate, without padding and with it."""
        member, model = family(name), of_kind(name, "switch")
        inputs = member.inputs(3, 33, member.paddings[0] if member.paddings else None, seed=5)
        with build_engine(model, tmp_path / "engine", runtime="aoti", device="cuda",
                          shapes={key: tuple(value.shape) for key, value in inputs.items()}) as engine:
            for _ in range(2):
                assert_parity(engine, model, {key: value.cuda() for key, value in inputs.items()},
                              member.valid(inputs))

    @pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
    @pytest.mark.parametrize("shapes", [None, {"input_ids": (3, 33)}], ids=["symbolic", "static"])
    def test_activations(self, tmp_path, precision, shapes):
        """In half precision a product of cuBLASLt's has them; in float32 the compiler writes them without a tanh."""
        model = of_kind("gpt2-unmasked", "dense")
        with build_engine(model, tmp_path / "engine", runtime="aoti", device="cuda", precision=precision,
                          shapes=shapes) as engine:
            assert_parity(engine, model, ids_of(5))
        wrapper = wrapper_of(tmp_path / "engine")
        assert wrapper.count("aoti_torch_cuda__addmm_activation(") == (0 if precision == "fp32" else 4)
        # Kernels are named after the operators in them.
        assert "_tanh" not in wrapper and ("_sigmoid" in wrapper) == (precision == "fp32")

    def test_another_gpu(self, gpu, engine):
        if torch.cuda.device_count() < 2:
            pytest.skip("there is one GPU")
        with pytest.raises(UsageError, match="expected: cuda:0"):
            engine.run(ids_of(0, "cuda:1"))
