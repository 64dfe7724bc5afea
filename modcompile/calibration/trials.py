"""A model whose blocks can be routed, dropped and put back in place, to see what each costs and saves."""

__all__ = ["DENSE", "DROPPED", "State", "Trials", "trials_of"]

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.fx

from modcompile.calibration.batches import Batch, sizes_of
from modcompile.calibration.objective import ObjectiveKind, choose_objective
from modcompile.config import MoDConfig, capacity
from modcompile.convert import convert, padded_dims
from modcompile.errors import UnsupportedGraphError, UsageError
from modcompile.flops import flops_by_module
from modcompile.model import GraphModel
from modcompile.ops import route
from modcompile.passes.route_blocks import emit_capacity
from modcompile.routers import router_path
from modcompile.variants import dense_model

# The ratio of a block that is left as it is, and of one that is left out.
DENSE, DROPPED = Fraction(1), Fraction(0)

# The ratio of each block, by path.
State = dict[str, Fraction]


class Trials:
    """One graph in which every candidate is routed; a trial runs it with other capacities, without a conversion.

    A trial computes nothing that it shares with the state that was settled on last: it starts at the first block whose
    ratio is another.

    Args:
        source: The dense model.
        config: Its ``blocks`` are the candidates; what chosen rows attend to and the padding are taken from it too.
        objective: What losses are, as for ``calibrate``.
        batches: What they are measured on.

    Attributes:
        mod: The graph. Its routers are those of the trials; call ``forget`` after a change of them.
        dense: The dense model, its blocks outlined.
        paths: The candidates, in the model's order.
        attend_to: What chosen rows attend to.
        objective: What losses are.
        dense_flops: Floating-point operations of the dense model, for the first batch's sizes.
    """

    def __init__(self, source: GraphModel, config: MoDConfig, objective: ObjectiveKind, batches: Sequence[Batch]):
        self.mod = convert(source, config=config.model_copy(update={"capacity_ratio": 0.5})).eval()
        self.dense = dense_model(self.mod)
        self.paths = [block.path for block in self.mod.routed_blocks]
        self.attend_to, self._batches, self._sizes = config.attend_to, batches, sizes_of(source, batches[0])
        self.objective = choose_objective(self.dense, objective, padded_dims(source, config))
        with torch.no_grad():
            self._references = [self.objective.reference(self.dense.run_graph(batch.inputs), batch)
                                for batch in batches]
        flops = flops_by_module(self.dense, self._sizes)
        self.dense_flops = flops[""]
        self._flops: dict[tuple[str, Fraction], int] = {(path, DROPPED): 0 for path in self.paths}
        self._flops |= {(path, DENSE): flops[path] for path in self.paths}
        nodes = list(self.mod.graph_module.graph.nodes)
        merges = {node.meta["role"][0]: node for node in nodes if node.meta.get("role", ("", ""))[1] == "output"}
        self._merges = {path: merges[path] for path in self.paths}
        self._routes = {node.meta["role"][0]: node.args[0] for node in nodes
                        if node.meta.get("role", ("", ""))[1] == "positions"}
        self._places = {node: place for place, node in enumerate(nodes)}
        self._losses: dict[tuple[Fraction, ...], float] = {}
        self._settled: tuple[State, list[dict[torch.fx.Node, Any]]] | None = None

    def flops(self, state: State) -> int:
        """Floating-point operations of one call with these ratios, exactly as of a model converted so."""
        for path, ratio in state.items():
            if (path, ratio) not in self._flops:
                # All blocks at once: one count gives everyone's.
                self._set_capacities(ratio)
                counted = flops_by_module(self.mod, self._sizes)
                self._flops |= {(path, ratio): counted[path] + counted[router_path(path)] for path in self.paths}
        return self.dense_flops - sum(self._flops[path, DENSE] - self._flops[path, ratio]
                                      for path, ratio in state.items())

    def loss(self, state: State, suspect: str | None = None) -> float:
        """The mean loss with these ratios.

        Args:
            state: The ratio of each block.
            suspect: The block whose ratio is new: an error names it.

        Raises:
            UsageError: The loss is not a number.
        """
        key = tuple(state[path] for path in self.paths)
        if key not in self._losses:
            self._losses[key] = self._measure(state, suspect)
        return self._losses[key]

    def settle(self, state: State) -> None:
        """Trials to come differ little from this state: what they share with it is kept, a batch's hidden states."""
        self._settled = None
        environments = []
        with torch.no_grad():
            for batch in self._batches:
                run = _Trial(self, state)
                run.garbage_collect_values = False
                run.run(*batch.inputs)
                last = self._places[self._merges[self.paths[-1]]]
                environments.append(self._before(last, run.env))
        self._settled = dict(state), environments

    def forget(self) -> None:
        """Routers have changed: what was measured with them is forgotten."""
        self._settled = None
        self._losses = {key: loss for key, loss in self._losses.items() if set(key) <= {DENSE, DROPPED}}

    def _measure(self, state: State, suspect: str | None) -> float:
        return self._mean((_Trial(self, state).run(*batch.inputs, initial_env=known)
                           for batch, known in zip(self._batches, self._known(state), strict=True)), suspect)

    def loss_of(self, model: GraphModel) -> float:
        """The mean loss of a model as it is, such as one that was converted otherwise than what is tried."""
        return self._mean((model.run_graph(batch.inputs) for batch in self._batches), None)

    def _mean(self, outputs: Iterable[tuple[torch.Tensor, ...]], suspect: str | None) -> float:
        """Of each batch's outputs, which are computed here, one at a time."""
        total, count = 0.0, 0
        with torch.no_grad():
            for made, batch, reference in zip(outputs, self._batches, self._references, strict=True):
                loss, summands = self.objective.measure(made, batch, reference)
                total, count = total + float(loss), count + summands
        mean = total / max(1, count)
        if not mean < float("inf"):
            raise UsageError("the loss is not a number", expected=f"a finite {self.objective.name} loss", found=mean,
                             where=suspect or "the dense model", fix="calibrate in float32, and look at the weights")
        return mean

    def _known(self, state: State) -> list[dict[torch.fx.Node, Any] | None]:
        """For each batch, the values that this state has in common with the settled one."""
        if self._settled is None:
            return [None for _ in self._batches]
        settled, environments = self._settled
        first = next((path for path in self.paths if state[path] != settled[path]), self.paths[-1])
        end = self._places[self._routes[first]]
        return [self._before(end, known) for known in environments]

    def _before(self, place: int, values: Mapping[torch.fx.Node, Any]) -> dict[torch.fx.Node, Any]:
        # What the counting of FLOPs put into the graph has no place: a trial does not look at it.
        return {node: value for node, value in values.items() if self._places.get(node, place) < place}

    def _set_capacities(self, ratio: Fraction) -> None:
        graph = self.mod.graph_module.graph
        for path in self.paths:
            node = self._routes[path]
            with graph.inserting_before(node):
                node.args = (*node.args[:2], emit_capacity(graph, self._merges[path].args[0], 1, ratio))


class _Trial(torch.fx.Interpreter):
    """Runs the graph with the capacities of a state, and without the blocks that it drops."""

    def __init__(self, trials: Trials, state: Mapping[str, Fraction]):
        super().__init__(trials.mod.graph_module)
        self.ratios = {trials._routes[path]: ratio for path, ratio in state.items()}
        self.dropped = {trials._merges[path] for path, ratio in state.items() if ratio == DROPPED}
        self.unused = {path for path, ratio in state.items() if ratio == DROPPED}

    def run_node(self, node: torch.fx.Node) -> Any:
        if node in self.ratios:
            logits, valid = (self.env[arg] if isinstance(arg, torch.fx.Node) else arg for arg in node.args[:2])
            # Of a block that is dropped, nothing is looked at.
            rows = logits.shape[1]
            return route(logits, valid, max(1, capacity(self.ratios[node], rows)))
        if node in self.dropped:
            return self.env[node.args[0]]
        return None if node.op == "call_module" and node.target in self.unused else super().run_node(node)


def trials_of(graph: GraphModel, config: MoDConfig, attend_to: str, batches: list[Batch], count: int,
            objective: ObjectiveKind) -> tuple[list[Trials], dict[str, str]]:
    """What is tried: a graph for each way to attend. "auto" leaves out one that the blocks cannot be cut for."""
    picked = [batches[i * len(batches) // min(count, len(batches))] for i in range(min(count, len(batches)))]
    made, refused = [], {}
    for way in ("all", "chosen") if attend_to == "auto" else (attend_to,):
        try:
            made.append(Trials(graph, MoDConfig(**config.model_dump() | {"attend_to": way}), objective, picked))
        except UnsupportedGraphError as error:
            if attend_to != "auto" or way == "chosen":
                raise
            refused[way] = str(error)
    return made, refused
