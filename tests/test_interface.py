"""The call and the output type of a model, as trees over flat tensors. What a capture does with them: test_capture."""

import collections
import json
import sys
import types
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modcompile.errors import UnsupportedGraphError, UsageError
from modcompile.interface import Interface, Outputs, pack_tree, unpack_tree
from modcompile.spec import TensorSpec

LEAF = torch.zeros(2)

trees = st.recursive(
    st.just(LEAF) | st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=9)


@settings(max_examples=60)
@given(trees)
def test_trees_survive_json(value):
    leaves: list = []
    names: list = []
    tree = json.loads(json.dumps(pack_tree(value, leaves, names)))
    assert len(leaves) == len(names)
    assert repr(unpack_tree(tree, leaves)) == repr(value)


class Point(NamedTuple):
    x: Tensor
    y: Tensor | None


class Loss(collections.OrderedDict):
    def __init__(self, **values):
        super().__init__(values)


def test_classes_are_kept_by_name():
    for value in (Point(LEAF, None), Loss(logits=LEAF, loss=LEAF)):
        leaves: list = []
        found = unpack_tree(json.loads(json.dumps(pack_tree(value, leaves, []))), leaves)
        assert type(found) is type(value) and found == value


def test_a_class_that_is_not_imported_is_not_imported_for_it():
    module = types.ModuleType("far_away")
    far_loss = type("Loss", (Loss,), {"__module__": "far_away"})
    module.Loss = far_loss
    sys.modules["far_away"] = module
    leaves: list = []
    tree = pack_tree(far_loss(logits=LEAF, hidden=(LEAF, LEAF)), leaves, [])
    assert type(unpack_tree(tree, leaves)) is far_loss
    del sys.modules["far_away"]
    found = unpack_tree(tree, leaves)
    assert type(found) is Outputs and found.logits is found["logits"] is found[0] is LEAF
    assert found[:2] == [LEAF, (LEAF, LEAF)] and "far_away" not in sys.modules
    with pytest.raises(AttributeError, match="loss"):
        _ = found.loss
    # A name of a module that is no type of results is never called.
    for name in ("os.system", "builtins.eval", "builtins.int"):
        assert type(unpack_tree({"class": name, "fields": {"a": {"const": 1}}}, [])) is Outputs


def test_names_of_leaves():
    names: list = []
    pack_tree({"a": [LEAF, (LEAF,)], "b": {"c": LEAF}}, [], names)
    assert names == ["a.0", "a.1.0", "b.c"]
    pack_tree((LEAF, {"x": LEAF}), [], names := [])
    assert names == ["output_0", "output_1.x"]
    pack_tree(LEAF, [], names := [])
    assert names == ["output"]


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.float32, torch.Size([2])])
def test_what_cannot_be_kept(value):
    with pytest.raises(UnsupportedGraphError, match="type that cannot be kept") as caught:
        pack_tree({"deep": [value]}, [], [])
    assert caught.value.details["where"] == "deep.0" and type(value).__name__ in caught.value.details["found"]


@pytest.fixture(scope="module")
def interface():
    """forward(ids, mask=None, *, pair, flag): mask was not given, flag was True."""
    spec = TensorSpec
    return Interface(
        ("ids", "mask", "pair", "flag"),
        {"ids": {"leaf": 0}, "pair": {"tuple": [{"leaf": 1}, {"const": 3}]}, "flag": {"const": True}},
        (spec("ids", "int64", ("batch", "sequence")), spec("pair.0", "float32", ("batch", "sequence", 8))),
        {"tuple": [{"leaf": 1}, {"dict": {"x": {"leaf": 0}}}]},
        (spec("x", "float32", ("batch", 8)), spec("output_0", "float32", ("batch",))))


IDS, ROWS = torch.zeros(3, 63, dtype=torch.long), torch.zeros(3, 63, 8)


def test_calls_bind_to_inputs_in_order(interface):
    for args, kwargs in [((IDS,), {"pair": (ROWS, 3)}), ((), {"pair": (ROWS, 3), "ids": IDS, "flag": True}),
                         ((IDS, None, (ROWS, 3)), {})]:
        ids, rows = interface.bind(args, kwargs)
        assert ids is IDS and rows is ROWS


@pytest.mark.parametrize(("args", "kwargs", "problem", "detail"), [
    ((IDS,), {}, "input pair is missing", "ids int64 [batch, sequence]"),
    ((), {"pair": (ROWS, 3)}, "input ids is missing", "pair"),
    ((IDS, None, (ROWS, 3), True, 5), {}, "too many positional arguments", "at most 4"),
    ((IDS,), {"pair": (ROWS, 3), "ids": IDS}, "argument ids was given twice", "once"),
    ((IDS,), {"pair": (ROWS, 3), "pairs": 1}, "unexpected input pairs", "did you mean pair?"),
    ((IDS, ROWS), {"pair": (ROWS, 3)}, "unexpected input mask", "capture the model again"),
    ((IDS,), {"pair": (ROWS, 4)}, "argument pair is not what the model was captured with", "'4'"),
    ((IDS,), {"pair": ROWS}, "argument pair is not what the model was captured with", "tensor"),
    ((IDS,), {"pair": (ROWS, 3), "flag": False}, "argument flag is not what the model was captured with", "False"),
    ((IDS.int(),), {"pair": (ROWS, 3)}, "input ids has the wrong dtype", "ids.to(torch.int64)"),
    ((IDS[0],), {"pair": (ROWS, 3)}, "input ids has the wrong rank", "(63,)"),
    ((IDS,), {"pair": (ROWS[:, :5], 3)}, "dim 1 of input pair.0 does not fit", "63 (sequence, from ids)"),
    ((IDS,), {"pair": (ROWS[..., :5], 3)}, "dim 2 of input pair.0 does not fit", "(3, 63, 5)"),
])
def test_calls_that_do_not_fit(interface, args, kwargs, problem, detail):
    with pytest.raises(UsageError) as caught:
        interface.bind(args, kwargs)
    assert caught.value.problem == problem and detail in str(caught.value.details)
    assert caught.value.details["where"]


def test_outputs_are_put_in_their_places(interface):
    one, two = torch.ones(1), torch.zeros(1)
    assert interface.unflatten([one, two]) == (two, {"x": one})


def test_an_interface_survives_json(interface):
    assert Interface.from_json(json.loads(json.dumps(interface.to_json()))) == interface
