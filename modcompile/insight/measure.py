"""Measures on a text which rows go through which block, what that depends on, what it costs, and what it spoils.

Everything is of one forward pass of the routed model over the text, beside the same pass of the dense model and of one
pruned to the same FLOPs. Rows of padding are left out of every figure.
"""

__all__ = ["Agreement", "BlockFacts", "Group", "Insight", "PassageRouting", "Variant", "measure"]

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.fx
from torch.nn import functional as F

from modcompile.convert import padding_mask
from modcompile.errors import UsageError
from modcompile.flops import flops_by_module
from modcompile.insight.passages import KINDS, Passage
from modcompile.model import MoDModel
from modcompile.routers import router_path
from modcompile.sample_inputs import index_limits
from modcompile.spec import TensorSpec
from modcompile.trace import RoutingTrace, trace_routing
from modcompile.variants import block_paths, dense_model, pruned_blocks, pruned_model

# B batch  S rows  K capacity  L routed blocks  V vocabulary  N valid rows of all passages

# Groups that a quantity is cut into.
GROUPS = 8
# Two runs of the same numbers in batches of the same shape; a model that looks ahead differs by far more.
_CAUSAL_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that have something in common.

    Attributes:
        name: What.
        rows: How many there are.
        rate: The share of (row, routed block) pairs in which the row went through the block; ``by_block``: the share of
            rows, for each block.
    """

    name: str
    rows: int
    rate: float
    by_block: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of one block, how often a decision that looks at one row alone is what top-k decided. All are shares of rows.

    Attributes:
        path: The block.
        taken: Rows that top-k took; ``positive``: those whose logit is above 0.
        sign: Agreement of "logit above 0", that is sigmoid above 1/2, which auxiliary cross-entropy trains.
        threshold: Agreement of "logit above the value that took as many rows of the passages with even numbers",
            measured on those with odd numbers; None for a text of one passage.
        constant: Agreement of one decision for all rows, the better of the two: what a decision has to beat.
        flat: Whether every row has the same logit, so that top-k took the first ones.
    """

    path: str
    taken: float
    positive: float
    sign: float
    threshold: float | None
    constant: float
    flat: bool

    @property
    def sign_decides(self) -> bool:
        """Whether the logit's sign says more of top-k's choice than one decision for all rows."""
        return not self.flat and self.sign > self.constant


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model beside the others.

    Attributes:
        name: "dense", "routed" or "pruned".
        flops: Of one call.
        loss: Mean cross-entropy of the next token, in nats; None where it is not defined.
        deviation: ||y - y_dense|| / ||y_dense|| of the model's first output over the valid rows.
    """

    name: str
    flops: int
    loss: float | None
    deviation: float


@dataclasses.dataclass(frozen=True)
class BlockFacts:
    """One block, routed or not.

    Attributes:
        path: Its module path; ``routed``: whether it is routed.
        rows: S, or B where sequences are routed; ``capacity``: how many of them enter.
        flops: Of one call, with its router's; ``dense_flops``: of the block in the dense model.
        rate: The share of rows that went through; 1 for a block that is not routed, 0 for one that is left out.
        empty: The share of slots that no valid row filled.
    """

    path: str
    routed: bool
    rows: int
    capacity: int
    flops: int
    dense_flops: int
    rate: float = 1.0
    empty: float = 0.0


@dataclasses.dataclass(frozen=True)
class PassageRouting:
    """One passage and what was decided on it. S valid rows, L routed blocks.

    Attributes:
        passage: Its tokens.
        logits: float32 [L, S]; ``taken``: bool [L, S], whether the row went through the block.
        entropy: Of the routed model's prediction at each row, in nats, [S]; None without logits over a vocabulary.
        loss: Cross-entropy of the token after each row, [S - 1]; None where it is not defined.
    """

    passage: Passage
    logits: np.ndarray
    taken: np.ndarray
    entropy: np.ndarray | None
    loss: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Insight:
    """All that was measured.

    Attributes:
        options: The conversion's options, as JSON-ready values.
        sizes: The size of each symbol of the inputs in a full batch.
        padding: The share of rows that are padding.
        passages: What was read, in order; ``blocks``: every block, in the model's order.
        overall: All rows.
        by_kind, by_frequency, by_position: All rows, cut by what kind of token they are, how often the token is in the
            text, and where in the passage it is.
        by_entropy: Cut by the entropy of the prediction; a text with the reason where it cannot be.
        agreement: Of each routed block.
        variants: Dense, routed and pruned; ``pruned``: the blocks that the pruned model lacks.
        no_loss: Why there is no loss; None if there is one.
    """

    options: dict[str, Any]
    sizes: dict[str, int]
    padding: float
    passages: tuple[PassageRouting, ...]
    blocks: tuple[BlockFacts, ...]
    overall: Group
    by_kind: tuple[Group, ...]
    by_frequency: tuple[Group, ...]
    by_position: tuple[Group, ...]
    by_entropy: tuple[Group, ...] | str
    agreement: tuple[Agreement, ...]
    variants: tuple[Variant, ...]
    pruned: tuple[str, ...]
    no_loss: str | None

    @property
    def routed(self) -> tuple[BlockFacts, ...]:
        """The routed blocks."""
        return tuple(block for block in self.blocks if block.routed)

    def to_dict(self) -> dict[str, Any]:
        """What can be told in short, as JSON-ready values: everything but the passages."""
        made = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "passages"}
        made = {name: _plain(value) for name, value in made.items()}
        return {"tokens": self.overall.rows, "passages": len(self.passages), **made}


def measure(mod: MoDModel, passages: Sequence[Passage], *, batch: int = 4, pad: int = 0,
            say: Callable[[str], None] = lambda text: None) -> Insight:
    """Runs the routed, the dense and the pruned model over passages.

    The pruned model lacks the blocks that, each dropped alone, spoil the loss of the first batch least: the strong form
    of the control.

    Args:
        mod: The routed model. Its mode is put back afterwards.
        passages: From ``read_passages``.
        batch: B, passages of a call.
        pad: The token that fills passages up to the longest.
        say: Told what is being done.

    Raises:
        UsageError: A model whose inputs a text cannot give, a text of other tokens than the model's, or no passage.
    """
    if not passages:
        raise UsageError("there is nothing to read", expected="passages", found="none", where="measure")
    if not mod.routers:
        raise UsageError("the model routes no block: there is nothing to show", expected="routed blocks", found="none",
                         where="measure", fix="modcompile report without --text sums the model up")
    was_training = mod.training
    mod.eval()
    try:
        with torch.no_grad():
            return _Measurement(mod, passages, batch, pad, say).insight()
    finally:
        mod.train(was_training)


@dataclasses.dataclass(frozen=True)
class _Call:
    """One batch: the graph's inputs, the tokens [B, S], and which of them are valid, bool [B, S]."""

    inputs: list[torch.Tensor]
    ids: torch.Tensor
    valid: torch.Tensor


def _check_rows(mod: MoDModel, words: str) -> None:
    """Refuses a model that routes other rows than those of the words, such as a patch or a class token more."""
    rows = next(spec.shape[1] for spec in mod.inputs if spec.name == words)
    other = next((block for block in mod.routed_blocks if mod.config.axis == "token" and block.rows != rows), None)
    if other is not None:
        raise UsageError("the routed rows are not the words'", expected=f"{rows} rows, as {words} has them",
                         found=f"{other.rows} rows in block {other.path}", where="measure")


class _Measurement:
    """The work of one ``measure``."""

    def __init__(self, mod: MoDModel, passages: Sequence[Passage], batch: int, pad: int, say: Callable[[str], None]):
        self.mod, self.passages, self.say = mod, list(passages), say
        self.device = next(iter(mod.tensors().values())).device
        self.words = _words_input(mod)
        _check_rows(mod, self.words)
        self.limit = index_limits(mod)[self.words]
        self.calls = [self._call(self.passages[at:at + batch], pad) for at in range(0, len(self.passages), batch)]
        self.dense = dense_model(mod)
        self.logits_output, self.no_entropy = _logits_output(mod, self.words, self.limit)
        self.no_loss = self.no_entropy or self._why_not_causal()

    def insight(self) -> Insight:
        """Everything, in the order of the page."""
        mod, first = self.mod, self.calls[0]
        sizes = {**mod.hints, **{dim: size for spec, tensor in zip(mod.inputs, first.inputs, strict=True)
                                 for dim, size in zip(spec.shape, tensor.shape, strict=True) if isinstance(dim, str)}}
        self.say("counting FLOPs")
        flops = {"routed": flops_by_module(mod, sizes), "dense": flops_by_module(self.dense, sizes)}
        self.say("measuring which blocks could be dropped")
        order = self._least_useful_first()
        dropped = pruned_blocks(mod, sizes, order)
        pruned = pruned_model(mod, dropped)
        flops["pruned"] = flops_by_module(pruned, sizes)

        self.say("running the routed model")
        routing: list[PassageRouting] = []
        filled: Counter[str] = Counter()
        slots: Counter[str] = Counter()
        quality = {name: _Quality() for name in ("dense", "routed", "pruned")}
        for call, read in zip(self.calls, _chunks(self.passages, first.ids.shape[0]), strict=True):
            with trace_routing(mod) as trace:
                routed = mod.run_graph(call.inputs)
            for path, block in trace.items():
                assert block.positions is not None and block.filled is not None
                filled[path] += int(block.filled.sum())
                slots[path] += block.positions.numel()
            routing += self._routing(read, call, trace, routed)
            dense = self.dense.run_graph(call.inputs)
            for name, outputs in (("dense", dense), ("routed", routed), ("pruned", pruned.run_graph(call.inputs))):
                quality[name].add(outputs[0], dense[0], self._rows_of(call), self._losses(outputs, call))
        for name, path in ((name, path) for name in flops for path in mod.routers):
            flops[name][path] += flops[name].get(router_path(path), 0)

        taken = np.concatenate([item.taken for item in routing], axis=1)  # [L, N]
        variants = tuple(Variant(name, flops[name][""], quality[name].loss, quality[name].deviation)
                         for name in quality)
        capacities = {block.path: block.at(sizes) for block in mod.routed_blocks}

        def facts(path: str) -> BlockFacts:
            length = first.ids.shape[1]
            rows, capacity, rate, empty = length, length, 1.0, 0.0
            if path in capacities:
                rows, capacity = int(capacities[path].rows), capacities[path].capacity or 0
                rate, empty = float(taken[list(capacities).index(path)].mean()), 1 - filled[path] / slots[path]
            elif path in mod.config.dropped:
                capacity, rate = 0, 0.0
            return BlockFacts(path, path in capacities, rows, capacity, flops["routed"].get(path, 0),
                              flops["dense"].get(path, 0), rate, empty)

        blocks = tuple(map(facts, block_paths(mod)))
        rows = sum(call.valid.numel() for call in self.calls)
        return Insight(
            options=mod.config.model_dump(mode="json"), sizes=sizes, padding=1 - taken.shape[1] / rows,
            passages=tuple(routing), blocks=blocks, overall=_group("all rows", taken, np.ones(taken.shape[1], bool)),
            by_kind=self._by_kind(routing, taken), by_frequency=self._by_frequency(routing, taken),
            by_position=self._by_position(routing, taken), by_entropy=self._by_entropy(routing, taken),
            agreement=tuple(_agreement(path, i, routing) for i, path in enumerate(mod.routers)),
            variants=variants, pruned=tuple(dropped), no_loss=self.no_loss)

    def _rows_of(self, call: _Call) -> torch.Tensor | None:
        """The valid rows of the first output, bool [B, S]; None if it has others than the words' rows."""
        words = next(spec.shape for spec in self.mod.inputs if spec.name == self.words)
        return call.valid if self.mod.outputs[0].shape[:2] == words else None

    def _call(self, passages: Sequence[Passage], pad: int) -> _Call:
        longest = max(len(passage.ids) for passage in self.passages)
        ids = torch.full((len(passages), longest), pad)
        valid = torch.zeros(len(passages), longest, dtype=torch.bool)
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
        return _Call(made, ids.to(self.device), valid.to(self.device))

    def _why_not_causal(self) -> str | None:
        """The reason why a token's loss is not defined, found by changing the last token that the dense model reads."""
        index, call = self.logits_output, self.calls[0]
        assert index is not None
        last = int(call.valid[0].sum()) - 1
        if last < 1:
            return "the first passage has one token"
        before = self.dense.run_graph(call.inputs)[index][0, :last]
        changed = [tensor.clone() if tensor.shape == call.ids.shape else tensor for tensor in call.inputs]
        words = changed[[spec.name for spec in self.mod.inputs].index(self.words)]
        words[0, last] = (words[0, last] + 1) % self.limit
        after = self.dense.run_graph(changed)[index][0, :last]
        if (before - after).abs().max() > _CAUSAL_TOLERANCE * before.abs().max():
            return "the model sees the tokens that come later, so how well it tells the next one is no measure of it"
        return None

    def _losses(self, outputs: Sequence[torch.Tensor], call: _Call) -> list[np.ndarray]:
        """Cross-entropy of the next valid token, [S - 1] for each passage; nothing where it is not defined."""
        if self.no_loss is not None:
            return []
        assert self.logits_output is not None
        return [F.cross_entropy(logits[:rows - 1].float(), ids[1:rows], reduction="none").cpu().numpy()
                for logits, ids, rows in zip(outputs[self.logits_output], call.ids, call.valid.sum(1).tolist(),
                                             strict=True)]

    def _least_useful_first(self) -> list[str]:
        """Blocks by what dropping each alone does to the loss, or else to the output, on the first batch."""
        call, graph = self.calls[0], self.dense.graph_module.graph
        whole = torch.fx.Interpreter(self.dense.graph_module, garbage_collect_values=False)
        dense = whole.run(*call.inputs)
        nodes, scores = list(graph.nodes), {}
        for path in block_paths(self.mod):
            place = next(i for i, node in enumerate(nodes) if node.target == path)
            # What came before the block is known, and its hidden state takes the place of its result.
            known = {node: whole.env[node] for node in nodes[:place]} | {nodes[place]: whole.env[nodes[place].args[0]]}
            outputs = torch.fx.Interpreter(self.dense.graph_module).run(*call.inputs, initial_env=known)
            quality = _Quality()
            quality.add(outputs[0], dense[0], self._rows_of(call), self._losses(outputs, call))
            scores[path] = quality.deviation if quality.loss is None else quality.loss
        return sorted(scores, key=scores.__getitem__)

    def _routing(self, passages: Sequence[Passage], call: _Call, trace: RoutingTrace,
                 outputs: Sequence[torch.Tensor]) -> list[PassageRouting]:
        logits = torch.stack([self._by_row(trace[path].logits, call) for path in self.mod.routers], 1)  # [B, L, S]
        taken = torch.stack([self._by_row(trace[path].taken(), call) for path in self.mod.routers], 1)
        losses = self._losses(outputs, call)
        made = []
        for i, passage in enumerate(passages):
            rows = len(passage.ids)
            entropy = None
            if self.no_entropy is None:
                assert self.logits_output is not None
                log_p = outputs[self.logits_output][i, :rows].float().log_softmax(-1)  # [S, V]
                entropy = -(log_p.exp() * log_p).nansum(-1).cpu().numpy()
            made.append(PassageRouting(passage, logits[i, :, :rows].float().cpu().numpy(),
                                       taken[i, :, :rows].cpu().numpy(), entropy, losses[i] if losses else None))
        return made

    def _by_row(self, values: torch.Tensor | None, call: _Call) -> torch.Tensor:
        """Values [B, S] of every row; where sequences are routed, [1, B], each row has its sequence's."""
        assert values is not None
        return values.T.expand_as(call.ids) if self.mod.config.axis == "sequence" else values

    @staticmethod
    def _by_kind(routing: list[PassageRouting], taken: np.ndarray) -> tuple[Group, ...]:
        kinds = np.array([kind for item in routing for kind in item.passage.kinds])
        return tuple(_group(kind, taken, kinds == kind) for kind in KINDS if (kinds == kind).any())

    @staticmethod
    def _by_frequency(routing: list[PassageRouting], taken: np.ndarray) -> tuple[Group, ...]:
        ids = [word for item in routing for word in item.passage.ids]
        counts = Counter(ids)
        power = np.array([counts[word].bit_length() - 1 for word in ids]).clip(max=GROUPS - 1)
        names = ["once", *(f"{2**p} to {2**(p + 1) - 1} times" for p in range(1, GROUPS - 1)),
                 f"{2**(GROUPS - 1)} times or more"]
        return tuple(_group(names[p], taken, power == p) for p in range(GROUPS) if (power == p).any())

    @staticmethod
    def _by_position(routing: list[PassageRouting], taken: np.ndarray) -> tuple[Group, ...]:
        at = np.concatenate([np.arange(len(item.passage.ids)) for item in routing])
        edges = np.unique(np.linspace(0, at.max() + 1, GROUPS + 1).astype(int))
        return tuple(_group(f"{low} to {high - 1}" if high - low > 1 else str(low), taken, (low <= at) & (at < high))
                     for low, high in itertools.pairwise(edges))

    def _by_entropy(self, routing: list[PassageRouting], taken: np.ndarray) -> tuple[Group, ...] | str:
        if self.no_entropy is not None:
            return self.no_entropy
        entropy = np.concatenate([item.entropy for item in routing if item.entropy is not None])
        edges = np.unique(np.quantile(entropy, np.linspace(0, 1, GROUPS + 1)))
        cut = np.searchsorted(edges[1:-1], entropy, side="right")
        return tuple(_group(f"{edges[i]:.2f} to {edges[i + 1]:.2f} nats", taken, cut == i)
                     for i in range(max(len(edges) - 1, 0)) if (cut == i).any())


class _Quality:
    """Sums from which the quality of a model follows."""

    def __init__(self) -> None:
        self.losses: list[np.ndarray] = []
        self.error, self.size = 0.0, 0.0

    def add(self, output: torch.Tensor, dense: torch.Tensor, valid: torch.Tensor | None, losses: list[np.ndarray]
            ) -> None:
        """Takes a call in: the model's first output, and the dense model's, and which of its rows count."""
        if valid is not None:
            output, dense = output[valid], dense[valid]
        self.error += float((output.float() - dense.float()).norm()) ** 2
        self.size += float(dense.float().norm()) ** 2
        self.losses += losses

    @property
    def loss(self) -> float | None:
        """The mean of all tokens."""
        return float(np.concatenate(self.losses).mean()) if self.losses else None

    @property
    def deviation(self) -> float:
        """Relative, in the 2-norm."""
        return (self.error / self.size) ** 0.5 if self.size else float(self.error > 0)


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


def _group(name: str, taken: np.ndarray, rows: np.ndarray) -> Group:
    """The rows of ``taken`` [L, N] that ``rows`` [N] is true at."""
    by_block = taken[:, rows].mean(axis=1)
    return Group(name, int(rows.sum()), float(by_block.mean()), tuple(by_block.tolist()))


def _agreement(path: str, index: int, routing: list[PassageRouting]) -> Agreement:
    logits = [item.logits[index] for item in routing]
    taken = [item.taken[index] for item in routing]
    every, chosen = np.concatenate(logits), np.concatenate(taken)
    threshold = None
    if len(routing) > 1:
        known = np.sort(np.concatenate(logits[::2]))[::-1]
        last = int(np.concatenate(taken[::2]).sum())
        # Halfway between the last logit that is above and the first that is not.
        border = known[max(last - 1, 0):last + 1].mean()
        threshold = float(((np.concatenate(logits[1::2]) > border) == np.concatenate(taken[1::2])).mean())
    share = float(chosen.mean())
    return Agreement(path, share, float((every > 0).mean()), float(((every > 0) == chosen).mean()), threshold,
                     max(share, 1 - share), bool(every.max() == every.min()))


def _chunks(items: list[Passage], size: int) -> Iterator[list[Passage]]:
    return (items[at:at + size] for at in range(0, len(items), size))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
