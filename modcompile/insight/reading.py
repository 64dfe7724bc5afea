"""A text as a routed model reads it: the calls that hold it, and what the outputs say of its tokens."""

__all__ = ["Call", "Reading"]

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from modcompile.convert import padding_mask
from modcompile.errors import UsageError
from modcompile.insight.passages import Passage
from modcompile.model import GraphModel, MoDModel, device_of
from modcompile.sample_inputs import index_limits
from modcompile.spec import TensorSpec

# B batch  S rows  V vocabulary

# Two runs of the same numbers in batches of the same shape; a model that looks ahead differs by far more.
_CAUSAL_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Call:
    """One batch: its passages, the graph's inputs, the tokens [B, S], and which of them are valid, bool [B, S]."""

    passages: list[Passage]
    inputs: list[torch.Tensor]
    ids: torch.Tensor
    valid: torch.Tensor


class Reading:
    """Passages as calls of a routed model, and where its outputs predict tokens.

    Args:
        mod: The routed model.
        dense: The dense model, which shows whether later tokens are seen.
        passages: From ``read_passages``.
        batch: B, passages of a call.
        pad: The token that fills passages up to the longest.

    Attributes:
        calls: All passages, in order.
        no_entropy: Why the outputs predict no tokens; None if they do.
        no_loss: Why there is no loss; None if there is one.

    Raises:
        UsageError: A model whose inputs a text cannot give, or a text of other tokens than the model's.
    """

    def __init__(self, mod: MoDModel, dense: GraphModel, passages: Sequence[Passage], batch: int, pad: int):
        self.mod = mod
        self.device = device_of(mod)
        self.words = _words_input(mod)
        _check_rows(mod, self.words)
        self.limit = index_limits(mod)[self.words]
        rows = max(len(passage.ids) for passage in passages)
        self.calls = [self._call(list(passages[at:at + batch]), rows, pad) for at in range(0, len(passages), batch)]
        self.logits_output, self.no_entropy = _logits_output(mod, self.words, self.limit)
        self.no_loss = self.no_entropy or self._why_not_causal(dense)

    def valid_rows(self, call: Call) -> torch.Tensor | None:
        """The valid rows of the first output, bool [B, S]; None if it has others than the words' rows."""
        words = next(spec.shape for spec in self.mod.inputs if spec.name == self.words)
        return call.valid if self.mod.outputs[0].shape[:2] == words else None

    def losses(self, outputs: Sequence[torch.Tensor], call: Call) -> list[np.ndarray]:
        """Cross-entropy of the next valid token, [S - 1] for each passage; nothing where it is not defined."""
        if self.no_loss is not None:
            return []
        assert self.logits_output is not None
        return [F.cross_entropy(logits[:rows - 1].float(), ids[1:rows], reduction="none").cpu().numpy()
                for logits, ids, rows in zip(outputs[self.logits_output], call.ids, call.valid.sum(1).tolist(),
                                             strict=True)]

    def entropies(self, outputs: Sequence[torch.Tensor], call: Call) -> list[np.ndarray]:
        """Entropy of the prediction at each valid row, in nats, [S] for each passage; nothing without logits."""
        if self.no_entropy is not None:
            return []
        assert self.logits_output is not None
        made = []
        for logits, passage in zip(outputs[self.logits_output], call.passages, strict=True):
            log_p = logits[:len(passage.ids)].float().log_softmax(-1)  # [S, V]
            made.append(-(log_p.exp() * log_p).nansum(-1).cpu().numpy())
        return made

    def _call(self, passages: list[Passage], rows: int, pad: int) -> Call:
        ids = torch.full((len(passages), rows), pad)
        valid = torch.zeros(len(passages), rows, dtype=torch.bool)
        for i, passage in enumerate(passages):
            ids[i, :len(passage.ids)] = torch.tensor(passage.ids)
            valid[i, :len(passage.ids)] = True
        if int(ids.max()) >= self.limit or int(ids.min()) < 0:
            raise UsageError("the tokens are not of this model's vocabulary", expected=f"0 to {self.limit - 1}",
                             found=f"{int(ids.min())} to {int(ids.max())}", where=f"input {self.words}",
                             fix="give the tokenizer of the model that was converted: --tokenizer FOLDER")
        mask = padding_mask(self.mod, self.mod.config) or ""
        name = mask.removeprefix("~")
        if not name and not valid.all():
            raise UsageError("passages of several lengths need a padding mask", expected="a model that takes one",
                             found=self.mod.interface.summary(), where="measure", fix="leave out --by-line")
        made = []
        for spec in self.mod.inputs:
            if spec.name == self.words:
                value = ids
            elif spec.name == name:
                value = ~valid if mask.startswith("~") else valid
            elif spec.name == "token_type_ids":
                value = torch.zeros_like(ids)
            else:
                raise UsageError("a text cannot give this input", expected=f"{self.words}, a padding mask, "
                                 "token_type_ids", found=spec, where="measure")
            made.append(value.to(self.device, getattr(torch, spec.dtype)))
        return Call(passages, made, ids.to(self.device), valid.to(self.device))

    def _why_not_causal(self, dense: GraphModel) -> str | None:
        """The reason why a token's loss is not defined, found by changing the last token that the dense model reads."""
        index, call = self.logits_output, self.calls[0]
        assert index is not None
        last = int(call.valid[0].sum()) - 1
        if last < 1:
            return "the first passage has one token"
        before = dense.run_graph(call.inputs)[index][0, :last]
        changed = [tensor.clone() if tensor.shape == call.ids.shape else tensor for tensor in call.inputs]
        words = changed[[spec.name for spec in self.mod.inputs].index(self.words)]
        words[0, last] = (words[0, last] + 1) % self.limit
        after = dense.run_graph(changed)[index][0, :last]
        if (before - after).abs().max() > _CAUSAL_TOLERANCE * before.abs().max():
            return "the model sees the tokens that come later, so how well it tells the next one is no measure of it"
        return None


def _words_input(mod: MoDModel) -> str:
    """The input that holds the tokens: the one that a table of embeddings is read by."""
    limits = index_limits(mod)
    found = [spec.name for spec in mod.inputs if spec.name in limits and len(spec.shape) == 2
             and spec.name != "token_type_ids"]
    words = "input_ids" if "input_ids" in found else found[0] if len(found) == 1 else None
    if words is None:
        raise UsageError("the model reads no text", expected="one input of tokens [batch, sequence]",
                         found=mod.interface.summary(), where="measure")
    return words


def _check_rows(mod: MoDModel, words: str) -> None:
    """Refuses a model that routes other rows than those of the words, such as a patch or a class token more."""
    rows = next(spec.shape[1] for spec in mod.inputs if spec.name == words)
    other = next((block for block in mod.routed_blocks if mod.config.axis == "token" and block.rows != rows), None)
    if other is not None:
        raise UsageError("the routed rows are not the words'", expected=f"{rows} rows, as {words} has them",
                         found=f"{other.rows} rows in block {other.path}", where="measure")


def _logits_output(mod: MoDModel, words: str, vocabulary: int) -> tuple[int | None, str | None]:
    """The place of the output that has logits over the vocabulary for every row, or the reason why there is none."""
    rows = next(spec.shape for spec in mod.inputs if spec.name == words)
    found = [i for i, spec in enumerate(mod.outputs) if _rows_of(spec) == rows and spec.shape[2] == vocabulary]
    if found:
        return found[0], None
    return None, (f"the model returns no logits over its vocabulary of {vocabulary:,} tokens for every row, only "
                  f"{', '.join(map(str, mod.outputs))}")


def _rows_of(spec: TensorSpec) -> tuple[int | str, ...] | None:
    return spec.shape[:2] if len(spec.shape) == 3 else None
