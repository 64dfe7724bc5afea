"""A model whose blocks can be routed, dropped and put back in place, to see what each costs and saves."""

__all__ = ["DENSE", "DROPPED", "State", "Trials"]

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.fx

from modcompile.calibration.batches import Batch, sizes_of
from modcompile.calibration.objective import choose_objective
from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.errors import UsageError
from modcompile.flops import flops_by_module
from modcompile.model import GraphModel
from modcompile.passes.route_blocks import emit_capacity
from modcompile.routers import router_path
from modcompile.variants import dense_model

# The ratio of a block that is left as it is, and of one that is left out.
DENSE, DROPPED = Fraction(1), Fraction(0)

# The ratio of each block, by path.
State = dict[str, Fraction]


class Trials:
    """One graph in which every candidate is routed; a trial sets capacities in it and runs it, without a conversion.

    Args:
        source: The dense model.
        config: Its ``blocks`` are the candidates; what chosen rows attend to and the padding are taken from it too.
        objective: What losses are, as for ``calibrate``.
        batches: What they are measured on.

    Attributes:
        mod: The graph. Its routers are those of the trials.
        dense: The dense model, its blocks outlined.
        paths: The candidates, in the model's order.
        attend_to: What chosen rows attend to.
        objective: What losses are.
        dense_flops: Floating-point operations of the dense model, for the first batch's sizes.
    """

    def __init__(self, source: GraphModel, config: MoDConfig, objective: Literal["auto", "next-token", "outputs"],
                 batches: Sequence[Batch]):
        self.mod = convert(source, config=config.model_copy(update={"capacity_ratio": 0.5})).eval()
        self.dense = dense_model(self.mod)
        self.paths = [block.path for block in self.mod.routed_blocks]
        self.attend_to, self._batches, self._sizes = config.attend_to, batches, sizes_of(source, batches[0])
        flops = flops_by_module(self.dense, self._sizes)
        self.objective = choose_objective(self.dense, batches[0], objective)
        self._places = {node.meta["role"]: node for node in self.mod.graph_module.graph.nodes if "role" in node.meta}
        with torch.no_grad():
            self._references = [self.objective.reference(self.dense.run_graph(batch.inputs)) for batch in batches]
        self.dense_flops = flops[""]
        self._flops: dict[tuple[str, Fraction], int] = {(path, DROPPED): 0 for path in self.paths}
        self._flops |= {(path, DENSE): flops[path] for path in self.paths}

    def flops(self, state: State) -> int:
        """Floating-point operations of one call with these ratios, exactly as of a model converted so."""
        for path, ratio in state.items():
            if (path, ratio) not in self._flops:
                # All blocks at once: one count gives everyone's.
                self._set(dict.fromkeys(self.paths, ratio))
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
        self._set(state)
        dropped = {self._places[path, "output"]: path for path, ratio in state.items() if ratio == DROPPED}
        total, count = 0.0, 0
        with torch.no_grad():
            for batch, reference in zip(self._batches, self._references, strict=True):
                outputs = _Trial(self.mod.graph_module, dropped).run(*batch.inputs)
                loss, summands = self.objective.measure(outputs, batch, reference)
                total, count = total + float(loss), count + summands
        mean = total / max(1, count)
        if not mean < float("inf"):
            raise UsageError("the loss is not a number", expected=f"a finite {self.objective.name} loss", found=mean,
                             where=suspect or "the dense model", fix="calibrate in float32, and look at the weights")
        return mean

    def _set(self, state: Mapping[str, Fraction]) -> None:
        graph = self.mod.graph_module.graph
        for path, ratio in state.items():
            route, merge = self._places[path, "positions"].args[0], self._places[path, "output"]
            if ratio != DROPPED:
                with graph.inserting_before(route):
                    route.args = (*route.args[:2], emit_capacity(graph, merge.args[0], 1, ratio))


class _Trial(torch.fx.Interpreter):
    """Runs the graph as it stands, without the blocks whose merges are given."""

    def __init__(self, graph_module: torch.fx.GraphModule, dropped: Mapping[torch.fx.Node, str]):
        super().__init__(graph_module)
        self.dropped, self.unused = dropped, set(dropped.values())

    def run_node(self, node: torch.fx.Node) -> Any:
        if node.op == "call_module" and node.target in self.unused:
            return None
        return self.env[node.args[0]] if node in self.dropped else super().run_node(node)
