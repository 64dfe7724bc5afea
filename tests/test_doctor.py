"""Findings about environments that are not this one: packages missing, too old, broken, or twice there."""

import importlib
import importlib.metadata

import pytest

from modcompile import doctor
from modcompile.doctor import Finding, diagnose, is_broken

REQUIRES = ["numpy>=1.26", 'transformers>=5.0; extra == "hf"', 'pytest>=8; extra == "dev"']


@pytest.fixture
def environment(monkeypatch):
    """Sets what is required, which versions are installed, and which modules do not load."""

    def arrange(installed, broken=(), requires=REQUIRES):
        def version(name):
            if name not in installed:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed[name]

        def import_module(name):
            if name in broken:
                raise OSError("libfoo.so: cannot open shared object file")
            return name

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)
        monkeypatch.setattr(importlib, "import_module", import_module)
        return {finding.name: finding for finding in diagnose()}

    return arrange


INSTALLED = {"modcompile": "0.1.0", "numpy": "2.0"}


def test_this_environment_is_fit():
    findings = diagnose()
    assert not is_broken(findings), findings
    found = {finding.name: finding for finding in findings}
    assert "CPU" in found["onnxruntime"].found
    assert found["torch"].needed.startswith(">=2.")


def test_what_an_extra_wants_may_be_missing(environment):
    found = environment(INSTALLED)
    assert found["transformers"] == Finding("transformers", "missing", "", ">=5.0 for [hf]", False,
                                            'pip install "modcompile[hf]"')
    assert not is_broken(list(found.values()))
    assert "pytest" not in found


def test_what_is_required_may_not(environment):
    found = environment({"modcompile": "0.1.0"})
    assert found["numpy"] == Finding("numpy", "missing", "", ">=1.26", True, 'pip install "numpy>=1.26"')
    assert is_broken(list(found.values()))


def test_a_version_out_of_range(environment):
    found = environment(INSTALLED | {"numpy": "1.25.3"})
    assert (found["numpy"].state, found["numpy"].found) == ("broken", "1.25.3")
    assert is_broken(list(found.values()))


def test_a_library_that_does_not_load(environment):
    found = environment(INSTALLED | {"transformers": "5.1"}, broken=["transformers"])
    assert found["transformers"].state == "broken"
    assert "libfoo.so" in found["transformers"].found


def test_the_gpu_build_stands_for_onnxruntime(environment, monkeypatch):
    monkeypatch.setattr(doctor, "ABILITIES", {})
    requires = ["onnxruntime>=1.24", 'onnxruntime-gpu>=1.27; extra == "gpu"']
    found = environment({"modcompile": "0", "onnxruntime-gpu": "1.30"}, requires=requires)
    assert (found["onnxruntime"].state, found["onnxruntime"].found) == ("ok", "1.30")
    found = environment({"modcompile": "0", "onnxruntime": "1.30"}, requires=requires)
    assert found["onnxruntime-gpu"].fix == "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"


def test_two_distributions_of_onnxruntime(monkeypatch):
    class Distribution:
        files = ("onnxruntime/__init__.py",)

        def __init__(self, name):
            self.name = name

    both = [Distribution("onnxruntime"), Distribution("onnxruntime_gpu")]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: both)
    found = {finding.name: finding for finding in diagnose()}["onnxruntime's files"]
    assert (found.state, found.found) == ("broken", "onnxruntime and onnxruntime-gpu")
    assert found.fix.startswith("pip uninstall -y onnxruntime onnxruntime-gpu")


def test_source_files_without_an_installation(environment):
    found = environment({})
    assert found["modcompile"].fix == "pip install -e ."
    assert is_broken(list(found.values()))


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(doctor, "_output", lambda *command: "NVIDIA H100, 580.1, 9.0\n")
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._gpu().state == "broken"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor._gpu() == Finding("NVIDIA GPU", "ok", "NVIDIA H100, 580.1, 9.0", "for CUDA and TensorRT engines")


def test_tools_say_their_version(tmp_path, monkeypatch):
    tool = tmp_path / "cmake"
    tool.write_text("#!/bin/sh\necho 'cmake version 9.9.9'\necho\necho maintained by someone\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor._tool("cmake", "builds").found == "cmake version 9.9.9"
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert doctor._tool("cmake", "builds").state == "missing"
