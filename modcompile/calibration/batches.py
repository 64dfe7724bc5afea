"""What a model is calibrated on: calls of it, as tensors from Python or as a text file through its tokenizer."""

__all__ = ["Batch", "bind_batches", "check_options", "prepare", "sizes_of", "text_batches"]

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modcompile.capture import capture
from modcompile.config import MoDConfig
from modcompile.convert import padding_mask, valid_rows
from modcompile.errors import UsageError
from modcompile.interface import graph_name
from modcompile.model import GraphModel, device_of
from modcompile.sample_inputs import index_limits

# B batch  S rows


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call of the model.

    Attributes:
        inputs: The graph's inputs, in order.
        valid: bool [B, S], false at padding; None if every row is valid.
    """

    inputs: list[Tensor]
    valid: Tensor | None

    def rows(self, values: Tensor, padded: bool = True) -> Tensor:
        """The valid rows of values [B, S, ...], in a row: [N, ...]. All are, where the padding is not of these rows."""
        return values[self.valid] if padded and self.valid is not None else values.flatten(0, 1)


def bind_batches(graph: GraphModel, calls: Sequence[Any], config: MoDConfig) -> list[Batch]:
    """The calls as inputs of the graph, on its device, each with its padding.

    Raises:
        UsageError: A call that does not fit the model, words out of its vocabulary, or padding alone.
    """
    mask = padding_mask(graph, config)
    limits = index_limits(graph)
    device = device_of(graph)
    names = [spec.name for spec in graph.inputs]
    made = []
    for number, call in enumerate(calls):
        args, kwargs = ((), dict(call)) if isinstance(call, Mapping) else (
            tuple(call) if isinstance(call, tuple | list) else (call,), {})
        inputs = [tensor.to(device) for tensor in graph.interface.bind(args, kwargs)]
        for name, limit in limits.items():
            _check_words(name, inputs[names.index(name)], limit, number)
        valid = None
        if mask is not None:
            valid = valid_rows(mask, inputs[names.index(mask.removeprefix("~"))])
            if not valid.any():
                raise UsageError("a batch is padding alone", expected="valid rows", found="none",
                                 where=f"batches[{number}], input {graph_name(mask.removeprefix('~'))}")
        made.append(Batch(inputs, valid))
    return made


def check_options(where: str, *, draws: int = 1, trial_batches: int = 1, exchanges: int = 0, ridge: float = 1.0
                  ) -> None:
    """Raises UsageError unless the numbers that calibration is told are such that it can work with them."""
    if draws < 1 or not ridge > 0 or trial_batches < 1 or exchanges < 0:
        raise UsageError("an option is too small", where=where,
                         expected="draws and trial_batches of at least 1, ridge above 0, exchanges of at least 0",
                         found=f"draws {draws}, trial_batches {trial_batches}, ridge {ridge}, exchanges {exchanges}")


def prepare(model: nn.Module, batches: Sequence[Any], config: MoDConfig) -> tuple[GraphModel, list[Batch]]:
    """The model's graph, and the batches as its inputs, of which it takes the first."""
    if not isinstance(batches, Sequence) or not batches:
        raise UsageError("calibration goes through its batches many times", where="batches",
                         expected="a list of calls: dicts of inputs by name, or tensors",
                         found="an empty list" if isinstance(batches, Sequence) else type(batches).__name__,
                         fix="list(batches)")
    graph = model if isinstance(model, GraphModel) else capture(model, batches[0])
    bound = bind_batches(graph, batches, config)
    try:
        with torch.no_grad():
            graph.run_graph(bound[0].inputs)
    except (IndexError, RuntimeError) as error:
        # Longer than a table of positions, for example.
        raise UsageError("the model does not take these sizes", expected=graph.interface.summary(), where="batches[0]",
                         found=f"{', '.join(str(tuple(tensor.shape)) for tensor in bound[0].inputs)}: "
                         f"{str(error).partition(chr(10))[0]}", fix="give it shorter sequences") from error
    return graph, bound


def sizes_of(graph: GraphModel, batch: Batch) -> dict[str, int]:
    """The size of each symbol of the model's inputs in a batch."""
    return {dim: size for spec, tensor in zip(graph.inputs, batch.inputs, strict=True)
            for dim, size in zip(spec.shape, tensor.shape, strict=True) if isinstance(dim, str)}


def _check_words(name: str, words: Tensor, limit: int, number: int) -> None:
    low, high = int(words.min()), int(words.max())
    if low < 0 or high >= limit:
        raise UsageError("the tokens are not of this model's vocabulary", expected=f"0 to {limit - 1}",
                         found=f"{low} to {high}", where=f"batches[{number}], input {name}",
                         fix="tokenize with the model's own tokenizer")


def text_batches(text: str, tokenizer: Any, inputs: Sequence[str], *, batch: int = 8, rows: int = 512,
                 sequences: int = 256) -> list[dict[str, Tensor]]:
    """A text as calls of a model: consecutive sequences of full length, spread evenly over the whole text.

    Each begins and ends with the special tokens that the tokenizer puts around a text.

    Args:
        text: What to read.
        tokenizer: A transformers tokenizer, or anything called alike.
        inputs: Names of the model's inputs: input_ids, and of attention_mask and token_type_ids those it takes.
        batch: B, sequences of a call.
        rows: S, tokens of a sequence.
        sequences: The largest number of sequences to take; where they are fewer than ``batch``, they are one call.

    Raises:
        UsageError: Other inputs than these, or too little text for one batch.
    """
    fill = {"input_ids": None, "attention_mask": 1, "token_type_ids": 0}
    if "input_ids" not in inputs or not set(inputs) <= set(fill):
        raise UsageError("a text cannot be made into the inputs of this model", expected=", ".join(fill),
                         found=", ".join(inputs), where="text_batches", fix="give calibrate tensors, from Python")
    before, after = _special_tokens(tokenizer)
    inner = rows - len(before) - len(after)
    if inner < 1:
        raise UsageError("the sequences are too short", expected=f"more than the {rows - inner} special tokens",
                         found=f"{rows} tokens", where="text_batches")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    whole, batch = len(ids) // inner, min(batch, sequences)
    if whole < batch:
        raise UsageError("the text is too short", expected=f"{batch * inner} tokens, for one batch of {batch} x {rows}",
                         found=f"{len(ids)} tokens", where="text_batches", fix="more text, or a smaller batch")
    taken = min(sequences, whole) // batch * batch
    picked = torch.arange(taken) * whole // taken
    parts = ids[:whole * inner].view(whole, inner)[picked]
    made = torch.cat([before.expand(len(parts), -1), parts, after.expand(len(parts), -1)], 1)
    return [{name: part if (value := fill[name]) is None else torch.full_like(part, value) for name in inputs}
            for part in made.split(batch)]


def _special_tokens(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """What a tokenizer puts before and after a text, told from a text of one letter."""
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full) - len(bare) + 1) if full[i:i + len(bare)] == bare), 0)
    before, after = full[:start], full[start + len(bare):]
    return torch.tensor(before, dtype=torch.int64), torch.tensor(after, dtype=torch.int64)
