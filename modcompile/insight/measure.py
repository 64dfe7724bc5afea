"""Measures on a text which rows go through which block, what that depends on, what it costs, and what it spoils.

Everything is of one forward pass of the routed model over the text, beside the same pass of the dense model and of one
pruned to the same FLOPs. Rows of padding are left out of every figure.
"""

__all__ = ["measure"]

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.fx

from modcompile.errors import UsageError
from modcompile.flops import flops_by_module
from modcompile.insight.dependence import agreement, by_entropy, by_frequency, by_kind, by_position, group
from modcompile.insight.figures import BlockFacts, Insight, PassageRouting, Variant
from modcompile.insight.passages import Passage
from modcompile.insight.reading import Call, Reading
from modcompile.model import MoDModel
from modcompile.routers import router_path
from modcompile.trace import RoutingTrace, trace_routing
from modcompile.variants import block_paths, dense_model, pruned_blocks, pruned_model

# B batch  S rows  L routed blocks  N valid rows of all passages


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


class _Measurement:
    """The work of one ``measure``."""

    def __init__(self, mod: MoDModel, passages: Sequence[Passage], batch: int, pad: int, say: Callable[[str], None]):
        self.mod, self.dense, self.say = mod, dense_model(mod), say
        self.reading = Reading(mod, self.dense, passages, batch, pad)

    def insight(self) -> Insight:
        """Everything, in the order of the page."""
        mod, reading, first = self.mod, self.reading, self.reading.calls[0]
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
        for call in reading.calls:
            with trace_routing(mod) as trace:
                routed = mod.run_graph(call.inputs)
            for path, block in trace.items():
                assert block.positions is not None and block.filled is not None
                filled[path] += int(block.filled.sum())
                slots[path] += block.positions.numel()
            routing += self._routing(call, trace, routed)
            dense = self.dense.run_graph(call.inputs)
            for name, outputs in (("dense", dense), ("routed", routed), ("pruned", pruned.run_graph(call.inputs))):
                quality[name].add(outputs[0], dense[0], reading.valid_rows(call), reading.losses(outputs, call))
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
        rows = sum(call.valid.numel() for call in reading.calls)
        return Insight(
            options=mod.config.model_dump(mode="json"), sizes=sizes, padding=1 - taken.shape[1] / rows,
            passages=tuple(routing), blocks=blocks, overall=group("all rows", taken, np.ones(taken.shape[1], bool)),
            by_kind=by_kind(routing, taken), by_frequency=by_frequency(routing, taken),
            by_position=by_position(routing, taken), by_entropy=reading.no_entropy or by_entropy(routing, taken),
            agreement=tuple(agreement(path, i, routing) for i, path in enumerate(mod.routers)),
            variants=variants, pruned=tuple(dropped), no_loss=reading.no_loss)

    def _least_useful_first(self) -> list[str]:
        """Blocks by what dropping each alone does to the loss, or else to the output, on the first batch."""
        call, graph = self.reading.calls[0], self.dense.graph_module.graph
        whole = torch.fx.Interpreter(self.dense.graph_module, garbage_collect_values=False)
        dense = whole.run(*call.inputs)
        nodes, scores = list(graph.nodes), {}
        for path in block_paths(self.mod):
            place = next(i for i, node in enumerate(nodes) if node.target == path)
            # What came before the block is known, and its hidden state takes the place of its result.
            known = {node: whole.env[node] for node in nodes[:place]} | {nodes[place]: whole.env[nodes[place].args[0]]}
            outputs = torch.fx.Interpreter(self.dense.graph_module).run(*call.inputs, initial_env=known)
            quality = _Quality()
            quality.add(outputs[0], dense[0], self.reading.valid_rows(call), self.reading.losses(outputs, call))
            scores[path] = quality.deviation if quality.loss is None else quality.loss
        return sorted(scores, key=scores.__getitem__)

    def _routing(self, call: Call, trace: RoutingTrace, outputs: Sequence[torch.Tensor]) -> list[PassageRouting]:
        logits = torch.stack([self._by_row(trace[path].logits, call) for path in self.mod.routers], 1)  # [B, L, S]
        taken = torch.stack([self._by_row(trace[path].taken(), call) for path in self.mod.routers], 1)
        losses, entropies = self.reading.losses(outputs, call), self.reading.entropies(outputs, call)
        made = []
        for i, passage in enumerate(call.passages):
            rows = len(passage.ids)
            made.append(PassageRouting(passage, logits[i, :, :rows].float().cpu().numpy(),
                                       taken[i, :, :rows].cpu().numpy(), entropies[i] if entropies else None,
                                       losses[i] if losses else None))
        return made

    def _by_row(self, values: torch.Tensor | None, call: Call) -> torch.Tensor:
        """Values [B, S] of every row; where sequences are routed, [1, B], each row has its sequence's."""
        assert values is not None
        return values.T.expand_as(call.ids) if self.mod.config.axis == "sequence" else values


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
