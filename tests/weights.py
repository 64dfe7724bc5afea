"""Real pretrained weights, as examples/pretrained.py reads them: where they are not installed the test is skipped."""

__all__ = ["minilm", "minilm_folder", "smollm2"]

from pathlib import Path

import pytest
from scripts import EXAMPLES, load_script
from torch import nn

_PRETRAINED = load_script(EXAMPLES / "pretrained.py")


def minilm_folder() -> Path:
    """Where all-MiniLM-L6-v2's files are, its tokenizer among them."""
    return _loaded(lambda: _PRETRAINED.folder_of(*_PRETRAINED.MINILM))


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2: BERT, 6 blocks, D 384."""
    return _loaded(_PRETRAINED.minilm_model)


def smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct: Llama, 30 blocks, D 576, 9 heads over 3; float32."""
    return _loaded(_PRETRAINED.smollm2_model)


def _loaded(load) -> nn.Module:
    try:
        return load()
    except _PRETRAINED.NotInstalled as error:
        pytest.skip(f"no weights: {error}")
