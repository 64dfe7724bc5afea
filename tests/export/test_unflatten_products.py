"""unflatten-products: products of flattened rows, in their place."""

import torch
from tiny import graph_of, nodes_of, run_again, run_graph
from tolerances import TOLERANCES, deviation

from modcompile.export.unflatten_products import UnflattenProducts
from modcompile.pass_manager import PassManager

aten = torch.ops.aten
EAGER = TOLERANCES["eager"][torch.float32]
GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {"weight": torch.randn(8, 12, generator=GENERATOR), "bias": torch.randn(12, generator=GENERATOR)}


def made(width: int, flat_too: bool = False, **kwargs):
    def build(call, x):
        batch, rows = (call(aten.sym_size.int, x, dim) for dim in (0, 1))
        flat = call(aten.reshape.default, x, [-1, 8])
        product = call(aten.addmm.default, call.tensor("bias"), flat, call.tensor("weight"), **kwargs)
        result = call(aten.reshape.default, product, [batch, rows, 12] if width == 12 else [batch, -1])
        return (result, product) if flat_too else result

    graph = graph_of({"x": ("batch", "rows", 8)}, build, TENSORS)
    x = torch.randn(3, 63, 8, generator=GENERATOR)
    before = run_graph(graph, x)
    PassManager([UnflattenProducts()])(graph)
    for one, other in zip(run_graph(graph, x), before, strict=True):
        assert deviation(one, other) <= EAGER
    assert not run_again(UnflattenProducts(), graph).modified
    return nodes_of(graph)


def test_rows_stay_in_their_place():
    assert made(12) == ["aten.matmul.default", "aten.add.Tensor"]


def test_a_product_that_is_used_flat_stays():
    assert "aten.addmm.default" in made(12, flat_too=True)


def test_another_shape_behind_it_stays():
    assert "aten.addmm.default" in made(0)


def test_another_factor_stays():
    assert "aten.addmm.default" in made(12, alpha=0.5)
