"""Training skips: forward and backward of a routed step cost their capacity share, and what routing adds."""

import pytest
from tiny import HEADS, WIDTH, Block, Stack, randn, randomise_routers

from modcompile.config import MoDConfig, capacity
from modcompile.convert import convert
from modcompile.training import step_flops

# B batch  S rows  K capacity  D model dim

BATCH, ROWS, LAYERS = 3, 64, 4


def flops_of(model):
    """Of forward and backward, to the parameters and to the input."""
    x = randn(BATCH, ROWS, WIDTH).requires_grad_()
    return step_flops(lambda: model(x).square().mean())


def block_flops(queries, keys):
    """Forward and backward, 3 times the forward's: 4 projections, attention, and an MLP of width 2 D."""
    forward = 2 * BATCH * (2 * queries * WIDTH**2 + 2 * keys * WIDTH**2 + 2 * queries * keys * WIDTH
                           + 4 * queries * WIDTH**2)
    return 3 * forward


@pytest.mark.parametrize(("attend_to", "ratio"), [("chosen", 0.125), ("chosen", 0.5), ("all", 0.25)])
def test_a_step_costs_its_share(attend_to, ratio):
    assert HEADS == 2
    model = Stack(*(Block() for _ in range(LAYERS)))
    mod = randomise_routers(convert(model, (randn(2, 5, WIDTH),),
                                    MoDConfig(capacity_ratio=ratio, gate="sigmoid", attend_to=attend_to)))
    k = capacity(ratio, ROWS)
    assert flops_of(model) == LAYERS * block_flops(ROWS, ROWS)
    share = 2 * block_flops(ROWS, ROWS) + 2 * block_flops(k, k if attend_to == "chosen" else ROWS)
    # Two routers' products, forward and backward. Nothing of the blocks is left out either.
    overhead = 2 * 3 * 2 * BATCH * ROWS * WIDTH
    assert share < flops_of(mod) <= share + overhead
