"""What looks at rows by their place is found in a block; what asks what they hold, or looks at each alone, is not."""

import re

import pytest
import torch
from tiny import WIDTH, Block, Mlp, Stack, randn
from torch import nn
from torch.nn import functional

from modcompile.blocks import find_blocks
from modcompile.capture import capture
from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.errors import ModcompileWarning

X = randn(2, 5, WIDTH)


class By(Mlp):
    """Adds what a function makes of the rows."""

    def __init__(self, function=None, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, hidden):
        return super().forward(hidden) + self.function(self, hidden)


def convolution(kernel, padding):
    return By(lambda self, x: self.conv(x.transpose(1, 2)).transpose(1, 2),
              conv=nn.Conv1d(WIDTH, WIDTH, kernel, padding=padding))


def notes(*layers):
    return [block.note for block in find_blocks(Stack(*layers), (X,))]


def test_what_looks_at_rows_by_their_place():
    found = notes(
        convolution(3, 1),
        By(lambda self, x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real),
        By(lambda self, x: torch.fft.fftn(x).real),
        By(lambda self, x: x.roll(1, 1)),
        By(lambda self, x: functional.pad(x, (0, 0, 1, 0))[:, :-1]),
        By(lambda self, x: x.cumsum(1)),
        By(lambda self, x: x[:, :1]),
        By(lambda self, x: functional.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2)),
    )
    ops = [note and re.fullmatch(r"([a-z0-9]+)\w* looks at rows by their place, outside of attention", note)[1]
           for note in found]
    assert ops == ["conv1d", "fft", "fft", "roll", "pad", "cumsum", "slice", "avg"]


def test_what_does_not():
    found = notes(
        Block(), Block(causal=True, fused=True),
        convolution(1, 0),
        By(lambda self, x: torch.fft.fft(x).real),
        By(lambda self, x: x.roll(1, -1) + functional.pad(x, (1, -1)) + x.cumsum(-1)),
        # A shift of scores, as relative positions are made by.
        By(lambda self, x: functional.pad(x @ x.transpose(1, 2), (1, 0))[:, :, :-1].softmax(-1) @ x),
    )
    assert found == [None] * 6


def test_who_converts_such_a_block_is_told(recwarn):
    graph = capture(Stack(Mlp(), convolution(3, 1), convolution(3, 1)), (X,))
    with pytest.warns(ModcompileWarning, match=r"block layers\.1 \(and 1 more\): conv1d looks .* even at capacity"):
        convert(graph, config=MoDConfig(blocks=(1, 2)))
    convert(graph, config=MoDConfig(blocks=(1,), axis="sequence"))
    convert(graph, config=MoDConfig(blocks=(0,)))
    assert not [warning for warning in recwarn if issubclass(warning.category, ModcompileWarning)]
