"""Captured models as ordinary modules: the source's call, output type and state-dict names over an ATen graph."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.fx
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from modcompile.config import MoDConfig
from modcompile.interface import Interface
from modcompile.manifest import RoutedBlock
from modcompile.pass_manager import Pass, PassManager
from modcompile.program import Program, format_graph
from modcompile.routers import Router, router_path
from modcompile.shapes import fake_inputs, propagate, propagate_alike, shape_exprs
from modcompile.spec import TensorSpec

__all__ = ["GraphModel", "MoDModel"]

REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class GraphModel(nn.Module):
    """A dense model as a graph: called like its source, returning the source's output type.

    Its parameters are the source's own objects under the source's names: deep-copy the model first if the two must
    part. Dropout follows ``.train()``; what the source decided from ``self.training`` in other ways, attention dropout
    included, stays as it was at capture.

    Attributes:
        graph_module: The graph: flat tensors in, a flat tuple of tensors out.
        interface: How calls bind to the graph's inputs, and outputs to the source's type.
        hints: The example's size for each symbol.
        passes: The passes that made this graph, as dicts of name, options and modified.
    """

    # Kept beside the module's registries, not in them.
    graph_module: torch.fx.GraphModule

    def __init__(self, graph_module: torch.fx.GraphModule, interface: Interface, hints: dict[str, int],
                 passes: list[dict] | None = None):
        super().__init__()
        # One registry for both: the graph's parameters are this module's, under the source's names.
        for registry in REGISTRIES:
            self.__dict__[registry] = graph_module.__dict__[registry]
        self.__dict__["graph_module"] = graph_module
        self.interface, self.hints, self.passes = interface, hints, passes or []
        self.training = False
        # The structure may be of a model in training.
        self._switch_dropout(False)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's tensor inputs, in order."""
        return self.interface.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's tensor outputs, in order."""
        return self.interface.outputs

    @property
    def program(self) -> Program:
        """The graph's structure."""
        return Program.of(self.graph_module)

    def forward(self, *args, **kwargs) -> Any:
        """Calls the graph as the source was called.

        Raises:
            UsageError: A call that does not fit the interface.
        """
        return self.interface.unflatten(list(self.run_graph(self.interface.bind(args, kwargs))))

    def run_graph(self, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The graph's outputs for its inputs, both flat and in order."""
        return self.graph_module(*inputs)

    @property
    def routed_blocks(self) -> list[RoutedBlock]:
        """What is routed: nothing in a dense model."""
        return []

    @property
    def routers(self) -> dict[str, Router]:
        """The router of each routed block, by the block's path: none in a dense model."""
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer by name, aliases of tied weights included."""
        return {**dict(self.named_parameters(remove_duplicate=False)),
                **dict(self.named_buffers(remove_duplicate=False))}

    def non_persistent(self) -> frozenset[str]:
        """Names of the buffers that are not in the state dict."""
        return frozenset(dict(self.named_buffers(remove_duplicate=False))) - frozenset(self.state_dict())

    def propagate_shapes(self, hints: dict[str, int] | None = None) -> None:
        """Records every value's shape in the graph, for passes; the sizes in ``hints`` stand for the symbols."""
        known: dict = {}
        for path, body in self.program.bodies.items():
            inputs = body.find_nodes(op="placeholder")
            if not all("val" in node.meta for node in inputs):
                # Loaded from a file: a sub-graph has symbols of its own.
                propagate_alike(self.get_submodule(path), [node.meta["spec"] for node in inputs], {}, known)
        propagate(self.graph_module, fake_inputs(list(self.inputs), hints or self.hints, self))

    def variant(self, program: Program, *stages: Pass, routers: bool = False) -> "GraphModel":
        """A model on this one's tensors, from a structure and further passes.

        Args:
            program: Where to start: ``self.program``, or a routed model's ``dense_program``. It is copied.
            stages: Passes to run on the copy.
            routers: Whether the stages will call the routers, where the structure does not yet.
        """
        known = {router_path(path): router for path, router in self.routers.items()}
        names = {f"{path}.{name}" for path, router in known.items() for name, _ in router.named_parameters()}
        tensors = {name: tensor for name, tensor in self.tensors().items() if name not in names}
        calls = {node.target for node in program.graph.nodes if node.op == "call_module"}
        called: dict[str, nn.Module] = {path: router for path, router in known.items() if path in calls}
        graph_module = program.copy().assemble(tensors, called, self.non_persistent())
        for path, router in known.items() if routers else ():
            graph_module.add_submodule(path, router)
        made = GraphModel(graph_module, self.interface, dict(self.hints))
        made.propagate_shapes()
        manager = PassManager(list(stages))
        manager(graph_module)
        made.passes = [*self.passes, *manager.ran]
        return made.train(self.training)

    def format(self) -> str:
        """Stable text of the graph, with shapes."""
        symbols: dict = {}
        placeholders = self.graph_module.graph.find_nodes(op="placeholder")
        for node, spec in zip(placeholders, self.inputs, strict=True):
            dims = zip(shape_exprs(node) or (), spec.shape, strict=False)
            symbols |= {expr: name for expr, name in dims if isinstance(name, str)}
        return format_graph(self.graph_module, symbols)

    def train(self, mode: bool = True):
        """Sets training mode: dropout in the graph is on or off with it."""
        if mode != self.training:
            self._switch_dropout(mode)
            self._graph_changed()
        super().train(mode)
        self.graph_module.training = mode
        return self

    def _switch_dropout(self, on: bool) -> None:
        for module in [self.graph_module, *self.graph_module.modules()]:
            if isinstance(module, torch.fx.GraphModule):
                _set_dropout(module, on)

    def _apply(self, fn, recurse=True):
        """Moves and casts tensors; the devices that the graph itself names and the dtypes of its inputs follow."""
        before = self.precisions()
        super()._apply(fn, recurse)
        after = self.precisions()
        if len(before) == len(after) == 1 and before != after:
            self.interface = self.interface.cast(*before, *after)
        devices = {tensor.device for tensor in self.tensors().values()}
        for graph in self._graphs():
            changed = len(devices) == 1 and _set_device(graph, next(iter(devices)))
            changed |= torch.float64 in after and _match_masks(graph)
            if changed and graph.owning_module is not None:
                graph.owning_module.recompile()
        self._graph_changed()
        return self

    def _graph_changed(self) -> None:
        """Called after changes of the graph, for what is derived from it."""

    def precisions(self) -> set[torch.dtype]:
        """The dtypes of the parameters, but for those of routers, which stay in float32 beside a half model."""
        own = {id(parameter) for router in self.routers.values() for parameter in router.parameters()}
        return {parameter.dtype for parameter in self.parameters()
                if parameter.is_floating_point() and id(parameter) not in own}

    def _graphs(self) -> list[torch.fx.Graph]:
        return [self.program.graph, *self.program.bodies.values()]

    def __deepcopy__(self, memo):
        return self._rebuild(self.program.copy(), {name: copy.deepcopy(tensor, memo)
                                                   for name, tensor in self.tensors().items()})

    def _rebuild(self, program: Program, tensors: dict[str, torch.Tensor]) -> "GraphModel":
        graph_module = program.assemble(tensors, self._copied_routers(tensors), self.non_persistent())
        return GraphModel(graph_module, self.interface, dict(self.hints), list(self.passes)).train(self.training)

    def _copied_routers(self, tensors: dict[str, torch.Tensor]) -> dict[str, nn.Module]:
        """Copies of the modules that the graph calls as they are; ``tensors`` loses theirs, for the graph has none."""
        program = self.program
        called = [str(node.target) for node in program.graph.nodes if node.op == "call_module"]
        copies = {path: copy.deepcopy(self.get_submodule(path)) for path in called if path not in program.bodies}
        for path, module in copies.items():
            for name in dict(module.named_parameters()):
                del tensors[f"{path}.{name}"]
        return copies


class MoDModel(GraphModel):
    """A model in Mixture-of-Depths form: an ordinary module that trains, saves, and is called like its source.

    Attributes:
        config: What was asked for.
        routed_blocks: What is routed, in the model's order.
        dense_program: The dense model's structure, its blocks outlined; the oracle and the pruned model start from it.
    """

    # Beside the registries too: the graph that a trace runs, and the code that it was made from.
    _watched: torch.fx.GraphModule
    _watched_code: str

    def __init__(self, graph_module: torch.fx.GraphModule, interface: Interface, hints: dict[str, int],
                 passes: list[dict], config: MoDConfig, routed_blocks: list[RoutedBlock], dense_program: Program):
        super().__init__(graph_module, interface, hints, passes)
        self.config, self.dense_program = config, dense_program
        self._routed_blocks = list(routed_blocks)
        self._observers: list[Callable[[str, str, torch.Tensor], None]] = []
        self._graph_changed()

    @property
    def routed_blocks(self) -> list[RoutedBlock]:
        """What is routed, in the model's order."""
        return list(self._routed_blocks)

    @property
    def routers(self) -> dict[str, Router]:
        """The router of each routed block, by the block's path. Kinds other than linear have other parameters."""
        return {block.path: cast(Router, self.get_submodule(router_path(block.path))) for block in self._routed_blocks}

    @property
    def thresholds(self) -> dict[str, float]:
        """Of a model in which each row decides for itself, by block: a row enters above. Empty where top-k chooses."""
        made = [record["options"] for record in self.passes if record["name"] == "decide-rows"]
        return {path: threshold for options in made
                for path, threshold in zip(options["blocks"], options["thresholds"], strict=True)}

    def _graph_changed(self) -> None:
        """Makes the graph anew that a trace runs: it also returns the values that have a role in the routing.

        Made beforehand, for a call may be under ``torch.compile``, which cannot look into the making of graphs; and
        only if there is a change, for what was compiled of another one is lost.
        """
        old = self.__dict__.get("_watched")
        if old is not None and old._modules is self._modules and self._watched_code == self.graph_module.code:
            return
        graph, copies = torch.fx.Graph(), dict[torch.fx.Node, torch.fx.Node]()
        outputs = graph.graph_copy(self.program.graph, copies)
        scored = {router_path(path): path for path in self.routers}
        roles: dict[tuple[str, str], torch.fx.Node] = {}
        for node, made in copies.items():
            if node.op == "call_module" and node.target in scored:
                roles[scored[node.target], "seen"] = made.all_input_nodes[0]
            if "role" in node.meta:
                roles[node.meta["role"]] = made
        graph.output((outputs, list(roles.values())))
        watched = torch.fx.GraphModule(self.graph_module, graph)
        for registry in REGISTRIES:
            watched.__dict__[registry] = self.__dict__[registry]
        self.__dict__["_watched"], self._roles, self._watched_code = watched, list(roles), self.graph_module.code

    def _graphs(self) -> list[torch.fx.Graph]:
        return [*super()._graphs(), self.dense_program.graph, *self.dense_program.bodies.values()]

    def run_graph(self, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The graph's outputs for its inputs; under ``trace_routing`` also shows each block's choice to the trace."""
        if not self._observers:
            return self.graph_module(*inputs)
        outputs, values = self._watched(*inputs)
        for (path, role), value in zip(self._roles, values, strict=True):
            for observer in self._observers:
                observer(path, role, value)
        return outputs

    def save_pretrained(self, folder: str | os.PathLike, *, overwrite: bool = False) -> Path:
        """Writes the model into a new folder of safetensors and JSON, which ``modcompile.load`` reads.

        Raises:
            UsageError: The folder exists, or cannot be written; nothing is left half-written.
        """
        from modcompile.saving import save_model

        return save_model(self, folder, overwrite=overwrite)

    def with_capacity(self, ratio: float | Sequence[float]) -> "MoDModel":
        """This model at other capacities: derived anew from the dense structure, on the same tensors and routers.

        Args:
            ratio: K/S for all routed blocks, or one for each, as ``MoDConfig.capacity_ratio``.

        Raises:
            UsageError: A ratio that does not fit.
        """
        from modcompile.convert import at_capacity

        return at_capacity(self, ratio)

    def set_capacity(self, ratio: float | Sequence[float]) -> None:
        """Makes this very object what ``with_capacity`` returns: optimizers and DDP keep what they hold.

        Hooks stay on routers only; what ``torch.compile`` made of the model is compiled again.
        """
        made = self.with_capacity(ratio)
        for name in (*REGISTRIES, "graph_module", "config", "_routed_blocks", "hints", "passes"):
            self.__dict__[name] = made.__dict__[name]
        self._graph_changed()

    def _rebuild(self, program: Program, tensors: dict[str, torch.Tensor]) -> "MoDModel":
        graph_module = program.assemble(tensors, self._copied_routers(tensors), self.non_persistent())
        return MoDModel(graph_module, self.interface, dict(self.hints), list(self.passes), self.config,
                        self._routed_blocks, self.dense_program.copy()).train(self.training)


def device_of(model: GraphModel) -> torch.device:
    """Where a model's tensors are; the CPU, if it has none."""
    return next((tensor.device for tensor in model.tensors().values()), torch.device("cpu"))


@contextlib.contextmanager
def evaluating(model: GraphModel) -> Iterator[None]:
    """Without dropout and gradients while the context is open."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _set_dropout(module: torch.fx.GraphModule, training: bool) -> None:
    nodes = [node for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
             if node.args[2] != training]
    for node in nodes:
        node.args = (*node.args[:2], training)
    if nodes:
        module.recompile()


def _set_device(graph: torch.fx.Graph, device: torch.device) -> bool:
    """Moves what a graph makes, and what its values are known to be: later passes go by that."""
    def moved(value: FakeTensor) -> torch.Tensor:
        return value if value.device == device else value.to(device)

    changed = False
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(FakeTensor, moved, node.meta["val"])
        if "device" in node.kwargs and node.kwargs["device"] not in (None, device):
            node.kwargs = {**node.kwargs, "device": device}
            changed = True
        if any(isinstance(arg, torch.device) and arg != device for arg in node.args):
            node.args = tuple(device if isinstance(arg, torch.device) else arg for arg in node.args)
            changed = True
    return changed


def _match_masks(graph: torch.fx.Graph) -> bool:
    """Casts masks that are added to scores to the dtype of the query.

    On a CPU, attention in float64 takes a mask of float32, and reads it as something else (PyTorch 2.13).
    """
    changed = False
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default):
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        # Of a graph that was just read no shapes are known: it was cast before it was saved.
        known = mask.meta.get("val") if mask is not None else None
        if known is not None and known.dtype in (torch.float16, torch.bfloat16, torch.float32):
            with graph.inserting_before(node):
                cast = graph.call_function(torch.ops.aten.type_as.default, (mask, node.args[0]))
            cast.meta["val"] = known
            node.replace_input_with(mask, cast)
            changed = True
    return changed
