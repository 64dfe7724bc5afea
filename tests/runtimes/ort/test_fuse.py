"""The graph as the CUDA provider takes it: fewer operators, the same numbers. The CPU provider has all of them too."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from families import Family, family
from modcompile.runtimes.ort.fuse import fuse_for_cuda
from tiny import randomise_routers
from tolerances import TOLERANCES, farthest

import modcompile as mc
from modcompile.variants import dense_model

ORT = TOLERANCES["ort"][torch.float32]

# What is between a dense block and a routed one; the function stands for the route of the exporter.
BORDER = """<ir_version: 10, opset_import: ["": 23, "modcompile": 1]>
border (float[2, 9, 8] o, float[2, 9, 8] x) => (float[2, 9, 8] n, float[2, 9, 8] s, int64[2, 3] positions)
<float[8] g = {{2, 1, 3, 1, 1, 2, 1, 1}}, float[8] d = {{1, 0, 0, 2, 0, 0, 0, 1}},
 float[8] c = {{3, 0, 1, 0, 0, 2, 0, 0}}, float[8, 1] w = {{1, -1, 2, 0, 1, 1, -2, 1}}, float[1] b = {{1}},
 int64[1] last = {{-1}}, int64 k = {{3}}, float[2, 9, 8] a, float[2, 9] r>
{{
    a = {added}
    s = Add (x, a)
    n = {norm}
    product = MatMul (s, w)
    biased = Add (product, b)
    r = Squeeze (biased, last)
    positions, filled = modcompile.Route (r, k)
}}
<domain: "modcompile", opset_import: ["": 23]>
Route (logits, capacity) => (positions, filled)
{{
    one = Constant <value = int64[1] {{1}}> ()
    count = Reshape (capacity, one)
    most, positions = TopK (logits, count)
    filled = Equal (most, most)
}}"""


@pytest.fixture(scope="module", params=["gpt2-unmasked", "bert", "llama"])
def mod(request: pytest.FixtureRequest) -> tuple[mc.MoDModel, dict, dict]:
    member = family(request.param)
    made = mc.convert(mc.capture(member.build(), member.example()),
                      config=mc.MoDConfig(capacity_ratio=0.25, gate="straight-through"))
    padding = member.paddings[0] if member.paddings else None
    inputs = member.inputs(3, 63, padding, seed=2)
    return randomise_routers(made), inputs, {"valid": member.valid(inputs), "name": request.param}


def operators(path: Path) -> Counter:
    return Counter(node.op_type for node in onnx.load(path / "model.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "routed"])
def test_it_computes_the_same_with_fewer_operators(mod, dense: bool, tmp_path: Path):
    model, inputs, facts = mod
    if dense and facts["name"] == "llama":
        pytest.skip("its routed form has the same operators")
    model = dense_model(model) if dense else model
    plain = mc.build_engine(model, tmp_path / "plain")
    fused = mc.build_engine(model, tmp_path / "fused", fuse=True)
    with torch.no_grad():
        expected = model.run_graph(list(inputs.values()))
    given = {name: tensor.numpy() for name, tensor in inputs.items()}
    for engine in (plain, fused):
        found = [torch.from_numpy(value) for value in engine.run(given).values()]
        assert farthest(found, expected, facts["valid"]) <= ORT
    counts = operators(tmp_path / "fused")
    # The first norm, one after the embedding or the head; and in a routed model those next to a gather or a merge.
    assert counts["LayerNormalization"] + counts["SimplifiedLayerNormalization"] <= (2 if dense else 5)
    assert counts["SkipLayerNormalization"] + counts["SkipSimplifiedLayerNormalization"] >= (8 if dense else 4)
    if facts["name"] != "llama":
        # Grouped heads stay with the standard operator.
        assert counts["MultiHeadAttention"] == 4 and counts["Attention"] == 0
        assert counts["FastGelu"] + counts["BiasGelu"] >= 4 and counts["Gelu"] == 0
        assert counts["Split"] == 0
    assert sum(counts.values()) < sum(operators(tmp_path / "plain").values())
    assert sorted(path.name for path in (tmp_path / "fused").iterdir()) == [
        "manifest.json", "model.onnx", "model.onnx.data"]


def fused_alike(model: mc.MoDModel, member: Family, padding: str | None, folder: Path) -> ir.Model:
    """The model's graph, fused for our custom ops, which computes what the model does."""
    inputs = member.inputs(3, 63, padding, seed=2)
    path = mc.export_onnx(model, folder / "model.onnx", opset=23, shapes={k: v.shape for k, v in inputs.items()})
    fused = fuse_for_cuda(ir.load(path), custom_ops=True)
    ir.save(fused, folder / "fused.onnx")
    # The function bodies, for no library is registered.
    session = onnxruntime.InferenceSession(folder / "fused.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        expected = model.run_graph(list(inputs.values()))
    assert farthest([torch.from_numpy(value) for value in found], expected, member.valid(inputs)) <= ORT
    return fused


@pytest.mark.parametrize("gate", ["straight-through", "raw"])
@pytest.mark.parametrize("name", ["gpt2-unmasked", "bert", "llama"])
def test_a_norm_goes_before_the_merge_and_a_router_into_its_route(name: str, gate: str, tmp_path: Path):
    member = family(name)
    model = randomise_routers(mc.convert(mc.capture(member.build(), member.example()),
                                         config=mc.MoDConfig(capacity_ratio=0.25, gate=gate)))
    padding = member.paddings[0] if member.paddings else None
    fused = fused_alike(model, member, padding, tmp_path)
    counts = Counter(node.op_type for node in fused.graph)
    routed = len(model.routed_blocks)
    # Behind a dense block the sum and its norm are in it too.
    summed = sum(count for op_type, count in counts.items() if op_type.endswith("NormRouteRows"))
    assert counts["RouteRows"] + counts["MaskedRouteRows"] == routed - summed
    assert counts["Route"] + counts["MaskedRoute"] == 0
    assert summed == (0 if name == "bert" else routed)
    if name == "bert":
        # Its norms end a block, inside of the merge.
        assert counts["MergeRows"] == routed
        # The numbers of the mask are made once, of each key, and a routed block takes its own of them.
        numbers = counts["Where"] - (0 if gate == "straight-through" else routed)
        assert (numbers, counts["Transpose"], counts["GatherRows"]) == (1, 0, 2 * routed)
        return
    # Of a gate that is 0 or 1 the merges of a row and of its norm are one operator.
    is_switch = gate == "straight-through"
    assert counts["MergeRowPairs"] == (routed if is_switch else 0)
    assert counts["MergeRows"] == (0 if is_switch else 2 * routed)
    # Every norm is of the fused kind; of all rows, only the one behind the embedding has nothing to add.
    assert counts["LayerNormalization"] + counts["SimplifiedLayerNormalization"] == 0
    alone = [node for node in fused.graph if node.op_type.startswith("Skip") and "nothing" in node.inputs[1].name]
    assert len(alone) <= 1 and all(node.outputs[0].shape[1] == 63 for node in alone)
    # A routed block begins with one of gathered rows; so does what follows, where a merged row is neither x's nor y's.
    assert counts["GatherLayerNorm"] + counts["GatherRmsNorm"] == routed * (1 if is_switch else 2)
    assert counts["GatherRows"] == (routed * 2 if name == "llama" else 0)


def test_attention_to_all_rows_takes_the_biases_too(tmp_path: Path):
    """Its weights are slices of one, and its queries are of fewer rows than its keys."""
    member = family("gpt2-unmasked")
    model = randomise_routers(mc.convert(mc.capture(member.build(), member.example()), config=mc.MoDConfig(
        capacity_ratio=0.25, gate="straight-through", attend_to="all")))
    fused = fused_alike(model, member, None, tmp_path)
    attentions = [node for node in fused.graph if node.op_type == "MultiHeadAttention"]
    assert len(attentions) == len(model.routed_blocks) and all(node.inputs[3] is not None for node in attentions)
    assert not any(node.op_type == "Add" for node in fused.graph)


def test_a_norm_stays_behind_the_merge_of_most_rows_and_of_sizes_that_vary(tmp_path: Path):
    member = family("gpt2-unmasked")
    for ratio, shapes in ((0.75, {"input_ids": (3, 63)}), (0.25, None)):
        model = mc.convert(mc.capture(member.build(), member.example()), config=mc.MoDConfig(capacity_ratio=ratio))
        path = mc.export_onnx(model, tmp_path / "model.onnx", opset=23, shapes=shapes)
        counts = Counter(node.op_type for node in fuse_for_cuda(ir.load(path)).graph)
        assert counts["MergeRows"] == counts["Route"] == len(model.routed_blocks)


def test_half_precision_is_as_near(mod, tmp_path: Path):
    model, inputs, _ = mod
    engine = mc.build_engine(model, tmp_path / "fused", fuse=True, precision="fp16")
    report = mc.verify(model, engine, {name: tensor.numpy() for name, tensor in inputs.items()}, options={"fuse": True})
    assert report.precision == "fp16"


@pytest.mark.parametrize(("added", "norm", "expected"), [
    ("Add (o, c)", "LayerNormalization <axis = -1> (s, g, d)", {"SkipLayerNormRouteRows"}),
    ("Identity (o)", "LayerNormalization <axis = -1> (s, g, d)", {"SkipLayerNormRouteRows"}),
    ("Identity (o)", "LayerNormalization <axis = -1> (s, g)", {"RouteRows"}),
    ("Identity (o)", "RMSNormalization <axis = -1> (s, g)", {"SkipRmsNormRouteRows"}),
    ("Add (o, c)", "RMSNormalization <axis = -1> (s, g)", {"SkipSimplifiedLayerNormalization", "RouteRows"}),
], ids=["layer norm", "no bias of the product", "no bias of the norm", "RMS norm", "a bias before an RMS norm"])
def test_a_sum_with_and_without_its_biases(added: str, norm: str, expected: set[str]):
    plain = onnx.parser.parse_model(BORDER.format(added=added, norm=norm))
    fused = ir.to_proto(fuse_for_cuda(ir.from_proto(plain), custom_ops=True))
    given = {name: torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(seed)).numpy()
             for seed, name in enumerate("ox")}
    before, after = (onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
                     .run(None, given) for model in (plain, fused))
    assert expected <= {node.op_type for node in fused.graph.node}
    assert farthest([torch.from_numpy(value) for value in after[:2]],
                    [torch.from_numpy(value) for value in before[:2]]) <= ORT
    assert (before[2] == after[2]).all()


# What begins a model: words and their places, a norm, a product with a bias, and the next norm.
BEGINNING = """<ir_version: 10, opset_import: ["": 23]>
beginning (float[2, 9, 8] words) => (float[2, 9, 8] n, float[2, 9, 8] t)
<float[1, 9, 8] places, float[8] g, float[8] d, float[8] c, float[8, 8] w, float[2, 9, 8] s, float[2, 9, 8] first,
 float[2, 9, 8] o, float[2, 9, 8] a>
{{
    s = Add ({words})
    first = LayerNormalization <axis = -1, epsilon = 0.001> (s, g, d)
    o = MatMul (first, w)
    a = Add ({product})
    t = Add ({sum})
    n = {norm}
}}"""


@pytest.mark.parametrize("norm", ["LayerNormalization <axis = -1> (t, g, d)", "RMSNormalization <axis = -1> (t, g)"],
                         ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize(("words", "product", "sum"), [
    ("words, places", "o, c", "s, a"), ("places, words", "c, o", "a, s")], ids=["sum first", "product first"])
def test_the_sums_that_begin_a_model(words: str, product: str, sum: str, norm: str):
    plain = onnx.parser.parse_model(BEGINNING.format(words=words, product=product, sum=sum, norm=norm))
    generator = np.random.default_rng(0)
    for name, shape in {"places": (1, 9, 8), "g": (8,), "d": (8,), "c": (8,), "w": (8, 8)}.items():
        plain.graph.initializer.append(onnx.numpy_helper.from_array(
            generator.standard_normal(shape).astype(np.float32), name))
    given = {"words": generator.standard_normal((2, 9, 8)).astype(np.float32)}
    fused = ir.to_proto(fuse_for_cuda(ir.from_proto(plain)))
    before, after = (onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
                     .run(None, given) for model in (plain, fused))
    assert farthest(list(map(torch.from_numpy, after)), list(map(torch.from_numpy, before))) <= ORT
    # No sum is left, and nothing is added to a norm.
    assert {node.op_type for node in fused.graph.node} <= {
        "MatMul", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
    assert not any("nothing" in name for node in fused.graph.node for name in node.input)


# Rows of a table, as routed blocks gather those of rotary cosines; and of a weight.
TABLE = """<ir_version: 10, opset_import: ["": 23]>
tables (int64[2, 3] first, int64[2, 3] second) => (float16[2, 3, 4] a, float16[2, 3, 4] b, float16[2, 3, 4] c)
<float[9] at = {0, 1, 2, 3, 4, 5, 6, 7, 8}, int64[1] one = {1}, int64 two = {2}, int64[3] shape = {9, 1, 1},
 int64[3] wide = {9, 1, 4}, float[3, 4] weight = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11},
 float[9, 1, 4] table, float[2, 3, 1, 4] a1, float[2, 1, 3, 4] a2, float[2, 3, 4] a3, float[2, 3, 1, 4] b1,
 float[2, 1, 3, 4] b2, float[2, 3, 4] b3, float[2, 3, 4] c1>
{
    column = Reshape (at, shape)
    radians = Expand (column, wide)
    table = Cos (radians)
    a1 = Gather <axis = 0> (table, first)
    a2 = Transpose <perm = [0, 2, 1, 3]> (a1)
    a3 = Squeeze (a2, one)
    a = Cast <to = 10> (a3)
    b1 = Gather <axis = 0> (table, second)
    b2 = Transpose <perm = [0, 2, 1, 3]> (b1)
    b3 = Squeeze (b2, one)
    b = Cast <to = 10> (b3)
    capped = Min (first, two)
    c1 = Gather <axis = 0> (weight, capped)
    c = Cast <to = 10> (c1)
}"""


def test_rows_of_a_table_are_shaped_and_cast_before_they_are_gathered():
    before = ir.from_onnx_text(TABLE)
    positions = np.array([[0, 3, 8], [1, 2, 4]])
    given = {"first": positions, "second": positions[::-1].copy()}

    def outputs(model: ir.Model) -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(),
                                               providers=["CPUExecutionProvider"])
        return session.run(None, given)

    expected = outputs(before)
    after = fuse_for_cuda(before)
    for found, wanted in zip(outputs(after), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    counts = Counter(node.op_type for node in after.graph)
    # One table for both, and a weight that is not kept twice.
    assert (counts["Transpose"], counts["Squeeze"], counts["Cast"], counts["Gather"]) == (0, 1, 2, 3)
    (gathered,) = (node for node in after.graph if node.op_type == "Gather" and node.inputs[0].name == "weight")
    assert gathered.outputs[0].dtype == ir.DataType.FLOAT


def test_numbers_of_more_dims_than_their_condition_stay_behind_it():
    before = ir.from_onnx_text("""<ir_version: 10, opset_import: ["": 23]>
    chosen (bool[1, 3] c) => (float[1, 3, 1] a) <float[1, 1, 1] yes = {0}, float[1, 1, 1] no = {-1}, bool[3, 1] turned>
    {
        turned = Transpose <perm = [1, 0]> (c)
        a = Where (turned, yes, no)
    }""")
    after = ir.to_proto(fuse_for_cuda(before)).SerializeToString()
    (found,) = onnxruntime.InferenceSession(after, providers=["CPUExecutionProvider"]).run(
        None, {"c": np.array([[True, False, True]])})
    np.testing.assert_array_equal(found, [[[0], [-1], [0]]])


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@torch.no_grad()
def test_causal_attention_to_more_keys_than_queries_stays(static: bool, tmp_path: Path):
    """The contrib operator lets the last query see all keys, torch and ONNX let the first one see one."""
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

        def forward(self, x, y):
            query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.query(x), self.key(y), y))
            mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            return mixed.transpose(1, 2).flatten(2)

    model, x, y = Two().eval(), torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    graph = mc.capture(model, (torch.randn(2, 4, 16), torch.randn(2, 9, 16)))
    shapes = {"x": (3, 5, 16), "y": (3, 7, 16)} if static else None
    with mc.build_engine(graph, tmp_path / "engine", fuse=True, opset=23, shapes=shapes) as engine:
        (found,) = engine.run({"x": x, "y": y}).values()
        assert torch.allclose(found, model(x, y), atol=1e-5)
    made = operators(tmp_path / "engine")
    assert (made["Attention"], made["MultiHeadAttention"]) == (1, 0)


class Heads(torch.nn.Module):
    """Attention of two heads, with one bias for all of what is named, and values of another width."""

    def __init__(self, alike: str = "", width: int = 8):
        super().__init__()
        sizes = {"query": 16, "key": 16, "value": 2 * width}
        self.weights = torch.nn.ParameterDict({name: torch.randn(16, size) / 4 for name, size in sizes.items()})
        self.biases = torch.nn.ParameterDict({
            name: torch.randn(1 if name in alike else size) for name, size in sizes.items()})

    def forward(self, x, mask=None):
        query, key, value = ((x @ self.weights[name] + self.biases[name]).unflatten(-1, (2, -1)).transpose(1, 2)
                             for name in ("query", "key", "value"))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
        return mixed.transpose(1, 2).flatten(2)


@torch.no_grad()
def fused_operators(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], folder: Path, **options) -> Counter:
    """The operators of a fused engine, which computes what the model does."""
    graph = mc.capture(model.eval(), tuple(value[:, :5] if value.shape[0] == 3 else value[..., :5, :5]
                                           for value in inputs))
    names = [spec.name for spec in graph.inputs]
    with mc.build_engine(graph, folder, fuse=True, opset=23, **options) as engine:
        (found,) = engine.run(dict(zip(names, inputs, strict=True))).values()
    assert farthest(found, model(*inputs)) <= ORT
    return operators(folder)


def attention_inputs(*mask: int, rows: int = 9) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in ((3, rows, 16), mask) if shape)


@pytest.mark.parametrize("kind", ["added", "bool"])
@pytest.mark.parametrize("shape", [(9, 9), (1, 9, 9), (2, 9, 9), (1, 2, 9, 9)], ids=str)
def test_masks_of_fewer_dims_are_taken_too(shape: tuple[int, ...], kind: str, tmp_path: Path):
    """The contrib operators take four; ONNX, as torch, any that broadcast."""
    x, mask = attention_inputs(*shape)
    mask = (mask > 0) | torch.eye(9, dtype=torch.bool) if kind == "bool" else mask
    counts = fused_operators(Heads(), (x, mask), tmp_path / "engine")
    assert counts["MultiHeadAttention"] == 1 and counts["Add"] == counts["Attention"] == 0


def test_a_mask_of_few_dims_is_shaped_once(tmp_path: Path):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Heads(), Heads()])

        def forward(self, x, mask):
            return self.layers[1](self.layers[0](x, mask), mask)

    counts = fused_operators(Twice(), attention_inputs(9, 9), tmp_path / "engine")
    assert counts["MultiHeadAttention"] == 2 and counts["Unsqueeze"] == 1


@pytest.mark.parametrize("mask", ["float[2, 1, 1, 3] mask", "float[2, 1, 3, 1] mask", "bool[3, 3] mask",
                                  "float[3] mask"])
def test_masks_that_the_contrib_operators_do_not_take_stay(mask: str):
    """They broadcast no rows and no columns, and add numbers."""
    before = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["": 23]>
    masked (float[2, 3, 8] x, {mask}) => (float[2, 3, 8] y)
    {{
        y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x, mask)
    }}""")
    (node,) = fuse_for_cuda(before).graph
    assert (node.domain, node.op_type, len(node.inputs)) == ("", "Attention", 4)


@pytest.mark.parametrize("rows", [9, 300], ids=["few rows", "many rows"])
@pytest.mark.parametrize("alike", ["query", "value", "query key value"])
def test_one_bias_for_a_whole_projection_stays_outside(alike: str, rows: int, tmp_path: Path):
    """The contrib operators take one for each column."""
    counts = fused_operators(Heads(alike), attention_inputs(rows=rows), tmp_path / "engine",
                             shapes={"x": (3, rows, 16)})
    assert counts["MultiHeadAttention"] == 1 and counts["Add"] == 3


@pytest.mark.parametrize("rows", [9, 300], ids=["few rows", "many rows"])
@pytest.mark.parametrize("width", [4, 11])
def test_values_of_another_width_are_projected_outside(width: int, rows: int, tmp_path: Path):
    """One product for all three takes them to be as wide as queries; where thirds come out even, without a word."""
    counts = fused_operators(Heads(width=width), attention_inputs(rows=rows), tmp_path / "engine",
                             shapes={"x": (3, rows, 16)})
    assert (counts["MultiHeadAttention"], counts["MatMul"], counts["Add"]) == (1, 3, 0)


class Summed(torch.nn.Module):
    """A product, of one column or more, and a bias, of one element or more, before a GELU or a norm."""

    def __init__(self, columns: int, biases: int, then):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16, columns))
        self.bias, self.then = torch.nn.Parameter(torch.randn(biases)), then

    def forward(self, x):
        return self.then(x, x @ self.weight + self.bias)


@pytest.mark.parametrize(("columns", "biases"), [(16, 1), (1, 16)])
@pytest.mark.parametrize("then", [
    lambda x, summed: torch.nn.functional.gelu(summed),
    lambda x, summed: torch.nn.functional.gelu(summed, approximate="tanh"),
    lambda x, summed: torch.nn.functional.rms_norm(x + summed, (16,)),
], ids=["gelu", "tanh", "norm"])
def test_a_bias_that_broadcasts_is_not_taken(then, columns: int, biases: int, tmp_path: Path):
    counts = fused_operators(Summed(columns, biases, then), attention_inputs(), tmp_path / "engine")
    assert counts["BiasGelu"] == counts["FastGelu"] == 0 and counts["Add"] == 1
