"""Drives the C++ runtime: the program runtimes/native/tests/check_engine.cc, and its words."""

__all__ = ["NATIVE", "ROOT", "Driver", "command", "overhead", "python_run", "word", "words"]

import json
import os
import subprocess
from pathlib import Path

import numpy as np

from modcompile.engine import load_engine

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "runtimes" / "native"


def command(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=900, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Driver:
    """tests/check_engine.cc, which answers one command after another."""

    def __init__(self, path):
        self.path = path
        # The process of a sanitizer's report ends with an error. ThreadSanitizer cannot see how a library that it did
        # not instrument, as ONNX Runtime, takes turns.
        self.process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={
            **os.environ, "ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "ignore_noninstrumented_modules=1"})

    def ask(self, *words):
        self.process.stdin.write("\t".join(map(str, words)).encode() + b"\n")
        self.process.stdin.flush()
        answer = bytearray()
        while (byte := self.process.stdout.read(1)) != b"\0":
            assert byte, f"the driver died at {words}"
            answer += byte
        return answer.decode()

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


def word(name, array, folder):
    """An array as a tensor of a command."""
    path = folder / f"given-{name.strip('>')}"
    path.write_bytes(np.ascontiguousarray(array).tobytes())
    return f"{name}:{array.dtype.name}:{'x'.join(map(str, array.shape))}:{path}"


def words(inputs, folder):
    return [word(name, array, folder) for name, array in inputs.items()]


def overhead(program, folder, runs, inputs, scratch, **options):
    """What bench_engine says of an engine: a run of the C++ runtime's beside the back end's own, by mode."""
    printed = command(program, folder, runs, *words(inputs, scratch), **options)
    return [json.loads(line) for line in printed.splitlines()]


def python_run(folder, inputs, **options):
    with load_engine(folder, intra_op_threads=1, **options) as engine:
        return engine.run(inputs)
