"""Every dim of every input has a range, and shapes that do not fit are refused."""

import onnx_ir as ir
import pytest
from modcompile.runtimes.trt.profile import Range, bind_profile

from modcompile.errors import UsageError

IDS = ir.Value(name="ids", shape=ir.Shape(["batch", "sequence"]))
MASK = ir.Value(name="mask", shape=ir.Shape(["batch", "sequence"]))
IMAGE = ir.Value(name="image", shape=ir.Shape(["batch", 3, 32]))


def test_a_static_shape_fixes_its_symbols_in_every_input():
    profile = bind_profile([IDS, MASK], {"ids": (8, 63)})
    assert profile.shapes["mask"] == (Range(8, 8, 8), Range(63, 63, 63))
    assert (profile.fixed, profile.dynamic) == ({"batch": 8, "sequence": 63}, {})


def test_three_shapes_make_a_range():
    profile = bind_profile([IDS, MASK], {"ids": ((1, 63), [8, 63], (16, 63))})
    assert profile.symbols == {"batch": Range(1, 8, 16), "sequence": Range(63, 63, 63)}
    assert profile.fixed == {"sequence": 63}
    assert profile.largest == {"batch": 16, "sequence": 63}
    assert list(profile.dynamic) == ["ids", "mask"]
    assert str(profile) == "ids [1..8..16, 63]; mask [1..8..16, 63]"


def test_dims_without_a_name_are_told_apart():
    nameless = ir.Value(name="x", shape=ir.Shape([None, None]))
    assert bind_profile([nameless], {"x": (2, 3)}).shapes["x"] == (Range(2, 2, 2), Range(3, 3, 3))


def test_static_inputs_need_no_shapes():
    assert bind_profile([ir.Value(name="x", shape=ir.Shape([2, 3]))], {}).fixed == {}


@pytest.mark.parametrize(("shapes", "message"), [
    ({"idz": (8, 63)}, "an input the model does not have"),
    ({"ids": (8,)}, "does not fit the model's input"),
    ({"ids": (8, 0)}, "does not fit the model's input"),
    ({"ids": (8, 63.0)}, "sizes are integers"),
    ({"ids": "63"}, "neither one shape nor three"),
    ({"ids": (8, 63), "mask": (8, 62)}, "with batch = 8, sequence = 63"),
    ({"ids": ((2, 63), (1, 63), (4, 63))}, "smallest <= usual <= largest"),
    ({"ids": ((1, 63), (8, 63))}, "neither one shape nor three"),
    ({"ids": ((1, 63), (8, 63), (16,))}, "neither one shape nor three"),
    ({"ids": (1, (8, 63), 63)}, "neither one shape nor three"),
    ({"ids": ((1, 63), (8, 63), (16, 63)), "image": (8, 3, 32)}, "with batch = 1..8..16"),
    ({"image": (8, 4, 32)}, "does not fit the model's input"),
    ({"image": (8, 3, 32)}, "sizes of sequence"),
    ({}, "sizes of batch, sequence"),
])
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(UsageError) as error:
        bind_profile([IDS, MASK, IMAGE], shapes)
    assert message in str(error.value)


def test_an_input_of_unknown_rank_is_refused():
    with pytest.raises(UsageError, match="no known rank"):
        bind_profile([ir.Value(name="x")], {"x": (1,)})
