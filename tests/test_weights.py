"""Real pretrained weights, converted: against their dense model, the reference, and ONNX Runtime."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from modcompile.runtimes.aoti.builder import lowering_passes
from reference import mod_reference, random_routers
from tolerances import EXACT, TOLERANCES, farthest
from torch import Tensor
from weights import minilm, smollm2

import modcompile as mc
from modcompile.export.flatten import flatten
from modcompile.pass_manager import PassManager

pytestmark = [pytest.mark.weights, pytest.mark.slow]

EAGER = TOLERANCES["eager"][torch.float32]
DEEP = TOLERANCES["eager-deep"][torch.float32]
ORT = TOLERANCES["ort"][torch.float32]


def text(rows: list[int], longest: int, words: int, side: str) -> dict[str, Tensor]:
    """Makes texts of these lengths from random words, padded on one side."""
    ids = torch.randint(1000, words, (len(rows), longest), generator=torch.Generator().manual_seed(11))
    mask = (torch.arange(longest) < torch.tensor(rows)[:, None]).long()
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="module", params=[(minilm, "encoder.layer.{}", 384, 30000, "right"),
                                        (smollm2, "model.layers.{}", 576, 49000, "left")],
                ids=["minilm", "smollm2"])  # fmt: skip
def pretrained(request: pytest.FixtureRequest):
    load, block, width, words, side = request.param
    model = load()
    captured = mc.capture(model, text([17, 9], 17, words, side))
    depth = model.config.num_hidden_layers
    routed = [block.format(index) for index in range(1, depth, 2)]
    # The reference takes its time for each row of each block.
    calls = [text([33, 17, 5], 33, words, side)]
    if depth < 10:
        calls.append(text([63, 63], 63, words, side))
    return model, captured, routed, width, calls


@pytest.mark.parametrize("attend_to", ["chosen", "all"])
def test_at_full_capacity_it_is_the_dense_model(pretrained, attend_to: str):
    model, captured, _, _, calls = pretrained
    config = mc.MoDConfig(capacity_ratio=1.0, gate="straight-through", attend_to=attend_to)
    mod = mc.convert(captured, config=config)
    with torch.no_grad():
        for inputs in calls:
            far = farthest(mod(**inputs), model(**inputs), inputs["attention_mask"].bool())
            assert far <= (EXACT if attend_to == "chosen" else EAGER)


@pytest.mark.parametrize("attend_to", [pytest.param("chosen", marks=pytest.mark.long), "all"])
def test_an_eighth_of_the_rows_is_the_reference_and_onnx_runtime_agrees(pretrained, attend_to: str, tmp_path: Path):
    model, captured, routed, width, calls = pretrained
    options = dict(capacity_ratio=0.125, gate="sigmoid", attend_to=attend_to)
    mod = mc.convert(captured, config=mc.MoDConfig(**options))
    routers = random_routers(routed, width)
    assert list(mod.routers) == routed
    with torch.no_grad():
        for path, (weight, bias) in routers.items():
            mod.routers[path].weight.copy_(weight)
            mod.routers[path].bias.copy_(bias)
    session = onnxruntime.InferenceSession(
        mc.export_onnx(mod, tmp_path / "routed.onnx"), providers=["CPUExecutionProvider"]
    )
    for inputs in calls:
        valid = inputs["attention_mask"].bool()
        expected = mod_reference(model, routed, inputs, routers, valid=valid, **options)
        with torch.no_grad():
            actual = mod(**inputs)
        assert farthest(actual, expected, valid) <= (DEEP if len(routed) > 10 else EAGER)
        arrays = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        assert farthest([torch.from_numpy(array) for array in arrays], actual, valid) <= ORT


@pytest.mark.long
def test_half_precision_is_as_near_at_the_end_of_a_long_sequence():
    model = smollm2()
    ids = torch.randint(0, 49000, (1, 1024), generator=torch.Generator().manual_seed(11))
    captured = mc.capture(model, {"input_ids": ids[:, :16]})
    flat = PassManager(lowering_passes("fp16"))(flatten(captured, {"input_ids": tuple(ids.shape)}))
    with torch.no_grad():
        expected, (found, *_) = model(ids).logits, flat(ids)
    errors = ((found.float() - expected).norm(dim=-1) / expected.norm(dim=-1))[0]  # [S]
    assert errors.max() <= TOLERANCES["ort"][torch.float16]
