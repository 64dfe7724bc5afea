"""A zoo of tiny models with random weights: every way of attending, placing and normalising that must be routable.

Each `Family` knows how to build its model, how to make inputs of any size, and where its blocks are. Nothing here knows
of modcompile. Widths are chosen so that no dim can be mistaken for another: D 32 (48 for images), 4 heads of 8 (12),
64 in the MLP, 128 positions, 99 words, and sequences of 17, 33 or 63 rows.
"""

__all__ = ["FAMILIES", "IMAGES", "PADDED", "Family", "family"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

# B batch  S rows  D model dim  H heads  d head dim  V words

WORDS = 99
POSITIONS = 128
DEPTH = 4


@dataclass(frozen=True)
class Family:
    """One architecture of the zoo.

    Args:
        name: Its name in test ids.
        build: Makes the model: float32, eval mode, the same random weights every time.
        block: Path of its blocks, with ``{}`` where the index goes.
        traits: What makes it different from the others.
        inputs: ``inputs(batch, rows, padding, seed)`` makes keyword arguments for a call.
        paddings: The sides its inputs can be padded on; empty when it takes no padding mask.
        padding_mask: The input that is the mask, after "~" when it is true for padding; None means ``attention_mask``.
        rows: The sequence length when the model fixes it, else None.
        width: Its model dim.
        at_positions: For blocks that number their rows inside: ``at_positions(block, positions, rows)`` is a context
            within which the rows of a block's call are those at ``positions`` ``[K]`` among ``rows``.
    """

    name: str
    build: Callable[[], nn.Module]
    block: str
    traits: str
    inputs: Callable[..., dict[str, Tensor]]
    paddings: tuple[str, ...] = ()
    padding_mask: str | None = None
    rows: int | None = None
    width: int = 32
    at_positions: Callable[..., Any] | None = None

    @property
    def blocks(self) -> list[str]:
        """Paths of the blocks, in order."""
        return [self.block.format(index) for index in range(DEPTH)]

    @property
    def routed(self) -> list[str]:
        """Paths of the blocks that "every-other" routes."""
        return self.blocks[1::2]

    def example(self) -> dict[str, Tensor]:
        """Inputs of the size that a user would trace with: padded where the model can be padded."""
        return self.inputs(2, self.rows or 17, self.paddings[0] if self.paddings else None, seed=1)

    def valid(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """Reads the padding mask of some inputs: ``[B, S]`` bool, true for words; None when they have none."""
        name = self.padding_mask or "attention_mask"
        mask = inputs.get(name.lstrip("~"))
        return mask if mask is None else mask.bool() ^ name.startswith("~")

    def __str__(self) -> str:
        return self.name


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter a random value large enough that each block changes its rows visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model.eval()


def built(model: Callable[[Any], nn.Module], config: Callable[..., Any], **options: Any) -> Callable[[], nn.Module]:
    """Returns a builder of a transformers model from the classes of the model and of its configuration."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return randomise(model(config(**options)))

    return build


# Inputs


def padding_mask(batch: int, rows: int, padding: str | None) -> Tensor:
    """Makes a mask [B, S] int64, 1 for words: the first text is full, the second half as long, the others 5 words."""
    mask = torch.ones(batch, rows, dtype=torch.long)
    for index in range(1, batch) if padding else ():
        mask[index, max(5, rows - index * rows // 2) :] = 0
    return mask.flip(1) if padding == "left" else mask


def masked_text(batch: int, rows: int, padding: str | None, seed: int) -> dict[str, Tensor]:
    """Makes words and their padding mask."""
    words = torch.randint(3, WORDS, (batch, rows), generator=torch.Generator().manual_seed(seed))
    mask = padding_mask(batch, rows, padding)
    return {"input_ids": words * mask, "attention_mask": mask}


def text(batch: int, rows: int, padding: str | None, seed: int) -> dict[str, Tensor]:
    """Makes words alone."""
    return {"input_ids": masked_text(batch, rows, None, seed)["input_ids"]}


def images(batch: int, rows: int, padding: str | None, seed: int) -> dict[str, Tensor]:
    """Makes pictures of 4 x 4 patches."""
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


def vectors(batch: int, rows: int, padding: str | None, seed: int) -> dict[str, Tensor]:
    """Makes hidden states and a mask that is true for padding."""
    return {
        "src": torch.randn(batch, rows, 32, generator=torch.Generator().manual_seed(seed)),
        "src_key_padding_mask": padding_mask(batch, rows, padding) == 0,
    }


# Plain PyTorch


class TorchTransformer(nn.Module):
    """Learned positions before ``nn.TransformerEncoder``: an encoder with a padding mask, or a causal decoder."""

    def __init__(self, causal: bool, norm_first: bool, activation: str):
        super().__init__()
        self.causal = causal
        self.words = nn.Embedding(WORDS, 32)
        self.positions = nn.Parameter(torch.zeros(1, POSITIONS, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, activation, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(32, WORDS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        rows = input_ids.shape[1]
        hidden = self.words(input_ids) + self.positions[:, :rows]  # [B, S, D]
        mask = nn.Transformer.generate_square_subsequent_mask(rows) if self.causal else None  # [S, S]
        padded = None if attention_mask is None else attention_mask == 0  # [B, S] bool, true for padding
        if self.causal and padded is not None:
            padded = torch.zeros_like(padded, dtype=hidden.dtype).masked_fill(padded, -torch.inf)
        return self.head(self.encoder(hidden, mask=mask, src_key_padding_mask=padded, is_causal=self.causal))


def torch_transformer(causal: bool = False, norm_first: bool = False, activation: str = "relu") -> nn.Module:
    torch.manual_seed(0)
    return randomise(TorchTransformer(causal, norm_first, activation))


def bare_encoder() -> nn.Module:
    torch.manual_seed(0)
    return randomise(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), DEPTH))


class SlicedCausalBlock(nn.Module):
    """Pre-norm, fused QKV, explicit softmax, a causal distance penalty sliced from a buffer inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.norm_mlp = nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        distance = torch.arange(POSITIONS)[:, None] - torch.arange(POSITIONS)
        bias = torch.where(distance >= 0, -0.1 * distance, -torch.inf)
        self.register_buffer("bias", bias[None, None], persistent=False)  # [1, 1, S max, S max]

    def forward(self, hidden: Tensor) -> Tensor:
        batch, rows, width = hidden.shape
        query, key, value = self.qkv(self.norm_attention(hidden)).split(width, dim=2)  # [B, S, D] each
        query, key, value = (part.view(batch, rows, 4, 8).transpose(1, 2) for part in (query, key, value))
        scores = query @ key.transpose(-2, -1) * 8**-0.5  # [B, H, S, S]
        scores = scores + self.bias[:, :, :rows, :rows]
        mixed = (functional.softmax(scores, dim=-1) @ value).transpose(1, 2).contiguous().view(batch, rows, width)
        hidden = hidden + self.out(mixed)
        return hidden + self.mlp(self.norm_mlp(hidden))


class SmallGPT(nn.Module):
    """A hand-written decoder: learned positions, a ModuleList of blocks, a head tied to the word table."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 32)
        self.positions = nn.Embedding(POSITIONS, 32)
        self.blocks = nn.ModuleList(SlicedCausalBlock() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class InnerRotaryBlock(nn.Module):
    """Computes rotary angles and a per-row scale from row numbers inside the block; no mask, separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.query = nn.Linear(32, 32, bias=False)
        self.key = nn.Linear(32, 32, bias=False)
        self.value = nn.Linear(32, 32, bias=False)
        self.out = nn.Linear(32, 32, bias=False)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def row_numbers(self, hidden: Tensor) -> Tensor:
        return torch.arange(hidden.shape[1], device=hidden.device)  # [S]

    def forward(self, hidden: Tensor, keep: Tensor) -> tuple[Tensor, None]:
        rows = self.row_numbers(hidden).to(hidden.dtype)
        angles = rows[:, None] * 100.0 ** (-torch.arange(4, device=hidden.device) / 4)  # [S, d / 2]
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)  # [S, d]

        def turn(heads: Tensor) -> Tensor:
            first, second = heads.chunk(2, dim=-1)
            return heads * cos + torch.cat([-second, first], dim=-1) * sin

        def heads(projection: nn.Linear) -> Tensor:
            return projection(normed).unflatten(-1, (4, 8)).transpose(1, 2)  # [B, H, S, d]

        normed = self.norm(hidden)
        mixed = functional.scaled_dot_product_attention(
            turn(heads(self.query)), turn(heads(self.key)), heads(self.value), attn_mask=keep[:, None, None, :]
        )
        scale = 1 / (1 + 0.05 * rows)  # [S]
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2)) * scale[:, None]
        return hidden + self.down(functional.silu(self.up(hidden))), None


class InnerRotary(nn.Module):
    """A hand-written encoder whose blocks return tuples and know where their rows are only from inside."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 32)
        self.layers = nn.ModuleList(InnerRotaryBlock() for _ in range(DEPTH))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.words(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, keep=attention_mask.bool())[0]
        return {"hidden": hidden}


@contextmanager
def bias_at(block: nn.Module, positions: Tensor, rows: int) -> Iterator[None]:
    """Lets the slice that the block takes of its bias buffer start with these rows and columns."""
    owner = next(module for module in block.modules() if "bias" in dict(module.named_buffers(recurse=False)))
    whole = owner.bias  # [1, 1, S max, S max]
    owner.bias = whole[:, :, positions][:, :, :, positions]
    try:
        yield
    finally:
        owner.bias = whole


@contextmanager
def relative_bias_at(block: nn.Module, positions: Tensor, rows: int) -> Iterator[None]:
    """Takes these rows and columns of the relative bias [1, H, S, S] that the block makes."""
    table = block.relative_position_bias
    whole = table.forward
    table.forward = lambda *args, **kwargs: whole(*args, **kwargs)[:, :, positions][:, :, :, positions]
    try:
        yield
    finally:
        del table.forward


@contextmanager
def row_numbers_at(block: nn.Module, positions: Tensor, rows: int) -> Iterator[None]:
    """Makes the block number its rows by these positions."""
    block.row_numbers = lambda hidden: positions
    try:
        yield
    finally:
        del block.row_numbers


# The zoo

_BOTH = ("right", "left")
_LLAMA_LIKE = dict(
    vocab_size=WORDS,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=DEPTH,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=POSITIONS,
    use_cache=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_BERT_LIKE = dict(
    vocab_size=WORDS,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=DEPTH,
    num_attention_heads=4,
    max_position_embeddings=POSITIONS,
    pad_token_id=0,
)
_VIT_LIKE = dict(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=DEPTH,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)
_SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


def _decoder(
    name: str, model: Any, config: Any, block: str, traits: str, masked: bool = True, at_positions: Any = None,
    **options: Any,
) -> Family:
    inputs, paddings = (masked_text, _BOTH) if masked else (text, ())
    return Family(name, built(model, config, **options), block, traits, inputs, paddings, at_positions=at_positions)


FAMILIES = [
    # Decoders
    _decoder(
        "gpt2", hf.GPT2LMHeadModel, hf.GPT2Config, "transformer.h.{}",
        "learned positions, QKV fused in a Conv1D, tied head",
        vocab_size=WORDS, n_embd=32, n_layer=DEPTH, n_head=4, n_positions=POSITIONS, use_cache=False, **_SPECIAL,
    ),
    _decoder(
        "gpt2-unmasked", hf.GPT2LMHeadModel, hf.GPT2Config, "transformer.h.{}", "no padding mask", masked=False,
        vocab_size=WORDS, n_embd=32, n_layer=DEPTH, n_head=4, n_positions=POSITIONS, use_cache=False, **_SPECIAL,
    ),
    _decoder(
        "gpt2-eager", hf.GPT2LMHeadModel, hf.GPT2Config, "transformer.h.{}", "explicit softmax attention",
        vocab_size=WORDS, n_embd=32, n_layer=DEPTH, n_head=4, n_positions=POSITIONS, use_cache=False,
        attn_implementation="eager", **_SPECIAL,
    ),
    _decoder(
        "gpt-bigcode", hf.GPTBigCodeForCausalLM, hf.GPTBigCodeConfig, "transformer.h.{}",
        "multi-query attention, QKV fused with unequal parts",
        vocab_size=WORDS, n_embd=32, n_layer=DEPTH, n_head=4, n_positions=POSITIONS, use_cache=False, **_SPECIAL,
    ),
    _decoder(
        "gpt-neox", hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, "gpt_neox.layers.{}",
        "parallel attention and MLP, QKV interleaved per head, partial rotary",
        **{**_LLAMA_LIKE, "num_key_value_heads": None},
    ),
    _decoder(
        "gptj", hf.GPTJForCausalLM, hf.GPTJConfig, "transformer.h.{}", "parallel, interleaved partial rotary by lookup",
        vocab_size=WORDS, n_embd=32, n_layer=DEPTH, n_head=4, rotary_dim=4, n_positions=POSITIONS, use_cache=False,
        **_SPECIAL,
    ),
    _decoder(
        "gpt-neo", hf.GPTNeoForCausalLM, hf.GPTNeoConfig, "transformer.h.{}",
        "explicit attention, every other window of 8 sliced from a buffer inside the block",
        at_positions=bias_at,
        vocab_size=WORDS, hidden_size=32, num_layers=DEPTH, num_heads=4, window_size=8,
        attention_types=[[["global", "local"], 2]], max_position_embeddings=POSITIONS, use_cache=False, **_SPECIAL,
    ),
    _decoder(
        "opt", hf.OPTForCausalLM, hf.OPTConfig, "model.decoder.layers.{}", "positions counted from the padding mask",
        vocab_size=WORDS, hidden_size=32, ffn_dim=64, num_hidden_layers=DEPTH, num_attention_heads=4,
        max_position_embeddings=POSITIONS, word_embed_proj_dim=32, use_cache=False, **_SPECIAL,
    ),
    _decoder(
        "bloom", hf.BloomForCausalLM, hf.BloomConfig, "transformer.h.{}",
        "ALiBi folded with the heads, QKV interleaved",
        vocab_size=WORDS, hidden_size=32, n_layer=DEPTH, n_head=4, use_cache=False, **_SPECIAL,
    ),
    _decoder("llama", hf.LlamaForCausalLM, hf.LlamaConfig, "model.layers.{}", "rotary, grouped-query", **_LLAMA_LIKE),
    _decoder(
        "llama-unmasked", hf.LlamaForCausalLM, hf.LlamaConfig, "model.layers.{}", "no padding mask", masked=False,
        **_LLAMA_LIKE,
    ),
    _decoder(
        "mistral", hf.MistralForCausalLM, hf.MistralConfig, "model.layers.{}", "sliding window of 8",
        **_LLAMA_LIKE, head_dim=8, sliding_window=8,
    ),
    _decoder("qwen2", hf.Qwen2ForCausalLM, hf.Qwen2Config, "model.layers.{}", "biased QKV", **_LLAMA_LIKE),
    _decoder(
        "qwen3", hf.Qwen3ForCausalLM, hf.Qwen3Config, "model.layers.{}", "normed Q and K", **_LLAMA_LIKE, head_dim=8,
    ),
    _decoder(
        "gemma", hf.GemmaForCausalLM, hf.GemmaConfig, "model.layers.{}", "multi-query, heads wider than D / H",
        **{**_LLAMA_LIKE, "num_key_value_heads": 1}, head_dim=16,
    ),
    _decoder(
        "gemma2", hf.Gemma2ForCausalLM, hf.Gemma2Config, "model.layers.{}",
        "soft-capped explicit attention, every other window of 8, norms before and after",
        **_LLAMA_LIKE, head_dim=8, sliding_window=8, query_pre_attn_scalar=8, attn_implementation="eager",
    ),
    _decoder(
        "gemma3", hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, "model.layers.{}", "two rotary tables, windows and full",
        **_LLAMA_LIKE, head_dim=8, sliding_window=8, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    ),
    _decoder(
        "phi", hf.PhiForCausalLM, hf.PhiConfig, "model.layers.{}", "parallel under one norm, partial rotary",
        **_LLAMA_LIKE,
    ),
    _decoder(
        "phi3", hf.Phi3ForCausalLM, hf.Phi3Config, "model.layers.{}", "QKV and gate-up fused by concatenation, grouped",
        **_LLAMA_LIKE,
    ),
    _decoder("olmo2", hf.Olmo2ForCausalLM, hf.Olmo2Config, "model.layers.{}", "post-norm only", **_LLAMA_LIKE),
    _decoder(
        "starcoder2", hf.Starcoder2ForCausalLM, hf.Starcoder2Config, "model.layers.{}", "biased, sliding window of 8",
        **_LLAMA_LIKE, sliding_window=8,
    ),
    _decoder(
        "cohere", hf.CohereForCausalLM, hf.CohereConfig, "model.layers.{}", "parallel, interleaved rotary",
        **_LLAMA_LIKE,
    ),
    # Encoders
    Family(
        "bert", built(hf.BertForMaskedLM, hf.BertConfig, **_BERT_LIKE), "bert.encoder.layer.{}",
        "post-norm, learned positions, tied head", masked_text, _BOTH,
    ),
    Family(
        "bert-classifier", built(hf.BertForSequenceClassification, hf.BertConfig, **_BERT_LIKE),
        "bert.encoder.layer.{}", "one pooled row of output", masked_text, ("right",),
    ),
    Family(
        "roberta", built(hf.RobertaForTokenClassification, hf.RobertaConfig, **_BERT_LIKE), "roberta.encoder.layer.{}",
        "positions counted from the words", masked_text, _BOTH,
    ),
    Family(
        "distilbert",
        built(
            hf.DistilBertModel, hf.DistilBertConfig, vocab_size=WORDS, dim=32, hidden_dim=64, n_layers=DEPTH, n_heads=4,
            max_position_embeddings=POSITIONS,
        ),
        "transformer.layer.{}", "post-norm without token types", masked_text, _BOTH,
    ),
    Family(
        "electra", built(hf.ElectraModel, hf.ElectraConfig, **_BERT_LIKE, embedding_size=16), "encoder.layer.{}",
        "word table narrower than D", masked_text, _BOTH,
    ),
    Family(
        "modernbert",
        built(
            hf.ModernBertModel, hf.ModernBertConfig, **_BERT_LIKE, local_attention=16, cls_token_id=1, sep_token_id=2,
            bos_token_id=1, eos_token_id=2,
        ),
        "layers.{}", "rotary, fused QKV, every third global and the others local", masked_text, _BOTH,
    ),
    Family(
        "mpnet", built(partial(hf.MPNetModel, add_pooling_layer=False), hf.MPNetConfig, **_BERT_LIKE),
        "encoder.layer.{}", "a learned relative bias shared by the blocks", masked_text, _BOTH,
    ),
    Family(
        "t5-encoder",
        built(
            hf.T5EncoderModel, hf.T5Config, vocab_size=WORDS, d_model=32, d_kv=8, d_ff=64, num_layers=DEPTH,
            num_heads=4, pad_token_id=0,
        ),
        "encoder.block.{}", "a relative bias made by the first block and handed on by each", masked_text, _BOTH,
    ),
    Family(
        "deberta-v2",
        built(
            hf.DebertaV2Model, hf.DebertaV2Config, **_BERT_LIKE, relative_attention=True, pos_att_type=["p2c", "c2p"],
            position_biased_input=False, position_buckets=16, norm_rel_ebd="layer_norm", share_att_key=True,
        ),
        "encoder.layer.{}", "disentangled relative positions", masked_text, _BOTH,
    ),
    # Images
    Family(
        "vit", built(hf.ViTModel, hf.ViTConfig, **_VIT_LIKE), "layers.{}", "static sequence, pooled", images,
        rows=17, width=48,
    ),
    Family(
        "deit", built(hf.DeiTForImageClassification, hf.DeiTConfig, **_VIT_LIKE), "deit.layers.{}",
        "two special rows", images, rows=18, width=48,
    ),
    Family(
        "dinov2", built(hf.Dinov2Model, hf.Dinov2Config, **_VIT_LIKE, mlp_ratio=2), "encoder.layer.{}",
        "scaled residuals", images, rows=17, width=48,
    ),
    Family(
        "beit",
        built(hf.BeitModel, hf.BeitConfig, **_VIT_LIKE, use_relative_position_bias=True, layer_scale_init_value=1.0),
        "layers.{}", "a relative bias made inside every block", images,
        rows=17, width=48, at_positions=relative_bias_at,
    ),
    # Plain PyTorch
    Family(
        "torch-encoder", bare_encoder, "layers.{}", "nn.TransformerEncoder called by itself, in_proj", vectors, _BOTH,
        padding_mask="~src_key_padding_mask",
    ),
    Family(
        "torch-padded", torch_transformer, "encoder.layers.{}",
        "nn.TransformerEncoder behind a word table and a mask of ones for words",
        masked_text, _BOTH,
    ),
    Family(
        "torch-causal", lambda: torch_transformer(causal=True, norm_first=True, activation="gelu"), "encoder.layers.{}",
        "nn.TransformerEncoder, pre-norm, a causal mask and hint", text,
    ),
    Family(
        "torch-causal-padded", lambda: torch_transformer(causal=True, norm_first=True), "encoder.layers.{}",
        "nn.TransformerEncoder, causal and padded", masked_text, _BOTH,
    ),
    Family("small-gpt", lambda: randomise(SmallGPT()), "blocks.{}", "a bias buffer sliced inside", text,
           at_positions=bias_at),
    Family(
        "inner-rotary", lambda: randomise(InnerRotary()), "layers.{}", "row numbers used inside, blocks return tuples",
        masked_text, _BOTH, at_positions=row_numbers_at,
    ),
]

PADDED = [member for member in FAMILIES if member.paddings]
IMAGES = [member for member in FAMILIES if member.rows]


def family(name: str) -> Family:
    """Finds a family by its name."""
    return next(member for member in FAMILIES if member.name == name)
