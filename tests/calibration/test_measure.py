"""Measured importance against updates that are left out in earnest."""

import pytest
import torch
from tiny import WIDTH, Block, Mlp, Stack, randn
from torch import nn

import modcompile as mc
from modcompile.calibration.batches import Batch, bind_batches
from modcompile.calibration.measure import importance, measure
from modcompile.calibration.objective import OutputChange
from modcompile.errors import UsageError
from modcompile.variants import block_paths, dense_model

# B batch  S rows
B, S = 2, 9


def dense_of(model, example):
    graph = mc.capture(model, example)
    mod = mc.convert(graph, config=mc.MoDConfig(blocks="all", capacity_ratio=0.5))
    return graph, dense_model(mod), block_paths(mod)


def test_it_is_what_leaving_one_small_update_out_changes():
    model = Stack(*(Mlp() for _ in range(3)))
    with torch.no_grad():
        for layer in model.layers:
            layer.down.weight *= 0.05
            layer.down.bias *= 0.05
    hidden = randn(1, S, WIDTH)
    _, dense, paths = dense_of(model, {"hidden": randn(2, 5, WIDTH)})
    draws = 400
    _, scores = importance(dense, paths, Batch([hidden], None), OutputChange((0,)), draws,
                           torch.Generator().manual_seed(0), "")  # fmt: skip
    with torch.no_grad():
        whole = model(hidden)
        for index, path in enumerate(paths):
            entering = nn.Sequential(*model.layers[:index])(hidden)
            after = nn.Sequential(*model.layers[index + 1 :])
            for row in range(S):
                without = model.layers[index](entering).clone()
                without[:, row] = entering[:, row]
                change = float((after(without) - whole).square().sum() / whole.square().sum())
                # A mean of 400 squares of normal numbers has a standard error of 7 %.
                assert scores[path][0, row].exp() == pytest.approx(change, rel=0.3)


def test_padding_does_not_matter():
    model = Stack(*(Block() for _ in range(3)))
    valid = torch.arange(S) < torch.tensor([[S], [5]])
    calls = []
    for noise in (1.0, 100.0):
        hidden = randn(B, S, WIDTH).where(valid[..., None], noise * randn(B, S, WIDTH, seed=1))
        calls.append({"hidden": hidden, "attention_mask": valid.long()})
    graph, dense, paths = dense_of(model, calls[0])
    first, second = (measure(dense, paths, bind_batches(graph, [call], mc.MoDConfig()), OutputChange((0,)), draws=2,
                             seed=0) for call in calls)  # fmt: skip
    for path in paths:
        assert first[path].rows == second[path].rows == S + 5
        weights = [fits[path].solve(0.1)[0] for fits in (first, second)]
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_parameters_get_no_gradients():
    model = Stack(*(Mlp() for _ in range(2)))
    _, dense, paths = dense_of(model, {"hidden": randn(2, 5, WIDTH)})
    with torch.no_grad():
        measure(dense, paths, [Batch([randn(B, S, WIDTH)], None)], OutputChange((0,)), draws=1, seed=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_output_that_is_not_a_number_names_the_block():
    model = Stack(*(Mlp() for _ in range(3)))
    _, dense, paths = dense_of(model, {"hidden": randn(2, 5, WIDTH)})
    with torch.no_grad():
        model.layers[1].down.bias[3] = torch.inf
    with pytest.raises(UsageError, match="a block's output is not a number") as raised:
        measure(dense, paths, [Batch([randn(B, S, WIDTH)], None)], OutputChange((0,)), draws=1, seed=0)
    assert raised.value.details["where"] == "layers.1, batches[0]"
