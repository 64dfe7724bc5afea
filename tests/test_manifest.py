"""The manifest, and folders that are whole or not there: hashes, paths, truncation, atomic replacement."""

import errno
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modcompile.config import capacity
from modcompile.errors import IntegrityError, RuntimeUnavailableError, UsageError
from modcompile.files import check_relative_path, new_folder
from modcompile.manifest import (
    MANIFEST_NAME,
    ModelMetadata,
    PassRecord,
    RoutedBlock,
    TensorSpec,
    VersionRange,
    _seal,
    read_manifest,
    read_verified,
    verify_files,
    write_manifest,
)

BLOCK = RoutedBlock(path="encoder.layer.1", capacity_ratio="5/33", attend_to="all", gate="raw", rows="sequence")
FIELDS = {
    "runtime": "ort",
    "runtime_version": "1.32.0",
    "runtime_range": VersionRange(minimum="1.24", below="2"),
    "precision": "fp32",
    "entry": "model.onnx",
    "inputs": [TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence"))],
    "outputs": [TensorSpec(name="last_hidden_state", dtype="float32", shape=("batch", "sequence", 32))],
    "routed_blocks": [BLOCK],
    "passes": [PassRecord(name="route-blocks", options={"attend_to": "all", "blocks": [1, 3]})],
    "providers": ["CPUExecutionProvider"],
    "created_with": {"onnxruntime": "1.32.0"},
}


@pytest.fixture
def folder(tmp_path):
    """A folder of two files, one below another folder and with a name beyond ASCII, and its manifest."""
    folder = tmp_path / "my engine é"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(bytes(range(200)))
    (folder / "tokenizer" / "wörter.json").write_bytes(b"{}")
    write_manifest(folder, FIELDS)
    return folder


def edit(folder, change):
    """Changes the manifest's JSON and gives it a digest that fits again: what an attacker could do."""
    path = folder / MANIFEST_NAME
    payload = json.loads(path.read_bytes())
    change(payload)
    path.write_bytes(_seal(json.dumps(payload, indent=2).encode() + b"\n"))


def check(folder):
    verify_files(folder, read_manifest(folder))


def test_manifest_round_trip(folder):
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    assert manifest.inputs == tuple(FIELDS["inputs"])
    assert manifest.routed_blocks == (BLOCK,)
    assert manifest.passes == tuple(FIELDS["passes"])
    assert set(manifest.files) == {"model.onnx", "tokenizer/wörter.json"}
    assert manifest.files["model.onnx"].size == 200
    assert manifest.created_with.keys() >= {"python", "onnxruntime"}
    assert read_verified(folder, manifest, "model.onnx") == bytes(range(200))


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer/wörter.json", MANIFEST_NAME])
def test_every_flip_and_truncation_names_the_file(folder, name):
    path = folder / name
    whole = path.read_bytes()
    offsets = range(0, len(whole), max(1, len(whole) // 64))
    for offset in offsets:
        for bit in (1, 32):
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ bit]) + whole[offset + 1:])
            with pytest.raises(IntegrityError) as caught:
                check(folder)
            assert str(path) in str(caught.value)
        path.write_bytes(whole[:offset])
        with pytest.raises(IntegrityError) as caught:
            check(folder)
        assert str(path) in str(caught.value)
    path.write_bytes(whole + b"\n")
    with pytest.raises(IntegrityError):
        check(folder)
    path.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        check(folder)
    path.write_bytes(whole)
    check(folder)


def test_a_verified_file_that_changes_afterwards_is_not_read(folder):
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    for content in (b"\xff" * 200, bytes(range(200)) + b"more", b""):
        (folder / "model.onnx").write_bytes(content)
        with pytest.raises(IntegrityError, match=r"model\.onnx"):
            read_verified(folder, manifest, "model.onnx")
    with pytest.raises(IntegrityError, match="lists no such file"):
        read_verified(folder, manifest, "other.onnx")


@pytest.mark.parametrize("name", [
    "/etc/passwd", "../model.onnx", "tokenizer/../../x", "a\\b", "C:/x", "C:x", "", ".", "..", "a//b", "a/", "./a",
    "a\0b", "a\nb", "\udc80", MANIFEST_NAME,
])
def test_paths_that_could_leave_the_folder_are_refused(folder, name):
    edit(folder, lambda payload: payload["files"].update({name: payload["files"]["model.onnx"]}))
    with pytest.raises(IntegrityError):
        read_manifest(folder)
    if name != MANIFEST_NAME:
        with pytest.raises(ValueError, match="plain path"):
            check_relative_path(name)


@given(st.text(max_size=12))
def test_an_accepted_path_stays_below_the_folder(path):
    try:
        check_relative_path(path)
    except ValueError:
        return
    assert os.path.normpath(os.path.join("/root", path)).startswith("/root/")


def test_links_and_special_files_are_refused(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(bytes(range(200)))
    manifest = read_manifest(folder)
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(outside)
    with pytest.raises(IntegrityError, match="symbolic link"):
        verify_files(folder, manifest)
    with pytest.raises(IntegrityError, match="symbolic link"):
        read_verified(folder, manifest, "model.onnx")
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    with pytest.raises(IntegrityError, match="neither a file nor a folder"):
        verify_files(folder, manifest)
    with pytest.raises(IntegrityError, match="neither a file nor a folder"):
        read_verified(folder, manifest, "model.onnx")
    (folder / "model.onnx").unlink()
    outside.rename(folder / "model.onnx")
    verify_files(folder, manifest)
    (tmp_path / "elsewhere").mkdir()
    (folder / "tokenizer2").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="tokenizer2"):
        verify_files(folder, manifest)


def test_a_manifest_that_is_a_link_is_refused(folder, tmp_path):
    (folder / MANIFEST_NAME).rename(tmp_path / "elsewhere.json")
    (folder / MANIFEST_NAME).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(IntegrityError, match="symbolic link"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["extra.bin", "tokenizer/extra.bin", "new folder/.hidden"])
def test_a_file_that_is_not_listed_is_an_error(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(IntegrityError, match="foreign"):
        check(folder)


def test_a_name_that_is_no_text_is_an_error_that_can_be_printed(folder):
    with open(os.fsencode(folder) + b"/\xff\xfe", "wb"):
        pass
    with pytest.raises(IntegrityError, match="foreign") as caught:
        check(folder)
    str(caught.value).encode()


def test_a_newer_format_says_to_upgrade(folder):
    def newer(payload):
        payload["format_version"] = 2
        payload["field of the future"] = 1

    edit(folder, newer)
    with pytest.raises(RuntimeUnavailableError, match="pip install --upgrade modcompile"):
        read_manifest(folder)


@pytest.mark.parametrize("change", [
    lambda payload: payload.update(surprise=1),
    lambda payload: payload.pop("inputs"),
    lambda payload: payload.update(entry="other.onnx"),
    lambda payload: payload.update(format_version="1"),
    lambda payload: payload.update(format_version=0),
    lambda payload: payload.update(runtime="tflite"),
    lambda payload: payload.update(outputs=[]),
    lambda payload: payload["inputs"].append(payload["inputs"][0]),
    lambda payload: payload["inputs"][0].update(shape=[0, 4]),
    lambda payload: payload["inputs"][0].update(shape=[True]),
    lambda payload: payload["inputs"][0].update(shape=[2.0]),
    lambda payload: payload["inputs"][0].update(dtype="complex64"),
    lambda payload: payload["routed_blocks"][0].update(capacity=9),
    lambda payload: payload["routed_blocks"][0].update(capacity_ratio="9/8"),
    lambda payload: payload["routed_blocks"][0].update(capacity_ratio="0.125"),
    lambda payload: payload["files"]["model.onnx"].update(sha256="0" * 63),
    lambda payload: payload["files"]["model.onnx"].update(size=-1),
    lambda payload: payload["runtime_range"].update(minimum="new"),
])
def test_contents_that_do_not_fit_are_refused(folder, change):
    edit(folder, change)
    with pytest.raises(IntegrityError, match=MANIFEST_NAME):
        read_manifest(folder)


def test_json_that_parsers_read_differently_is_refused(folder):
    path = folder / MANIFEST_NAME
    whole = path.read_bytes()
    for content in (whole.replace(b'"runtime": "ort"', b'"runtime": "aoti",\n  "runtime": "ort"'),
                    whole[:82] + b'  "x": ' + b"[" * 100_000, whole.replace(b'"fp32"', b'"\xff"')):
        path.write_bytes(_seal(content))
        with pytest.raises(IntegrityError):
            read_manifest(folder)


def test_a_manifest_that_is_too_large_is_not_parsed(folder, monkeypatch):
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    (folder / MANIFEST_NAME).write_bytes(b" " * (4 * 2**20 + 1))
    with pytest.raises(IntegrityError, match="larger"):
        read_manifest(folder)


def test_no_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no engine folder"):
        read_manifest(tmp_path / "nothing")
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match="no engine folder"):
        read_manifest(tmp_path / "model.onnx")
    with pytest.raises(IntegrityError, match="missing"):
        read_manifest(tmp_path)


def test_a_routed_block_counts_its_capacity():
    assert BLOCK.at({"sequence": 33}).capacity == 5
    assert BLOCK.at({"batch": 8}) == BLOCK
    tiled = BLOCK.model_copy(update={"multiple": 64}).at({"sequence": 1000})
    assert (tiled.rows, tiled.capacity) == (1000, capacity(5 / 33, 1000, multiple=64)) == (1000, 192)
    with pytest.raises(ValueError, match="should be 8"):
        RoutedBlock(path="h.1", capacity_ratio="1/8", attend_to="all", gate="raw", rows=63)


def test_model_metadata_round_trip_and_damage():
    metadata = ModelMetadata(precision="bf16", routed_blocks=[BLOCK], passes=[{"name": "x", "options": {"k": None}}])
    assert ModelMetadata.from_json(metadata.to_json()) == metadata
    for text in ("", "{}", "[1]", metadata.to_json()[:-1], metadata.to_json().replace("bf16", "int3")):
        with pytest.raises(IntegrityError, match=r"some\.onnx"):
            ModelMetadata.from_json(text, where="some.onnx")


@pytest.mark.parametrize(("version", "inside"), [
    ("1.24", True), ("1.24.0", True), ("1.24.1+cu13", True), ("1.100.0rc1", True), ("1.23.9", False), ("2", False),
    ("2.0.0", False), ("1.9", False), ("unknown", False),
])
def test_version_range(version, inside):
    assert VersionRange(minimum="1.24.0", below="2").contains(version) == inside


def test_a_new_folder_appears_whole(tmp_path):
    target = tmp_path / "a b" / "ü"
    with new_folder(target, marker="mark") as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_bytes(b"x")
        assert not target.exists()
    assert (target / "sub" / "file").read_bytes() == b"x"
    assert os.listdir(target.parent) == ["ü"]
    # The folder's rights are those any new folder gets.
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files")
def test_everything_is_on_the_disk_before_the_name_appears(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_rename(source, destination):
        events.append("rename")
        rename(source, destination)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    with new_folder(tmp_path / "engine", marker="mark") as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_bytes(b"x")
    assert sorted(events[:3]) == sorted([staging.name, "sub", "file"])
    assert events[3:] == ["rename", tmp_path.name]


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_failure_leaves_nothing(tmp_path, failure):
    expected = UsageError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected, match="No space left" if expected is UsageError else None), \
            new_folder(tmp_path / "new" / "engine", marker="mark") as staging:
        (staging / "half").write_bytes(b"x")
        raise failure
    assert os.listdir(tmp_path) == []


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "engine", marker="mark"):
        open(tmp_path / "absent")
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_kept_unless_overwritten(tmp_path):
    target = tmp_path / "engine"
    target.mkdir()
    with new_folder(target, marker="mark") as staging:
        (staging / "mark").write_text("1")
    with pytest.raises(UsageError, match="overwrite=True"), new_folder(target, marker="mark"):
        pytest.fail("entered")
    with pytest.raises(RuntimeError), new_folder(target, marker="mark", overwrite=True):
        raise RuntimeError
    assert (target / "mark").read_text() == "1"
    with new_folder(target, marker="mark", overwrite=True) as staging:
        (staging / "mark").write_text("2")
        assert (target / "mark").read_text() == "1"
    assert (target / "mark").read_text() == "2"
    assert os.listdir(tmp_path) == ["engine"]


def test_a_folder_of_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex"), new_folder(tmp_path, marker="mark", overwrite=True):
        pytest.fail("entered")
    assert (tmp_path / "thesis.tex").exists()


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "engine"
    with pytest.raises(UsageError, match="not empty"), new_folder(target, marker="mark") as staging:
        (staging / "mark").write_text("mine")
        target.mkdir()
        (target / "mark").write_text("theirs")
    assert (target / "mark").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["engine"]


def test_a_failed_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "engine"
    with new_folder(target, marker="mark") as staging:
        (staging / "mark").write_text("old")
    rename = os.rename

    def refuse_new(source, destination):
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", refuse_new)
    with pytest.raises(UsageError, match="Input/output error"), new_folder(target, marker="mark", overwrite=True):
        pass
    assert (target / "mark").read_text() == "old"
    assert os.listdir(tmp_path) == ["engine"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for target in (tmp_path / "file", tmp_path / "file" / "engine", tmp_path / "file" / "deep" / "engine"):
        with pytest.raises(UsageError), new_folder(target, marker="mark"):
            pytest.fail("entered")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("call", "number"), [("mkdir", errno.EROFS), ("mkdir", errno.EACCES), ("fsync", errno.ENOSPC)])
def test_a_place_that_cannot_be_written(tmp_path, monkeypatch, call, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UsageError, match=os.strerror(number)), \
            new_folder(tmp_path / "engine", marker="mark") as staging:
        (staging / "mark").write_bytes(b"x")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits")
def test_a_full_disk_for_real(tmp_path):
    """A process that may write 1,000 bytes a file stands for a disk that fills up in the middle of one."""
    script = """
import resource, sys
from modcompile.errors import UsageError
from modcompile.files import new_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with new_folder(sys.argv[1] + "/engine", marker="mark") as staging:
        (staging / "mark").write_bytes(bytes(1000))
        (staging / "weights").write_bytes(bytes(1001))
except UsageError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "File too large" in result.stdout
    assert os.listdir(tmp_path) == []
