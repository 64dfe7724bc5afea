"""A model with its loss: what is added up, what a state dict holds, and the trainers that take it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from tiny import Attention, Mlp, Stack, randn, randomise_routers
from torch import nn
from torch.nn import functional as F

from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.errors import ModcompileError, UsageError
from modcompile.saving import load
from modcompile.trace import trace_routing
from modcompile.training import (
    CapacityAnnealing,
    Predictors,
    Teacher,
    WithLoss,
    hidden_losses,
    logits_loss,
    next_token_loss,
    routing_losses,
)
from modcompile.variants import pruned_model

EXAMPLES = Path(__file__).parents[2] / "examples"
IDS = torch.randint(17, (6, 33), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(6, 33, dtype=torch.long)
MASK[1, 20:] = 0


class Words(nn.Module):
    """A decoder whose head is tied to its table of words."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(17, 8)
        self.blocks = Stack(Attention(), Mlp(), Attention(), Mlp())
        self.head = nn.Linear(8, 17, bias=False)
        self.head.weight = self.words.weight
        with torch.no_grad():
            self.words.weight.copy_(randn(17, 8, seed=5))
        self.eval()

    def forward(self, input_ids, attention_mask):
        return {"logits": self.head(self.blocks(self.words(input_ids)))}


@pytest.fixture
def mod():
    return randomise_routers(convert(Words(), {"input_ids": IDS[:2, :5], "attention_mask": MASK[:2, :5]},
                                     MoDConfig(capacity_ratio=0.25, gate="sigmoid")))


class Translation(nn.Module):
    """An encoder under a padding mask, and a decoder, of another length, that has none."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(17, 8), nn.Linear(8, 17, bias=False)
        self.encoder, self.decoder = Stack(Attention(), Attention()), Stack(Attention(), Mlp())

    def forward(self, input_ids, attention_mask, decoder_input_ids):
        seen = self.encoder(self.words(input_ids), attention_mask)
        keep = (attention_mask != 0)[..., None]
        mean = (seen * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True)
        return {"logits": self.head(self.decoder(self.words(decoder_input_ids) + mean))}


def test_padding_counts_where_the_mask_is_of_a_blocks_rows():
    ids, mask, answer = IDS[:, :20], MASK[:, 10:30], IDS[:, 20:]
    mod = randomise_routers(convert(Translation().eval(), {
        "input_ids": ids[:2, :7], "attention_mask": mask[:2, :7], "decoder_input_ids": answer[:2, :5]},
        MoDConfig(blocks=("encoder.layers.1", "decoder.layers.1"), capacity_ratio=0.25, gate="sigmoid")))
    predictors, teacher = Predictors(mod), Teacher(mod)
    model = WithLoss(mod, routing_weight=1.0, predictors=predictors, teacher=teacher, hidden_weight=1.0).train()
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": answer}
    model(labels=answer, **inputs)
    with trace_routing(mod) as trace, torch.no_grad():
        mod(**inputs)
        teacher(**inputs)
    valid = {"encoder.layers.1": mask.bool()}
    assert not mask.bool().all()
    for kind, expected in (("routing", routing_losses(trace, valid)), ("prediction", predictors.losses(trace, valid)),
                           ("hidden", hidden_losses(trace, teacher.hidden, valid))):
        for path, value in expected.items():
            assert torch.allclose(model.losses[f"{kind} of {path}"], value / 2, atol=1e-6), (kind, path)
        everywhere = {"routing": routing_losses(trace), "prediction": predictors.losses(trace),
                      "hidden": hidden_losses(trace, teacher.hidden)}[kind]
        assert not torch.allclose(expected["encoder.layers.1"], everywhere["encoder.layers.1"], rtol=1e-4)


def test_what_is_added_up(mod):
    predictors, teacher = Predictors(mod), Teacher(mod)
    model = WithLoss(mod, routing_weight=0.1, predictors=predictors, teacher=teacher, logits_weight=0.5,
                     hidden_weight=2.0, temperature=3.0).train()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    out = model(labels=IDS, **inputs)
    with trace_routing(mod) as trace, torch.no_grad():
        logits, expected = mod(**inputs)["logits"], teacher(**inputs)["logits"]
    valid = MASK.bool()
    task = F.cross_entropy(logits[:, :-1].reshape(-1, 17), IDS[:, 1:].reshape(-1))
    hidden = hidden_losses(trace, teacher.hidden, valid)
    total = (task + 0.05 * sum(routing_losses(trace, valid).values())
             + 0.5 * sum(predictors.losses(trace, valid).values())
             + 0.5 * logits_loss(logits, expected, valid, 3.0) + sum(hidden.values()))
    assert torch.equal(out["logits"], logits) and torch.allclose(out["loss"], total, atol=1e-5)
    assert list(model.losses) == ["task", *(f"{kind} of blocks.layers.{i}" for kind in ("routing", "prediction")
                                            for i in (1, 3)), "distillation",
                                  "hidden of blocks.layers.1", "hidden of blocks.layers.3"]
    # In evaluation the task's loss alone, and without labels none.
    model.eval()
    assert torch.allclose(model(labels=IDS, **inputs)["loss"], task, atol=1e-6)
    assert list(model(**inputs)) == ["logits"]


def test_a_control_trains_under_the_same_losses(mod):
    """A pruned model has no routing to learn, but the same teacher."""
    pruned = pruned_model(mod, ["blocks.layers.1"])
    model = WithLoss(pruned, routing_weight=0.1, teacher=Teacher(mod), hidden_weight=1.0).train()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    out = model(labels=IDS, **inputs)
    expected = Teacher(mod)(**inputs)["logits"]
    total = next_token_loss(out["logits"], IDS) + logits_loss(out["logits"], expected, MASK.bool())
    assert list(model.losses) == ["task", "distillation"] and torch.allclose(out["loss"], total, atol=1e-6)


def test_nan_names_the_step_and_the_block(mod):
    model = WithLoss(mod.train())
    model.step = 41
    with torch.no_grad():
        mod.get_parameter("blocks.layers.1.up.weight").fill_(torch.nan)
    with pytest.raises(ModcompileError, match="a loss is not finite") as caught:
        model(labels=IDS, input_ids=IDS, attention_mask=MASK)
    assert caught.value.details["where"] == "step 41, block blocks.layers.1"


def test_compiled_nan_names_the_block_too(mod):
    model = WithLoss(mod.train())
    compiled = torch.compile(model, backend="eager", dynamic=False)
    compiled(labels=IDS, input_ids=IDS, attention_mask=MASK)
    with torch.no_grad():
        mod.get_parameter("blocks.layers.1.up.weight").fill_(torch.nan)
    with pytest.raises(ModcompileError, match="a loss is not finite") as caught:
        compiled(labels=IDS, input_ids=IDS, attention_mask=MASK)
    assert caught.value.details["where"] == "step 0, block blocks.layers.1"


@pytest.mark.parametrize("options", [{}, {"routing_weight": 0.1}])
def test_a_compiled_graph_hands_on_nothing_of_its_blocks(mod, options):
    """Each output has a gradient, which is as large, and zeros where nobody reads it."""
    shapes = []

    def backend(graph_module, _):
        shapes.extend(node.meta["example_value"].shape for node in graph_module.graph.output_node().all_input_nodes)
        return graph_module.forward

    model = WithLoss(mod.train(), **options)
    torch.compile(model, backend=backend, dynamic=False)(labels=IDS, input_ids=IDS, attention_mask=MASK)
    # The logits and losses.
    assert (*IDS.shape, 17) in shapes and set(shapes) <= {(*IDS.shape, 17), torch.Size()}
    assert not model(labels=IDS, input_ids=IDS, attention_mask=MASK)["logits"].requires_grad
    assert model(input_ids=IDS, attention_mask=MASK)["logits"].requires_grad
    eager = model(labels=IDS, input_ids=IDS, attention_mask=MASK)["loss"]
    assert list(model.losses) == (["task", "routing of blocks.layers.1", "routing of blocks.layers.3"] if options
                                  else ["task"]) and eager.isfinite()


def test_a_control_is_compiled_whole_too(mod):
    """What a routed model is compared with pays for nothing that it does not."""
    counter = torch._dynamo.testing.CompileCounter()
    model = WithLoss(pruned_model(mod, ["blocks.layers.1"]), teacher=Teacher(mod)).train()
    torch.compile(model, backend=counter, dynamic=False)(labels=IDS, input_ids=IDS, attention_mask=MASK)
    assert counter.frame_count == 1


def test_a_state_dict_has_no_tensor_twice(mod):
    model = WithLoss(mod, teacher=Teacher(mod))
    state = model.state_dict()
    assert "mod.head.weight" not in state and "mod.words.weight" in state
    assert len({value.data_ptr() for value in state.values()}) == len(state) == len(mod.state_dict()) - 1
    other = WithLoss(randomise_routers(convert(Words(), {"input_ids": IDS[:2, :5], "attention_mask": MASK[:2, :5]},
                                               MoDConfig(capacity_ratio=0.25, gate="sigmoid")), seed=3))
    with torch.no_grad():
        mod.get_parameter("words.weight").add_(1)
    assert str(other.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    assert torch.equal(other(**inputs)["logits"], model(**inputs)["logits"])


def test_outputs_without_logits():
    class Two(Words):
        def forward(self, input_ids):
            return (self.words(input_ids), self.blocks(self.words(input_ids)))

    mod = convert(Two(), {"input_ids": IDS[:2, :5]}, MoDConfig(capacity_ratio=0.25))
    with pytest.raises(UsageError, match="output has no logits"):
        WithLoss(mod)(input_ids=IDS)


def test_it_is_compiled_once_and_whole(mod):
    model = WithLoss(mod.train(), routing_weight=0.1, predictors=Predictors(mod))
    inputs = {"labels": IDS, "input_ids": IDS, "attention_mask": MASK}
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    for step in range(3):
        model.step = step
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(**inputs)["loss"]
        loss.backward()
        # As for an evaluation between steps.
        mod.eval()
        mod.train()
    # One graph, made once: the step, the trace and what is kept of the losses do not break it, nor make it anew.
    assert counter.frame_count == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(**inputs)["loss"], loss, atol=1e-6)
    # The losses' products are in half the precision, the logits of routers never.
    assert not torch.equal(model(**inputs)["loss"], loss)
    model.step = 5
    with torch.no_grad():
        mod.get_parameter("blocks.layers.1.up.weight").fill_(torch.nan)
    with pytest.raises(ModcompileError) as caught:
        compiled(**inputs)
    assert caught.value.details["where"] == "step 5, block blocks.layers.1"


# The Trainer


def trainer(folder, until=None):
    """Trains for 6 steps of 2, capacities falling, a checkpoint every other step."""
    transformers = pytest.importorskip("transformers")
    from modcompile.training.callback import RoutedTraining

    torch.manual_seed(3)
    mod = randomise_routers(convert(Words(), {"input_ids": IDS[:2, :5], "attention_mask": MASK[:2, :5]},
                                    MoDConfig(capacity_ratio=0.25, gate="sigmoid")))
    model = WithLoss(mod, routing_weight=0.1)
    seen = {}

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seen[state.global_step] = ({name: loss.item() for name, loss in model.losses.items()},
                                       mod.routed_blocks[0].capacity_ratio)
            if state.global_step == until:
                raise KeyboardInterrupt

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, learning_rate=0.05, save_steps=2,
        report_to=[], disable_tqdm=True, remove_unused_columns=False, label_names=["labels"], use_cpu=True,
        logging_steps=1, dataloader_pin_memory=False)
    data = [{"input_ids": ids, "labels": ids, "attention_mask": mask} for ids, mask in zip(IDS, MASK, strict=True)]
    made = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data,
                                callbacks=[RoutedTraining(model, CapacityAnnealing(mod, 4, 2)), Watch()])
    return made, mod, seen


def test_the_trainer_goes_on_bit_for_bit(tmp_path):
    from modcompile.training.callback import complete_checkpoint

    whole, mod, expected = trainer(tmp_path / "whole")
    whole.train(resume_from_checkpoint=complete_checkpoint(tmp_path / "whole"))
    assert [ratio for _, ratio in expected.values()] == ["1/1", "1/1", "5/8", "5/8", "1/4", "1/4"]
    killed, *_ = trainer(tmp_path / "killed", until=5)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    # The last checkpoint was being written.
    (tmp_path / "killed" / "checkpoint-6").mkdir()
    resumed, other, seen = trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=complete_checkpoint(tmp_path / "killed"))
    assert seen == {5: expected[5], 6: expected[6]}
    for name, value in mod.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert resumed.evaluate()["eval_loss"] == pytest.approx(
        next_token_loss(mod(input_ids=IDS, attention_mask=MASK)["logits"], IDS).item(), rel=1e-4)
    mod.eval().save_pretrained(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(IDS, MASK)["logits"], mod(IDS, MASK)["logits"])


# Several processes


RANKS = '''
import sys, torch
sys.path.insert(0, {tests!r})
from training.test_with_loss import IDS, MASK, Words
from tiny import randomise_routers
import modcompile as mc
from modcompile.training import Predictors, WithLoss
import torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
mod = randomise_routers(mc.convert(Words(), {{"input_ids": IDS[:2, :5], "attention_mask": MASK[:2, :5]}},
                                   mc.MoDConfig(capacity_ratio=0.25, gate="sigmoid")))
model = WithLoss(mod.train(), routing_weight=0.1, predictors=Predictors(mod))
if {sharded!r}:
    from torch.distributed.fsdp import fully_shard
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for path in ["blocks.layers.0", "blocks.layers.1"]:
        fully_shard(model.mod.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)
else:
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(2):
    share = slice(2 * rank, 2 * rank + 2)
    optimizer.zero_grad()
    model(labels=IDS[share], input_ids=IDS[share], attention_mask=MASK[share])["loss"].backward()
    optimizer.step()
flat = torch.cat([(p.full_tensor() if {sharded!r} else p).detach().flatten() for p in model.parameters()])
all_of = [torch.empty_like(flat) for _ in range(2)]
dist.all_gather(all_of, flat)
assert torch.equal(*all_of), "the ranks' parameters differ"
if rank == 0:
    torch.save(flat, {out!r})
dist.destroy_process_group()
'''


@pytest.mark.long
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_are_one_with_both_shares(sharded, tmp_path):
    out = tmp_path / "parameters.pt"
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(tests=str(Path(__file__).parents[1]), out=str(out), sharded=sharded))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script],
                   check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    torch.manual_seed(0)
    mod = randomise_routers(convert(Words(), {"input_ids": IDS[:2, :5], "attention_mask": MASK[:2, :5]},
                                    MoDConfig(capacity_ratio=0.25, gate="sigmoid")))
    model = WithLoss(mod.train(), routing_weight=0.1, predictors=Predictors(mod))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        shares = (slice(0, 2), slice(2, 4))
        torch.stack([model(labels=IDS[s], input_ids=IDS[s], attention_mask=MASK[s])["loss"] for s in shares]
                    ).mean().backward()
        optimizer.step()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(torch.load(out), flat, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("command", [
    ["train_decoder.py"], ["train_trainer.py"], ["train_accelerate.py"],
    ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train_accelerate.py"],
], ids=["decoder", "trainer", "accelerate", "accelerate-2"])
def test_an_example_runs(command, tmp_path):
    *first, script = command
    done = subprocess.run([sys.executable, *first, EXAMPLES / script, "--tiny"], check=True, timeout=400,
                          capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
    if first:
        assert "of 2 processes" in done.stdout
