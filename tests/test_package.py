"""The package as it is installed: what a wheel holds, what an import costs, what may not be imported."""

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import modcompile

ROOT = Path(__file__).parents[1]
# The folder of each part of the package, and where the wheel has it.
PARTS = {"modcompile": "modcompile", "passes": "modcompile/passes", "runtimes": "modcompile/runtimes"}


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, **options)


def sources():
    """Every Python file of the package, by its place in the wheel."""
    return {str(Path(place, file.relative_to(ROOT / folder)))
            for folder, place in PARTS.items() for file in (ROOT / folder).rglob("*.py")}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """A wheel built from a copy: the copy has no build folder with the leftovers of an earlier one."""
    copy = tmp_path_factory.mktemp("source")
    for folder in PARTS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    built = python("-m", "build", "--wheel", "--no-isolation", "--outdir", copy / "dist", cwd=copy)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return path


def test_the_listed_packages_are_the_folders():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(
        {str(Path(name).parent).replace("/", ".") for name in sources() if Path(name).name == "__init__.py"})
    # A folder without __init__.py would be left out of the wheel without a word.
    assert {str(Path(name).parent).replace("/", ".") for name in sources()} == set(settings["packages"])


def test_the_wheel_is_the_tree(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.endswith(".py")} == sources()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"modcompile", f"modcompile-{modcompile.__version__}.dist-info"}
    assert "modcompile/py.typed" in names
    assert {f"modcompile/insight/page.{kind}" for kind in ("css", "html", "js")} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_installs_and_imports(wheel, tmp_path):
    installed = python("-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path, wheel)
    assert installed.returncode == 0, installed.stderr
    # With -P and from another folder, the checkout is in reach only by its own installation, which comes later.
    done = python("-P", "-c", "import modcompile.passes as p, modcompile.runtimes as r, modcompile as m;"
                  "print(p.__file__, r.__file__, m.__file__, sep='\\n')", cwd=tmp_path,
                  env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(tmp_path) for line in done.stdout.split())
    assert (tmp_path / "bin" / "modcompile").exists()


def test_import_is_quick_and_leaves_torch_alone():
    code = ("import sys, time; start_s = time.perf_counter(); import modcompile; modcompile.__version__;"
            "print(time.perf_counter() - start_s); print(*sys.modules)")
    runs = [python("-c", code).stdout.splitlines() for _ in range(5)]
    assert min(float(taken_s) for taken_s, _ in runs) < 0.3
    assert {"torch", "onnx", "onnxruntime", "numpy", "transformers", "pydantic"}.isdisjoint(runs[0][1].split())


def test_the_command_line_answers_help_without_torch():
    done = python("-X", "importtime", "-c", "import sys; sys.argv = ['modcompile', '--help']; "
                  "from modcompile.cli import main; main()")
    assert done.returncode == 0
    assert "bench" in done.stdout
    assert not re.search(r"\| +(torch|onnx|onnxruntime|numpy|pydantic)$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("name", ["passes", "runtimes"])
def test_the_parts_are_not_packages_of_their_own(name):
    done = python("-c", f"import {name}", cwd=ROOT)
    assert f"import modcompile.{name}" in done.stderr
    assert "ImportError" in done.stderr


@pytest.mark.parametrize("name", modcompile.__all__)
def test_every_public_name_is_there(name):
    value = getattr(modcompile, name)
    assert value is getattr(modcompile, name)
    assert not inspect.ismodule(value) or name == "errors"
    assert name in dir(modcompile)


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'convret'"):
        modcompile.convret  # noqa: B018


@pytest.mark.parametrize("name", ["capture", "convert", "verify"])
def test_a_function_is_not_hidden_by_its_module(name, monkeypatch):
    module = importlib.import_module(f"modcompile.{name}")
    monkeypatch.delitem(vars(modcompile), name, raising=False)
    # What importing the module for the first time does.
    setattr(modcompile, name, module)
    assert getattr(modcompile, name) is getattr(module, name)


def test_what_type_checkers_see_is_what_is_imported():
    text = inspect.getsource(importlib.import_module("modcompile"))
    seen = {name: match[1] for match in re.finditer(r"^    from (\S+) import (.+)$", text, re.MULTILINE)
            for name in match[2].split(", ")}
    assert seen == modcompile._HOMES
    assert set(modcompile.__all__) == {*seen, "errors", "__version__"}
