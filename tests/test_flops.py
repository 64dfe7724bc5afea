"""FLOPs against counts by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from modcompile.capture import capture
from modcompile.errors import UsageError
from modcompile.flops import count_flops, flops_by_module

# B batch  H heads  S queries  D model dim
B, H, S, D = 2, 4, 63, 32


class Attention(nn.Module):
    def __init__(self, fused, key_heads=H):
        super().__init__()
        self.project, self.fused, self.key_heads = nn.Linear(D, D), fused, key_heads

    def forward(self, x):
        heads = self.project(x).unflatten(2, (H, -1)).transpose(1, 2)  # [B, H, S, D / H]
        keys = heads[:, : self.key_heads]
        if self.fused:
            mixed = functional.scaled_dot_product_attention(heads, keys, keys, enable_gqa=self.key_heads != H)
        else:
            mixed = (heads @ heads.transpose(2, 3)).softmax(3) @ heads
        return mixed.transpose(1, 2).flatten(2)


PROJECTION = 2 * B * S * D * D
PRODUCTS = 2 * (2 * B * H * S * S * (D // H))


@pytest.mark.parametrize("model", [Attention(True), Attention(False), Attention(True, key_heads=2)],
                         ids=["fused", "written out", "grouped"])
def test_attention_counts_in_every_form(model):
    graph = capture(model, (torch.randn(3, 17, D),))
    flops = flops_by_module(graph, {"batch": B, "sequence": S})
    assert flops[""] == count_flops(graph, {"batch": B, "sequence": S}) == PROJECTION + PRODUCTS
    assert flops["project"] == PROJECTION


def test_sizes_are_asked_for_and_checked():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(1, 40, D))

        def forward(self, x):
            return x + self.table[:, : x.shape[1]]

    graph = capture(Positions(), (torch.randn(3, 17, D),))
    with pytest.raises(UsageError, match="no size for batch, sequence"):
        count_flops(graph, {})
    with pytest.raises(UsageError, match=r"does not take these sizes(.|\n)*sequence 63"):
        count_flops(graph, {"batch": 2, "sequence": 63})
