"""The Triton kernel of ``route``: in Triton's interpreter on the CPU, in compilers' graphs, and on the GPU.

On a GPU the contract itself is tested by ``test_route.py``, whose calls end in this kernel.
"""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses import FakeTensorMode

from modcompile.ops import route

# B batch  S rows  K capacity

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


class OneInEight(torch.nn.Module):
    def forward(self, logits, valid):
        return route(logits, valid, (logits.shape[1] + 7) // 8)


# In a process of its own: Triton reads the variable that turns on its interpreter when it is imported.
INTERPRETED = """
import itertools
import torch, triton
from modcompile.ops import route
from modcompile.ops.route_triton import route_kernel

torch.manual_seed(5)
for rows, block in ((1, 128), (33, 128), (300, 512), (300, 128)):
    few = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.nan, torch.inf, -torch.inf, torch.finfo().min, 1e-45, 3.5])
    bits = torch.randint(-2**31, 2**31, (2, rows)).to(torch.int32).view(torch.float32)
    close = (torch.randint(7, (2, rows)).to(torch.int32) + 0x3F800000).view(torch.float32)
    small, equal = torch.randn(2, rows) / 10 - 2, torch.full((2, rows), torch.nan)
    all_logits = torch.randn(2, rows), torch.ones(2, rows), few[torch.randint(10, (2, rows))], bits, close, small, equal
    masks = (None, *(torch.rand(2, rows) < share for share in (0.7, 0.02, 0.0, 1.0)))
    for capacity, logits, valid in itertools.product({1, rows, rows // 8 | 1}, all_logits, masks):
        positions = torch.full((2, capacity), -1)
        filled = torch.ones(2, capacity, dtype=torch.bool)
        route_kernel[(2,)](logits, logits if valid is None else valid, positions, filled, rows, capacity, BLOCK=block,
                           HAS_VALID=valid is not None, IS_SHORT=capacity > 1)
        expected = route(logits, valid, capacity)
        assert torch.equal(positions, expected[0]) and torch.equal(filled, expected[1]), (logits, valid, capacity)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs on this machine")
@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) >= "2.4.0", reason="Triton 3.6's interpreter does not run on NumPy 2.4"
)
def test_interpreted_kernel_agrees_with_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def target(monkeypatch):
    """A GPU that Triton can compile for, where there is none."""
    if torch.cuda.is_available():
        return
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_compilers_see_the_kernel_and_that_it_writes_its_outputs_alone(target, masked):
    with FakeTensorMode():
        logits = torch.empty(2, 63, device="cuda")
        valid = torch.empty(2, 63, dtype=torch.bool, device="cuda") if masked else None
    graph_module, _ = aot_export_module(OneInEight(), (logits, valid), trace_joint=False)
    nodes = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    assert torch.ops.modcompile.route.default not in [node.target for node in nodes]
    (kernel,) = [node for node in nodes if node.target == torch.ops.higher_order.triton_kernel_wrapper_functional]
    assert sorted(kernel.kwargs["tensors_to_clone"]) == ["filled", "positions"]
    positions, filled = graph_module.graph.output_node().args[0]
    assert (positions.meta["val"].dtype, filled.meta["val"].dtype) == (torch.int64, torch.bool)


def test_export_keeps_one_node_on_cuda():
    with FakeTensorMode():
        example = torch.empty(2, 63, device="cuda"), torch.empty(2, 63, dtype=torch.bool, device="cuda")
        program = torch.export.export(OneInEight(), example, strict=False)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.modcompile.route.default) == 1
    assert torch.ops.higher_order.triton_kernel_wrapper_functional not in targets


def random_case(batch, rows, kind="normal"):
    shape = (batch, rows)
    logits = torch.randint(3, shape).float() if kind == "ties" else torch.randn(shape)
    if kind == "close":
        logits = (torch.randint(700, shape).to(torch.int32) + 0x3F800000).view(torch.float32)
    return logits, torch.rand(shape) < 0.7


def assert_on_gpu(call, logits, valid, *expected):
    found = call(logits.cuda(), None if valid is None else valid.cuda())
    for tensor, reference in zip(found, expected, strict=True):
        assert torch.equal(tensor.cpu(), reference)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
class TestOnGpu:
    @pytest.mark.parametrize("kind", ["normal", "ties", "close"])
    @pytest.mark.parametrize("rows", [1, 127, 128, 1000, 1024, 1025, 4097, 8192, 8193, 16384, 20000, 65536])
    def test_agrees_with_the_reference(self, rows, kind):
        logits, some = random_case(3, rows, kind)
        for valid in (None, some, torch.zeros_like(some), torch.rand(3, rows) < 0.01):
            for capacity in {1, rows, rows // 8 | 1}:
                def on_gpu(logits, valid, capacity=capacity):
                    return route(logits, valid, capacity)

                assert_on_gpu(on_gpu, logits, valid, *route(logits, valid, capacity))

    def test_is_the_kernel_that_runs(self):
        logits = torch.randn(2, 63, device="cuda")
        route(logits, None, 5)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            route(logits, None, 5)
            torch.cuda.synchronize()
        assert [event.key for event in profile.key_averages() if event.device_type.name == "CUDA"] == ["route_kernel"]

    def test_strided_inputs_and_an_empty_batch(self):
        logits, valid = (tensor.T for tensor in random_case(63, 4))
        assert_on_gpu(lambda *inputs: route(*inputs, 5), logits, valid, *route(logits, valid, 5))
        positions, filled = route(torch.empty(0, 9, device="cuda"), None, 3)
        assert positions.shape == filled.shape == (0, 3)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_inductor(self, dynamic):
        compiled = torch.compile(OneInEight(), fullgraph=True, dynamic=dynamic)
        # Where the size is symbolic, the last one does not fit one block.
        for rows in (63, 1000, 20000) if dynamic else (63,):
            logits, valid = random_case(2, rows)
            assert_on_gpu(compiled, logits, valid, *OneInEight()(logits, valid))

    def test_a_graph_replays_with_other_inputs(self):
        logits, valid = (tensor.cuda() for tensor in random_case(2, 1000))
        route(logits, valid, 125)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = route(logits, valid, 125)
        for _ in range(3):
            new_logits, new_valid = random_case(2, 1000)
            logits.copy_(new_logits), valid.copy_(new_valid)
            graph.replay()
            for found, expected in zip(outputs, route(new_logits, new_valid, 125), strict=True):
                assert torch.equal(found.cpu(), expected)

    def test_aot_inductor(self, tmp_path):
        logits, valid = random_case(2, 1000)
        program = torch.export.export(OneInEight(), (logits.cuda(), valid.cuda()), strict=False)
        # By the file's name, as the builder of engines links it: a second copy of the C++ library can crash on locales.
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "route.pt2"),
            inductor_configs={"aot_inductor.custom_op_libs": [":libstdc++.so.6"]})
        # Loaded where nothing of ours is, as C++ loads it.
        torch.save((logits, valid, *OneInEight()(logits, valid)), tmp_path / "case.pt")
        code = ("import sys, torch; logits, valid, positions, filled = torch.load(sys.argv[2]);"
                "found = torch._inductor.aoti_load_package(sys.argv[1])(logits.cuda(), valid.cuda());"
                "assert torch.equal(found[0].cpu(), positions) and torch.equal(found[1].cpu(), filled);"
                "assert 'modcompile' not in sys.modules")
        done = subprocess.run([sys.executable, "-c", code, path, tmp_path / "case.pt"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
