"""A float32 product with one column becomes a sum; every other product stays."""

import pytest
import torch
from modcompile.passes.sum_columns import SumColumns
from tiny import assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten
from tolerances import TOLERANCES

aten = torch.ops.aten
INPUTS = {"x": ("batch", "sequence", 8), "weight": (1, 8), "bias": (1,)}


def summed(inputs=INPUTS):
    return rewritten(SumColumns(), lambda: graph_of(inputs, lambda call, *given: call(aten.linear.default, *given)))[:2]


def test_golden():
    before, after = summed()
    check_rewrite("sum_columns", before, after)


@pytest.mark.parametrize("biased", [True, False])
def test_numbers(biased):
    before, after = summed(INPUTS if biased else {name: INPUTS[name] for name in ("x", "weight")})
    assert nodes_of(after) == ["aten.mul.Tensor", "aten.sum.dim_IntList", *["aten.add.Tensor"][:biased]]
    given = randn(2, 63, 8), randn(1, 8, seed=1), randn(1, seed=2)
    assert_same(before, after, *given[:2 + biased], tolerance=TOLERANCES["eager"][torch.float32])


def test_a_new_router_still_ties_everywhere():
    _, after = summed()
    (logits,) = after(randn(2, 63, 8), torch.zeros(1, 8), torch.ones(1))
    assert (logits == 1).all()


def test_other_products_stay():
    before, after = summed({"x": ("batch", "sequence", 8), "weight": (2, 8), "bias": (2,)})
    assert nodes_of(after) == nodes_of(before) == ["aten.linear.default"]
