"""The light runtime: engines load and run where there is neither torch nor a compiler to import."""

import subprocess
import sys
import textwrap

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modcompile.engine import build_engine, load_engine

# B batch  D width
D = 33
# What modcompile depends on and an engine does not.
HEAVY = ["accelerate", "jinja2", "onnx", "onnx_ir", "onnxscript", "rich", "safetensors", "tensorrt", "tensorrt_rtx",
         "torch", "transformers", "triton", "typer"]
COMPILER = ["capture", "convert", "export", "ops", "passes", "runtimes.ort.builder"]


def python(code, *arguments):
    """What another process prints, in which nothing that is heavy can be imported."""
    absent = f"import sys\nsys.modules |= dict.fromkeys({HEAVY!r})\n"
    done = subprocess.run([sys.executable, "-c", absent + textwrap.dedent(code), *map(str, arguments)],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def engine_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("light")
    weight = np.random.default_rng(0).standard_normal((D, D)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["product"]), helper.make_node("Tanh", ["product"], ["y"])]
    values = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", D])] for name in ("x", "y")]
    graph = helper.make_graph(nodes, "graph", *values, [numpy_helper.from_array(weight, "weight")])
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
                    folder / "tanh.onnx")
    build_engine(folder / "tanh.onnx", folder / "engine").close()
    return folder / "engine"


def test_an_engine_runs_without_torch_and_without_the_compiler(engine_folder, tmp_path):
    x = np.random.default_rng(1).standard_normal((5, D)).astype(np.float32)  # [B, D]
    np.save(tmp_path / "x.npy", x)
    printed = python("""
        import numpy as np
        from modcompile.engine import load_engine
        with load_engine(sys.argv[1], intra_op_threads=1) as engine:
            y = engine.run({"x": np.load(sys.argv[2])})["y"]
        assert isinstance(y, np.ndarray)
        np.save(sys.argv[3], y)
        # Entries that are None were never imported.
        print(*(name for name, module in sys.modules.items() if module is not None))
        """, engine_folder, tmp_path / "x.npy", tmp_path / "y.npy").split()
    assert {"numpy", "onnxruntime", "modcompile.engine"} <= set(printed)
    assert set(HEAVY).isdisjoint(printed)
    assert {f"modcompile.{name}" for name in COMPILER}.isdisjoint(printed)
    with load_engine(engine_folder, intra_op_threads=1) as engine:
        np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), engine.run({"x": x})["y"])


def test_nothing_is_hidden_by_what_is_absent(engine_folder):
    """With torch installed it stays on the disk as well: nothing asks for it."""
    code = ("import sys; from modcompile.runtimes import load_engine; import numpy as np;"
            f"load_engine(sys.argv[1]).run({{'x': np.ones((2, {D}), np.float32)}}); print(*sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, engine_folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(HEAVY).isdisjoint(done.stdout.split())


def test_errors_are_told_without_torch(engine_folder):
    printed = python("""
        import numpy as np
        from modcompile.errors import UsageError
        from modcompile.runtimes import load_engine
        with load_engine(sys.argv[1]) as engine:
            for given in (np.ones((2, 3), np.float32), np.ones((2, 33)), [[1.0]]):
                try:
                    engine.run({"x": given})
                except UsageError as error:
                    print(error.problem)
        """, engine_folder)
    assert printed.splitlines() == [f"input x {problem}" for problem in (
        "has the wrong size", "has the wrong dtype", "is not a tensor")]


def test_the_import_takes_a_fifth_of_a_second_at_most():
    code = "import time; start = time.process_time(); import modcompile.runtimes; print(time.process_time() - start)"
    assert min(float(python(code)) for _ in range(3)) < 0.2
