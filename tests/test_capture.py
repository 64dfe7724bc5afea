"""A captured model is called like its source, returns what it returns, and says why where it cannot be captured."""

import collections
import copy
import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tiny import Mlp, Stack
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modcompile.blocks import find_blocks
from modcompile.capture import capture
from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.errors import UnsupportedGraphError, UsageError
from modcompile.variants import dense_model, oracle_model, pruned_model

# B batch  S rows  D model dim


class Flexible(nn.Module):
    """Takes what a forward may take, and returns it in a type of choice."""

    def __init__(self, wrap=lambda x, y: x):
        super().__init__()
        self.linear, self.wrap = nn.Linear(8, 8), wrap

    def forward(self, hidden, bias=None, *, scale: float = 1.0, flip: bool = False, extra=None, **others):
        hidden = self.linear(hidden) * scale
        if bias is not None:
            hidden = hidden + bias
        if flip:
            hidden = -hidden
        if extra is not None:
            hidden = hidden + extra["a"] * extra["b"][0]
        for other in others.values():
            hidden = hidden + other
        return self.wrap(hidden, hidden.mean(1))


class Pair(NamedTuple):
    hidden: Tensor
    mean: Tensor


class Named(collections.OrderedDict):
    """Dict-like, as transformers' outputs are: keys are attributes, None is no entry."""

    def __init__(self, hidden=None, loss=None, mean=None):
        super().__init__((k, v) for k, v in (("hidden", hidden), ("loss", loss), ("mean", mean)) if v is not None)
        self.__dict__.update(hidden=hidden, loss=loss, mean=mean)


pytree.register_pytree_node(
    Named, lambda named: (list(named.values()), list(named)),
    lambda values, keys: Named(**dict(zip(keys, values, strict=True))), serialized_type_name="tests.Named")


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_alike(graph, model, *args, **kwargs):
    with torch.no_grad():
        actual, expected = graph(*args, **kwargs), model(*args, **kwargs)
    assert type(actual) is type(expected)
    actual, expected = pytree.tree_flatten(actual), pytree.tree_flatten(expected)
    assert actual[1] == expected[1]
    assert all(torch.equal(a, b) if isinstance(b, Tensor) else a == b
               for a, b in zip(actual[0], expected[0], strict=True))


# Inputs


def test_positional_and_by_name_are_one_call():
    model = Flexible()
    graph = capture(model, (rows(2, 5, 8), rows(5, 8)))
    x, bias = rows(3, 63, 8), rows(63, 8)
    assert [str(spec) for spec in graph.inputs] == ["hidden float32 [batch, sequence, 8]", "bias float32 [sequence, 8]"]
    assert_alike(graph, model, x, bias)
    assert_alike(graph, model, x, bias=bias)
    assert_alike(graph, model, bias=bias, hidden=x)


def test_a_single_tensor_and_a_mapping_are_example_inputs():
    model = Flexible()
    assert capture(model, rows(2, 5, 8)).inputs == capture(model, collections.UserDict(hidden=rows(2, 5, 8))).inputs


def test_nested_inputs_and_variable_names():
    model = Flexible()
    extra = {"a": rows(2, 5, 8), "b": (rows(8),)}
    graph = capture(model, {"hidden": rows(2, 5, 8), "extra": extra, "more": rows(8)})
    assert [spec.name for spec in graph.inputs] == ["hidden", "extra.a", "extra.b.0", "more"]
    x = rows(3, 63, 8)
    assert_alike(graph, model, x, extra={"a": x, "b": (rows(8, seed=3),)}, more=rows(8, seed=4))
    with pytest.raises(UsageError, match="argument extra is not what the model was captured with"):
        graph(x, extra={"a": x}, more=rows(8))
    assert "forward" not in vars(model)


def test_constants_are_fixed_at_their_example():
    model = Flexible()
    graph = capture(model, {"hidden": rows(2, 5, 8), "scale": 2.0, "flip": True})
    x = rows(3, 63, 8)
    assert len(graph.inputs) == 1
    with torch.no_grad():
        assert torch.equal(graph(x), model(x, scale=2.0, flip=True))
    assert_alike(graph, model, x, scale=2.0, flip=True)
    with pytest.raises(UsageError, match="argument flip is not what the model was captured with") as caught:
        graph(x, flip=False)
    assert caught.value.details["expected"] == "True" and caught.value.details["found"] == "False"


def test_names_that_are_no_identifiers():
    class Odd(nn.Module):
        def forward(self, hidden, extra):
            return hidden * extra["my-key"] + extra["class"]

    model = Odd()
    graph = capture(model, (rows(2, 5, 8), {"my-key": rows(8), "class": rows(8, seed=2)}))
    assert [spec.name for spec in graph.inputs] == ["hidden", "extra.my-key", "extra.class"]
    assert_alike(graph, model, rows(3, 63, 8), {"my-key": rows(8, seed=3), "class": rows(8, seed=4)})
    with pytest.raises(UsageError, match="two inputs would have one name in the graph") as caught:
        capture(model, (rows(2, 5, 8), {"my-key": rows(8), "my_key": rows(8), "class": rows(8)}))
    assert caught.value.details["found"] == "hidden, extra.my-key, extra.my_key, extra.class"


def test_a_constant_may_come_by_a_variable_name():
    model = Flexible()
    graph = capture(model, {"hidden": rows(2, 5, 8), "more": 2.0})
    assert_alike(graph, model, rows(3, 63, 8), more=2.0)
    with pytest.raises(UsageError, match="argument more is not what the model was captured with"):
        graph(rows(3, 63, 8), more=3.0)


def test_a_forward_of_the_instances_own_stays():
    model = Stack(Mlp())
    model.forward = own = lambda hidden: model.layers[0](hidden) * 2
    graph = capture(model, (rows(2, 5, 8),))
    assert model.forward is own
    assert_alike(graph, model, rows(3, 63, 8))


def test_a_cache_is_not_captured():
    class Cached(Stack):
        def forward(self, hidden, use_cache=True):
            out = super().forward(hidden)
            return (out, [out]) if use_cache else (out,)

    model = Cached(Mlp())
    graph = capture(model, (rows(2, 5, 8),))
    assert_alike(graph, model, rows(3, 63, 8), use_cache=False)
    assert len(graph(rows(1, 4, 8))) == 1


def test_what_a_call_may_not_be():
    graph = capture(Flexible(), (rows(2, 5, 8), rows(5, 8)))
    x, bias = rows(3, 63, 8), rows(63, 8)
    for call, problem in [
        (lambda: graph(x), "input bias is missing"),
        (lambda: graph(x, bias, bias=bias), "argument bias was given twice"),
        (lambda: graph(x, bias, 1.0, False, None, 7), "too many positional arguments"),
        (lambda: graph(x, bias, hiden=x), "unexpected input hiden"),
        (lambda: graph(x.double(), bias), "input hidden has the wrong dtype"),
        (lambda: graph(x[0], bias), "input hidden has the wrong rank"),
        (lambda: graph(x[..., :7], bias), "dim 2 of input hidden does not fit"),
        (lambda: graph(x, bias[:5]), "dim 0 of input bias does not fit"),
        (lambda: graph("x", bias), "argument hidden is not what the model was captured with"),
    ]:
        with pytest.raises(UsageError) as caught:
            call()
        assert caught.value.problem == problem
    assert graph(x, bias, extra=None).shape == x.shape


@pytest.mark.parametrize(("example", "problem"), [
    (None, "example_inputs are not the arguments of a call"),
    (3, "example_inputs are not the arguments of a call"),
    ({}, "example_inputs do not fit the model's forward"),
    ({"hiden": torch.zeros(2, 5, 8)}, "example_inputs do not fit the model's forward"),
    ({"hidden": 3}, "example_inputs hold no tensor"),
    ({"hidden": np.zeros((2, 5, 8))}, "example_inputs hold no tensor"),
    ({"hidden": torch.zeros(0, 5, 8)}, "an example input is empty"),
])
def test_examples_that_do_not_fit(example, problem):
    model = Stack(Mlp()) if isinstance(example, dict) and "hiden" in example else Flexible()
    with pytest.raises(UsageError) as caught:
        capture(model, example)
    assert caught.value.problem == problem and caught.value.details["where"] == "example_inputs"


def test_examples_that_the_model_itself_does_not_take():
    """Not a word of tracing: the call fails as well."""
    with pytest.raises(UsageError, match=r"(?s)does not take the example inputs.*RuntimeError.*where: hidden"):
        capture(Stack(Mlp()), {"hidden": torch.randn(2, 5, 9)})
    with pytest.raises(UsageError, match=r"(?s)array is given for a tensor.*torch.as_tensor\(hidden\)"):
        capture(Stack(Mlp()), {"hidden": torch.randn(2, 5, 8)})(hidden=np.zeros((2, 5, 8), np.float32))


# Graphs


def graphs():
    """What is a graph already: captured, converted, and what is made from these."""
    graph = capture(Stack(Mlp(), Mlp(), Mlp()), (rows(2, 5, 8),))
    mod = convert(graph, config=MoDConfig(capacity_ratio=0.5))
    return {"captured": graph, "pruned": pruned_model(graph, ["layers.1"]), "mod": mod, "dense": dense_model(mod),
            "oracle": oracle_model(mod), "pruned mod": pruned_model(mod, ["layers.1"])}


@pytest.mark.parametrize("kind", ["captured", "pruned", "mod", "dense", "oracle", "pruned mod"])
def test_a_graph_is_returned_as_it_is(kind):
    graph = graphs()[kind]
    for example in (rows(3, 63, 8), (rows(2, 5, 8),), {"hidden": rows(2, 5, 8)}):
        assert capture(graph, example) is graph
    for example, problem in (({"hiden": rows(2, 5, 8)}, "input hidden is missing"),
                             (rows(2, 5, 9), "dim 2 of input hidden does not fit"),
                             (None, "example_inputs are not the arguments of a call")):
        with pytest.raises(UsageError) as caught:
            capture(graph, example)
        assert caught.value.problem == problem
    with pytest.raises(UsageError, match="the model is a graph already, and its sizes vary"):
        capture(graph, (rows(2, 5, 8),), dynamic=False)


def test_a_graph_of_fixed_sizes_is_one_without_dynamic_sizes():
    graph = capture(Stack(Mlp()), (rows(2, 5, 8),), dynamic=False)
    assert capture(graph, (rows(2, 5, 8),), dynamic=False) is graph


def test_what_was_converted_is_not_converted_again():
    made = graphs()
    assert [block.path for block in find_blocks(made["pruned"])] == ["layers.0", "layers.2"]
    assert list(convert(made["pruned"]).routers) == ["layers.2"]
    for kind in ("mod", "dense", "oracle", "pruned mod"):
        for refuse in (find_blocks, convert):
            with pytest.raises(UsageError, match="the model was converted already"):
                refuse(made[kind])


# Outputs


@pytest.mark.parametrize("wrap", [
    lambda x, y: x,
    lambda x, y: (x, y),
    lambda x, y: [x, (y, None)],
    lambda x, y: {"x": x, "inner": {"y": y, "n": 3}},
    lambda x, y: (x,),
    Pair,
    lambda x, y: Named(hidden=x, mean=y),
    lambda x, y: (x, x),
], ids=["tensor", "tuple", "list", "dict", "one", "named tuple", "dict-like", "twice"])
def test_outputs_keep_their_type(wrap):
    model = Flexible(wrap)
    graph = capture(model, (rows(2, 5, 8),))
    assert_alike(graph, model, rows(3, 63, 8))


def test_names_of_outputs():
    graph = capture(Flexible(lambda x, y: {"x": x, "inner": (y, x.sum())}), (rows(2, 5, 8),))
    assert [str(spec) for spec in graph.outputs] == [
        "x float32 [batch, sequence, 8]", "inner.0 float32 [batch, 8]", "inner.1 float32 []"]
    assert [spec.name for spec in capture(Flexible(lambda x, y: (x, y)), (rows(2, 5, 8),)).outputs] == [
        "output_0", "output_1"]


def test_an_output_type_that_cannot_be_kept():
    @dataclasses.dataclass
    class Kept:
        x: Tensor

    torch.export.register_dataclass(Kept, serialized_type_name="tests.Kept")
    with pytest.raises(UnsupportedGraphError, match="type that cannot be kept") as caught:
        capture(Flexible(lambda x, y: Kept(x)), (rows(2, 5, 8),))
    assert "Kept" in caught.value.details["found"]


# Sizes


@pytest.mark.parametrize("shape", [(1, 5, 8), (2, 5, 8), (8, 5, 8), (5, 5, 8), (2, 8, 8), (2, 2, 8)])
def test_any_example_makes_a_dynamic_batch_and_sequence(shape):
    model = Stack(Mlp())
    graph = capture(model, (rows(*shape),))
    assert graph.inputs[0].shape == ("batch", "sequence", 8)
    for other in ((3, 63, 8), (1, 63, 8), (3, 1, 8), (1, 1, 8)):
        assert_alike(graph, model, rows(*other))


def test_the_example_is_left_as_it_was():
    class Writes(Stack):
        def forward(self, hidden):
            hidden += 1
            return super().forward(hidden)

    x = rows(1, 5, 8)
    capture(Writes(Mlp()), (x,))
    assert torch.equal(x, rows(1, 5, 8))


def test_static_sizes_on_request():
    graph = capture(Stack(Mlp()), (rows(2, 5, 8),), dynamic=False)
    assert graph.inputs[0].shape == (2, 5, 8) and graph.hints == {}
    with pytest.raises(UsageError, match="dim 1 of input hidden does not fit"):
        graph(rows(2, 6, 8))


def test_an_image_has_a_sequence_of_its_own_size():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 4, 4)
            self.positions = nn.Parameter(torch.randn(1, 9, 8))

        def forward(self, image):
            if image.shape[2:] != (12, 12):
                raise ValueError("an image has 12 x 12 pixels")
            return self.patch(image).flatten(2).transpose(1, 2) + self.positions

    model = Patches()
    graph = capture(model, (rows(1, 3, 12, 12),))
    assert graph.inputs[0].shape == ("batch", 3, 12, 12) and graph.outputs[0].shape == ("batch", 9, 8)
    assert_alike(graph, model, rows(3, 3, 12, 12))


class Patches(nn.Module):
    """Computes something of the 15 patches of an image, which another image may have more of, and of a table."""

    def __init__(self, compute, *shape):
        super().__init__()
        self.patch, self.table, self.compute = nn.Conv2d(3, 8, 4, 4), nn.Parameter(rows(*shape)), compute

    def forward(self, image):
        return self.compute(self.patch(image).flatten(2).transpose(1, 2), self.table)


class Rows(nn.Module):
    """Computes something of rows and of a table."""

    def __init__(self, compute, *shape):
        super().__init__()
        self.table, self.compute = nn.Parameter(rows(*shape)), compute

    def forward(self, hidden):
        return self.compute(hidden, self.table)


def exports(monkeypatch):
    """Counts the calls of torch.export."""
    calls, export = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: calls.append(1) or export(*args, **kwargs))
    return calls


IMAGE = ("batch", 3, 12, 20)


@pytest.mark.parametrize(("model", "example", "shape"), [
    (Patches(torch.add, 15, 8), (3, 12, 20), IMAGE),
    (Patches(lambda h, table: torch.cat([h[:, :1], h], 1) + table, 16, 8), (3, 12, 20), IMAGE),
    (Patches(lambda h, table: table @ h, 15, 15), (3, 12, 20), IMAGE),
    (Patches(lambda h, table: h.reshape(-1, 15, 8) * table, 8), (3, 12, 20), IMAGE),
    (Patches(lambda h, table: h.reshape(h.shape[0] * 15, 8) * table, 8), (3, 12, 20), IMAGE),
    # A side of the grid, through a float: it is refused only where it may vary.
    (Patches(lambda h, table: (h + table).unflatten(1, (int(h.shape[1] ** 0.5), -1)), 9, 8), (3, 12, 12),
     ("batch", 3, 12, 12)),
    (Rows(lambda h, table: h[:, ::2] + table, 8, 8), (15, 8), ("batch", 15, 8)),
    (Rows(lambda h, table: torch.cat([h[:, :1], h], 1) + table, 16, 8), (15, 8), ("batch", 15, 8)),
], ids=["positions", "class", "mix", "view", "batch", "float", "half", "one-more"])
def test_sizes_that_the_model_fixes_together_are_the_examples(model, example, shape):
    graph = capture(model, (rows(1, *example),))
    assert graph.inputs[0].shape == shape and graph.hints.keys() == {"batch"}
    assert all(isinstance(size, int) for size in graph.outputs[0].shape[1:])
    for batch in (1, 3):
        assert_alike(graph, model, rows(batch, *example))
    with pytest.raises(UsageError, match="dim 2 of input image" if len(shape) == 4 else "dim 1 of input hidden"):
        graph(rows(2, *(2 * size if size > 8 else size for size in example)))


@pytest.mark.parametrize(("model", "example", "other"), [
    (Rows(torch.add, 8), (5, 8), (63, 8)),
    (Rows(lambda h, table: h + table[: h.shape[1]], 64, 8), (5, 8), (63, 8)),
    (Rows(lambda h, table: h.unflatten(1, (-1, 4)) + table, 4, 8), (16, 8), (60, 8)),
    (Rows(lambda h, table: h.view(-1, h.shape[1] // 4, 4, 8) + table, 4, 8), (16, 8), (60, 8)),
    (Rows(lambda h, table: h + table if h.shape[1] % 3 == 2 else h, 8), (5, 8), (62, 8)),
    (Patches(torch.mul, 8), (3, 12, 20), (3, 24, 16)),
    (Patches(lambda h, table: h + table[: h.shape[1]], 64, 8), (3, 12, 20), (3, 24, 16)),
], ids=["free", "slice", "windows", "windows-of-4", "remainder", "image", "image-slice"])
def test_sizes_that_may_vary_are_captured_once(model, example, other, monkeypatch):
    calls = exports(monkeypatch)
    graph = capture(model, (rows(2, *example),))
    assert len(calls) == 1
    assert_alike(graph, model, rows(3, *other))


def test_an_inputs_fixed_length_is_that_of_inputs_of_its_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(rows(8, 8))

        def forward(self, words, memory):
            return (words[:, ::2] + self.table).sum(1) + memory.sum(1)

    graph = capture(Two(), (rows(2, 15, 8), rows(2, 15, 8)))
    assert [spec.shape for spec in graph.inputs] == [("batch", 15, 8)] * 2
    graph = capture(Two(), (rows(2, 15, 8), rows(2, 7, 8)))
    assert [spec.shape for spec in graph.inputs] == [("batch", 15, 8), ("batch", "sequence", 8)]


class TwoLengths(nn.Module):
    def forward(self, words, memory):
        return words.sum(1) + memory.sum(1)


def test_two_lengths_of_different_size_stay_apart():
    graph = capture(TwoLengths(), (rows(2, 5, 8), rows(2, 7, 8)))
    assert [spec.shape[:2] for spec in graph.inputs] == [("batch", "sequence"), ("batch", "memory_1")]
    assert graph.hints == {"batch": 2, "sequence": 5, "words_2": 8, "memory_1": 7}
    assert_alike(graph, TwoLengths(), rows(3, 63, 8), rows(3, 33, 8))
    with pytest.raises(UsageError, match="dim 0 of input memory does not fit"):
        graph(rows(3, 63, 8), rows(2, 33, 8))


def test_two_lengths_of_equal_size_are_one():
    graph = capture(TwoLengths(), (rows(2, 5, 8), rows(2, 5, 8)))
    assert [spec.shape[:2] for spec in graph.inputs] == [("batch", "sequence")] * 2
    with pytest.raises(UsageError, match="dim 1 of input memory does not fit"):
        graph(rows(3, 63, 8), rows(3, 33, 8))


# Models


def test_sizes_of_one_name_fix_nothing_between_them():
    """Heads folded into a mask's batch, unfolded by the hidden state's: 4 B' // B is 4, for the two are one size."""
    class Folded(nn.Module):
        def forward(self, hidden, mask):
            folded = mask[:, None].expand(-1, 4, -1).reshape(-1, mask.shape[1])  # [4 B', S]
            return folded.view(hidden.shape[0], -1, mask.shape[1]) * torch.ones(4, 1)

    graph = capture(Folded(), (torch.randn(2, 5, 8), torch.randn(2, 5)))
    hidden, mask = torch.randn(3, 63, 8), torch.randn(3, 63)
    assert [spec.shape[0] for spec in graph.inputs] == ["batch"] * 2
    assert torch.equal(graph(hidden, mask), Folded()(hidden, mask))


class LastOfTable(Mlp):
    """Takes the last rows of a table, as many as there are, or all."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.empty(128, 8))

    def forward(self, hidden):
        rows = hidden.shape[1]
        alike = torch.ones(1, rows, 8)[:, max(0, 1 - rows):]
        return super().forward(hidden + self.table[max(0, 128 - rows):] * alike)


@torch.no_grad()
def test_a_size_that_always_equals_another_is_that_one():
    """128 - max(0, 128 - S) of a table's 128 rows, which are added to S."""
    model, x = Stack(LastOfTable(), LastOfTable()), torch.randn(3, 63, 8)
    mod = convert(model, (torch.randn(2, 5, 8),), MoDConfig(blocks="all", capacity_ratio=1.0))
    assert torch.equal(mod(x), model(x))
    half = convert(model, (torch.randn(2, 5, 8),), MoDConfig(blocks=(1,), capacity_ratio=0.5))
    # Found again with room for a capacity that is 1 for the example's rows.
    one = convert(model, (torch.randn(2, 5, 8),), MoDConfig(blocks="all", capacity_ratio=1 / 63))
    assert one(x).shape == x.shape
    # Routers that know nothing take the first rows.
    between = model.layers[0](x)
    expected = torch.cat([model.layers[1](between)[:, :32], between[:, 32:]], 1)
    assert (half(x) - expected).abs().max() <= 1e-6


def test_a_range_of_floats():
    class Centres(nn.Module):
        def forward(self, x):
            centres = torch.arange(0.5, x.shape[1] // 2)
            return x.sum() * torch.ones(centres.shape[0] + 1)

    with pytest.raises(UnsupportedGraphError, match="computes a size through a float") as caught:
        capture(Centres(), (rows(2, 5, 8),))
    assert "torch.arange(n) + 0.5" in caught.value.details["fix"]
    assert_alike(capture(Centres(), (rows(2, 5, 8),), dynamic=False), Centres(), rows(2, 5, 8))


def test_data_dependent_control_flow():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedGraphError, match=r"torch\.export cannot trace the model") as caught:
        capture(Branch(), (rows(2, 5, 8),))
    assert caught.value.details["where"] == "Branch"
    assert "data-dependent" in caught.value.details["expected"]
    assert "data-dependent" in caught.value.details["found"].lower()


def test_arguments_without_names():
    class Rest(nn.Module):
        def forward(self, *tensors):
            return tensors[0]

    with pytest.raises(UnsupportedGraphError, match="takes arguments without names") as caught:
        capture(Rest(), (rows(2, 5, 8),))
    assert caught.value.details["where"] == "tensors"


def test_regions_without_gradients_or_autocast_are_in_the_graph():
    class Regions(Stack):
        def forward(self, hidden):
            with torch.no_grad():
                bias = hidden.mean(-1, keepdim=True)
            with torch.autocast("cpu", enabled=False):
                hidden = super().forward(hidden)
            return hidden + bias

    model = Regions(Mlp())
    graph = capture(model, (rows(2, 5, 8),))
    assert not any("higher_order" in str(node.target) for node in graph.graph_module.graph.nodes)
    assert_alike(graph, model, rows(3, 63, 8))


def test_a_region_under_autocast():
    class Half(Stack):
        def forward(self, hidden):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(hidden)

    with pytest.raises(UnsupportedGraphError, match="region under autocast") as caught:
        capture(Half(Mlp()), (rows(2, 5, 8),))
    assert "bfloat16" in caught.value.details["found"]


def test_the_parameters_are_the_sources_own_and_in_its_order():
    class Tied(Stack):
        def __init__(self):
            super().__init__(Mlp(), Mlp())
            self.head = nn.Linear(8, 16)
            self.head.weight = self.layers[0].up.weight
            self.register_buffer("kept", torch.ones(8))
            self.register_buffer("left", torch.ones(8), persistent=False)
            self.unused = nn.Parameter(torch.ones(3))

        def forward(self, hidden):
            return self.head(super().forward(hidden) * self.kept + self.left)

    model = Tied()
    graph = capture(model, (rows(2, 5, 8),))
    assert list(graph.state_dict()) == list(model.state_dict())
    assert [name for name, _ in graph.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(a is b for a, b in zip(graph.parameters(), model.parameters(), strict=True))
    assert graph.get_parameter("head.weight") is graph.get_parameter("layers.0.up.weight")
    assert graph.non_persistent() == {"left"}
    copied = copy.deepcopy(graph)
    assert list(copied.state_dict()) == list(model.state_dict())
    assert copied.get_parameter("head.weight") is copied.get_parameter("layers.0.up.weight")
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in graph.parameters()}
    assert_alike(copied, model, rows(3, 63, 8))


def test_the_source_stays_in_its_modes():
    model = Stack(Mlp(), Mlp()).train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert not capture(model, (rows(2, 5, 8),)).training
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(UsageError):
        capture(model, (rows(2, 5, 9),))
    assert [module.training for module in model.modules()] == modes


def test_dropout_follows_the_mode():
    graph = capture(Stack(Mlp(dropout=0.5)), (rows(2, 5, 8),))
    x = rows(3, 63, 8)
    expected = graph(x)
    assert torch.equal(graph(x), expected)
    graph.train()
    assert not torch.equal(graph(x), graph(x))
    copied = copy.deepcopy(graph)
    assert copied.training and not torch.equal(copied(x), copied(x))
    assert torch.equal(copied.eval()(x), expected) and torch.equal(graph.eval()(x), expected)


def test_a_size_through_a_float_is_refused_where_sizes_vary():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 4)

        def forward(self, x):
            return self.project(x[:, : int(x.shape[1] * 0.5)])

    x = torch.randn(2, 10, 4)
    with pytest.raises(UnsupportedGraphError, match="computes a size through a float") as caught:
        capture(Half(), (x,))
    assert "sequence" in caught.value.details["found"]
    assert capture(Half(), (x,), dynamic=False)(x).shape == (2, 5, 4)


def test_without_dynamic_sizes_all_are_the_examples():
    model, example = Flexible(), rows(1, 5, 8)
    graph = capture(model, {"hidden": example, "more": 2.0}, dynamic=False)
    assert graph.inputs[0].shape == (1, 5, 8)
    assert_alike(graph, model, example, more=2.0)


def test_a_table_that_comes_first_is_not_the_batch():
    class Biased(nn.Module):
        def forward(self, bias, hidden):
            return hidden + bias.sum(-1)[None, :, None]

    graph = capture(Biased(), (rows(7, 7), rows(3, 7, 8)))
    assert_alike(graph, Biased(), rows(9, 9), rows(2, 9, 8))
