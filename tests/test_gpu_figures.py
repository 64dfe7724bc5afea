"""docs/gpu_figures.sh with commands that only say what they were called with: what fails is named, the rest is done."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "gpu_figures.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the script is bash")


@pytest.fixture
def figures(tmp_path):
    """Runs parts of the script; a command fails if the shell's expression says so of its arguments, "$*"."""
    (tmp_path / "docs").mkdir()
    shutil.copy(SCRIPT, tmp_path / "docs")
    (tmp_path / "bin").mkdir()

    def run(fails, *parts):
        for name in ("python", "modcompile"):
            stub = tmp_path / "bin" / name
            stub.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> called\nif {fails}; then exit 3; fi\n')
            stub.chmod(0o755)
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(["bash", "docs/gpu_figures.sh", "out", *parts], cwd=tmp_path, text=True, timeout=60,
                              capture_output=True, env={**os.environ, "PATH": path})
        return done, (tmp_path / "called").read_text().splitlines()

    return run


def ending(done):
    """What is said last: each failure once more."""
    lines = [line.removeprefix("failed: ") for line in done.stderr.splitlines()]
    half = len(lines) // 2
    assert lines[:half] == lines[half:]
    return lines[half:]


def test_nothing_failed(figures):
    done, called = figures("false")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"== (\w+)", done.stdout) == ["engines", "kernels", "training", "budgets"]
    assert sum("bench " in call and "--runs 1 " in call for call in called) == 8
    assert sum("train_budgets.py" in call for call in called) == 8


def test_a_worker_that_failed_is_named_and_the_others_go_on(figures):
    # The worker that is first to make the folder.
    done, called = figures('[[ "$*" == *budgets-structure* ]] && mkdir taken 2> /dev/null', "budgets")
    assert done.returncode == 1
    (failure,) = ending(done)
    assert re.fullmatch(r"worker [1-4] of 4 of out/budgets-structure", failure)
    assert sum("train_budgets.py" in call for call in called) == 8


def test_every_worker_is_waited_for(figures):
    done, _ = figures('[[ "$*" == *"out/budgets "* ]]', "budgets")
    assert done.returncode == 1
    assert ending(done) == [f"worker {worker} of 4 of out/budgets" for worker in range(1, 5)]


def test_an_engine_that_was_not_built_is_named_with_its_log(figures, tmp_path):
    done, called = figures('[[ "$*" == *"--runs 1 "*aoti-bert* ]]', "engines", "kernels")
    assert done.returncode == 1
    assert ending(done) == ["the build of aoti-bert: see out/log/aoti-bert.txt"]
    assert (tmp_path / "out" / "log" / "aoti-bert.txt").exists()
    assert sum("--runs 50 " in call for call in called) == 8 and "bench_kernels.py" in called[-1]


@pytest.mark.parametrize(("fails", "failure"), [
    ("pretrained.py", "the tokens of texts/held-out/plays.txt, for SmolLM2"),
    ("--runs 50 *ort-gpt1 ", "the figures of ort-gpt1"),
    ("bench_kernels.py", "kernels"),
    ("--batch 32 ", "training of 32"),
])
def test_other_failures_stop_no_other_part(figures, fails, failure):
    pattern = "*".join(f'"{part}"' for part in fails.split("*"))
    done, called = figures(f'[[ "$*" == *{pattern}* ]]', "engines", "kernels", "training", "budgets")
    assert done.returncode == 1 and ending(done) == [failure]
    assert "train_budgets.py" in called[-1]
