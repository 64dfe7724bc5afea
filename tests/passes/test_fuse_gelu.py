"""fuse-gelu: the tanh form of GELU, its operands in any order; and what only looks like it."""

import math

import pytest
import torch
from modcompile.passes.fuse_gelu import FuseGelu
from tiny import graph_of, nodes_of, run_again, run_graph
from tolerances import TOLERANCES, deviation

from modcompile.pass_manager import PassManager

aten = torch.ops.aten
EAGER = TOLERANCES["eager"][torch.float32]
C = math.sqrt(2 / math.pi)


def made(build):
    graph = graph_of({"x": ("batch", "rows", 8)}, build)
    x = 3 * torch.randn(2, 63, 8, generator=torch.Generator().manual_seed(0))
    before = run_graph(graph, x)
    manager = PassManager([FuseGelu()])
    manager(graph)
    assert deviation(run_graph(graph, x)[0], before[0]) <= EAGER
    assert not run_again(FuseGelu(), graph).modified
    return nodes_of(graph)


def as_in_gpt2(call, x):
    cubic = call(aten.mul.Tensor, call(aten.pow.Tensor_Scalar, x, 3.0), 0.044715)
    tanh = call(aten.tanh.default, call(aten.mul.Tensor, call(aten.add.Tensor, x, cubic), C))
    return call(aten.mul.Tensor, call(aten.mul.Tensor, x, 0.5), call(aten.add.Tensor, tanh, 1.0))


def in_another_order(call, x):
    square = call(aten.mul.Tensor, x, x)
    cubic = call(aten.mul.Tensor, 0.044715, call(aten.mul.Tensor, square, x))
    tanh = call(aten.tanh.default, call(aten.mul.Tensor, C, call(aten.add.Tensor, cubic, x)))
    return call(aten.mul.Tensor, call(aten.add.Tensor, 1.0, tanh), call(aten.mul.Tensor, 0.5, x))


@pytest.mark.parametrize("build", [as_in_gpt2, in_another_order])
def test_it_is_one_gelu(build):
    assert made(build) == ["aten.gelu.default"]


def another_factor(call, x):
    cubic = call(aten.mul.Tensor, call(aten.pow.Tensor_Scalar, x, 3.0), 0.05)
    tanh = call(aten.tanh.default, call(aten.mul.Tensor, call(aten.add.Tensor, x, cubic), C))
    return call(aten.mul.Tensor, call(aten.mul.Tensor, x, 0.5), call(aten.add.Tensor, tanh, 1.0))


def another_power(call, x):
    cubic = call(aten.mul.Tensor, call(aten.pow.Tensor_Scalar, x, 2.0), 0.044715)
    tanh = call(aten.tanh.default, call(aten.mul.Tensor, call(aten.add.Tensor, x, cubic), C))
    return call(aten.mul.Tensor, call(aten.mul.Tensor, x, 0.5), call(aten.add.Tensor, tanh, 1.0))


def a_plain_tanh(call, x):
    return call(aten.tanh.default, x)


@pytest.mark.parametrize("build", [another_factor, another_power, a_plain_tanh])
def test_what_is_no_gelu_stays(build):
    assert "aten.gelu.default" not in made(build)
