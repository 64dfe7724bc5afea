"""Real pretrained weights, calibrated: fitted routers choose better rows than random ones."""

import pytest
import torch
from weights import minilm

from modcompile.calibration import calibrate

pytestmark = [pytest.mark.weights, pytest.mark.long]

# B batch  S rows


def words(seed):
    ids = torch.randint(1000, 30000, (4, 33), generator=torch.Generator().manual_seed(seed))
    valid = torch.arange(33) < torch.tensor([[33], [33], [21], [9]])
    return {"input_ids": ids * valid, "attention_mask": valid.long()}


def test_fitted_routers_beat_random_ones_on_other_words():
    model = minilm()
    result = calibrate(model, [words(seed) for seed in range(12)], 0.7, attend_to="all", trial_batches=2)
    assert result.report["objective"] == "outputs" and result.report["flops"] <= 0.7
    assert all(block["r2"] > 0.1 for block in result.report["blocks"].values())

    def change():
        call = words(99)
        valid = call["attention_mask"].bool()
        with torch.no_grad():
            before, after = (each(**call).last_hidden_state[valid] for each in (model, result.mod))
        return float((after - before).square().sum() / before.square().sum())

    fitted, random = change(), []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for router in result.mod.routers.values():
                router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        random.append(change())
    assert fitted < min(random)
