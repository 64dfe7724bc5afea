"""An einsum becomes the product that it is, with the same numbers."""

import onnxruntime
import pytest
import torch
from modcompile.passes.expand_einsum import ExpandEinsum
from modcompile.passes.fuse_attention import FuseAttention
from tiny import (
    HEADS,
    WIDTH,
    Stack,
    assert_same,
    check_rewrite,
    graph_of,
    nodes_of,
    randn,
    randomise_routers,
    rewritten,
)
from tolerances import TOLERANCES, deviation
from torch import nn

from modcompile.attention import SDPA, attention_arguments
from modcompile.capture import capture
from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.export.flatten import flatten
from modcompile.export.onnx_file import export_onnx
from modcompile.pass_manager import PassManager
from modcompile.trace import trace_routing

aten = torch.ops.aten
EAGER = TOLERANCES["eager"][torch.float32]
# The size of each dim in the tests below.
SIZES = {"a": 3, "b": 2, "c": 4, "d": 5, "e": 1, "g": 2, "i": 5, "j": 7, "k": 2, "A": 3, "B": 2}


def expanded(equation, *shapes, held=(), path=None):
    """The graph before and after; the operands of these places are parameters."""
    given = {f"x{place}": shape for place, shape in enumerate(shapes) if place not in held}
    tensors = {f"w{place}": nn.Parameter(randn(*shapes[place], seed=place)) for place in held}

    def build(call, *inputs):
        inputs = list(inputs)
        operands = [call.tensor(f"w{place}") if place in held else inputs.pop(0) for place in range(len(shapes))]
        return call(aten.einsum.default, equation, operands, **({"path": path} if path else {}))

    return rewritten(ExpandEinsum(), lambda: graph_of(given, build, tensors))


def check(equation, *shapes, held=(), path=None):
    """What is called in the place of an einsum, which keeps its numbers."""
    before, after, skips = expanded(equation, *shapes, held=held, path=path)
    assert not skips and "aten.einsum.default" not in nodes_of(after)
    inputs = [randn(*shape, seed=10 + place) for place, shape in enumerate(shapes) if place not in held]
    assert_same(before, after, *inputs, tolerance=EAGER)
    return [name.removeprefix("aten.") for name in nodes_of(after)]


def shapes_of(equation):
    return [tuple(SIZES[name] for name in text) for text in equation.partition("->")[0].replace(" ", "").split(",")]


def test_golden():
    before, after, _ = expanded("bqhd,bkhd->bhqk", ("batch", "queries", 2, 4), ("batch", "keys", 2, 4))
    check_rewrite("expand_einsum", before, after)


@pytest.mark.parametrize("held", [(), (1,), (0,)], ids=["computed", "right-held", "left-held"])
@pytest.mark.parametrize("equation", [
    # attention: keys first, values first, heads in any place, and groups of them
    "aibc,ajbc->abij", "ajbc,aibc->abij", "aibc,ajbc->aijb", "aibc,ajbc->baji", "abij,ajbc->aibc", "ajbc,abij->aibc",
    "abij,ajbc->abci", "aibgc,ajbc->abgij", "abgij,ajbc->aibgc", "aibc,ajc->abij", "aic,ajbc->abij",
    # projections, and products by head or expert
    "aic,bcd->aibd", "aibc,bcd->aid", "ci,aid->aci", "aibc,bcd->aibd", "abic,bcdg->abidg", "abc,bcd->abd", "aic,c->ai",
    "c,aic->ai", "c,cd->d", "ab,bc->ac", "ab,bc->ca", "abcd,cdij->abij", "abcd,dcji->ijab",
    # of elements, and sums
    "i,j->ij", "ai,bj->abij", "aic,aic->ai", "aic,iac->", "ab,ba->ab", "aic,c->aic", "abi,bjk->ik", "ai,bj->",
    "aibc,abj->ijc",
    # a size of 1, spaces, and the result in the order of the alphabet
    "aie,aje->aij", "aei,aej->aeij", "a i c, a j c -> a i j", "ba,bc", "BA,Ac",
])
def test_two_factors(equation, held):
    check(equation, *shapes_of(equation), held=held)


@pytest.mark.parametrize(("equation", "shapes"), [
    ("...ic,...jc->...ij", [(3, 2, 5, 4), (3, 2, 7, 4)]),
    ("...ic,...jc", [(3, 2, 5, 4), (3, 2, 7, 4)]),
    ("...ic,jc->...ij", [(3, 2, 5, 4), (7, 4)]),
    ("...ic,...jc->i...j", [(2, 5, 4), (3, 2, 7, 4)]),
    ("...c,...c->...", [(3, 5, 4), (4,)]),
    ("i...,i...->i", [(3, 5, 4), (3, 5, 4)]),
    ("...ic,...cj->...ij", [(3, 1, 5, 4), (1, 2, 4, 7)]),
])
def test_dims_without_a_name(equation, shapes):
    check(equation, *shapes)


@pytest.mark.parametrize(("equation", "nodes"), [
    ("aij->aji", ["transpose.int"]), ("aij->jai", ["permute.default"]), ("aij->", ["sum.dim_IntList"]), ("aij", []),
    ("aij->ia", ["sum.dim_IntList", "transpose.int"]),
])
def test_one_factor(equation, nodes):
    assert check(equation, *shapes_of(equation)) == nodes


@pytest.mark.parametrize(("equation", "path"), [
    ("aic,ajc,ajd->aid", None), ("aic,ajc,ajd->aid", [1, 2, 0, 1]), ("aic,ajc,ajd->aid", [2, 0, 0, 1]),
    ("aic,aic,c->ai", None), ("ab,bc,cd,di->ai", [2, 3, 0, 1, 0, 1]), ("ai,aj,ac->aijc", None),
])
def test_case_4_more_factors(equation, path):
    assert check(equation, *shapes_of(equation), path=path).count("matmul.default") <= equation.count(",")


def test_case_1_usual_forms():
    """What others look for: no more is moved than must be."""
    heads = [(3, 2, 5, 4), (3, 2, 7, 4)]
    assert check("bhqd,bhkd->bhqk", *heads) == ["transpose.int", "matmul.default"]
    assert check("bhqk,bhkd->bhqd", (3, 2, 5, 7), heads[1]) == ["matmul.default"]
    assert check("bsd,de->bse", (3, 5, 4), (4, 7)) == ["matmul.default"]
    assert check("bsd,d->bs", (3, 5, 4), (4,)) == ["unsqueeze.default", "matmul.default", "squeeze.dim"]


def test_case_2_parameters_are_not_copied():
    shapes = [("batch", "rows", 2, 4), (2, 4, 5)]
    _, after, _ = expanded("bshd,hde->bshe", *shapes, held=(1,))
    (product,) = after.graph.find_nodes(op="call_function", target=aten.matmul.default)
    assert [len(factor.meta["val"].shape) for factor in product.args] == [3, 3]
    _, after, _ = expanded("bshd,hde->bshe", *shapes)
    (product,) = after.graph.find_nodes(op="call_function", target=aten.matmul.default)
    assert [len(factor.meta["val"].shape) for factor in product.args] == [4, 3]


def test_case_2_of_groups_and_queries_the_queries_are_rows():
    """Whichever the equation has last."""
    for equation in ("bqhgd,bkhd->bhgqk", "bqhgd,bkhd->bqhgk"):
        _, after, _ = expanded(equation, ("batch", "queries", 2, 3, 4), ("batch", "keys", 2, 4))
        (product,) = after.graph.find_nodes(op="call_function", target=aten.matmul.default)
        assert isinstance(product.meta["val"].shape[-2], torch.SymInt)


@pytest.mark.parametrize(("equation", "shapes", "reason"), [
    ("aii->ai", [(3, 5, 5)], "a diagonal"), ("aic,ajc->aij", [(3, 5, 1), (3, 7, 4)], "the sum over c broadcasts"),
])
def test_case_5_what_stays(equation, shapes, reason):
    _, after, (skip,) = expanded(equation, *shapes)
    assert nodes_of(after) == ["aten.einsum.default"] and reason in skip


def test_case_5_integers_stay():
    def build(call, one, other):
        return call(aten.einsum.default, "ai,ai->a", [one, other])

    shapes, dtypes = {"one": (3, 5), "other": (3, 5)}, {"one": "int64", "other": "int64"}
    _, after, (skip,) = rewritten(ExpandEinsum(), lambda: graph_of(shapes, build, dtypes=dtypes))
    assert nodes_of(after) == ["aten.einsum.default"] and skip == "the product is torch.int64"


class Attention(nn.Module):
    """Of rows, without a matrix product but in an einsum: projections by head, scores, and what becomes of them."""

    def __init__(self, masked):
        super().__init__()
        self.query, self.key, self.value = (nn.Parameter(torch.empty(HEADS, WIDTH, 4)) for _ in range(3))
        self.out, self.norm, self.masked = nn.Parameter(torch.empty(HEADS, 4, WIDTH)), nn.LayerNorm(WIDTH), masked

    def forward(self, x):
        query, key, value = (torch.einsum("bsd,hdk->bshk", self.norm(x), weight)
                             for weight in (self.query, self.key, self.value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.5
        if self.masked:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
        return x + torch.einsum("bqhd,hde->bqe", mixed, self.out)


class GroupedAttention(nn.Module):
    """Three heads of queries to each of keys and values."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.out = nn.Linear(24, WIDTH)

    def forward(self, x):
        query = self.query(x).unflatten(-1, (2, 3, 4))
        key, value = (part(x).unflatten(-1, (2, 4)) for part in (self.key, self.value))
        weights = torch.einsum("bqhgd,bkhd->bhgqk", query, key).softmax(-1)
        return x + self.out(torch.einsum("bhgqk,bkhd->bqhgd", weights, value).flatten(2))


MODELS = {"plain": lambda: Attention(False), "causal": lambda: Attention(True), "grouped": GroupedAttention}


def stack(kind):
    model = Stack(MODELS[kind](), MODELS[kind]())
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("attend_to", [pytest.param("chosen", marks=pytest.mark.long), "all"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_attention_is_routed(kind, attend_to, tmp_path):
    model, x = stack(kind), randn(3, 63, WIDTH)
    full = convert(model, (randn(2, 5, WIDTH),), MoDConfig(blocks="all", capacity_ratio=1.0, attend_to=attend_to))
    assert deviation(full(x), model(x)) <= EAGER
    mod = randomise_routers(convert(model, (randn(2, 5, WIDTH),), MoDConfig(
        blocks=(1,), capacity_ratio=0.3, attend_to=attend_to, gate="straight-through")))
    with trace_routing(mod) as trace:
        out = mod(x)
    before, taken = model.layers[0](x), trace["layers.1"].taken()
    rows = before[taken].unflatten(0, (3, -1))
    made = model.layers[1](before)[taken] if attend_to == "all" else model.layers[1](rows).flatten(0, 1)
    assert deviation(out[taken], made) <= EAGER
    assert deviation(out[~taken], before[~taken]) <= EAGER
    for opset in (18, 23):
        path = export_onnx(mod, tmp_path / f"{opset}.onnx", opset=opset)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert deviation(torch.from_numpy(found), out) <= TOLERANCES["ort"][torch.float32]


@pytest.mark.parametrize(("kind", "is_masked"), [("plain", False), ("causal", True)])
def test_attention_becomes_one_node(kind, is_masked):
    flat = flatten(capture(stack(kind), (randn(2, 5, WIDTH),)))
    PassManager([FuseAttention()])(flat)
    nodes = flat.graph.find_nodes(op="call_function", target=SDPA)
    assert [attention_arguments(node)["attn_mask"] is not None for node in nodes] == [is_masked] * 2
    assert [attention_arguments(node)["scale"] for node in nodes] == [0.5] * 2
    assert not flat.graph.find_nodes(op="call_function", target=aten.softmax.int)


def test_capture_expands():
    graph = capture(stack("plain"), (randn(2, 5, WIDTH),))
    assert graph.passes[0]["name"] == "expand-einsum" and "aten.einsum.default" not in nodes_of(graph.graph_module)
