"""The pass contract, and the manager that runs passes and checks the graph between them.

A pass is a frozen dataclass whose fields are its options. It edits the ``torch.fx.GraphModule`` it is given, in place,
and says honestly whether it changed anything; running it twice changes nothing the second time. "Does not apply" is a
``Skip`` value with the reason; a broken contract is an error.
"""

import dataclasses
from typing import Any, ClassVar

import torch.fx

from modcompile.errors import PassContractError
from modcompile.shapes import propagate_missing

__all__ = ["Pass", "PassManager", "PassResult", "Skip", "call_for", "nested_graphs"]


@dataclasses.dataclass(frozen=True)
class Skip:
    """Why a pass, or a part of it, does not apply: kept, and shown by ``modcompile inspect``."""

    reason: str
    node: str = ""


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What a pass returns: the graph, whether it changed, and what it left alone and why."""

    graph_module: torch.fx.GraphModule
    modified: bool
    skips: tuple[Skip, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pass:
    """A graph rewrite. Subclasses set ``name``, override ``call``, and state their contract in the other two."""

    name: ClassVar[str]

    def requires(self, graph_module: torch.fx.GraphModule) -> None:
        """Raises PassContractError if the graph is not in the form this pass takes."""

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Rewrites the graph in place."""
        raise NotImplementedError(f"{type(self).__name__} must define call()")

    def ensures(self, graph_module: torch.fx.GraphModule) -> None:
        """Raises PassContractError if the rewritten graph lacks what this pass promises."""

    def options(self) -> dict[str, object]:
        """The pass's fields, as the command line and the manifest show them: JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def call_for(node: torch.fx.Node, target: Any, *args: Any, like: torch.fx.Node | None = None, **kwargs: Any
             ) -> torch.fx.Node:
    """A call at the insertion point that does part of what a node did: it comes from the same module.

    Args:
        node: What the call stands for, or for a part of.
        target: The op.
        args: What it is called with.
        like: A node of the result's shape, where there is one; else the manager finds the shape.
        kwargs: What it is called with by name.
    """
    made = node.graph.call_function(target, args, kwargs)
    made.meta = {name: node.meta[name] for name in ("nn_module_stack",) if name in node.meta}
    if like is not None:
        made.meta["val"] = like.meta["val"]
    return made


def nested_graphs(graph_module: torch.fx.GraphModule) -> list[tuple[str, torch.fx.GraphModule]]:
    """The graph module itself (path "") and every graph module that it calls, by module path."""
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    inner = [(path, graph_module.get_submodule(path)) for path in sorted(called)]
    return [("", graph_module), *((path, module) for path, module in inner if isinstance(module, torch.fx.GraphModule))]


class PassManager:
    """Runs passes in order; after each one removes dead code, lints, completes shapes and checks the contract.

    Args:
        passes: The pipeline, each stage with its options.

    Attributes:
        skips: What each pass left alone, by the pass's name.
        ran: The passes that ran, as ``{"name", "options", "modified"}``, for the manifest.
    """

    def __init__(self, passes: list[Pass]):
        self.passes = passes
        self.skips: dict[str, tuple[Skip, ...]] = {}
        self.ran: list[dict] = []

    def __call__(self, graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """Runs the pipeline on a graph module, in place, and returns it.

        Raises:
            PassContractError: A pass's precondition or postcondition does not hold, or it left a broken graph.
        """
        for stage in self.passes:
            stage.requires(graph_module)
            result = stage.call(graph_module)
            graph_module = result.graph_module
            if result.modified:
                self._settle(stage, graph_module)
            stage.ensures(graph_module)
            self.skips[stage.name] = result.skips
            self.ran.append({"name": stage.name, "options": stage.options(), "modified": result.modified})
        return graph_module

    @staticmethod
    def _settle(stage: Pass, graph_module: torch.fx.GraphModule) -> None:
        try:
            for _, module in nested_graphs(graph_module):
                # A random op is dead code too, if nothing uses it.
                module.graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
                module.graph.lint()
                module.recompile()
            propagate_missing(graph_module)
        except PassContractError:
            raise
        except Exception as error:
            raise PassContractError(f"the graph is broken after pass {stage.name}", expected="a well-formed graph",
                                    found=f"{type(error).__name__}: {str(error)[:400]}", where=stage.name,
                                    fix="a defect of the pass: please report it with the model's graph") from error
