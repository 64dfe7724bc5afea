"""What a MODEL on the command line may be, and what it may not."""

import json
import sys

import pytest
import torch
import transformers as hf
from torch import nn

from modcompile.errors import IntegrityError, RuntimeUnavailableError, UsageError
from modcompile.load_source import example_for, load_graph, load_source

# B batch  S rows

TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
IMAGE = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, patch_size=8)


def save(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    return save(hf.BertForMaskedLM(hf.BertConfig(**TEXT)), tmp_path / "model")


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_transformers_folder_gives_the_model_that_was_saved(folder):
    source = load_source(str(folder))
    assert type(source.model) is hf.BertForMaskedLM
    assert not source.model.training
    assert source.converted is None
    # In this order: a mask is the second thing that most models take.
    assert [(name, tuple(value.shape)) for name, value in source.example_inputs.items()] == [
        ("input_ids", (2, 16)), ("attention_mask", (2, 16))]
    torch.manual_seed(0)
    expected = hf.BertForMaskedLM(hf.BertConfig(**TEXT)).eval()(**source.example_inputs).logits
    assert torch.equal(source.model(**source.example_inputs).logits, expected)


def test_weights_are_float32_whatever_they_were_saved_as(tmp_path):
    folder = save(hf.BertModel(hf.BertConfig(**TEXT)).to(torch.bfloat16), tmp_path / "model")
    assert {parameter.dtype for parameter in load_source(str(folder)).model.parameters()} == {torch.float32}


@pytest.mark.parametrize("model, shapes", [
    (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=99)),
     {"input_ids": (2, 16), "attention_mask": (2, 16)}),
    (lambda: hf.ViTModel(hf.ViTConfig(**IMAGE, image_size=32, num_channels=1)), {"pixel_values": (2, 1, 32, 32)}),
    (lambda: hf.ViTModel(hf.ViTConfig(**IMAGE, image_size=[32, 48])), {"pixel_values": (2, 3, 32, 48)}),
    (lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT, pad_token_id=1)),
     {"input_ids": (2, 16), "attention_mask": (2, 16)}),
])
def test_examples_follow_the_signature(model, shapes):
    model = model()
    example = example_for(model)
    assert {name: tuple(value.shape) for name, value in example.items()} == shapes
    assert model(**example)
    padding = getattr(model.config, "pad_token_id", None)
    assert padding is None or not (example.get("input_ids") == padding).any()


def test_inputs_that_cannot_be_guessed():
    model = nn.Linear(2, 2)
    model.main_input_name, model.config = "input_values", hf.BertConfig()
    with pytest.raises(UsageError, match="inputs of this model are not known") as error:
        example_for(model)
    assert "package.module:function" in error.value.details["fix"]


def test_lost_weights_are_not_replaced_by_random_ones(folder):
    hf.BertModel(hf.BertConfig(**TEXT), add_pooling_layer=False).save_pretrained(folder)
    edit(folder, architectures=["BertForMaskedLM"])
    with pytest.raises(IntegrityError, match="lacks weights") as error:
        load_source(str(folder))
    assert "cls.predictions" in error.value.details["found"]


def test_damaged_folders(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    with pytest.raises(IntegrityError, match="cannot load the folder"):
        load_source(str(folder))
    weights.unlink()
    with pytest.raises(IntegrityError, match="cannot load the folder"):
        load_source(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(IntegrityError, match="not a JSON object"):
        load_source(str(folder))


def test_pickled_weights_are_not_read(folder):
    model = hf.BertForMaskedLM(hf.BertConfig(**TEXT))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(IntegrityError):
        load_source(str(folder))


@pytest.mark.parametrize("names", [None, [], ["NoSuchModel"], ["BertConfig"]])
def test_architectures_that_are_no_model_class(folder, names):
    edit(folder, architectures=names)
    with pytest.raises(UsageError, match="names no class of transformers"):
        load_source(str(folder))


def test_code_in_a_folder_is_not_run(folder):
    (folder / "own.py").write_text("raise SystemExit('this was run')\n")
    edit(folder, model_type="own-type", architectures=["BertModel"],
         auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"})
    with pytest.raises(IntegrityError, match="cannot load the folder"):
        load_source(str(folder))


def test_other_folders_and_names(tmp_path):
    (tmp_path / "file.txt").touch()
    for name, message in {
        str(tmp_path): "holds no model",
        str(tmp_path / "file.txt"): "a file",
        str(tmp_path / "nosuch"): "no such folder",
        "owner/model-on-a-hub": "must be downloaded",
        "no.such.module:function": "No module named",
        "os.path:nosuch": "has no attribute",
        ":function": "cannot be imported",
    }.items():
        with pytest.raises(UsageError, match=message):
            load_source(name)


def test_a_function_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "my_own_model.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Linear(2, 3).train(), (torch.randn(4, 2),)\n"
        "def wrong():\n    return torch.nn.Linear(2, 3)\n")
    source = load_source("my_own_model:build")
    assert not source.model.training
    assert source.example_inputs[0].shape == (4, 2)
    with pytest.raises(UsageError, match="returns something else"):
        load_source("my_own_model:wrong")
    (tmp_path / "broken_model.py").write_text("def build(:\n")
    (tmp_path / "failing_model.py").write_text("raise RuntimeError('no weights here')\n")
    (tmp_path / "other_model.py").write_text("def build(size):\n    return size\n"
                                             "def absent():\n    open('nosuch')\n")
    for name, said in (("broken_model:build", "fails when it is imported.*SyntaxError"),
                       ("failing_model:build", "fails when it is imported.*RuntimeError: no weights here"),
                       ("other_model:build", "function fails.*TypeError.*size"),
                       ("other_model:absent", "function fails.*FileNotFoundError")):
        with pytest.raises(UsageError, match=f"(?s){said}.*where: {name}"):
            load_source(name)


def test_without_transformers(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeUnavailableError) as error:
        load_source(str(folder))
    assert error.value.details["fix"] == 'pip install "modcompile[hf]"'


def test_as_a_graph(folder, tmp_path):
    import modcompile

    graph = load_graph(str(folder))
    assert [spec.name for spec in graph.inputs] == ["input_ids", "attention_mask"]
    mod = modcompile.convert(graph, config=modcompile.MoDConfig(blocks=[1]))
    mod.save_pretrained(tmp_path / "converted")
    source = load_source(str(tmp_path / "converted"))
    assert source.converted is source.model
    assert [block.path for block in load_graph(str(tmp_path / "converted")).routed_blocks] == ["bert.encoder.layer.1"]
