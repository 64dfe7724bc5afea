"""The tanh form of GELU as a sigmoid: the same numbers, also where cubes and exponentials leave a dtype's range."""

import pytest
import torch
from modcompile.passes.expand_gelu import ExpandGelu
from tiny import assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten, run_graph
from tolerances import TOLERANCES
from torch.nn import functional

# B batch  S rows  N width

aten = torch.ops.aten


def expanded(dtype="float32", **form):
    inputs = {"x": ("batch", "rows", 8)}
    return rewritten(ExpandGelu(), lambda: graph_of(
        inputs, lambda call, x: call(aten.gelu.default, x, **form), dtypes=dict.fromkeys(inputs, dtype)))[:2]


def test_golden():
    before, after = expanded("float16", approximate="tanh")
    check_rewrite("expand_gelu", before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers(dtype):
    before, after = expanded(str(dtype).removeprefix("torch."), approximate="tanh")
    assert {"aten.gelu.default", "aten.tanh.default"}.isdisjoint(nodes_of(after))
    assert_same(before, after, 3 * randn(2, 63, 8).to(dtype), tolerance=TOLERANCES["eager"][dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_number_is_within_a_rounding_of_float64(dtype):
    """Over the range that rounds to neither 0 nor x, in its far tail too, where 1 + tanh has no digits left."""
    _, after = expanded(str(dtype).removeprefix("torch."), approximate="tanh")
    x = torch.linspace(-6, 6, 8 * 4001, dtype=torch.float64).to(dtype).reshape(1, -1, 8)
    (found,) = run_graph(after, x)
    wide = x.double()
    expected = wide * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))
    # The textbook form agrees, as far as it has digits.
    assert torch.allclose(expected, functional.gelu(wide, approximate="tanh"), rtol=0, atol=1e-14)
    tiny, eps = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).eps
    # The argument's own rounding in float32, up to 24 of it, counts in the exponential.
    bound = (eps + 32 * torch.finfo(torch.float32).eps) * expected.abs() + tiny
    assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_numbers(dtype):
    before, after = expanded(str(dtype).removeprefix("torch."), approximate="tanh")
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest, -largest, largest**0.5, -(largest**0.5), 50, -50, 0.0, torch.nan], dtype=dtype)
    (found,) = run_graph(after, x.reshape(1, 1, 8))
    expected = [largest, 0, float(x[2]), 0, 50, 0, 0, torch.nan]
    assert torch.equal(found[0, 0, :7].double(), torch.tensor(expected[:7], dtype=torch.float64))
    assert found[0, 0, 7].isnan()
    infinite = torch.tensor([torch.inf, -torch.inf] * 4, dtype=dtype).reshape(1, 1, 8)
    assert torch.equal(*(run_graph(graph, infinite)[0].nan_to_num(nan=7.0) for graph in (before, after)))


@pytest.mark.parametrize("form", [{}, {"approximate": "none"}])
def test_the_exact_form_stays(form):
    before, after = expanded(**form)
    assert nodes_of(after) == nodes_of(before)
