"""``route_and_norm``: its reference, its Triton kernel in the interpreter and on the GPU, and what compilers see."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from tolerances import TOLERANCES, deviation
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses import FakeTensorMode
from torch.nn.functional import layer_norm, rms_norm

from modcompile.errors import UsageError
from modcompile.ops import gather_rows, route
from modcompile.ops.route_and_norm import route_and_norm

# B batch  S rows  K capacity  D width

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_case(batch=2, rows=63, width=24, dtype=torch.float32, kind="normal"):
    """Logits, a mask, rows, a weight and a bias; row by row another mean and spread.

    No spread is so small beside the mean that float32 keeps little of it.
    """
    logits = torch.randint(3, (batch, rows)).float() if kind == "ties" else torch.randn(batch, rows)
    x = torch.randn(batch, rows, width) * (torch.rand(batch, rows, 1) * 4 + 1) + torch.randn(batch, rows, 1)
    valid, weight, bias = torch.rand(batch, rows) < 0.7, torch.randn(width), torch.randn(width)
    return logits, valid, x.to(dtype), weight.to(dtype), bias.to(dtype)


def expected(logits, valid, capacity, x, weight, bias, eps, is_centered):
    """In float64, from the ops that it stands for."""
    positions, filled = route(logits, valid, capacity)
    chosen, shape = gather_rows(x, positions), x.shape[2:]
    rows = chosen.double()
    weight, bias = (None if tensor is None else tensor.double() for tensor in (weight, bias))
    return positions, filled, chosen, (layer_norm(rows, shape, weight, bias, eps) if is_centered
                                       else rms_norm(rows, shape, weight, eps))


def assert_right(found, reference, dtype):
    *exact, normed = (tensor.cpu() for tensor in found)
    assert all(map(torch.equal, exact, reference))
    assert normed.dtype == dtype
    assert deviation(normed, reference[3]) < TOLERANCES["eager"][dtype]


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("is_centered", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("affine", [True, False])
def test_the_reference_is_the_ops_that_it_stands_for(is_centered, affine, masked):
    logits, valid, x, weight, bias = random_case()
    weight, bias = weight if affine else None, bias if affine and is_centered else None
    for capacity in (1, 8, 63):
        given = logits, valid if masked else None, capacity, x, weight, bias, 1e-3
        assert_right(route_and_norm(*given, is_centered=is_centered), expected(*given, is_centered), torch.float32)


def test_what_route_refuses():
    logits, _, x, *_ = random_case()
    with pytest.raises(UsageError, match="cannot choose that many rows"):
        route_and_norm(logits, None, 64, x)
    with pytest.raises(UsageError, match="in float32"):
        route_and_norm(logits.half(), None, 3, x)


# In a process of its own: Triton reads the variable that turns on its interpreter when it is imported.
INTERPRETED = """
import itertools
import torch
from modcompile.ops.route_and_norm import route_and_norm
from modcompile.ops.route_and_norm_triton import route_and_norm_kernel

torch.manual_seed(5)
few = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.nan, torch.inf, -torch.inf, torch.finfo().min, 1e-45, 3.5])
for rows, block, width in ((1, 128, 8), (33, 128, 24), (200, 256, 40)):
    all_logits = torch.randn(2, rows), few[torch.randint(10, (2, rows))]
    masks = None, torch.rand(2, rows) < 0.7, torch.rand(2, rows) < 0.02
    for capacity, logits, valid, is_centered in itertools.product(
            {1, rows, rows // 8 | 1}, all_logits, masks, (True, False)):
        affine = capacity > 1
        x, weight, bias = torch.randn(2, rows, width) * 3 + 1, torch.randn(width), torch.randn(width)
        has_bias = affine and is_centered
        found = (torch.full((2, capacity), -1), torch.ones(2, capacity, dtype=torch.bool),
                 *(torch.full((2, capacity, width), torch.nan) for _ in range(2)))
        route_and_norm_kernel[(2, -(-capacity // 4))](
            logits, logits if valid is None else valid, x, weight, bias, *found, rows, capacity, EPS=1e-5, WIDTH=width,
            IS_CENTERED=is_centered, HAS_VALID=valid is not None, HAS_WEIGHT=affine, HAS_BIAS=has_bias, BLOCK=block,
            COLUMNS=64, TILE=4)
        expected = route_and_norm(logits, valid, capacity, x, weight if affine else None, bias if has_bias else None,
                                  is_centered=is_centered)
        assert all(map(torch.equal, found[:3], expected)), (logits, valid, capacity)
        torch.testing.assert_close(found[3], expected[3], rtol=1e-5, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs on this machine")
@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) >= "2.4.0", reason="Triton 3.6's interpreter does not run on NumPy 2.4"
)
def test_interpreted_kernel_agrees_with_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class OneInEight(torch.nn.Module):
    def forward(self, logits, valid, x, weight, bias):
        return route_and_norm(logits, valid, (logits.shape[1] + 7) // 8, x, weight, bias)


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


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_compilers_see_the_kernel_and_that_it_writes_its_outputs_alone(target, masked):
    example = random_case(dtype=torch.float16)
    with FakeTensorMode():
        given = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda") for tensor in example]
    given[1] = given[1] if masked else None
    graph_module, _ = aot_export_module(OneInEight(), tuple(given), trace_joint=False)
    (kernel,) = [node for node in graph_module.graph.nodes
                 if node.target == torch.ops.higher_order.triton_kernel_wrapper_functional]
    assert sorted(kernel.kwargs["tensors_to_clone"]) == ["filled", "gathered", "normed", "positions"]
    # What others read too is written once, for all of them.
    assert {kernel.kwargs["kwargs"][name].target for name in ("logits", "x")} == {torch.ops.aten.as_strided.default}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize(("rows", "width"), [(1, 8), (63, 24), (128, 64), (1000, 768), (1024, 1024), (2048, 4100),
                                                 (300, 16384)])
    def test_agrees_with_the_reference(self, rows, width, dtype):
        for kind, batch in (("normal", 3), ("ties", 1)):
            logits, some, x, weight, bias = random_case(batch, rows, width, dtype, kind)
            for valid in (None, some, torch.zeros_like(some)):
                for capacity in {1, rows, rows // 8 | 1}:
                    for is_centered in (True, False):
                        given = logits, valid, capacity, x, weight, bias if is_centered else None, 1e-5
                        on_gpu = [each.cuda() if isinstance(each, torch.Tensor) else each for each in given]
                        assert_right(route_and_norm(*on_gpu, is_centered=is_centered), expected(*given, is_centered),
                                     dtype)

    def test_inductor(self):
        given = random_case(2, 1000, 768, torch.float16)
        found = torch.compile(OneInEight(), fullgraph=True)(*(tensor.cuda() for tensor in given))
        logits, valid, *rest = given
        assert_right(found, expected(logits, valid, 125, *rest, 1e-5, True), torch.float16)

    def test_a_graph_replays_with_other_inputs(self):
        held = [tensor.cuda() for tensor in random_case(2, 1000, 768, torch.float16)]
        route_and_norm(*held[:2], 125, *held[2:])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = route_and_norm(*held[:2], 125, *held[2:])
        for _ in range(3):
            given = random_case(2, 1000, 768, torch.float16)
            for tensor, new in zip(held, given, strict=True):
                tensor.copy_(new)
            graph.replay()
            assert_right(outputs, expected(*given[:2], 125, *given[2:], 1e-5, True), torch.float16)
