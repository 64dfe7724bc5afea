import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modcompile.capture import capture
from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.errors import UsageError
from modcompile.export import export_onnx


def encoder(seed=0):
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    return BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                                vocab_size=99, max_position_embeddings=96)).eval()


def decoder(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, intermediate_size=64, vocab_size=99,
                                        use_cache=False)).eval()


MODELS = {"encoder": encoder, "decoder": decoder}


def tokens(batch=3, rows=63, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, rows, dtype=torch.long)
    mask[1, rows // 2:] = 0
    return {"input_ids": torch.randint(0, 99, (batch, rows), generator=generator), "attention_mask": mask}


EXAMPLE = tokens(batch=2, rows=17)


@pytest.fixture(scope="module")
def graphs():
    return {name: capture(make(), EXAMPLE) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def routed():
    def route(name, **options):
        made = convert(MODELS[name](), EXAMPLE, MoDConfig(capacity_ratio=0.25, gate="sigmoid", **options))
        generator = torch.Generator().manual_seed(2)
        for router in made.routers.values():
            nn.init.normal_(router.weight, generator=generator)
        return made

    return {(name, attend_to): route(name, attend_to=attend_to) for name in MODELS for attend_to in ("chosen", "all")}


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


def assert_parity(path, model, inputs, tolerance=1e-4):
    with torch.no_grad():
        expected = [value for value in model(**inputs).values() if isinstance(value, torch.Tensor)]
    found = run(path, inputs)
    valid = inputs["attention_mask"].bool().numpy()
    for want, have in zip(expected, found, strict=True):
        want = want.numpy()
        assert want.shape == have.shape
        rows = valid if want.ndim == 3 else ...
        np.testing.assert_allclose(have[rows], want[rows], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("opset", [18, 20, 23])
@pytest.mark.parametrize("name", MODELS)
def test_dense_parity_at_another_size(graphs, name, opset, tmp_path):
    path = export_onnx(graphs[name], tmp_path / "model.onnx", opset=opset)
    assert_parity(path, MODELS[name](), tokens())
    assert onnx.load(path).opset_import[0].version == opset


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("attend_to", ["chosen", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_routed_parity_at_another_size(routed, name, attend_to, inline, tmp_path):
    model = routed[name, attend_to]
    path = export_onnx(model, tmp_path / "model.onnx", inline=inline)
    assert_parity(path, model, tokens())
    proto = onnx.load(path)
    ops = [node.op_type for node in proto.graph.node if node.domain == "modcompile"]
    assert (not ops) == (not proto.functions) == inline
    assert inline or (ops.count("MaskedRoute"), ops.count("MergeRows")) == (1, 1)


def test_plain_module_and_odd_path(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3)).eval()
    path = export_onnx(model, tmp_path / "a b é.onnx", example_inputs=torch.randn(3, 7))
    x = torch.randn(11, 7)
    np.testing.assert_allclose(run(path, {"input": x})[0], model(x).detach().numpy(), atol=1e-6)


class Product(nn.Module):
    """Rows times a square matrix, which a mistaken transposition would fit too."""

    def __init__(self, product):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)))
        self.product = product

    def forward(self, x):
        return self.product(x, self.weight)


@pytest.mark.parametrize("product", [
    lambda x, w: torch.tensordot(x, w, 1),
    lambda x, w: torch.tensordot(x, w, 1) + 1,
    lambda x, w: x @ w.permute(0, 1) + 1,
    lambda x, w: x @ w.permute(1, 0) + 1,
    lambda x, w: x @ w.T,
    lambda x, w: (x @ w.mT).mT + 0,
    lambda x, w: x @ w.adjoint(),
    lambda x, w: (x @ w.H).swapaxes(0, 1),
    lambda x, w: (x @ w.swapdims(0, 1)).movedim(1, 0),
    lambda x, w: (x @ w).moveaxis((0, 1), (1, 0)).movedim((0, 2), (2, 0)),
    lambda x, w: torch.square(x),
    lambda x, w: torch.nan_to_num(x),
    lambda x, w: torch.inner(x, w),
], ids=["tensordot", "tensordot-inside", "permute-none", "permute", "T", "mT", "adjoint", "H-swapaxes", "movedim",
        "moveaxis", "square", "nan_to_num", "inner"])
@torch.no_grad()
def test_products_transposed_and_decomposed(product, tmp_path):
    """Under every name that torch has for it; what is decomposed may be an output."""
    model, x = Product(product).eval(), torch.randn(3, 5, 7)
    path = export_onnx(model, tmp_path / "model.onnx", example_inputs=(torch.randn(2, 9, 7),))
    np.testing.assert_allclose(run(path, {"x": x})[0], model(x).numpy(), atol=1e-5)


class Attend(nn.Module):
    """Rows that attend to themselves, as ``attend`` says; two heads."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend

    def forward(self, x):
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return self.attend(heads).transpose(1, 2).flatten(2)


def _bools(h):
    return (h[..., :1] > 0) & (h[..., 1:2] > 0).transpose(-1, -2)  # [B, H, S, S]


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("attend", [
    lambda h: (h @ h.transpose(-1, -2) * 0.3 + _bools(h)).softmax(-1) @ h,
    lambda h: (h @ h.transpose(-1, -2) * 0.3 + _bools(h).long()).softmax(-1) @ h,
    lambda h: F.scaled_dot_product_attention(h, h, h, scale=0.0),
    lambda h: F.scaled_dot_product_attention(h, h, h, scale=-0.5),
    lambda h: (h @ h.transpose(-1, -2) * 0.0).softmax(-1) @ h,
    lambda h: F.scaled_dot_product_attention(h, h, h, attn_mask=h[:, :1, :, :1]),
    lambda h: F.scaled_dot_product_attention(h, h[:, :, :-1], h[:, :, :-1], is_causal=True),
    lambda h: torch.add(h, h.square().mean(-1, keepdim=True), alpha=-2),
    lambda h: h * torch.rsqrt(torch.add(h.pow(2).mean(-1, keepdim=True), 0.5, alpha=3)),
    lambda h: 0.5 * h * torch.add((math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh(), 1, alpha=2),
    lambda h: 0.5 * h * (1 + (math.sqrt(2 / math.pi) * torch.add(h, 0.044715 * h**3, alpha=2)).tanh()),
    lambda h: torch.add(h * h.cos()[:, :1], torch.cat([-h[..., 2:], h[..., :2]], -1) * h.sin()[:, :1], alpha=-1),
], ids=["bool-added", "int-added", "scale-0", "scale-negative", "scaled-by-0", "one-column", "fewer-keys", "alpha",
        "norm-alpha", "gelu-alpha", "gelu-inner-alpha", "rotary-alpha"])
@torch.no_grad()
def test_what_only_looks_like_a_pattern(attend, opset, tmp_path):
    model, x = Attend(attend).eval(), torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    path = export_onnx(model, tmp_path / "model.onnx", example_inputs=(torch.randn(2, 9, 8),), opset=opset)
    np.testing.assert_allclose(run(path, {"x": x})[0], model(x).numpy(), atol=1e-5)


@pytest.mark.parametrize("outputs", [
    lambda x, w: (F.linear(x, w), w), lambda x, w: (x + 1, w.T), lambda x, w: (x @ w.T, w.T)])
@torch.no_grad()
def test_a_weight_that_is_an_output_stays_as_it_is(outputs, tmp_path):
    model, x = Product(outputs).eval(), torch.randn(3, 5, 7)
    path = export_onnx(model, tmp_path / "model.onnx", example_inputs=(torch.randn(2, 9, 7),))
    for found, expected in zip(run(path, {"x": x}), model(x), strict=True):
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("rows", [1, 6], ids=["one-row", "rows"])
@torch.no_grad()
def test_keys_of_all_sequences(opset, rows, tmp_path):
    """A memory that is learned, repeated over the batch as well as for heads."""
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys = nn.Parameter(torch.randn(1, 2, rows, 8, generator=torch.Generator().manual_seed(3)))

        def forward(self, x):
            query = x.unflatten(-1, (4, 8)).transpose(1, 2)
            keys = self.keys.unsqueeze(2).expand(x.shape[0], 2, 2, rows, 8).reshape(x.shape[0], 4, rows, 8)
            return F.scaled_dot_product_attention(query, keys, keys)

    model, x = Memory().eval(), torch.randn(3, 5, 32)
    path = export_onnx(model, tmp_path / "model.onnx", example_inputs=(torch.randn(2, 9, 32),), opset=opset)
    np.testing.assert_allclose(run(path, {"x": x})[0], model(x).numpy(), atol=1e-5)


@pytest.mark.parametrize("form", [
    lambda x, w: torch.addmm(x.reshape(-1, 7), x.reshape(-1, 7), w).reshape(*x.shape[:2], 7),
    lambda x, w: torch.addmm(x.reshape(-1, 7)[:, :1], x.reshape(-1, 7), w).reshape(*x.shape[:2], 7),
    lambda x, w: x.amin(-1),
    lambda x, w: F.batch_norm(x.transpose(1, 2), w[0], w[1].square(), w[2], w[3]),
], ids=["bias-of-rows", "bias-column", "amin", "batch-norm"])
@torch.no_grad()
def test_other_forms(form, tmp_path):
    model, x = Product(form).eval(), torch.randn(3, 5, 7)
    for opset in (17, 18, 23):
        path = export_onnx(model, tmp_path / f"{opset}.onnx", example_inputs=(torch.randn(2, 9, 7),), opset=opset)
        np.testing.assert_allclose(run(path, {"x": x})[0], model(x).numpy(), atol=1e-5)


def test_dims_and_nodes_are_named(graphs, tmp_path):
    model = onnx.load(export_onnx(graphs["encoder"], tmp_path / "model.onnx"))
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input]
    assert dims == [["batch", "sequence"]] * 2
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert "encoder.layer.1.attention.output.LayerNorm/LayerNormalization" in names
    # Source lines of the machine that exported have no place in the file.
    assert b".py" not in model.SerializeToString()


def test_static_shapes_bind_every_input(graphs, tmp_path):
    path = export_onnx(graphs["decoder"], tmp_path / "model.onnx", shapes={"input_ids": (3, 63)})
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in onnx.load(path).graph.input]
    assert shapes == [[3, 63]] * 2
    assert_parity(path, decoder(), tokens())


@pytest.mark.parametrize("options, problem", [
    ({"opset": 16}, "opset"),
    ({"precision": "int3"}, "precision"),
    ({"shapes": {"tokens": (3, 63)}}, "does not have"),
    ({"shapes": {"input_ids": (3,)}}, "does not fit"),
    ({"shapes": {"input_ids": (3, 63), "attention_mask": (3, 64)}}, "does not fit"),
])
def test_bad_options_write_nothing(graphs, options, problem, tmp_path):
    with pytest.raises(UsageError, match=problem):
        export_onnx(graphs["encoder"], tmp_path / "model.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_an_error(graphs, tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        export_onnx(graphs["encoder"], tmp_path / "nowhere" / "model.onnx")


def test_plain_module_needs_an_example(tmp_path):
    with pytest.raises(UsageError, match="example inputs"):
        export_onnx(nn.Linear(3, 3), tmp_path / "model.onnx")


def test_export_is_reproducible(graphs, tmp_path):
    first, second = (export_onnx(graphs["encoder"], tmp_path / f"{i}.onnx").read_bytes() for i in range(2))
    assert first == second
