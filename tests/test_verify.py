"""verify: what passes, what does not and what is said of it, on engines that are the model itself with a defect."""

import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeEngine
from rich.console import Console
from tiny import Attention, Mlp, Stack, randomise_routers
from torch import Tensor, nn

import modcompile as mc
from modcompile.errors import ParityError, UsageError
from modcompile.model import GraphModel, MoDModel
from modcompile.training import Predictors, QuantileThresholds, causal_model
from modcompile.variants import with_routing_outputs

# B batch  S rows  K capacity  D model dim

B, S, WIDTH = 3, 63, 8
# The package's attribute of this name is the function.
VERIFY = importlib.import_module("modcompile.verify")


class Encoder(nn.Module):
    """Two blocks and a norm; the mean of all rows comes along."""

    def __init__(self):
        super().__init__()
        self.stack = Stack(Attention(), Attention())
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.stack(hidden, attention_mask))
        return {"hidden": hidden, "pooled": hidden[:, 0], "words": attention_mask.sum(1)}


FIRST, SECOND = "stack.layers.0", "stack.layers.1"


def inputs_of(batch: int = B, rows: int = S, padding: int = 0, seed: int = 0) -> dict[str, Tensor]:
    mask = torch.ones(batch, rows, dtype=torch.int64)
    mask[0, rows - padding:] = 0
    return {"hidden": torch.randn(batch, rows, WIDTH, generator=torch.Generator().manual_seed(seed)),
            "attention_mask": mask}


def converted(**options) -> MoDModel:
    config = mc.MoDConfig(capacity_ratio=5 / 63, gate="sigmoid", **options)
    return randomise_routers(mc.convert(Encoder().eval(), inputs_of(2, 5), config))


@pytest.fixture(scope="module")
def dense() -> GraphModel:
    return mc.capture(Encoder().eval(), inputs_of(2, 5))


@pytest.fixture(scope="module")
def mod() -> MoDModel:
    return converted()


def changed(model: MoDModel, name: str, by: float, seed: int = 0) -> MoDModel:
    """A copy with one parameter a little different."""
    made = copy.deepcopy(model)
    parameter = dict(made.named_parameters())[name]
    with torch.no_grad():
        parameter += by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return made


@pytest.fixture
def build(monkeypatch) -> Callable[..., list]:
    """Lets verify build its engines of one model from another one; gives the list of what it asked for.

    Of an engine that hands out every hidden state, ``whole`` takes the model's place.
    """

    def arrange(model: MoDModel, tamper: Callable | None = None, whole: MoDModel | None = None) -> list:
        asked = []

        def build_engine(probe: GraphModel, path: Path, **options):
            asked.append(options)
            outputs = any(spec.name.endswith(".output") for spec in probe.outputs)
            return FakeEngine(with_routing_outputs(whole if outputs and whole else model, outputs=outputs), tamper)

        monkeypatch.setattr(VERIFY, "build_engine", build_engine)
        return asked

    return arrange


# Outputs


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_an_engine_that_is_the_model(dense: GraphModel, kind: str):
    inputs = inputs_of()
    if kind == "numpy":
        inputs = {name: value.numpy() for name, value in inputs.items()}
    report = mc.verify(dense, FakeEngine(dense), inputs)
    assert [item.name for item in report.outputs] == ["hidden", "pooled", "words"]
    assert report.outputs[0].shape == (B, S, WIDTH)
    assert all(item.max_abs_error == item.relative_l2 == item.not_finite == 0 for item in report.outputs)
    assert (report.runtime, report.precision, report.tolerance, report.blocks, report.routing) == (
        "ort", "fp32", 1e-4, (), ())
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["outputs"][0]["name"] == "hidden"


@pytest.mark.filterwarnings("error")
def test_arrays_that_torch_cannot_take_as_they_are(dense: GraphModel):
    inputs = {name: value.numpy()[::-1] for name, value in inputs_of().items()}
    inputs["attention_mask"] = np.ones_like(inputs["attention_mask"])
    inputs["attention_mask"].setflags(write=False)
    assert mc.verify(dense, FakeEngine(dense), inputs).outputs[0].max_abs_error == 0


def test_differences_within_the_tolerance_are_measured(dense: GraphModel):
    def tamper(outputs):
        outputs["hidden"][1, 7, 3] += 1e-5

    item = mc.verify(dense, FakeEngine(dense, tamper), inputs_of()).outputs[0]
    size = dense(**inputs_of())["hidden"]
    assert item.max_abs_error == pytest.approx(1e-5, rel=0.05)
    assert item.relative_l2 == pytest.approx(1e-5 / size.norm().item(), rel=0.05)
    assert item.limit == pytest.approx(1e-4 * size.abs().max().item())
    assert item.worst.startswith("at [1, 7, 3]")


def _shift(outputs):
    outputs["hidden"][1, 7, 3] += 1e-2


def _nan(outputs):
    outputs["hidden"][1, 7, 3] = np.nan


def _infinite(outputs):
    outputs["hidden"][1, 7, 3] = np.inf


def _count(outputs):
    outputs["words"][2] += 1


def _cut(outputs):
    outputs["pooled"] = outputs["pooled"][:, :5]


@pytest.mark.parametrize(("tamper", "said"), [
    (_shift, r"output hidden.*0\.01 at \[1, 7, 3\].*relative L2"),
    (_nan, "1 elements NaN or infinite on one side alone"),
    (_infinite, "1 elements NaN or infinite on one side alone"),
    (_count, r"output words.*largest error 0, .*largest error 1 at \[2\]: 64 for 63"),
    (_cut, r"output pooled.*for shape \[3, 8\].*pooled \[3, 5\]"),
])  # fmt: skip
def test_an_engine_that_differs(dense: GraphModel, tamper: Callable, said: str):
    with pytest.raises(ParityError, match=f"(?s){said}") as caught:
        mc.verify(dense, FakeEngine(dense, tamper), inputs_of())
    assert caught.value.exit_code == 4
    assert list(caught.value.details) == ["expected", "found", "where", "fix"]


def test_small_numbers_are_compared_on_their_own_scale():
    """Half of 1e-6 is lost: far below the absolute limit, and yet wrong."""

    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1e-6 * x

    def tamper(outputs):
        outputs["output"] *= 0.5

    graph = mc.capture(Small(), (torch.randn(2, 5),))
    with pytest.raises(ParityError, match=r"relative L2 0\.5"):
        mc.verify(graph, FakeEngine(graph, tamper), {"x": torch.randn(3, 7)})


def test_nan_and_infinity_on_both_sides_agree():
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.abs().floor()

    graph = mc.capture(Inverse(), (torch.randn(2, 5),))
    x = torch.tensor([[0.0, 0.5, -0.5, 2.0, 3.0, 4.0, 5.0]]).repeat(2, 1)
    assert mc.verify(graph, FakeEngine(graph), {"x": x}).outputs[0].not_finite == 0

    def tamper(outputs):
        outputs["output"][0, 1] *= -1

    with pytest.raises(ParityError, match="1 elements NaN"):
        mc.verify(graph, FakeEngine(graph, tamper), {"x": x})


def test_tolerances(dense: GraphModel):
    inputs = inputs_of()
    assert mc.verify(dense, FakeEngine(dense, _shift), inputs, tolerance=0.02).tolerance == 0.02
    assert mc.verify(dense, FakeEngine(dense, _shift, precision="fp16"), inputs).tolerance == 1e-2
    with pytest.raises(ParityError):
        mc.verify(dense, FakeEngine(dense), inputs | {"hidden": inputs["hidden"] * torch.nan}, tolerance=-1.0)


def test_an_engine_in_half_precision_gets_its_inputs_in_it(dense: GraphModel):
    half = FakeEngine(dense, precision="fp16", input_dtypes={"hidden": "float16"})
    inputs = inputs_of()
    for given in (inputs, {name: value.numpy() for name, value in inputs.items()}):
        item = mc.verify(dense, half, given).outputs[0]
        # Both sides saw the rounded inputs.
        assert item.max_abs_error == 0


def test_the_model_is_left_as_it_was(mod: MoDModel):
    mod.train()
    try:
        mc.verify(mod, FakeEngine(copy.deepcopy(mod).eval()), inputs_of())
        assert mod.training
    finally:
        mod.eval()


# Padding


def test_rows_of_padding_are_left_out(dense: GraphModel):
    def tamper(outputs):
        outputs["hidden"][0, S - 4:] = np.nan

    mc.verify(dense, FakeEngine(dense, tamper), inputs_of(padding=4))
    with pytest.raises(ParityError, match="8 elements NaN"):
        mc.verify(dense, FakeEngine(dense, tamper), inputs_of(padding=3))


def test_sequences_of_padding_are_left_out_of_what_has_no_rows(dense: GraphModel):
    def tamper(outputs):
        outputs["hidden"][0], outputs["pooled"][0] = 7, 7

    mc.verify(dense, FakeEngine(dense, tamper), inputs_of(padding=S))
    with pytest.raises(ParityError, match="output hidden"):
        mc.verify(dense, FakeEngine(dense, tamper), inputs_of(padding=S - 1))


def test_a_mask_that_is_true_at_padding():
    class Inverted(Encoder):
        def forward(self, hidden: Tensor, padded: Tensor) -> Tensor:
            return self.norm(self.stack(hidden, ~padded))

    config = mc.MoDConfig(padding_mask="~padded")
    example = {"hidden": torch.randn(2, 5, WIDTH), "padded": torch.zeros(2, 5, dtype=torch.bool)}
    mod = mc.convert(Inverted().eval(), example, config)
    padded = torch.zeros(B, S, dtype=torch.bool)
    padded[2, 9:] = True

    def tamper(outputs):
        outputs["output"][2, 9:] += 1

    mc.verify(mod, FakeEngine(mod, tamper), {"hidden": torch.randn(B, S, WIDTH), "padded": padded})


# Blocks


def test_every_block_is_compared(mod: MoDModel, build: Callable):
    asked = build(mod)
    report = mc.verify(mod, FakeEngine(mod), inputs_of(padding=60), per_block=True, options={"opset": 18})
    assert [item.name for item in report.blocks] == [
        f"{FIRST} output", f"{SECOND} logits", f"{SECOND} gate", f"{SECOND} output"]
    assert all(item.max_abs_error == 0 for item in report.blocks)
    assert asked == [{"runtime": "ort", "precision": "fp32", "shapes": None, "opset": 18,
                      "providers": ("CPUExecutionProvider",), "cuda_graph": False}]
    text = Console(width=120)
    with text.capture() as shown:
        text.print(report)
    assert f"{SECOND} logits  [3, 63]" in shown.get()


def test_the_temporary_engine_records_no_cuda_graph(mod: MoDModel, build: Callable):
    asked = build(mod)
    mc.verify(mod, FakeEngine(mod), inputs_of(), per_block=True, options={"cuda_graph": True})
    assert asked[0]["cuda_graph"] is False


@pytest.mark.parametrize(("parameter", "block", "role"), [
    (f"{FIRST}.out.weight", FIRST, "output"),
    (f"router.{SECOND}.bias", SECOND, "logits"),
    (f"{SECOND}.value.weight", SECOND, "output"),
])
def test_the_first_block_that_differs_is_named(mod: MoDModel, build: Callable, parameter: str, block: str, role: str):
    wrong = changed(mod, parameter, by=0.1)
    build(wrong)
    with pytest.raises(ParityError, match=f"first in block {block}\n") as caught:
        mc.verify(mod, FakeEngine(wrong), inputs_of())
    assert caught.value.details["where"].startswith(f"{block} {role} [")


def test_what_follows_the_last_block_is_told_from_it(mod: MoDModel, build: Callable):
    wrong = changed(mod, "norm.bias", by=0.1)
    build(wrong)
    with pytest.raises(ParityError, match="look at what follows the last"):
        mc.verify(mod, FakeEngine(wrong), inputs_of())


def test_an_engine_of_other_weights_is_told_from_a_defect(mod: MoDModel, build: Callable):
    build(mod)
    with pytest.raises(ParityError, match="a new engine of this model agrees with it"):
        mc.verify(mod, FakeEngine(changed(mod, f"{FIRST}.out.weight", by=0.1)), inputs_of())


def test_an_engine_that_agrees_passes_whatever_another_one_does(mod: MoDModel, build: Callable):
    """Nothing is built where nobody asked and nothing differs."""
    assert build(mod) == []
    mc.verify(mod, FakeEngine(mod), inputs_of())


# Near ties


@pytest.fixture(scope="module", params=["token", "sequence"])
def undecided(request) -> MoDModel:
    """Logits so near each other that an error of 1e-6 changes their order."""
    mod = converted(axis=request.param)
    for router in mod.routers.values():
        with torch.no_grad():
            router.weight *= 1e-5
    return mod


def nudged(mod: MoDModel) -> MoDModel:
    """A copy that chooses other rows, its logits being different by about 1e-6."""
    inputs = inputs_of(batch=13, padding=20)
    with mc.trace_routing(mod) as ours:
        mod(**inputs)
    for seed in range(20):
        made = changed(mod, f"router.{SECOND}.weight", by=1e-6, seed=seed)
        with mc.trace_routing(made) as theirs:
            made(**inputs)
        if not torch.equal(ours[SECOND].positions, theirs[SECOND].positions):
            return made
    raise AssertionError("no nudge changes the choice")


@pytest.mark.parametrize("own", [True, False], ids=["its own routing outputs", "another engine's"])
def test_a_near_tie_explains_a_difference(undecided: MoDModel, build: Callable, own: bool):
    inputs, other = inputs_of(batch=13, padding=20), nudged(undecided)
    build(other)
    engine = FakeEngine(with_routing_outputs(other, outputs=True) if own else other)
    plain = VERIFY._Case(undecided, engine, inputs, 1e-4)
    assert not all(item.passed for item in plain.compare(undecided.outputs, plain.found, plain.expected))
    report = mc.verify(undecided, engine, inputs)
    (difference,) = report.routing
    assert difference.block == SECOND and difference.rows >= 1
    assert 0 <= difference.margin <= 2 * difference.logit_error < 2e-4
    assert all(item.passed for item in (*report.outputs, *report.blocks))
    console = Console(width=200)
    with console.capture() as shown:
        console.print(report)
    assert f"block {SECOND}: {difference.rows} rows chosen differently" in shown.get()


def test_hidden_states_that_are_handed_out_may_decide_near_ties_another_way(undecided: MoDModel, build: Callable):
    """An engine that hands out all of them fuses less: its choices are not those of the engine in question."""
    other = nudged(undecided)
    asked = build(other, whole=undecided)
    (difference,) = mc.verify(undecided, FakeEngine(other), inputs_of(batch=13, padding=20)).routing
    assert difference.block == SECOND and len(asked) == 1


def test_a_near_tie_explains_nothing_of_an_engine_that_another_does_not_copy(undecided: MoDModel, build: Callable):
    build(undecided)
    with pytest.raises(ParityError, match="decides near ties in a way of its own"):
        mc.verify(undecided, FakeEngine(nudged(undecided)), inputs_of(batch=13, padding=20))


def test_a_near_tie_does_not_hide_a_defect(undecided: MoDModel, build: Callable):
    """The engine chooses other rows, and computes them wrongly, too."""
    wrong = changed(nudged(undecided), f"{SECOND}.out.weight", by=0.1)
    build(wrong)
    with pytest.raises(ParityError, match=f"(?s)first in block {SECOND}.*rows chosen differently"):
        mc.verify(undecided, FakeEngine(wrong), inputs_of(batch=13, padding=20))


def test_logits_within_the_tolerance_in_another_order(undecided: MoDModel, build: Callable):
    """Beside a bias that all rows have, what they differ by may be less than the tolerance."""
    wrong = copy.deepcopy(undecided)
    with torch.no_grad():
        wrong.routers[SECOND].weight.neg_()
    build(wrong)
    with pytest.raises(ParityError, match=f"(?s)first in block {SECOND}.*but not how rows differ"):
        mc.verify(undecided, FakeEngine(with_routing_outputs(wrong)), inputs_of(batch=13, padding=20))


@pytest.mark.parametrize("by", ["sign", "thresholds", "predictors"])
@torch.no_grad()
def test_rows_that_decide_for_themselves(mod: MoDModel, build: Callable, by: str):
    """Its own decision is the engine's contract; near the threshold it may differ from the model's."""
    decides: QuantileThresholds | Predictors | None = None
    if by == "thresholds":
        with mc.trace_routing(mod) as trace:
            mod(**inputs_of(padding=20))
        (decides := QuantileThresholds(mod)).update(trace)
    elif by == "predictors":
        for network in (decides := Predictors(mod)).networks:
            network.weight.normal_()
            network.bias.zero_()
    causal = causal_model(mod, decides)
    build(causal)
    report = mc.verify(causal, FakeEngine(causal), inputs_of(padding=20), per_block=True)
    scored = ["logits", "decision"] if by == "predictors" else ["logits"]
    assert [item.name for item in report.blocks if item.name.startswith(SECOND)] == [
        f"{SECOND} {role}" for role in (*scored, "gate", "output")]

    # A row that is as near to the threshold as rounding goes, on the other side in the engine.
    with mc.trace_routing(causal) as trace:
        causal(**inputs_of(padding=20))
    block, threshold = trace[SECOND], causal.thresholds[SECOND]
    asked = block.logits if block.decision is None else block.decision
    apart = (asked - threshold)[inputs_of(padding=20)["attention_mask"].bool()]
    side = apart[apart.abs().argmin()].sign()
    nearest, second = (side * apart)[side * apart > 0].sort().values[:2]
    other = copy.deepcopy(causal)
    moved = dict(other.named_parameters())[f"predictor.{SECOND}.bias"] if by == "predictors" else \
        other.routers[SECOND].bias
    moved -= side * (nearest + second) / 2
    build(other)
    (difference,) = mc.verify(causal, FakeEngine(other), inputs_of(padding=20), tolerance=0.1,
                               per_block=True).routing
    assert difference.rows == 1 and difference.margin == pytest.approx(nearest.item(), rel=1e-3)


def test_there_has_to_be_something_to_compare():
    words = mc.capture(Stack(Attention()), {name: value[:2, :5] for name, value in inputs_of().items()})
    for changed_input in ({"attention_mask": torch.zeros(B, S, dtype=torch.int64)},
                          {"hidden": torch.full((B, S, WIDTH), torch.nan)}):
        with pytest.raises(UsageError, match="nothing to compare"):
            mc.verify(words, FakeEngine(words), inputs_of() | changed_input)


def test_choices_that_do_not_follow_from_the_logits(mod: MoDModel, build: Callable):
    """An engine whose TopK is wrong cannot be explained by near ties, whatever it does with its choice."""
    def tamper(outputs):
        positions = outputs[f"routing.{SECOND}.positions"]
        positions[1] = [position for position in range(S) if position not in positions[1]][:positions.shape[1]]

    build(mod, tamper)
    with pytest.raises(ParityError, match=f"(?s)not follow its own logits, first in block {SECOND}.*in sequence 1"):
        mc.verify(mod, FakeEngine(mod), inputs_of(), per_block=True)


# Usage


def test_only_a_converted_model_knows_its_blocks(dense: GraphModel):
    with pytest.raises(UsageError, match="only a converted model"):
        mc.verify(dense, FakeEngine(dense), inputs_of(), per_block=True)


def test_an_engine_of_another_model(dense: GraphModel):
    other = mc.capture(Stack(Mlp(), Mlp()), (torch.randn(2, 5, WIDTH),))
    with pytest.raises(UsageError, match=r"(?s)not one of this model.*hidden, attention_mask -> .*hidden -> output"):
        mc.verify(dense, FakeEngine(other), inputs_of())


def test_inputs_that_do_not_fit(dense: GraphModel):
    inputs = inputs_of()
    with pytest.raises(UsageError, match="attention_mask is missing"):
        mc.verify(dense, FakeEngine(dense), {"hidden": inputs["hidden"]})
    with pytest.raises(UsageError, match="attention_mask has the wrong dtype"):
        mc.verify(dense, FakeEngine(dense), inputs | {"attention_mask": inputs["attention_mask"].bool()})


def test_onnx_runtime(mod: MoDModel, tmp_path: Path):
    """From end to end, at sizes other than the example's, block by block."""
    with mc.build_engine(mod, tmp_path / "engine") as engine:
        report = mc.verify(mod, engine, inputs_of(padding=40), per_block=True)
        assert len(report.blocks) == 4 and report.routing == ()
        assert 0 < max(item.max_abs_error for item in report.blocks) < 1e-5
