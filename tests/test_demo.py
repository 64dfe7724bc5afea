"""The demo's parts that its tiny run, a stage of the checks, does not reach: where the weights come from."""

from types import ModuleType

import pytest
import torch
from scripts import EXAMPLES, load_script
from weights import minilm


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return load_script(EXAMPLES / "demo.py")


@pytest.mark.weights
def test_pretrained_weights_and_real_text(demo: ModuleType):
    expected = minilm()
    model, inputs, origin = demo.load_model(tiny=False)
    assert origin == "all-MiniLM-L6-v2, its pretrained weights"
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(model.get_parameter(words), expected.get_parameter(words))
    mask = inputs["attention_mask"]
    assert mask.shape == inputs["input_ids"].shape and mask.shape[0] == len(demo.SENTENCES)
    # The batch is padded, and every sentence has words between the two special tokens.
    assert 5 < mask.sum(1).min() < mask.shape[1]


def test_without_the_package_the_model_is_random_and_says_so(demo: ModuleType, monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "a_package_that_nobody_has")
    model, inputs, origin = demo.load_model(tiny=False)
    assert origin == "random weights of its shape, for a_package_that_nobody_has is not installed"
    assert model.config.hidden_size == 384 and len(model.encoder.layer) == 6
    assert 1 <= inputs["attention_mask"].sum(1).min() < inputs["attention_mask"].shape[1]


def test_a_tiny_model_does_not_look_for_the_package(demo: ModuleType, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: pytest.fail("looked for weights"))
    model, _, origin = demo.load_model(tiny=True)
    assert origin == "a tiny random model" and model.config.hidden_size == 32


def test_a_step_that_fails_tells_nothing(demo: ModuleType, capsys):
    with pytest.raises(ZeroDivisionError), demo.Step("divide") as step:
        step.done("never")
        print(1 / 0)
    with demo.Step("add") as step:
        step.doing("adding")
        step.done("1 + 1 = 2")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("add ") and lines[0].endswith(" s   1 + 1 = 2")
