"""Random inputs by specification, and the tables that bound them."""

import numpy as np
import pytest
import torch
from torch import nn

from modcompile.capture import capture
from modcompile.errors import UsageError
from modcompile.manifest import TensorSpec
from modcompile.sample_inputs import index_limits, sample_inputs, symbol_sizes

# B batch  S rows

SPECS = [
    TensorSpec(name="ids", dtype="int64", shape=("batch", "rows")),
    TensorSpec(name="attention_mask", dtype="int32", shape=("batch", "rows")),
    TensorSpec(name="keep", dtype="bool", shape=("batch",)),
    TensorSpec(name="pixels", dtype="float16", shape=("batch", 3, 8)),
    TensorSpec(name="bias", dtype="bfloat16", shape=("rows",)),
]


def test_every_kind():
    found = sample_inputs(SPECS, {"ids": (4, 63)}, limits={"ids": 5})
    assert {name: (array.dtype.name, array.shape) for name, array in found.items()} == {
        "ids": ("int64", (4, 63)), "attention_mask": ("int32", (4, 63)), "keep": ("bool", (4,)),
        "pixels": ("float16", (4, 3, 8)), "bias": ("bfloat16", (63,))}
    assert set(np.unique(found["ids"])) == {0, 1, 2, 3, 4}
    assert found["attention_mask"].all() and found["keep"].all()


def test_one_symbol_is_one_size_and_one_seed_one_array():
    first, again, other = (sample_inputs(SPECS, seed=seed) for seed in (3, 3, 4))
    assert [first[spec.name].shape for spec in SPECS] == [(2, 16), (2, 16), (2,), (2, 3, 8), (16,)]
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["pixels"], other["pixels"])


def test_arrays_that_are_given_are_taken_and_others_fit_them():
    ids = np.arange(8).reshape(2, 4)
    found = sample_inputs(SPECS, given={"ids": ids})
    assert found["ids"] is ids
    assert (found["attention_mask"].shape, found["bias"].shape) == ((2, 4), (4,))


@pytest.mark.parametrize("given, problem", [
    ({"ids": np.zeros((2, 4), np.int32)}, "an input has another dtype"),
    ({"ids": np.zeros(4, np.int64)}, "the shape of input ids does not fit"),
    ({"words": np.zeros((2, 4), np.int64)}, "there is no input of this name"),
])
def test_arrays_that_do_not_fit(given, problem):
    with pytest.raises(UsageError, match=problem):
        sample_inputs(SPECS, given=given)


@pytest.mark.parametrize("mask, value", [("ids", 1), ("~ids", 0), ("~keep", False)])
def test_the_padding_mask_hides_nothing(mask, value):
    assert (sample_inputs(SPECS, padding_mask=mask)[mask.removeprefix("~")] == value).all()


@pytest.mark.parametrize("shapes", [
    {"nosuch": (2,)}, {"ids": (2,)}, {"pixels": (2, 4, 8)}, {"ids": (2, 8), "bias": (9,)},
])
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(UsageError):
        symbol_sizes(SPECS, shapes)


def test_limits_come_from_the_tables_of_the_graph():
    class Embeddings(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.kinds = nn.Embedding(99, 8), nn.Embedding(3, 8)

        def forward(self, ids, kinds, weights):
            return self.words(ids) + self.kinds(kinds.to(torch.int64).view(-1, 1)) * weights[..., None]

    example = (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), torch.ones(2, 5))
    graph = capture(Embeddings(), example)
    assert index_limits(graph) == {"ids": 99, "kinds": 3}
    arrays = sample_inputs(graph.inputs, {"ids": (50, 7)}, limits=index_limits(graph))
    assert arrays["ids"].max() > 50 and arrays["kinds"].max() == 2
    assert graph(*map(torch.from_numpy, arrays.values())).shape == (50, 7, 8)
