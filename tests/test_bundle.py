"""Bundles: what ships is the engine, whole and hashed; and Triton's model repository, by the schema of its config."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import onnx
import onnx.parser
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

import modcompile as mc
from modcompile.bundle import package
from modcompile.errors import IntegrityError, UsageError
from modcompile.manifest import MANIFEST_NAME, TensorSpec, read_manifest, verify_files, write_manifest

FIELDS = {
    "runtime": "ort",
    "runtime_version": "1.32.0",
    "runtime_range": {"minimum": "1.24", "below": "2"},
    "precision": "fp32",
    "entry": "model.onnx",
    "inputs": [TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence")),
               TensorSpec(name='quo"ted\\', dtype="bfloat16", shape=())],
    "outputs": [TensorSpec(name="hidden", dtype="float16", shape=("batch", 63, 384)),
                TensorSpec(name="valid", dtype="bool", shape=("batch",))],
    "providers": ["CPUExecutionProvider"],
}
TENSORRT = {"runtime": "tensorrt", "runtime_version": "10.7.0", "entry": "model.engine", "providers": []}


def make_engine(folder, files=("model.onnx", "weights/model.onnx.data"), **fields):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 99)
    write_manifest(folder, FIELDS | {"created_with": {"torch": "0.1"}} | fields)
    return folder


@pytest.fixture
def engine(tmp_path):
    return make_engine(tmp_path / "engine")


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "some tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "model": {"type": "WordPiece", "vocab": {"é": 0}}}), encoding="utf-8")
    return path


# Bundles


def test_a_bundle_is_the_engine_and_its_tokenizer(engine, tokenizer, tmp_path):
    made = mc.package(engine, tmp_path / "deep" / "bundle", tokenizer=tokenizer)
    assert (made.folder, made.triton_command) == (tmp_path / "deep" / "bundle", None)
    assert sorted(made.manifest.files) == ["model.onnx", "tokenizer.json", "weights/model.onnx.data"]
    assert (made.folder / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    manifest = read_manifest(made.folder)
    verify_files(made.folder, manifest)
    assert manifest == made.manifest
    # Who built the engine, and with what, stays as it was.
    before = read_manifest(engine)
    assert before.tokenizer is None
    assert manifest == before.model_copy(update={"tokenizer": "tokenizer.json", "files": manifest.files})
    assert before.files.items() <= manifest.files.items()


def test_a_bundle_without_a_tokenizer_is_the_engine_again(engine, tmp_path):
    made = package(engine, tmp_path / "bundle")
    assert (made.folder / MANIFEST_NAME).read_bytes() == (engine / MANIFEST_NAME).read_bytes()


def test_a_bundle_keeps_its_tokenizer(engine, tokenizer, tmp_path):
    first = package(engine, tmp_path / "first", tokenizer=tokenizer)
    assert package(first.folder, tmp_path / "second").manifest == first.manifest
    with pytest.raises(UsageError, match="has a tokenizer already"):
        package(first.folder, tmp_path / "third", tokenizer=tokenizer)
    # Or a file of its name.
    other = make_engine(tmp_path / "other", files=("model.onnx", "tokenizer.json"))
    with pytest.raises(UsageError, match="has a tokenizer already"):
        package(other, tmp_path / "third", tokenizer=tokenizer)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"models": 1}', b'{"model": "m"}', b"[" * 100_000])
def test_what_is_no_tokenizer(engine, tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UsageError, match="no tokenizer"):
        package(engine, tmp_path / "bundle", tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match="found: a folder"):
        package(engine, tmp_path / "bundle", tokenizer=tmp_path)
    with pytest.raises(UsageError, match="found: nothing"):
        package(engine, tmp_path / "bundle", tokenizer=tmp_path / "absent.json")
    assert not (tmp_path / "bundle").exists()


def test_a_linked_tokenizer_is_followed(engine, tokenizer, tmp_path):
    (tmp_path / "link.json").symlink_to(tokenizer)
    assert package(engine, tmp_path / "bundle", tokenizer=tmp_path / "link.json").manifest.tokenizer == "tokenizer.json"


def test_a_damaged_engine_is_not_packed(engine, tmp_path):
    data = engine / "weights" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"model\.onnx\.data"):
        package(engine, tmp_path / "bundle")
    data.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        package(engine, tmp_path / "bundle")
    assert sorted(os.listdir(tmp_path)) == ["engine"]


def test_an_engine_that_changes_while_it_is_copied_is_not_packed(engine, tmp_path, monkeypatch):
    copy = shutil.copyfile

    def change(source, target):
        copy(source, target)
        target.write_bytes(target.read_bytes()[::-1])

    monkeypatch.setattr(shutil, "copyfile", change)
    with pytest.raises(IntegrityError, match="not the one that was written"):
        package(engine, tmp_path / "bundle")
    assert sorted(os.listdir(tmp_path)) == ["engine"]


def test_where_a_bundle_may_go(engine, tokenizer, tmp_path):
    with pytest.raises(UsageError, match="inside the engine's folder"):
        package(engine, engine / "bundle")
    with pytest.raises(UsageError, match="not empty"):
        package(engine, engine)
    with pytest.raises(UsageError, match="no engine folder"):
        package(tmp_path / "absent", tmp_path / "bundle")
    # In its own place it gains what is new.
    package(engine, engine, tokenizer=tokenizer, overwrite=True)
    verify_files(engine, read_manifest(engine))
    assert read_manifest(engine).tokenizer == "tokenizer.json"


def test_a_tokenizer_that_the_manifest_does_not_list_is_refused(engine):
    with pytest.raises(ValueError, match=r"tokenizer 'absent\.json' is not one of the files"):
        write_manifest(engine, FIELDS | {"tokenizer": "absent.json"})


def test_a_tokenizer_may_be_a_model_that_takes_texts(engine, tmp_path):
    texts = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 18]>
        main (string[N] text) => (string[N] same) { same = Identity (text) }""")
    onnx.save_model(texts, tmp_path / "some.onnx")
    made = package(engine, tmp_path / "bundle", tokenizer=tmp_path / "some.onnx")
    assert made.manifest.tokenizer == "tokenizer.onnx"
    assert (made.folder / "tokenizer.onnx").read_bytes() == (tmp_path / "some.onnx").read_bytes()
    numbers = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 18]>
        main (float[N] x) => (float[N] same) { same = Identity (x) }""")
    onnx.save_model(numbers, tmp_path / "numbers.onnx")
    with pytest.raises(UsageError, match="no tokenizer\n  expected: one input of texts\n  found: FLOAT"):
        package(engine, tmp_path / "other", tokenizer=tmp_path / "numbers.onnx")
    (tmp_path / "none.onnx").write_bytes(b"no model")
    with pytest.raises(UsageError, match="no ONNX model"):
        package(engine, tmp_path / "other", tokenizer=tmp_path / "none.onnx")
    with pytest.raises(UsageError, match=r"no such tokenizer file\n  expected: tokenizer\.onnx"):
        package(engine, tmp_path / "other", tokenizer=tmp_path / "absent.onnx")


# Triton

_TYPES = "INVALID BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING BF16".split()
_STRING, _INT32, _INT64, _ENUM, _MESSAGE = 9, 5, 3, 14, 11
# The part of Triton's model_config.proto that a config of ours uses: name, number, type, and whether it is repeated.
_SCHEMA = {
    "ModelConfig": [("name", 1, _STRING), ("backend", 17, _STRING), ("max_batch_size", 4, _INT32),
                    ("input", 5, "ModelInput", True), ("output", 6, "ModelOutput", True),
                    ("instance_group", 7, "ModelInstanceGroup", True), ("default_model_filename", 8, _STRING),
                    ("model_operations", 18, "ModelOperations")],
    "ModelInput": [("name", 1, _STRING), ("data_type", 2, "DataType"), ("dims", 4, _INT64, True),
                   ("reshape", 5, "ModelTensorReshape")],
    "ModelOutput": [("name", 1, _STRING), ("data_type", 2, "DataType"), ("dims", 3, _INT64, True),
                    ("reshape", 5, "ModelTensorReshape")],
    "ModelTensorReshape": [("shape", 1, _INT64, True)],
    "ModelInstanceGroup": [("kind", 4, "Kind"), ("count", 2, _INT32)],
    "ModelOperations": [("op_library_filename", 1, _STRING, True)],
}
_ENUMS = {"DataType": [f"TYPE_{name}" for name in _TYPES], "Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"]}


def read_config(path):
    """The config as protobuf reads it by Triton's schema; a name, a type or a value that is not of it is an error."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for field, number, kind, *repeated in fields:
            made = message.field.add(name=field, number=number, label=3 if repeated else 1)
            if isinstance(kind, str):
                made.type, made.type_name = _ENUM if kind in _ENUMS else _MESSAGE, f".inference.{kind}"
            else:
                made.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    config = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()
    return text_format.Parse(path.read_text(encoding="utf-8"), config)


@pytest.fixture(scope="module")
def model_config():
    """Triton's own message, of its client's package, whose other parts would take gRPC."""
    found = importlib.util.find_spec("tritonclient")
    if found is None:
        pytest.skip("there is no tritonclient: pip install --no-deps tritonclient")
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelConfig


def test_the_part_of_the_schema_is_tritons(model_config):
    file = model_config.DESCRIPTOR.file
    for name, fields in _SCHEMA.items():
        proto = descriptor_pb2.DescriptorProto()
        file.message_types_by_name[name].CopyToProto(proto)
        found = {field.name: field for field in proto.field}
        for field, number, kind, *repeated in fields:
            typed = found[field].type_name.rpartition(".")[2] or found[field].type
            assert (found[field].number, typed, found[field].label == 3) == (number, kind, bool(repeated)), field
    # Kind is defined within the message that uses it.
    kinds = file.message_types_by_name["ModelInstanceGroup"].enum_types_by_name
    for name, values in _ENUMS.items():
        enum = file.enum_types_by_name.get(name) or kinds[name]
        assert [(value.name, value.number) for value in enum.values] == [(v, i) for i, v in enumerate(values)]


def test_tritons_own_message_takes_the_configs(model_config, engine, tokenizer, tmp_path):
    plugins = make_engine(tmp_path / "plugins", files=("model.engine", "libmodcompile_trt.so"), **TENSORRT)
    ops = make_engine(tmp_path / "ops", files=("model.onnx", "libmodcompile_ort.so"))
    for number, source in enumerate((engine, plugins, ops)):
        package(source, tmp_path / "models" / f"m{number}", triton=True)
        text = (tmp_path / "models" / f"m{number}" / "config.pbtxt").read_text(encoding="utf-8")
        config = text_format.Parse(text, model_config())
        assert (config.name, config.max_batch_size) == (f"m{number}", 0)
        assert len(config.input) == len(config.output) == 2


def described(tensors):
    return [(tensor.name, _ENUMS["DataType"][tensor.data_type], list(tensor.dims), tensor.HasField("reshape"))
            for tensor in tensors]


def test_a_model_for_triton(engine, tokenizer, tmp_path):
    made = package(engine, tmp_path / "models" / "mini.lm-1", tokenizer=tokenizer, triton=True)
    assert sorted(os.listdir(tmp_path / "models" / "mini.lm-1")) == ["1", "config.pbtxt"]
    # The version's folder is a bundle.
    assert made.folder == tmp_path / "models" / "mini.lm-1" / "1"
    verify_files(made.folder, read_manifest(made.folder))
    assert made.triton_command == f"tritonserver --model-repository={tmp_path / 'models'}"
    config = read_config(tmp_path / "models" / "mini.lm-1" / "config.pbtxt")
    assert (config.name, config.backend, config.default_model_filename) == ("mini.lm-1", "onnxruntime", "model.onnx")
    assert config.max_batch_size == 0
    assert described(config.input) == [("input_ids", "TYPE_INT64", [-1, -1], False),
                                       ('quo"ted\\', "TYPE_BF16", [1], True)]
    assert described(config.output) == [("hidden", "TYPE_FP16", [-1, 63, 384], False),
                                        ("valid", "TYPE_BOOL", [-1], False)]
    assert [(group.kind, group.count) for group in config.instance_group] == [(_ENUMS["Kind"].index("KIND_CPU"), 1)]
    assert not config.HasField("model_operations")


def test_the_custom_op_library_is_registered(tmp_path):
    engine = make_engine(tmp_path / "engine", files=("model.onnx", "libmodcompile_ort.so"),
                         providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    made = package(engine, tmp_path / "my models" / "m", triton=True)
    config = read_config(tmp_path / "my models" / "m" / "config.pbtxt")
    assert list(config.model_operations.op_library_filename) == ["libmodcompile_ort.so"]
    assert config.instance_group[0].kind == _ENUMS["Kind"].index("KIND_GPU")
    assert made.triton_command == (f"LD_LIBRARY_PATH='{tmp_path}/my models/m'/1 tritonserver "
                                   f"--model-repository='{tmp_path}/my models'")


def test_the_plugin_library_is_preloaded(tmp_path):
    engine = make_engine(tmp_path / "engine", files=("model.engine", "libmodcompile_trt.so"), **TENSORRT)
    made = package(engine, tmp_path / "models" / "m", triton=True)
    config = read_config(tmp_path / "models" / "m" / "config.pbtxt")
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.engine")
    assert not config.HasField("model_operations")
    assert made.triton_command.startswith(f"LD_PRELOAD={tmp_path}/models/m/1/libmodcompile_trt.so tritonserver")


def test_models_of_one_repository(engine, tmp_path):
    for name in ("a", "b"):
        package(engine, tmp_path / "models" / name, triton=True)
    package(engine, tmp_path / "models" / "a", triton=True, overwrite=True)
    assert sorted(os.listdir(tmp_path / "models")) == ["a", "b"]
    # A bundle is not taken for a model of Triton's.
    package(engine, tmp_path / "bundle")
    with pytest.raises(UsageError, match=r"expected: a folder with config\.pbtxt"):
        package(engine, tmp_path / "bundle", triton=True, overwrite=True)


@pytest.mark.parametrize("runtime", ["tensorrt-rtx", "aoti"])
def test_runtimes_without_a_backend_in_triton(tmp_path, runtime):
    engine = make_engine(tmp_path / "engine", files=("model.engine",), **TENSORRT | {"runtime": runtime})
    with pytest.raises(UsageError, match="no backend for engines of this runtime"):
        package(engine, tmp_path / "models" / "m", triton=True)


@pytest.mark.parametrize("name", ["a b", "ä", ".hidden", "-x"])
def test_names_that_a_model_of_tritons_cannot_have(engine, tmp_path, name):
    with pytest.raises(UsageError, match="cannot have this name"):
        package(engine, tmp_path / "models" / name, triton=True)
    assert not (tmp_path / "models").exists()
