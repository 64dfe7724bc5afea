"""ONNX Runtime engines from end to end: build, verify, load, run, and everything that must be refused."""

import errno
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from modcompile.runtimes.ort import OrtEngine
from onnx import TensorProto, helper, numpy_helper

from modcompile.engine import build_engine, load_engine
from modcompile.errors import (
    IntegrityError,
    ModcompileError,
    RuntimeUnavailableError,
    UnsupportedGraphError,
    UsageError,
)
from modcompile.manifest import METADATA_KEY, ModelMetadata, RoutedBlock, read_manifest, write_manifest

# B batch  S rows  D model dim
D = 32
VOCABULARY = 50
METADATA = ModelMetadata(
    precision="fp32",
    routed_blocks=[RoutedBlock(path="layer.1", capacity_ratio="1/8", attend_to="all", gate="raw", rows="sequence")],
    passes=[{"name": "route-blocks", "options": {"attend_to": "all"}}],
)
RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((VOCABULARY, D)).astype(np.float32)
WEIGHT = RNG.standard_normal((D, D)).astype(np.float32)


def value(name, dtype, shape):
    return helper.make_tensor_value_info(name, dtype, shape)


def model_of(nodes, inputs, outputs, weights=(), **metadata):
    model = helper.make_model(helper.make_graph(nodes, "graph", inputs, outputs, list(weights)),
                              opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, metadata)
    return model


def embedding_model():
    """hidden = (table[ids] * mask) @ weight: [B, S, D]; the embedding table and the weight are 6 KB and 4 KB."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Unsqueeze", ["attention_mask", "last"], ["mask"]),
        helper.make_node("Cast", ["mask"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["rows", "factor"], ["kept"]),
        helper.make_node("MatMul", ["kept", "weight"], ["hidden"]),
        helper.make_node("Greater", ["attention_mask", "zero"], ["valid"]),
    ]
    ids = [value(name, TensorProto.INT64, ["batch", "sequence"]) for name in ("input_ids", "attention_mask")]
    weights = [numpy_helper.from_array(array, name) for name, array in (
        ("table", TABLE), ("weight", WEIGHT), ("last", np.array([-1])), ("zero", np.array(0)))]
    outputs = [value("hidden", TensorProto.FLOAT, ["batch", "sequence", D]),
               value("valid", TensorProto.BOOL, ["batch", "sequence"])]
    return model_of(nodes, ids, outputs, weights, **{METADATA_KEY: METADATA.to_json()})


def twice_model(dtype):
    """y = x + x and the shape of x; y = x in bfloat16, which the CPU does not add."""
    return model_of([helper.make_node("Identity", ["x"], ["y"]) if dtype == TensorProto.BFLOAT16
                     else helper.make_node("Add", ["x", "x"], ["y"]),
                     helper.make_node("Shape", ["x"], ["size"])],
                    [value("x", dtype, ["batch", 4])],
                    [value("y", dtype, ["batch", 4]), value("size", TensorProto.INT64, [2])])


def batch(rows=3, length=63):
    ids = np.random.default_rng(rows * length).integers(0, VOCABULARY, (rows, length))
    mask = (np.arange(length) < length - np.arange(rows)[:, None]).astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask}


def reference(inputs):
    ids, mask = (np.asarray(inputs[name]) for name in ("input_ids", "attention_mask"))
    return (TABLE[ids] * mask[..., None]) @ WEIGHT


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "embedding.onnx"
    onnx.save(embedding_model(), path)
    return path


@pytest.fixture(scope="module")
def folder(onnx_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("engines") / "engine"
    build_engine(onnx_path, path, intra_op_threads=1).close()
    return path


@pytest.fixture(scope="module")
def engine(folder):
    with load_engine(folder, intra_op_threads=1) as engine:
        yield engine


@pytest.fixture
def no_session(monkeypatch):
    """Fails the test if ONNX Runtime sees a model."""
    def refuse(*_, **__):
        pytest.fail("a session was made")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)


# Build and manifest


def test_a_built_engine_says_what_it_is(folder, engine):
    manifest = read_manifest(folder)
    assert isinstance(engine, OrtEngine)
    assert engine.manifest == manifest
    assert (manifest.runtime, manifest.precision, manifest.entry) == ("ort", "fp32", "model.onnx")
    assert manifest.runtime_version == onnxruntime.__version__
    assert manifest.providers == ("CPUExecutionProvider",)
    assert [str(spec) for spec in manifest.inputs] == ["input_ids int64 [batch, sequence]",
                                                       "attention_mask int64 [batch, sequence]"]
    assert [str(spec) for spec in manifest.outputs] == [f"hidden float32 [batch, sequence, {D}]",
                                                        "valid bool [batch, sequence]"]
    assert manifest.routed_blocks == METADATA.routed_blocks
    assert manifest.passes == METADATA.passes
    # Weights lie beside the graph, readable by whoever may read the graph.
    assert sorted(manifest.files) == ["model.onnx", "model.onnx.data"]
    assert len({(folder / name).stat().st_mode for name in manifest.files}) == 1


def test_static_shapes_fix_symbols_everywhere_and_count_capacities(onnx_path, tmp_path):
    engine = build_engine(onnx_path, tmp_path / "engine", shapes={"input_ids": (2, 63)})
    assert [spec.shape for spec in engine.inputs] == [(2, 63), (2, 63)]
    assert [spec.shape for spec in engine.outputs] == [(2, 63, D), (2, 63)]
    assert [(block.rows, block.capacity) for block in engine.manifest.routed_blocks] == [(63, 8)]
    inputs = batch(2, 63)
    np.testing.assert_allclose(engine.run(inputs)["hidden"], reference(inputs), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="pad or cut it to 63"):
        engine.run(batch(2, 64))


def test_one_static_dim_leaves_the_other(onnx_path, tmp_path):
    model = onnx.load(onnx_path)
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "model.onnx")
    engine = build_engine(tmp_path / "model.onnx", tmp_path / "engine")
    assert [spec.shape for spec in engine.inputs] == [("batch", "sequence"), (2, "sequence")]
    assert engine.manifest.routed_blocks[0].capacity is None


@pytest.mark.parametrize(("shapes", "part"), [
    ({"ids": (2, 63)}, "found: ids"),
    ({"input_ids": (2,)}, "[batch, sequence]"),
    ({"input_ids": (2, 0)}, "found: (2, 0)"),
    ({"input_ids": (2, 63), "attention_mask": (2, 64)}, "with {'batch': 2, 'sequence': 63}"),
])
def test_shapes_that_do_not_fit(onnx_path, tmp_path, shapes, part):
    with pytest.raises(UsageError) as caught:
        build_engine(onnx_path, tmp_path / "engine", shapes=shapes)
    assert part in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_precision_is_the_files(onnx_path, tmp_path):
    with pytest.raises(UsageError, match="expected: fp16"):
        build_engine(onnx_path, tmp_path / "engine", precision="fp16")
    assert build_engine(onnx_path, tmp_path / "engine", precision="fp32").manifest.precision == "fp32"


@pytest.mark.parametrize(("dtype", "precision"), [(np.float16, "fp16"), (np.float32, "fp32")])
def test_a_foreign_files_precision_is_that_of_most_weights(tmp_path, dtype, precision):
    model = embedding_model()
    del model.metadata_props[:]
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((100, 100), dtype), "unused"))
    onnx.save(model, tmp_path / "model.onnx")
    manifest = build_engine(tmp_path / "model.onnx", tmp_path / "engine").manifest
    assert (manifest.precision, manifest.routed_blocks, manifest.passes) == (precision, (), ())


@pytest.mark.parametrize("location", ["weights.bin", ".export/wéights.bin"])
def test_external_data_comes_along(tmp_path, location):
    source = tmp_path / "source"
    (source / location).parent.mkdir(parents=True)
    onnx.save(embedding_model(), source / "m.onnx", save_as_external_data=True, location=location)
    engine = build_engine(source / "m.onnx", tmp_path / "engine")
    assert sorted(engine.manifest.files) == sorted(["model.onnx", location])
    shutil.rmtree(source)
    inputs = batch()
    np.testing.assert_allclose(engine.run(inputs)["hidden"], reference(inputs), rtol=1e-4, atol=1e-4)


def test_external_data_that_is_missing_truncated_or_elsewhere(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    path = source / "m.onnx"
    onnx.save(embedding_model(), path, save_as_external_data=True, location="weights.bin")
    os.truncate(source / "weights.bin", 100)
    with pytest.raises(IntegrityError, match=r"found: 100 bytes\n.*weights\.bin"):
        build_engine(path, tmp_path / "engine")
    (source / "weights.bin").unlink()
    with pytest.raises(IntegrityError, match=r"no such file\n.*weights\.bin"):
        build_engine(path, tmp_path / "engine")
    for location in ("../secret", "/etc/passwd", "a\\b"):
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        path.write_bytes(model.SerializeToString())
        with pytest.raises(IntegrityError, match="not a plain path"):
            build_engine(path, tmp_path / "engine")
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("location", ["model.onnx", "manifest.json", "model.onnx/weights"])
def test_external_data_with_a_name_of_ours(tmp_path, location):
    source = tmp_path / "source"
    (source / location).parent.mkdir(parents=True)
    onnx.save(embedding_model(), source / "m.onnx", save_as_external_data=True, location=location)
    with pytest.raises(UsageError, match="another name for its data file"):
        build_engine(source / "m.onnx", tmp_path / "engine")
    assert os.listdir(tmp_path) == ["source"]


def test_an_engine_that_points_outside_its_folder_is_not_loaded(folder, tmp_path):
    """A forged manifest fits its files; ONNX Runtime still refuses data outside the folder."""
    target = tmp_path / "engine"
    shutil.copytree(folder, target)
    fields = read_manifest(target).model_dump(exclude={"files", "created_with", "modcompile_version"})
    (target / "model.onnx.data").rename(tmp_path / "outside")
    model = onnx.load(target / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside"
    (target / "model.onnx").write_bytes(model.SerializeToString())
    write_manifest(target, fields)
    with pytest.raises(UnsupportedGraphError, match="escapes"):
        load_engine(target)


def test_no_onnx_file(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        build_engine(tmp_path / "absent.onnx", tmp_path / "engine")
    with pytest.raises(UsageError, match="cannot be read"):
        build_engine(tmp_path, tmp_path / "engine")
    assert os.listdir(tmp_path) == []


def test_a_truncated_onnx_file_is_refused_and_nothing_stays(onnx_path, tmp_path):
    whole = onnx_path.read_bytes()
    broken = tmp_path / "broken.onnx"
    for size in [*range(0, len(whole), len(whole) // 23), len(whole) - 1]:
        broken.write_bytes(whole[:size])
        with pytest.raises((IntegrityError, UnsupportedGraphError), match=r"broken\.onnx"):
            build_engine(broken, tmp_path / "engine")
    broken.write_bytes(b"\xff" * 100)
    with pytest.raises(IntegrityError, match="not a complete ONNX model"):
        build_engine(broken, tmp_path / "engine")
    assert os.listdir(tmp_path) == ["broken.onnx"]


def test_graphs_that_cannot_run_are_refused(tmp_path):
    for nodes, inputs, part in [
        ([helper.make_node("NoSuchOp", ["x"], ["y"])], [value("x", TensorProto.FLOAT, [2])], "NoSuchOp"),
        ([helper.make_node("Neg", ["absent"], ["y"])], [value("x", TensorProto.FLOAT, [2])], "absent"),
        ([helper.make_node("Identity", ["x"], ["y"])], [value("x", TensorProto.STRING, [2])], "tensor(string)"),
        ([helper.make_node("Neg", ["x"], ["y"])], [value("x", TensorProto.FLOAT, None)], "known rank"),
    ]:
        output = value("y", inputs[0].type.tensor_type.elem_type, None)
        (tmp_path / "m.onnx").write_bytes(model_of(nodes, inputs, [output]).SerializeToString())
        with pytest.raises(UnsupportedGraphError) as caught:
            build_engine(tmp_path / "m.onnx", tmp_path / "engine")
        assert part in str(caught.value)
        assert "m.onnx" in str(caught.value)
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_an_existing_folder_needs_overwrite(onnx_path, tmp_path):
    target = tmp_path / "my engine ü"
    first = build_engine(onnx_path, target)
    before = (target / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="overwrite=True"):
        build_engine(onnx_path, target)
    with pytest.raises(UsageError, match="No such file"):
        build_engine(tmp_path / "absent.onnx", target, overwrite=True)
    assert (target / "manifest.json").read_bytes() == before
    second = build_engine(onnx_path, target, overwrite=True, shapes={"input_ids": (3, 63)})
    # The engine that was loaded from the old folder still runs.
    for engine in (first, second):
        np.testing.assert_allclose(engine.run(batch())["hidden"], reference(batch()), rtol=1e-4, atol=1e-4)
    assert os.listdir(tmp_path) == ["my engine ü"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_in_the_middle(onnx_path, tmp_path, monkeypatch, number):
    save = onnx.save_model

    def half_written(model, path, **options):
        save(model, path, **options)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(onnx, "save_model", half_written)
    with pytest.raises(UsageError, match=os.strerror(number)):
        build_engine(onnx_path, tmp_path / "engine")
    assert os.listdir(tmp_path) == []


# Integrity


def test_flips_and_truncations_are_refused_before_a_session_is_made(folder, tmp_path, no_session):
    target = tmp_path / "engine"
    shutil.copytree(folder, target)
    for name in [*read_manifest(folder).files, "manifest.json"]:
        path = target / name
        whole = path.read_bytes()
        for i in range(256):
            offset = i * len(whole) // 256
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1 << i % 8]) + whole[offset + 1:])
            with pytest.raises(IntegrityError) as caught:
                load_engine(target)
            assert str(path) in str(caught.value)
        for i in range(64):
            path.write_bytes(whole[:i * len(whole) // 64])
            with pytest.raises(IntegrityError) as caught:
                load_engine(target)
            assert str(path) in str(caught.value)
        path.write_bytes(whole)
    with pytest.raises(pytest.fail.Exception):
        load_engine(target)


def test_a_model_that_differs_from_its_manifest_is_refused(folder, tmp_path):
    target = tmp_path / "engine"
    shutil.copytree(folder, target)
    for side, change in (("inputs", {"shape": ("batch", 63)}), ("inputs", {"name": "ids"}), ("outputs", {"name": "y"}),
                         ("outputs", {"dtype": "float16"})):
        fields = read_manifest(folder).model_dump(exclude={"files", "created_with", "modcompile_version"})
        fields[side][0].update(change)
        write_manifest(target, fields)
        with pytest.raises(IntegrityError, match="not those of its manifest"):
            load_engine(target)


def test_another_version_of_the_runtime_is_refused(folder, tmp_path, no_session):
    target = tmp_path / "engine"
    shutil.copytree(folder, target)
    fields = read_manifest(target).model_dump(exclude={"files", "created_with", "modcompile_version"})
    write_manifest(target, fields | {"runtime_range": {"minimum": "9"}})
    with pytest.raises(RuntimeUnavailableError, match="pip install 'onnxruntime>=9'"):
        load_engine(target)


# Running


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 63), (5, 7)])
def test_numpy_in_numpy_out(engine, rows, length):
    inputs = batch(rows, length)
    outputs = engine.run(inputs)
    assert {name: (type(y), y.dtype.name) for name, y in outputs.items()} == {
        "hidden": (np.ndarray, "float32"), "valid": (np.ndarray, "bool")}
    np.testing.assert_allclose(outputs["hidden"], reference(inputs), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(outputs["valid"], inputs["attention_mask"] > 0)


def test_torch_in_torch_out(engine):
    inputs = batch()
    outputs = engine.run({name: torch.from_numpy(x) for name, x in inputs.items()})
    assert {name: (type(y), y.dtype) for name, y in outputs.items()} == {
        "hidden": (torch.Tensor, torch.float32), "valid": (torch.Tensor, torch.bool)}
    for name, expected in engine.run(inputs).items():
        np.testing.assert_array_equal(outputs[name].numpy(), expected)


def test_inputs_that_are_not_contiguous(engine):
    inputs = batch(4, 63)
    expected = engine.run(inputs)["hidden"]
    strided = {name: x.T.copy().T for name, x in inputs.items()}
    assert not strided["input_ids"].flags.c_contiguous
    np.testing.assert_array_equal(engine.run(strided)["hidden"], expected)
    turned = {name: torch.from_numpy(x.T.copy()).t() for name, x in inputs.items()}
    assert not turned["input_ids"].is_contiguous()
    np.testing.assert_array_equal(engine.run(turned)["hidden"].numpy(), expected)
    raw = np.frombuffer(b"\0" + inputs["input_ids"].tobytes(), np.uint8)[1:].view(np.int64).reshape(4, 63)
    assert not raw.flags.aligned
    np.testing.assert_array_equal(engine.run(inputs | {"input_ids": raw})["hidden"], expected)
    frozen = {name: x.copy() for name, x in inputs.items()}
    for x in frozen.values():
        x.flags.writeable = False
    np.testing.assert_array_equal(engine.run(frozen)["hidden"], expected)


def test_outputs_are_not_copied_and_stay(folder):
    """Outputs are the caller's: later runs, writes and the engine's end leave them alone."""
    inputs = batch()
    given = {name: torch.from_numpy(x) for name, x in inputs.items()}
    with load_engine(folder, intra_op_threads=1) as engine:
        first, of_torch = engine.run(inputs), engine.run(given)
        assert not first["hidden"].flags.owndata
        kept = first["hidden"].copy()
        engine.run(inputs)["hidden"][...] = 7
        engine.run(given)["hidden"].fill_(7)
        np.testing.assert_array_equal(engine.run(inputs)["hidden"], kept)
    del engine
    noise = [np.full(kept.shape, 3, np.float32) for _ in range(100)]
    np.testing.assert_array_equal(first["hidden"], kept)
    np.testing.assert_array_equal(of_torch["hidden"].numpy(), kept)
    assert len(noise) == 100


@pytest.mark.parametrize(("dtype", "name"), [
    (TensorProto.FLOAT16, "float16"), (TensorProto.BFLOAT16, "bfloat16"), (TensorProto.DOUBLE, "float64"),
])
def test_element_types(tmp_path, dtype, name):
    onnx.save(twice_model(dtype), tmp_path / "m.onnx")
    factor = 1 if name == "bfloat16" else 2
    engine = build_engine(tmp_path / "m.onnx", tmp_path / "engine")
    given = torch.randn(3, 4, dtype=getattr(torch, name))
    outputs = engine.run({"x": given})
    assert outputs["y"].dtype == given.dtype
    assert torch.equal(outputs["y"], given * factor)
    assert outputs["size"].tolist() == [3, 4]
    import ml_dtypes

    array = given.double().numpy().astype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    outputs = engine.run({"x": array})
    assert outputs["y"].dtype == array.dtype
    np.testing.assert_array_equal(outputs["y"].astype(np.float64), array.astype(np.float64) * factor)
    with pytest.raises(UsageError, match=f"expected: {name}"):
        engine.run({"x": given.float()})


def test_bfloat16_without_its_numpy_type(tmp_path, monkeypatch):
    import ml_dtypes

    onnx.save(twice_model(TensorProto.BFLOAT16), tmp_path / "m.onnx")
    engine = build_engine(tmp_path / "m.onnx", tmp_path / "engine")
    array = np.ones((1, 4), ml_dtypes.bfloat16)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(RuntimeUnavailableError, match="pip install ml_dtypes"):
        engine.run({"x": array})


def test_an_exported_module(tmp_path):
    """A module is exported below the engine's folder; its data file is moved and nothing of the export stays."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.GELU(), torch.nn.LayerNorm(D)).eval()
    engine = build_engine(module, tmp_path / "engine", example_inputs=(torch.randn(3, 5, D),))
    assert sorted(os.listdir(tmp_path / "engine")) == ["manifest.json", "model.onnx", "model.onnx.data"]
    other = torch.randn(2, 9, D)
    (result,) = engine.run({engine.inputs[0].name: other}).values()
    with torch.no_grad():
        torch.testing.assert_close(result, module(other), rtol=1e-4, atol=1e-5)


def test_an_output_that_is_an_input_is_the_callers_own(tmp_path):
    model = model_of([helper.make_node("Identity", ["x"], ["y"])], [value("x", TensorProto.FLOAT, ["n"])],
                     [value("y", TensorProto.FLOAT, ["n"])])
    onnx.save(model, tmp_path / "m.onnx")
    engine = build_engine(tmp_path / "m.onnx", tmp_path / "engine")
    for x in (np.ones(5, np.float32), torch.ones(5)):
        y = engine.run({"x": x})["y"]
        y[:] = 7
        assert float(x.sum()) == 5


def test_dims_without_a_name_vary_each_for_itself(tmp_path):
    model = model_of([helper.make_node("Concat", ["a", "b"], ["y"], axis=0)],
                     [value("a", TensorProto.FLOAT, [None]), value("b", TensorProto.FLOAT, [None])],
                     [value("y", TensorProto.FLOAT, [None])])
    onnx.save(model, tmp_path / "m.onnx")
    engine = build_engine(tmp_path / "m.onnx", tmp_path / "engine")
    assert [spec.shape for spec in engine.inputs] == [("a_0",), ("b_0",)]
    assert engine.run({"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)})["y"].shape == (5,)


def test_a_failing_run_names_shapes_and_reason(engine):
    inputs = batch()
    inputs["input_ids"][0, 0] = VOCABULARY
    with pytest.raises(ModcompileError) as caught:
        engine.run(inputs)
    assert "out of data bounds" in str(caught.value)
    assert "input_ids (3, 63)" in str(caught.value)


@pytest.mark.parametrize("failure", [
    RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 4294967296"),
    RuntimeError("Available memory of 1024 is smaller than requested bytes of 4294967296"),
    RuntimeError("CUDA failure 2: out of memory ; GPU=0"),
    MemoryError("std::bad_alloc"),
])
def test_memory_that_runs_out(folder, monkeypatch, failure):
    class Full:
        def io_binding(self):
            return self

        def bind_input(self, *_):
            raise failure

    with load_engine(folder) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "session", Full())
            with pytest.raises(ModcompileError, match=r"too little memory(.|\n)*input_ids \(3, 63\)") as caught:
                engine.run(batch())
        assert str(failure) in str(caught.value) and "fewer or shorter sequences" in caught.value.details["fix"]
        engine.run(batch())


def test_memory_that_is_too_little_to_load(folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Failed to allocate memory for requested buffer of size 4294967296")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(ModcompileError, match=r"too little memory for the engine(.|\n)*4294967296"):
        load_engine(folder)


def test_memory_that_really_runs_out(folder):
    """A process that may take little memory: the run is refused, and a smaller one is not."""
    script = """
import resource, sys
import numpy as np
from modcompile.engine import load_engine
from modcompile.errors import ModcompileError
with load_engine(sys.argv[1], intra_op_threads=1) as engine:
    few, many = np.ones((2, 7), np.int64), np.ones((4096, 4096), np.int64)
    engine.run({"input_ids": few, "attention_mask": few})
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1))
    try:
        engine.run({"input_ids": many, "attention_mask": many})
    except ModcompileError as error:
        print(error)
    assert engine.run({"input_ids": few, "attention_mask": few})["hidden"].shape == (2, 7, 32)
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "too little memory" in done.stdout and "input_ids (4096, 4096)" in done.stdout


def test_tensors_of_another_gpu(engine, monkeypatch):
    """Where nothing of a GPU is but what the session and the tensor say."""
    class OnCuda:
        def get_providers(self):
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def get_provider_options(self):
            return {"CUDAExecutionProvider": {"device_id": "1"}, "CPUExecutionProvider": {}}

    class Stream:
        def synchronize(self):
            pass

    class Tensor(torch.Tensor):
        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    value = torch.ones(1).as_subclass(Tensor)
    with pytest.raises(UsageError, match=r"another GPU(.|\n)*expected: cuda:1\n  found: tensors on cuda:0"):
        engine._device(value, OnCuda())
    Tensor.device = torch.device("cuda", 1)
    assert engine._device(value, OnCuda()) == ("cuda", 1)


def test_a_tensor_of_another_device(engine):
    ids = torch.ones(1, 7, dtype=torch.int64, device="meta")
    with pytest.raises(UsageError, match="tensors on meta"):
        engine.run({"input_ids": ids, "attention_mask": ids})


def test_threads_give_the_serial_results_bit_for_bit(engine):
    given = [batch(rows, length) for rows, length in ((1, 7), (2, 63), (3, 33), (4, 5))]
    expected = [engine.run(inputs) for inputs in given]
    wrong: list[str] = []

    def many(seed):
        for i in range(125):
            which = (seed + i) % len(given)
            as_torch = (seed + i) % 3 == 0
            inputs = {n: torch.from_numpy(x) for n, x in given[which].items()} if as_torch else given[which]
            for name, y in engine.run(inputs).items():
                if not np.array_equal(np.asarray(y), expected[which][name]):
                    wrong.append(f"{which} {name}")

    threads = [threading.Thread(target=many, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Options and providers


def test_a_provider_that_is_not_available_is_no_fallback(onnx_path, folder, tmp_path, no_session):
    for make in (lambda providers: load_engine(folder, providers=providers),
                 lambda providers: build_engine(onnx_path, tmp_path / "engine", providers=providers)):
        with pytest.raises(RuntimeUnavailableError, match="onnxruntime-gpu"):
            make(["CUDAExecutionProvider", "CPUExecutionProvider"])
        with pytest.raises(RuntimeUnavailableError, match="found: NoSuchProvider"):
            make([("NoSuchProvider", {"device_id": 0})])
        with pytest.raises(UsageError, match="not a list"):
            make("CPUExecutionProvider")
        with pytest.raises(UsageError, match="not a list"):
            make([])
    assert os.listdir(tmp_path) == []


def test_a_provider_that_is_dropped_in_silence_is_an_error(folder, monkeypatch):
    """ONNX Runtime goes on with the CPU where a provider's library does not load; that is what is imitated here."""
    make = onnxruntime.InferenceSession

    def drop(model, options, providers, *, enable_fallback):
        assert [name for name, _ in providers] == ["CUDAExecutionProvider"]
        assert not enable_fallback
        return make(model, options, ["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", drop)
    with pytest.raises(RuntimeUnavailableError, match="CUDAExecutionProvider did not start"):
        load_engine(folder, providers=["CUDAExecutionProvider"])


def test_session_options_reach_the_session(folder):
    with load_engine(folder, intra_op_threads=1, inter_op_threads=2, optimization="none",
                     providers=[("CPUExecutionProvider", {"use_arena": "0"})],
                     session_config={"session.intra_op.allow_spinning": "0"}) as engine:
        options = engine.session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 2)
        assert options.execution_mode == onnxruntime.ExecutionMode.ORT_PARALLEL
        assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert engine.run(batch())["hidden"].shape == (3, 63, D)
    assert engine.session is None


@pytest.mark.parametrize(("option", "given"), [
    ("intra_op_threads", 0), ("inter_op_threads", -1), ("intra_op_threads", True), ("intra_op_threads", 1.5),
    ("optimization", "most"),
])
def test_options_that_do_not_fit(folder, no_session, option, given):
    with pytest.raises(UsageError, match=f"{option} does not fit"):
        load_engine(folder, **{option: given})


def test_loading_and_running_imports_no_torch_and_no_compiler(folder):
    script = """
import sys
import numpy as np
from modcompile.engine import load_engine
with load_engine(sys.argv[1]) as engine:
    ids = np.ones((2, 7), np.int64)
    assert engine.run({"input_ids": ids, "attention_mask": ids})["hidden"].shape == (2, 7, 32)
print(sorted({"torch", "transformers", "onnxscript", "onnx"} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.skipif("CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="no onnxruntime-gpu")
def test_torch_cuda_in_torch_cuda_out(folder):
    inputs = batch()
    with load_engine(folder, providers=["CUDAExecutionProvider", "CPUExecutionProvider"]) as engine:
        # The last op that makes the input is still under way when run is called.
        outputs = engine.run({name: torch.from_numpy(x).cuda() * 2 // 2 for name, x in inputs.items()})
        assert {y.device.type for y in outputs.values()} == {"cuda"}
        np.testing.assert_allclose(outputs["hidden"].cpu().numpy(), reference(inputs), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(engine.run(inputs)["hidden"], reference(inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif("CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="no onnxruntime-gpu")
def test_gpu_memory_that_runs_out(folder):
    limited = ("CUDAExecutionProvider", {"gpu_mem_limit": str(2**26)})
    few, many = batch(), {name: torch.ones(4096, 1024, dtype=torch.int64) for name in batch()}
    with load_engine(folder, providers=[limited, "CPUExecutionProvider"]) as engine:
        for _ in range(2):
            with pytest.raises(ModcompileError, match=r"too little memory(.|\n)*input_ids \(4096, 1024\)"):
                engine.run({name: value.cuda() for name, value in many.items()})
            np.testing.assert_allclose(engine.run(few)["hidden"], reference(few), rtol=1e-3, atol=1e-3)
