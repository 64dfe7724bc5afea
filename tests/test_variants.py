"""The models that a routed one is compared with, on its own tensors."""

import pytest
import torch
from reference import mod_reference
from tiny import WIDTH, Block, Stack, randomise_routers
from tolerances import TOLERANCES, farthest

import modcompile as mc
from modcompile.errors import UsageError
from modcompile.flops import count_flops
from modcompile.variants import dense_model, masked_model, other_attention_model, pruned_blocks, pruned_model

# B batch  S rows  D model dim

EAGER = TOLERANCES["eager"][torch.float32]
SIZES = {"batch": 3, "sequence": 63}
OPTIONS = dict(capacity_ratio=5 / 63, gate="sigmoid")


def source() -> Stack:
    return Stack(*(Block(causal=True) for _ in range(4)))


def converted(attend_to: str, **options) -> mc.MoDModel:
    return randomise_routers(mc.convert(source(), {"hidden": torch.randn(2, 5, WIDTH)},
                                        mc.MoDConfig(attend_to=attend_to, **OPTIONS | options)))


@pytest.fixture(scope="module", params=["chosen", "all"])
def mod(request: pytest.FixtureRequest) -> mc.MoDModel:
    return converted(request.param)


@pytest.fixture(scope="module")
def hidden() -> torch.Tensor:
    return torch.randn(3, 63, WIDTH, generator=torch.Generator().manual_seed(2))


def reference(mod: mc.MoDModel, hidden: torch.Tensor, attend_to: str) -> torch.Tensor:
    routers = {path: (router.weight.detach(), router.bias.detach()) for path, router in mod.routers.items()}
    return mod_reference(source(), list(routers), {"hidden": hidden}, routers, attend_to=attend_to, **OPTIONS)


def test_the_masked_model_computes_every_row_and_gives_what_attending_to_all_gives(mod, hidden):
    masked = masked_model(mod)
    assert farthest(masked(hidden), reference(mod, hidden, "all")) <= EAGER
    dense = count_flops(dense_model(mod), SIZES)
    assert dense < count_flops(masked, SIZES) < 1.05 * dense


def test_the_other_model_attends_to_the_other_rows_by_the_same_routers(mod, hidden):
    other = "chosen" if mod.config.attend_to == "all" else "all"
    assert farthest(other_attention_model(mod)(hidden), reference(mod, hidden, other)) <= EAGER
    assert farthest(mod(hidden), reference(mod, hidden, mod.config.attend_to)) <= EAGER


def test_variants_leave_the_model_and_its_tensors_alone(mod, hidden):
    before, names = mod(hidden), set(mod.state_dict())
    for variant in (masked_model(mod), other_attention_model(mod), dense_model(mod)):
        tensors = variant.tensors()
        assert all(tensor is mod.tensors()[name] for name, tensor in tensors.items())
    assert set(mod.state_dict()) == names and torch.equal(mod(hidden), before)
    assert not any("router" in name for name in dense_model(mod).tensors())


def test_sequences_have_no_masked_form():
    with pytest.raises(UsageError, match="only a model that routes tokens has a masked form"):
        masked_model(converted("chosen", axis="sequence"))


def test_the_pruned_model_lacks_what_is_named(mod):
    assert pruned_blocks(mod, SIZES) == ["layers.1", "layers.3"]
    assert pruned_blocks(mod, SIZES, order=["layers.2", "layers.0", "layers.1", "layers.3"]) == ["layers.2", "layers.0"]
    with pytest.raises(UsageError, match="a block to prune does not exist"):
        pruned_model(mod, ["layers.9"])


