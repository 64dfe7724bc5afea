"""What is written down stays true: examples in docstrings run, links lead somewhere, files name no machine."""

import doctest
import importlib
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest

import modcompile

ROOT = Path(__file__).parents[1]
# What a Markdown link leads to, without its anchor; code in backticks is no link.
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
# Folders of one machine, and addresses of package registries: pip's own configuration says where packages come from.
MACHINE = re.compile(r"(?<![\w.])/(?:(?:work|farm)/|(?:home|Users)/\w|root/\.)"
                     r"|(?:pypi|pythonhosted|npmjs|pypi\.nvidia|download\.pytorch|deb\.debian)\.(?:org|com)")


def modules():
    """Every module of the package. Those of a runtime that is not installed here are left to machines that have it."""
    names = ["modcompile"]
    for info in pkgutil.walk_packages(modcompile.__path__, "modcompile."):
        names.append(info.name)
    for part in ("passes", "runtimes"):
        package = importlib.import_module(f"modcompile.{part}")
        names += [info.name for info in pkgutil.walk_packages(package.__path__, f"modcompile.{part}.")]
    return sorted(set(names))


def tracked(*patterns):
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name):
    if name.endswith("_triton"):
        pytest.importorskip("triton")
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_public_functions_have_examples():
    finder = doctest.DocTestFinder()
    for name in ("MoDConfig", "capture", "convert", "find_blocks", "trace_routing"):
        assert any(test.examples for test in finder.find(getattr(modcompile, name), name)), f"{name} has no example"


@pytest.mark.parametrize("document", tracked("*.md"), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document):
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (document.parent / target).exists(), f"{document.relative_to(ROOT)}: {target}"


def test_no_file_names_a_machine():
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if path != Path(__file__):
            found += [f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
                      for number, line in enumerate(text.splitlines(), 1) if MACHINE.search(line)]
    assert found == []
