"""Every family of the zoo, converted: against its dense model, the reference, its gradients, and ONNX Runtime.

One family is captured once and routed a few ways; the fixture is of module scope so that its tests run one after
another. Families that differ from another in little are marked long: whoever changes what they go through runs them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from families import FAMILIES, Family, family
from reference import Routed, mod_reference, random_routers
from tolerances import EXACT, TOLERANCES, deviation, farthest, tensors_of
from torch import Tensor

import modcompile as mc

# B batch  S rows  D model dim

EAGER = TOLERANCES["eager"][torch.float32]
GRADIENT = TOLERANCES["gradient"][torch.float32]
ORT = TOLERANCES["ort"][torch.float32]
# None of these is the example's 2 x 17.
SIZES = ((3, 63), (1, 19))
QUARTER = dict(capacity_ratio=0.25, gate="sigmoid")
ALWAYS = {
    "gpt2", "bloom", "llama", "gemma3",
    "bert", "t5-encoder", "deberta-v2",
    "vit",
    "torch-causal", "small-gpt",
}  # fmt: skip
# The graph of torch.export resizes beit's table of relative positions to other last bits than eager does; bloom's
# product with a bias is one operation there, and two in the graph.
ROUNDED = {"beit", "bloom"}


class Subject:
    """One family: its model, captured once, and the ways it was routed."""

    def __init__(self, member: Family):
        self.member = member
        self.model = member.build()
        self.captured = mc.capture(self.model, member.example())
        self._routed: dict[tuple, mc.MoDModel] = {}

    def routed(self, random: bool = True, **options: Any) -> mc.MoDModel:
        """Converts once for each set of options, with random routers or with routers as they start."""
        key = (random, *sorted(options.items()))
        if key not in self._routed:
            mod = mc.convert(self.captured, config=mc.MoDConfig(padding_mask=self.member.padding_mask, **options))
            assert list(mod.routers) == self.member.routed
            if random:
                fill_routers(mod, random_routers(self.member.routed, self.member.width))
            self._routed[key] = mod
        return self._routed[key]

    def reference(self, inputs: dict[str, Tensor], trace: dict[str, Routed] | None = None, **options: Any) -> Any:
        """Runs the reference with the same options and the same random routers."""
        return mod_reference(
            self.model, self.member.routed, inputs, random_routers(self.member.routed, self.member.width),
            valid=self.member.valid(inputs), at_positions=self.member.at_positions, trace=trace, **options,
        )  # fmt: skip

    def calls(self, sizes: tuple[tuple[int, int], ...] = SIZES) -> Iterator[dict[str, Tensor]]:
        """Makes inputs of every size, unpadded and padded on every side that the family can be."""
        for batch, rows in sizes:
            for padding in (None, *self.member.paddings):
                yield self.member.inputs(batch, self.member.rows or rows, padding, seed=batch)


def fill_routers(mod: mc.MoDModel, routers: dict[str, tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for path, (weight, bias) in routers.items():
            mod.routers[path].weight.copy_(weight)
            mod.routers[path].bias.copy_(bias)


@pytest.fixture(
    scope="module",
    params=[pytest.param(member, marks=() if member.name in ALWAYS else pytest.mark.long) for member in FAMILIES],
    ids=str,
)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


@pytest.mark.parametrize(("attend_to", "gate"), [("chosen", "raw"), ("all", "straight-through")])
def test_at_full_capacity_it_is_the_dense_model(subject: Subject, attend_to: str, gate: str):
    mod = subject.routed(random=False, capacity_ratio=1.0, gate=gate, attend_to=attend_to)
    for inputs in subject.calls():
        dense, routed = subject.model(**inputs), mod(**inputs)
        assert type(routed) is type(dense)
        far = farthest(routed, dense, subject.member.valid(inputs))
        # Split projections may round differently; a block that takes all rows runs the very same kernels.
        exact = attend_to == "chosen" and subject.member.name not in ROUNDED
        assert far <= (EXACT if exact else EAGER)


@pytest.mark.parametrize("attend_to", ["chosen", "all"])
def test_a_quarter_of_the_rows_is_the_reference(subject: Subject, attend_to: str):
    mod = subject.routed(attend_to=attend_to, **QUARTER)
    for inputs in subject.calls():
        steps: dict[str, Routed] = {}
        expected = subject.reference(inputs, steps, attend_to=attend_to, **QUARTER)
        with mc.trace_routing(mod) as trace:
            actual = mod(**inputs)
        assert type(actual) is type(expected)
        valid = subject.member.valid(inputs)
        for path, step in steps.items():
            assert trace[path].filled.equal(step.filled), path
            # Which padding an empty slot holds is nobody's business: its logits are not compared either.
            assert trace[path].positions[step.filled].equal(step.positions[step.filled]), path
            assert deviation(trace[path].gate, step.gates) <= EAGER, path
            assert farthest(trace[path].logits, step.logits, valid) <= EAGER, path
        assert farthest(actual, expected, valid) <= EAGER
        assert farthest(actual, subject.model(**inputs), valid) > 0.01


def weighed(outputs: Any, valid: Tensor | None) -> Tensor:
    """Sums all outputs with fixed random weights, of the valid rows alone: a loss that no gradient cancels from."""
    generator = torch.Generator().manual_seed(4)
    total = torch.zeros(())
    for output in tensors_of(outputs):
        weights = torch.randn(output.shape, generator=generator)
        if valid is not None and output.dim() > 1 and output.shape[:2] == valid.shape:
            weights = weights * valid.reshape(*valid.shape, *[1] * (output.dim() - 2))
        total = total + (output * weights).sum()
    return total


@pytest.mark.parametrize("attend_to", ["chosen", "all"])
def test_gradients_are_those_of_the_reference(subject: Subject, attend_to: str):
    mod = subject.routed(attend_to=attend_to, **QUARTER)
    member = subject.member
    inputs = next(subject.calls(((2, 17),)))
    if all(output.dim() == 2 for output in tensors_of(mod(**inputs))):
        pytest.skip("a pooled output depends on one row: whether a router has a gradient is chance")
    valid = member.valid(inputs)
    routers = random_routers(member.routed, member.width)
    leaves = {f"{path} {part}": tensor
              for path, pair in routers.items() for part, tensor in zip("wb", pair, strict=True)}  # fmt: skip
    shared = dict(subject.model.named_parameters())
    for tensor in leaves.values():
        tensor.requires_grad_()
    reference = mod_reference(
        subject.model, member.routed, inputs, routers, valid=valid, at_positions=member.at_positions,
        attend_to=attend_to, **QUARTER,
    )  # fmt: skip
    expected = gradients(weighed(reference, valid), leaves | shared)
    mine = {f"{path} {part}": tensor for path, router in mod.routers.items()
            for part, tensor in zip("wb", (router.weight, router.bias), strict=True)}  # fmt: skip
    actual = gradients(weighed(mod(**inputs), valid), mine | shared)
    # A later block may have chosen no row that the outputs depend on.
    assert actual[f"{member.routed[0]} w"].abs().max() > 0
    for name, gradient in expected.items():
        assert deviation(actual[name], gradient) <= GRADIENT, name


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Differentiates a loss; what it does not depend on has a gradient of zero."""
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


@pytest.mark.parametrize("attend_to", [pytest.param("chosen", marks=[pytest.mark.slow, pytest.mark.long]), "all"])
def test_onnx_runtime_agrees(subject: Subject, attend_to: str, tmp_path: Path):
    mod = subject.routed(attend_to=attend_to, **QUARTER)
    path = mc.export_onnx(mod, tmp_path / "routed.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for inputs in subject.calls():
        with torch.no_grad():
            expected = mod(**inputs)
        actual = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        assert farthest([torch.from_numpy(array) for array in actual], expected, subject.member.valid(inputs)) <= ORT


@pytest.fixture(scope="module", params=["llama", "bert", "vit", "torch-causal"])
def plain(request: pytest.FixtureRequest) -> Subject:
    return Subject(family(request.param))


@pytest.mark.parametrize(
    "options",
    [
        dict(gate="raw"),
        dict(gate="tanh", attend_to="all"),
        dict(gate="straight-through", capacity_multiple=10),
        dict(axis="sequence", gate="sigmoid"),
        dict(axis="sequence", gate="raw", capacity_multiple=2),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_other_options_are_the_reference_too(plain: Subject, options: dict[str, Any]):
    options = dict(capacity_ratio=5 / 33, **options)
    mod = plain.routed(**options)
    for inputs in plain.calls(((7, 33), (1, 19))):
        expected = plain.reference(inputs, **options)
        assert farthest(mod(**inputs), expected, plain.member.valid(inputs)) <= EAGER
        assert farthest(plain.model(**inputs), expected, plain.member.valid(inputs)) > 0.01
