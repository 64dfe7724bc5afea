"""Calibration as a whole, from Python and from the command line."""

import copy
import json

import pytest
import torch
from tiny import WIDTH, Block, Mlp, Stack, randn
from torch import nn
from torch.nn import functional

import modcompile as mc
from modcompile.calibration import calibrate, calibrate_each, fit_routers, pruning_order, refit_routers
from modcompile.calibration.batches import bind_batches
from modcompile.calibration.measure import Measured, importance
from modcompile.calibration.trials import DENSE, DROPPED, Trials
from modcompile.cli import main
from modcompile.errors import UnsupportedGraphError, UsageError
from modcompile.flops import count_flops
from modcompile.variants import dense_model, masked_model, oracle_model, pruned_blocks, pruned_model

# B batch  S rows  V vocabulary
B, S, V = 2, 24, 13
SIZES = {"batch": B, "sequence": S}


class Decoder(nn.Module):
    """A causal model of words whose second block does next to nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.stack = nn.Embedding(V, WIDTH), Stack(*(Block(causal=True) for _ in range(3)))
        with torch.no_grad():
            for parameter in (self.stack.layers[1].attention.out, self.stack.layers[1].mlp.down):
                parameter.weight *= 1e-3
                parameter.bias *= 1e-3

    def forward(self, ids):
        return functional.linear(self.stack(self.table(ids)), self.table.weight)


def texts(count=3):
    return [torch.randint(V, (B, S), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


@pytest.fixture(scope="module")
def graph():
    return mc.capture(Decoder(), (texts()[0],))


@pytest.fixture(scope="module")
def result(graph):
    return calibrate(graph, texts(), 0.7, ratios=(0.25, 0.5))


def test_the_budget_is_met_as_flops_are_counted(result):
    dense = count_flops(dense_model(result.mod), SIZES)
    share = count_flops(result.mod, SIZES) / dense
    # One row of one block.
    assert 0.7 - 1 / S / 3 <= share <= 0.7
    assert share == pytest.approx(result.report["flops"])


def test_the_report_tells_how_it_came_about(result):
    report = result.report
    assert report["objective"] == "divergence"
    assert set(report["attend_to"]) == {"all", "chosen"}
    better = min(way["loss"] for way in report["attend_to"].values())
    assert report["loss"]["calibrated"] == better == report["attend_to"][result.mod.config.attend_to]["loss"]
    assert json.loads(json.dumps(report)) == report


def test_it_is_a_conversion_with_these_ratios_and_routers(graph, result):
    config = result.mod.config
    assert config.gate == "straight-through"
    ratios = [block["ratio"] for block in result.report["blocks"].values() if block["ratio"] != "1"]
    assert [str(ratio) for ratio in config.ratios(list(result.mod.routers))] == ratios
    again = mc.convert(graph, config=config)
    for path, router in again.routers.items():
        router.load_state_dict(result.mod.routers[path].state_dict())
        assert router.weight.any()
    with torch.no_grad():
        assert torch.equal(again(texts()[0]), result.mod(texts()[0]))


def divergence(model, dense, calls):
    with torch.no_grad():
        made, before = (torch.cat([each(ids) for ids in calls]).double().log_softmax(-1) for each in (model, dense))
    return float((before.exp() * (before - made)).sum(-1).mean())


BUDGETS = (0.9, 0.8, 0.7, 0.6)
# A mean of differences of logarithms in float32.
ROUNDING = 1e-7


@pytest.fixture(scope="module")
def results(graph):
    return dict(zip(BUDGETS, calibrate_each(graph, texts(2), BUDGETS[::-1], ratios=(0.25, 0.5), attend_to="all"),
                    strict=True))  # fmt: skip


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_calibrated_model_is_never_worse_than_the_pruned_one(graph, results, budget):
    mod, report = results[budget].mod, results[budget].report
    order = pruning_order(graph, texts(2), budget)
    flops = count_flops(graph, SIZES)
    pruned = next(model for n in range(1, len(order))
                  if count_flops(model := pruned_model(mod, order[:n]), SIZES) <= budget * flops)  # fmt: skip
    losses = [divergence(model, graph, texts(2)) for model in (mod, pruned)]
    assert losses[0] <= losses[1] + ROUNDING
    assert [report["loss"][name] for name in ("calibrated", "pruned")] == pytest.approx(losses, rel=1e-3, abs=ROUNDING)
    assert report["budget"] == budget
    assert count_flops(mod, SIZES) / flops == pytest.approx(report["flops"]) and report["flops"] <= budget


def test_blocks_that_are_worth_nothing_are_left_out(graph, tmp_path):
    result = calibrate(graph, texts(2), 0.6, ratios=(0.25, 0.5), attend_to="all", objective="outputs")
    mod, dropped = result.mod, result.mod.config.dropped
    assert dropped == ("stack.layers.1",)
    assert [path for path, block in result.report["blocks"].items() if block["ratio"] == "0"] == [*dropped]
    # The graphs that it is compared with leave them out too, but for the dense one.
    assert mod.config.dropped == dropped and count_flops(dense_model(mod), SIZES) == count_flops(graph, SIZES)
    assert count_flops(oracle_model(mod), SIZES) <= count_flops(mod, SIZES)
    with torch.no_grad():
        expected = mod(texts()[0])
        torch.testing.assert_close(masked_model(mod)(texts()[0]), expected, rtol=1e-4, atol=1e-5)
        again = mod.with_capacity(0.5).with_capacity(mod.config.capacity_ratio)
        assert torch.equal(again(texts()[0]), expected) and again.config == mod.config
        assert [record["name"] for record in again.passes].count("prune-blocks") == 1
        assert torch.equal(mc.load(mod.save_pretrained(tmp_path / "made"))(texts()[0]), expected)


# One block is left out, one is routed.
GIVEN = mc.MoDConfig(blocks=("stack.layers.2",), capacity_ratio=0.25, dropped=("stack.layers.1",), attend_to="all",
                     gate="straight-through", capacity_multiple=2)  # fmt: skip


def test_routers_of_given_blocks_are_fitted_with_the_blocks_in_place(graph):
    result = fit_routers(graph, texts(), GIVEN)
    routed, dropped = GIVEN.blocks[0], GIVEN.dropped[0]
    config = GIVEN.model_copy(update={"blocks": (routed, dropped), "dropped": ()})
    batches = bind_batches(graph, [(ids,) for ids in texts()], config)
    trials = Trials(graph, config, "auto", batches)
    for state in ({routed: DENSE, dropped: DENSE}, {routed: GIVEN.ratios([routed])[0], dropped: DROPPED}):
        generator = torch.Generator().manual_seed(0)
        seen = [importance(Measured.of(trials), state, batch, 2, generator, "") for batch in batches]
        states, scores = (torch.cat([each[i][routed] for each in seen]).double() for i in (0, 1))
        x, y = (each - each.mean(1, keepdim=True) for each in (states, scores))
        gram = torch.einsum("bsd,bse->de", x, x)
        ridge = 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        weight = torch.linalg.solve(gram + ridge, torch.einsum("bsd,bs->d", x, y))
        with torch.no_grad():
            trials.mod.routers[routed].weight.copy_(weight[None])
            trials.mod.routers[routed].bias.copy_(-weight @ states.mean((0, 1)))
    made = result.mod.routers[routed]
    torch.testing.assert_close(made.weight[0].double(), weight, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(made(states.float()).mean(), torch.tensor(0.0), rtol=0, atol=1e-5)


def test_given_blocks_are_converted_as_they_are_given(graph):
    result = fit_routers(graph, texts(), GIVEN)
    assert result.mod.config == GIVEN and list(result.mod.routers) == [*GIVEN.blocks]
    report = result.report
    assert {path: block["ratio"] for path, block in report["blocks"].items()} == {
        "stack.layers.1": "0", "stack.layers.2": "1/4"}  # fmt: skip
    assert report["flops"] == count_flops(result.mod, SIZES) / count_flops(graph, SIZES)
    assert report["loss"]["calibrated"] == pytest.approx(divergence(result.mod, graph, texts(2)), rel=1e-3)
    assert json.loads(json.dumps(report)) == report


def test_routers_are_fitted_again_to_the_model_as_it_is(graph):
    made = fit_routers(graph, texts(), GIVEN).mod
    generator = torch.Generator().manual_seed(1)
    routed, dropped = GIVEN.blocks[0], GIVEN.dropped[0]
    mod = copy.deepcopy(made).train()
    with torch.no_grad():
        for name, parameter in mod.named_parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean()
            # What is left out is not looked at.
            if dropped in name:
                parameter.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in mod.state_dict().items()}
    r2 = refit_routers(mod, texts())
    changed = [name for name, tensor in mod.state_dict().items() if not torch.equal(tensor, before[name])
               and not before[name].isnan().any()]
    assert {name.rpartition(".")[0] for name in changed} == {f"router.{routed}"} and mod.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in mod.parameters())

    # The same model made by hand: two blocks, of which the second one's routed rows are what is left in.
    model = Decoder()
    layers = model.stack.layers
    del layers[1]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name.replace("layers.1", "layers.2")])
    hand = mc.capture(model, (texts()[0],))
    router = copy.deepcopy(made.routers[routed])
    router.load_state_dict({key: before[f"router.{routed}.{key}"] for key in ("weight", "bias")})
    config = GIVEN.model_copy(update={"blocks": ("stack.layers.1",), "dropped": ()})
    again = mc.convert(hand, config=config)
    again.routers["stack.layers.1"].load_state_dict(router.state_dict())
    assert list(refit_routers(again, texts()).values()) == pytest.approx([*r2.values()], rel=1e-4)
    torch.testing.assert_close(again.routers["stack.layers.1"].weight, mod.routers[routed].weight, rtol=1e-3, atol=1e-6)
    assert 0 < r2[routed] <= 1
    without = mc.convert(graph, config=GIVEN.model_copy(update={"blocks": (dropped,)}))
    assert not without.routers and refit_routers(without, texts()) == {}


@pytest.mark.parametrize("options", [dict(gate="raw"), dict(router="mlp"), dict(axis="sequence")], ids=str)
def test_routers_that_do_more_than_rank_are_not_fitted(graph, options):
    config = mc.MoDConfig(**{"gate": "straight-through"} | options)
    with pytest.raises(UsageError, match="fitted to rank the rows of a sequence"):
        fit_routers(graph, texts(), config)
    with pytest.raises(UsageError, match="fitted to rank the rows of a sequence"):
        refit_routers(mc.convert(graph, config=config), texts())


@pytest.mark.long
def test_the_same_arguments_give_the_same_model(graph, results):
    torch.manual_seed(1)
    first, again = results[0.9], mc.calibrate(graph, texts(2), 0.9, ratios=(0.25, 0.5), attend_to="all")
    assert again.report == first.report
    for path, router in first.mod.routers.items():
        assert torch.equal(router.weight, again.mod.routers[path].weight)


@pytest.mark.long
def test_padding_does_not_matter():
    valid = torch.arange(S) < torch.tensor([[S], [9]])
    model, made = Stack(*(Block() for _ in range(2))), []
    for noise in (1.0, 100.0):
        hidden = randn(B, S, WIDTH).where(valid[..., None], noise * randn(B, S, WIDTH, seed=1))
        made.append(calibrate(model, [{"hidden": hidden, "attention_mask": valid.long()}], 0.8, ratios=(0.25,),
                              attend_to="chosen"))  # fmt: skip
    first, second = made
    assert first.report["objective"] == "outputs" and first.report["rows"] == S + 9
    assert first.mod.config == second.mod.config
    assert first.report["loss"]["calibrated"] == pytest.approx(second.report["loss"]["calibrated"], rel=1e-3)


def test_the_order_of_pruning_begins_with_the_block_that_does_least(graph, result):
    order = pruning_order(graph, texts(1), 0.6, objective="outputs")
    assert order[0] == "stack.layers.1" and sorted(order) == [f"stack.layers.{i}" for i in range(3)]
    assert pruned_blocks(result.mod, SIZES, order) == ["stack.layers.1"]


@pytest.mark.long
def test_blocks_that_cannot_attend_to_all_rows_attend_to_chosen_ones():
    class Twice(nn.Module):
        """Two attentions: nothing to cut at."""

        def __init__(self):
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, hidden):
            return self.second(self.first(hidden))

    model = Stack(Twice(), Twice())
    result = calibrate(model, [(randn(B, S, WIDTH),)], 0.8, ratios=(0.25,))
    assert result.mod.config.attend_to == "chosen"
    assert "cannot attend to all rows" in result.report["attend_to"]["all"]["refused"]
    with pytest.raises(UnsupportedGraphError, match="cannot attend to all rows"):
        calibrate(model, [(randn(B, S, WIDTH),)], 0.8, attend_to="all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batches=[]), "calibration goes through its batches many times"),
        (dict(batches=iter(())), "calibration goes through its batches many times"),
        (dict(budget=0.0), "the budget does not fit"),
        (dict(budget=1.0), "the budget does not fit"),
        (dict(ratios=()), "a ratio does not fit"),
        (dict(ratios=(0.5, 1.0)), "a ratio does not fit"),
        (dict(draws=0), "an option is too small"),
        (dict(ridge=0.0), "an option is too small"),
        (dict(padding_mask="mask"), "padding_mask names no input"),
        (dict(blocks=[7]), "blocks names no block"),
    ],
)
def test_arguments_that_do_not_fit(graph, options, message):
    with pytest.raises(UsageError, match=message):
        calibrate(graph, **dict(batches=texts(), budget=0.7, attend_to="chosen") | options)


def test_weights_that_are_not_numbers_name_the_block():
    model = Stack(*(Mlp() for _ in range(3)))
    with torch.no_grad():
        model.layers[1].up.weight[0, 0] = torch.nan
    with pytest.raises(UsageError, match="is not a number") as raised:
        calibrate(model, [(randn(B, S, WIDTH),)], 0.8)
    assert raised.value.details["where"].startswith("layers.1")


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A transformers folder with a tokenizer of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=27, n_positions=48)
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    words = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=" "))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ").save_pretrained(path)
    (path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    return path


def call(*arguments):
    with pytest.raises(SystemExit) as raised:
        main([str(argument) for argument in arguments])
    return raised.value.code or 0


def test_convert_calibrates(folder, tmp_path, capfd):
    made = tmp_path / "made"
    options = ["--calibrate", folder / "text.txt", "--budget", 0.9, "--shape", "input_ids=2x32", "--attend-to", "all"]
    assert call("convert", folder, "-o", made, *options, "--json") == 0
    data = json.loads(capfd.readouterr().out)
    report = data["calibration"]
    assert (report["objective"], report["rows"]) == ("divergence", 26 * 32)
    assert report["flops"] <= 0.9
    mod = mc.load(made)
    assert mod.config.attend_to == "all" and all(router.weight.any() for router in mod.routers.values())


def test_convert_fits_routers_of_given_blocks(folder, tmp_path, capfd):
    made = tmp_path / "made"
    options = ["--calibrate", folder / "text.txt", "--shape", "input_ids=2x32"]
    assert call("convert", folder, "-o", made, *options, "--blocks", "1", "--capacity-ratio", "1/4", "--json") == 0
    report = json.loads(capfd.readouterr().out)["calibration"]
    mod = mc.load(made)
    assert [block["ratio"] for block in report["blocks"].values()] == ["1/4"] and len(mod.routers) == 1
    assert mod.config.gate == "straight-through" and next(iter(mod.routers.values())).weight.any()


def test_a_device_that_is_not_there(folder, tmp_path, capfd):
    options = ["--calibrate", folder / "text.txt", "--budget", 0.9, "--device", "cuda:99"]
    assert call("convert", folder, "-o", tmp_path / "made", *options) == 5
    assert "the device is not there" in capfd.readouterr().err


def test_a_tokenizer_that_does_not_fit(folder, tmp_path, capfd):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["quick"])
    tokenizer.save_pretrained(tmp_path / "other")
    options = ["--calibrate", folder / "text.txt", "--budget", 0.9, "--shape", "input_ids=2x32"]
    assert call("convert", folder, "-o", tmp_path / "made", *options, "--tokenizer", tmp_path / "other") == 2
    shown = capfd.readouterr().err
    assert "the tokens are not of this model's vocabulary" in shown and "0 to 26" in shown
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibrate", "{text}"], "calibration needs a budget"),
        (["--budget", "0.9"], "--budget is for calibration"),
        (["--calibrate", "{text}", "--budget", "0.9", "--gate", "raw"], "calibration chooses this itself"),
        (["--calibrate", "{text}", "--budget", "0.9", "--shape", "ids=2x32"], "a text is cut into batches"),
        (["--calibrate", "{text}", "--budget", "0.9", "--shape", "input_ids=2x64"], "does not take these sizes"),
        (["--calibrate", "{text}", "--budget", "0.9", "--shape", "input_ids=99x32"], "the text is too short"),
        (["--calibrate", "{text}.no", "--budget", "0.9"], "the text cannot be read"),
        (["--calibrate", "{text}", "--budget", "0.01", "--shape", "input_ids=2x32"], "the budget cannot be met"),
        (["--device", "cpu"], "--device is for calibration"),
        (["--calibrate", "{text}", "--budget", "0.9", "--tokenizer", "{text}"], "there is no tokenizer"),
    ],
)
def test_options_that_do_not_go_together(folder, tmp_path, capfd, options, message):
    options = [option.format(text=folder / "text.txt") for option in options]
    assert call("convert", folder, "-o", tmp_path / "made", *options) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("rows", [pytest.param(2, marks=pytest.mark.long), 5])
def test_in_short_sequences_two_ratios_are_the_same_rows(rows):
    result = calibrate(Stack(*(Block() for _ in range(4))), [(randn(3, rows, WIDTH),)], budget=0.7)
    assert result.report["flops"] <= 0.7


def assert_change(result, model, batch):
    """The reported loss is how far the model that is returned is from the dense one, computed apart from the code."""
    with torch.no_grad():
        dense, made = model(**batch).double(), result.mod(**batch).double()
    assert result.report["loss"]["calibrated"] == pytest.approx(
        float((made - dense).square().sum() / dense.square().sum()), rel=1e-4)


def test_the_report_of_given_blocks_is_of_the_model_that_is_returned():
    x = randn(3, 10, WIDTH)
    model = Stack(*(Block() for _ in range(4))).eval()
    result = fit_routers(model, [(x,)], mc.MoDConfig(blocks=(1, 2), capacity_ratio=0.5, gate="scale",
                                                     capacity_multiple=8))
    sizes = {"batch": 3, "sequence": 10}
    assert result.report["flops"] == count_flops(result.mod, sizes) / count_flops(dense_model(result.mod), sizes)
    assert_change(result, model, {"hidden": x})


class Pooled(nn.Module):
    """The mean valid row, [B, D]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stack = Stack(*(Block() for _ in range(4)))

    def forward(self, hidden, attention_mask):
        weights = attention_mask[..., None].float()
        return (self.stack(hidden, attention_mask) * weights).sum(1) / weights.sum(1)


@pytest.mark.long
def test_an_output_as_wide_as_a_sequence_is_long_is_not_padded():
    mask = (torch.arange(WIDTH) < torch.tensor([[WIDTH], [3], [5]])).long()
    batch = {"hidden": randn(3, WIDTH, WIDTH), "attention_mask": mask}
    model = Pooled().eval()
    result = calibrate(model, [batch], budget=0.7)
    assert_change(result, model, batch)


class Crossed(nn.Module):
    """An encoder, and a decoder that sees it, with a padding mask of the encoder's rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = {"d_model": WIDTH, "nhead": 2, "dim_feedforward": 16, "batch_first": True, "dropout": 0.0}
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(**layers) for _ in range(2))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(**layers) for _ in range(2))

    def forward(self, source, attention_mask, target):
        padding = attention_mask == 0
        for layer in self.encoder:
            source = layer(source, src_key_padding_mask=padding)
        for layer in self.decoder:
            target = layer(target, source, memory_key_padding_mask=padding)
        return target


@pytest.mark.long
def test_an_encoders_mask_is_not_a_decoders():
    def call(rows):
        mask = (torch.arange(7) < torch.tensor([[7], [4]])).long()
        return {"source": randn(2, 7, WIDTH), "attention_mask": mask, "target": randn(2, rows, WIDTH, seed=1)}

    model = Crossed().eval()
    mod = mc.convert(model, call(5), mc.MoDConfig(blocks="decoder.*", capacity_ratio=1.0, gate="straight-through"))
    for rows in (5, 7):
        assert torch.allclose(mod(**call(rows)), model(**call(rows)), atol=1e-5)
    half = mc.convert(model, call(5), mc.MoDConfig(blocks="all", capacity_ratio=0.5, gate="straight-through"))
    with mc.trace_routing(half) as trace:
        half(**call(7))
    taken = {path: block.taken() for path, block in trace.items()}
    assert all(taken[f"decoder.{i}"].sum(1).tolist() == [4, 4] for i in range(2))
    assert not any(taken[f"encoder.{i}"][1, 4:].any() for i in range(2))
    result = calibrate(model, [call(5)], budget=0.8)
    assert_change(result, model, call(5))


@pytest.mark.parametrize(("call", "options"), [
    (fit_routers, {"draws": 0}), (fit_routers, {"trial_batches": 0}), (fit_routers, {"ridge": -1.0}),
    (pruning_order, {"trial_batches": 0}), (calibrate, {"exchanges": -1})])
def test_numbers_that_do_not_fit(call, options):
    given = mc.MoDConfig(blocks=(1,), gate="straight-through") if call is fit_routers else 0.8
    with pytest.raises(UsageError, match="an option is too small"):
        call(Stack(Block(), Block()), [(randn(2, 9, WIDTH),)], given, **options)


def test_an_objective_that_there_is_not():
    with pytest.raises(UsageError, match=r"no such objective(.|\n)*next_token"):
        calibrate(Stack(Block(), Block()), [(randn(2, 9, WIDTH),)], 0.8, objective="next_token")
