"""A run that is killed goes on as if it had not been, bit for bit; what is no whole checkpoint is no checkpoint."""

import json
import signal
import subprocess
import sys
import time

import numpy
import pytest
import torch
from tiny import Mlp, Stack, randn, randomise_routers

from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.errors import IntegrityError, UsageError
from modcompile.trace import trace_routing
from modcompile.training import (
    CapacityAnnealing,
    latest_checkpoint,
    load_checkpoint,
    routing_losses,
    save_checkpoint,
)
from modcompile.training.callback import complete_checkpoint


class Killed(BaseException):
    pass


def train(folder, steps, until=None, every=2):
    """Trains with dropout and noise from torch's generator, annealing, and a checkpoint at every other step."""
    torch.manual_seed(7)
    mod = randomise_routers(convert(Stack(Mlp(dropout=0.3), Mlp(dropout=0.3)), (randn(2, 5, 8),),
                                    MoDConfig(capacity_ratio=0.25, gate="sigmoid"))).train()
    optimizer = torch.optim.AdamW(mod.parameters(), lr=0.01)
    annealing = CapacityAnnealing(mod, steps=6, stages=3)
    seen = {}
    for step in range(load_checkpoint(folder, model=mod, optimizer=optimizer), steps):
        annealing.update(step)
        if step == until:
            raise Killed
        x = torch.randn(2, 63, 8)
        with trace_routing(mod) as trace:
            loss = mod(x).square().mean()
        loss = loss + sum(routing_losses(trace).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen[step] = loss.item()
        if step % every == every - 1:
            save_checkpoint(folder, step + 1, model=mod, optimizer=optimizer)
    return seen


def test_it_goes_on_bit_for_bit(tmp_path):
    expected = train(tmp_path / "whole", 9)
    with pytest.raises(Killed):
        train(tmp_path / "killed", 9, until=5)
    assert latest_checkpoint(tmp_path / "killed").name == "step-00000004"
    resumed = train(tmp_path / "killed", 9)
    assert list(resumed) == [4, 5, 6, 7, 8] and resumed == {step: expected[step] for step in resumed}
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["step-00000006", "step-00000008"]


def test_a_killed_process_goes_on_bit_for_bit(tmp_path):
    """A process that is given no time to clean up: SIGKILL, at whatever it is doing."""
    folder = tmp_path / "killed"
    program = f"import sys; sys.path[:0] = {sys.path!r}; from training.test_checkpoint import train; " \
              f"train({str(folder)!r}, 10**6, every=1)"
    child = subprocess.Popen([sys.executable, "-c", program])
    try:
        end = time.monotonic() + 120
        while latest_checkpoint(folder) is None or latest_checkpoint(folder).name < "step-00000004":
            assert child.poll() is None and time.monotonic() < end, "the process trains no more"
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == -signal.SIGKILL
    taken = int(latest_checkpoint(folder).name.removeprefix("step-"))
    resumed = train(folder, taken + 3)
    expected = train(tmp_path / "whole", taken + 3)
    assert resumed == {step: expected[step] for step in range(taken, taken + 3)}


def test_killed_while_writing(tmp_path, monkeypatch):
    layer = torch.nn.Linear(2, 2)
    save_checkpoint(tmp_path, 1, model=layer)

    def dies(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", dies)
        save_checkpoint(tmp_path, 2, model=layer)
    # What a process leaves that had no time to clean up.
    (tmp_path / ".modcompile-0.partial").mkdir()
    assert load_checkpoint(tmp_path, model=layer) == 1
    save_checkpoint(tmp_path, 2, model=layer)
    assert load_checkpoint(tmp_path, model=layer) == 2


def test_what_cannot_be_loaded(tmp_path):
    layer = torch.nn.Linear(2, 2)
    assert load_checkpoint(tmp_path / "none", model=layer) == 0 and latest_checkpoint(tmp_path) is None
    folder = save_checkpoint(tmp_path, 3, model=layer)
    with pytest.raises(UsageError, match="checkpoint is of other objects"):
        load_checkpoint(tmp_path, model=layer, optimizer=torch.optim.SGD(layer.parameters()))
    content = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(content[:len(content) // 2])
    with pytest.raises(IntegrityError, match="checkpoint cannot be read"):
        load_checkpoint(tmp_path, model=layer)


def test_the_trainers_checkpoints_that_are_whole(tmp_path):
    assert complete_checkpoint(tmp_path / "none") is None
    for step, text in ((2, json.dumps({"global_step": 2})), (10, json.dumps({"global_step": 10})), (12, '{"glob'),
                       (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_run_does_not_write_among_a_later_ones_checkpoints(tmp_path):
    layer = torch.nn.Linear(2, 2)
    for step in (1000, 1010, 123456789):
        save_checkpoint(tmp_path, step, model=layer)
    assert load_checkpoint(tmp_path, model=layer) == 123456789
    with pytest.raises(UsageError, match=r"checkpoints of later steps(.|\n)*step-123456789"):
        save_checkpoint(tmp_path, 10, model=layer)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UsageError, match="keep of at least 1"):
        save_checkpoint(tmp_path, 123456790, keep=0, model=layer)


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=numpy.float64(0.1))
    with pytest.raises(UsageError, match="a state could not be read back"):
        save_checkpoint(tmp_path, 1, model=layer, optimizer=optimizer)
    assert latest_checkpoint(tmp_path) is None and list(tmp_path.iterdir()) == []
