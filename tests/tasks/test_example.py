"""What examples/tasks.py puts on an encoder, and the table that it prints."""

import argparse

import pytest
import torch
from scripts import EXAMPLES, load_script
from torch import nn

from modcompile.errors import UsageError

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tasks():
    return load_script(EXAMPLES / "tasks.py")


class Encoder(nn.Module):
    """Gives back vectors that are its input."""

    class config:
        hidden_size = 3

    def forward(self, input_ids, attention_mask):
        return type("Outputs", (), {"last_hidden_state": input_ids})


HIDDEN = torch.tensor([[[1.0, 0, 0], [0, 2.0, 0], [9, 9, 9]], [[0, 0, 3.0], [9, 9, 9], [9, 9, 9]]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def batch_of(tasks, target, spans=()):
    return tasks.EncodedBatch({"attention_mask": MASK}, target, [0, 1], list(spans))


def test_padding_is_in_no_mean_and_no_loss(tasks):
    model = tasks.Classifier(Encoder(), ["a", "b"])
    expected = model.head(torch.tensor([[0.5, 1, 0], [0, 0, 3]]))
    assert torch.allclose(model(input_ids=HIDDEN, attention_mask=MASK), expected)
    logits = torch.zeros(2, 3, 2)
    logits[:, 2] = 50
    batch = batch_of(tasks, torch.tensor([[0, 1], [-100, -100]]))
    # Two valid tokens with equal logits; the answer that was cut off does not count.
    assert tasks.SpanFinder.loss(logits, batch).item() == pytest.approx(torch.tensor(2.0).log().item())
    other = logits.clone()
    other[:, 2] = -50
    assert tasks.SpanFinder.distance(logits, other, batch) == 0
    other[0, 0, 0] = 1
    assert tasks.SpanFinder.distance(logits, other, batch) > 0


def test_a_pair_is_two_neighbours(tasks):
    vectors = tasks.Embedder(Encoder(), [])(input_ids=HIDDEN, attention_mask=MASK)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(2))
    assert tasks.Embedder.cosines(vectors).tolist() == [0]
    assert tasks.Embedder.loss(vectors, batch_of(tasks, torch.tensor([0.5]))) == 0.25
    assert tasks.Embedder.distance(vectors, vectors, batch_of(tasks, torch.tensor([0.5]))).abs() < 1e-6


def test_files_of_ones_own(tasks, tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text(f"sentence\tlabel\na {name} sentence\t1\n")
    task = tasks.own_task(f"sst-2={tmp_path}/train.tsv,{tmp_path}/dev.tsv")
    assert (task.name, task.train[0].text, task.test[0].text) == ("sst-2", "a train sentence", "a dev sentence")
    for text in ("sst-2=train.tsv", "sst2=train.tsv,dev.tsv"):
        with pytest.raises(UsageError, match=r"this names no task|there is no such task"):
            tasks.own_task(text)


def test_the_table_has_means_and_spreads(tasks):
    cell = {"flops": 0.5, "untrained": {"accuracy": 0.5}, "trained": {"accuracy": 0.75}}
    other = {"flops": 0.5, "untrained": {"accuracy": 0.7}, "trained": {"accuracy": 0.75}}
    lines = tasks.table({"cells": {"News, seed 0, pruned 1": cell, "News, seed 1, pruned 1": other,
                                   "News, seed 0, dense": cell}}).splitlines()
    assert lines[2:] == ["| News | dense | 0.500 | accuracy | 0.5000 | 0.7500 |",
                         "| News | pruned 1 | 0.500 | accuracy | 0.6000 ± 0.1000 | 0.7500 ± 0.0000 |"]


def test_a_task_and_seed_is_made_by_one_process(tasks, tmp_path, monkeypatch):
    sizes = dict.fromkeys(("dense_steps", "steps", "lr", "router_lr", "distill", "calibration_batches",
                           "trial_batches", "exchanges"), 1)
    options = argparse.Namespace(tiny=True, device="cpu", folder=tmp_path, seeds=[0, 1], batch=4, rows=16,
                                 attend_to="all", dropped=[1], **sizes)
    begun = []

    def compare(work, encoder, seed, cells, options):
        begun.append((work.task.name, seed))
        if len(begun) == 1:
            # Another process with the same folder, from its beginning to its end.
            tasks.run(options)
            assert ("pairs", 0) not in begun[1:] and begun[1:3] == [("pairs", 1), ("rated", 0)]

    monkeypatch.setattr(tasks, "compare", compare)
    tasks.run(options)
    # The other has left these, done or not: what is missing in them is made.
    assert begun.count(("pairs", 0)) == 1 and begun.count(("pairs", 1)) == 2
