"""A softmax that is written out becomes one; what only looks like it stays."""

import operator

import pytest
import torch
from modcompile.passes.fuse_softmax import FuseSoftmax
from tiny import Attention, Stack, assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten
from tolerances import TOLERANCES, deviation

from modcompile.capture import capture
from modcompile.config import MoDConfig
from modcompile.convert import convert

aten = torch.ops.aten
EAGER = TOLERANCES["eager"][torch.float32]
SOFTMAX = "aten.softmax.int"


def fused(build, dtype="float32"):
    """The graph before and after, and the names of what is left."""
    before, after, _ = rewritten(FuseSoftmax(), lambda: graph_of({"s": ("batch", 2, "rows", 5)}, build,
                                                                dtypes={"s": dtype}))
    return before, after, nodes_of(after)


def quotient(call, value, dims=(-1,), keep=True, other=None):
    exponents = call(aten.exp.default, value)
    return call(aten.div.Tensor, exponents, call(aten.sum.dim_IntList, other or exponents, list(dims), keep))


def shifted(call, s, dim=-1, detached=False, by=None):
    largest = by or call(aten.amax.default, s, [dim], True)
    return call(aten.sub.Tensor, s, call(aten.detach.default, largest) if detached else largest)


def largest(call, s, place):
    """The largest value, or where it is."""
    return call(operator.getitem, call(aten.max.dim, s, 3, True), place)


def test_golden():
    before, after, _ = fused(lambda call, s: quotient(call, shifted(call, s)))
    check_rewrite("fuse_softmax", before, after)


@pytest.mark.parametrize("build", [
    quotient,
    lambda call, s: quotient(call, shifted(call, s, dim=3, detached=True)),
    lambda call, s: quotient(call, shifted(call, s, by=largest(call, s, 0))),
    lambda call, s: call(aten.softmax.int, shifted(call, s), 3),
])
def test_with_a_shift_and_without(build):
    before, after, nodes = fused(build)
    assert nodes == [SOFTMAX]
    assert_same(before, after, randn(3, 2, 63, 5), tolerance=EAGER)


@pytest.mark.parametrize(("build", "dtype"), [
    (lambda call, s: quotient(call, s, dims=(-1, -2)), "float32"),
    (lambda call, s: quotient(call, s, other=call(aten.exp.default, call(aten.mul.Tensor, s, 2.0))), "float32"),
    (lambda call, s: call(aten.softmax.int, shifted(call, s, dim=-2), -1), "float32"),
    (lambda call, s: call(aten.softmax.int, shifted(call, s, by=call(aten.amin.default, s, [3], True)), 3), "float32"),
    (lambda call, s: call(aten.softmax.int, shifted(call, s, by=largest(call, s, 1)), -1), "float32"),
    (quotient, "int64"),
])
def test_what_is_none_stays(build, dtype):
    before, _, nodes = fused(build, dtype)
    assert nodes == nodes_of(before)


class Written(Attention):
    """Attention with a softmax that is written out."""

    def forward(self, hidden):
        parts = (self.query(hidden), self.key(hidden), self.value(hidden))
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts)
        scores = query @ key.transpose(-1, -2) / 2
        weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
        mixed = (weights / weights.sum(-1, keepdim=True)) @ value
        return hidden + self.out(mixed.transpose(1, 2).flatten(2))


def test_attention_with_it_is_split():
    model = Stack(Written(), Written())
    graph = capture(model, (randn(2, 5, 8),))
    x = randn(3, 63, 8)
    assert deviation(graph(x), model(x)) <= EAGER
    mod = convert(graph, config=MoDConfig(capacity_ratio=1.0, attend_to="all"))
    assert deviation(mod(x), model(x)) <= EAGER
