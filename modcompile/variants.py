"""The models a routed one is compared with, on its own tensors: dense, oracle, and pruned to equal FLOPs."""

import dataclasses
from collections.abc import Mapping, Sequence

import sympy
import torch

from modcompile.blocks import find_blocks
from modcompile.convert import dropping_passes, refuse_decided, routing_passes
from modcompile.errors import UsageError
from modcompile.flops import count_flops, flops_by_module
from modcompile.interface import Interface
from modcompile.model import GraphModel, MoDModel
from modcompile.passes.attend_to_all import AttendToAll
from modcompile.passes.prune_blocks import PruneBlocks
from modcompile.passes.route_blocks import RouteBlocks
from modcompile.passes.routing_outputs import ROLES, RoutingOutputs
from modcompile.passes.split_fused_qkv import SplitFusedQkv
from modcompile.passes.take_first_rows import TakeFirstRows
from modcompile.shapes import shape_exprs
from modcompile.spec import TensorSpec, dtype_name

__all__ = ["block_paths", "dense_model", "masked_model", "oracle_model", "other_attention_model",
           "pruned_blocks", "pruned_model", "with_routing_outputs"]


def dense_model(mod: MoDModel) -> GraphModel:
    """The dense model that was converted, its blocks outlined."""
    return mod.variant(mod.dense_program)


def oracle_model(mod: MoDModel, *, merge: bool = False) -> GraphModel:
    """The routed model with the first K rows taken and no router: the fastest any routing could be.

    Args:
        mod: The routed model.
        merge: Writes the rows back with ``merge_rows``, which is faster than putting the two parts together where a
            runtime does it in place.
    """
    paths = tuple(block.path for block in mod.routed_blocks)
    ratios = tuple(block.capacity_ratio for block in mod.routed_blocks)
    config = mod.config
    split = config.attend_to == "all" and config.axis == "token"
    stages = [SplitFusedQkv(paths), AttendToAll(paths)] if split else []
    return mod.variant(mod.dense_program, *dropping_passes(config), *stages,
                       TakeFirstRows(paths, ratios, config.axis, config.capacity_multiple, merge))


def masked_model(mod: MoDModel) -> GraphModel:
    """The routed model with every row computed in every block, and all but the chosen ones thrown away.

    It returns what the model does with ``attend_to="all"``.

    Raises:
        UsageError: A model that routes sequences, or in which each row decides for itself.
    """
    refuse_decided(mod, "masked_model")
    if mod.config.axis != "token":
        raise UsageError("only a model that routes tokens has a masked form", expected="axis token",
                         found=f"axis {mod.config.axis}", where="masked_model")
    stages = [dataclasses.replace(stage, masked=True) if isinstance(stage, RouteBlocks) else stage
              for stage in routing_passes(mod, list(mod.routers), mod.config)
              if not isinstance(stage, SplitFusedQkv | AttendToAll)]
    return mod.variant(mod.dense_program, *stages, routers=True)


def other_attention_model(mod: MoDModel) -> GraphModel:
    """The routed model, on the same routers, whose chosen rows attend to all rows if it was to chosen ones, or back.

    Raises:
        UsageError: A model in which each row decides for itself.
    """
    refuse_decided(mod, "other_attention_model")
    config = mod.config.model_copy(update={"attend_to": "chosen" if mod.config.attend_to == "all" else "all"})
    return mod.variant(mod.dense_program, *routing_passes(mod, list(mod.routers), config), routers=True)


def block_paths(mod: MoDModel) -> list[str]:
    """Every outlined block, in the model's order: what can be dropped, and whose borders can be compared."""
    return [node.target for node in mod.dense_program.graph.nodes
            if node.op == "call_module" and node.target in mod.dense_program.bodies]


def pruned_model(model: GraphModel, blocks: Sequence[str]) -> GraphModel:
    """The dense model without the given blocks.

    Args:
        model: A routed model, whose dense form is pruned; or a captured one, and then what is left can be converted.
        blocks: Module paths.

    Raises:
        UsageError: A path that is no block.
    """
    if isinstance(model, MoDModel):
        known, program = block_paths(model), model.dense_program
    else:
        known, program = [block.path for block in find_blocks(model).routable], model.program
    unknown = [path for path in blocks if path not in known]
    if unknown:
        raise UsageError("a block to prune does not exist", expected=", ".join(known), found=", ".join(unknown),
                         where="pruned_model")
    return model.variant(program, PruneBlocks(tuple(blocks)))


def pruned_blocks(mod: MoDModel, sizes: Mapping[str, int], order: Sequence[str] | None = None) -> list[str]:
    """Which blocks to drop so that the dense model's FLOPs come nearest to the routed model's.

    Args:
        mod: The routed model.
        sizes: The size of each symbol, such as {"batch": 8, "sequence": 256}.
        order: Blocks from the least to the most useful, by measured loss for a fair comparison of quality; for one of
            speed alone any order will do, and by default the routed blocks go first.
    """
    routed = [block.path for block in mod.routed_blocks]
    order = list(order or [*routed, *(path for path in block_paths(mod) if path not in routed)])
    target = count_flops(mod, sizes)
    flops = flops_by_module(dense_model(mod), sizes)
    left = [flops[""] - sum(flops[path] for path in order[:n]) for n in range(len(order))]
    return order[:min(range(len(order)), key=lambda n: abs(left[n] - target))]


def with_routing_outputs(mod: MoDModel, outputs: bool = False) -> GraphModel:
    """The routed model returning, after its own outputs, each block's logits, positions, filled slots and gates.

    They are named "routing.<block>.<role>"; where a predictor decides, its logits are among them, as role "decision".
    With ``outputs`` the hidden state after every block, routed or not, is among them too, as role "output".
    """
    routed = [block.path for block in mod.routed_blocks]
    program = mod.program.copy()
    given = {tuple(node.meta["role"]) for node in program.graph.nodes if "role" in node.meta}
    roles = []
    for node in program.graph.nodes:
        if node.op == "call_module" and node.target in program.bodies:
            roles += [f"{node.target}:{role}" for role in ROLES if node.target in routed]
            roles += [f"{node.target}:decision"] if (node.target, "decision") in given else []
            roles += [f"{node.target}:output"] if outputs else []
            if node.target not in routed:
                node.meta["role"] = (node.target, "output")
    made = mod.variant(program, RoutingOutputs(len(mod.outputs), True, tuple(roles)))
    nodes = {":".join(node.meta["role"]): node for node in made.graph_module.graph.nodes if "role" in node.meta}
    specs = tuple(_spec(made, f"routing.{role.replace(':', '.')}", nodes[role]) for role in roles)
    interface = made.interface
    made.interface = Interface(interface.parameters, interface.arguments, interface.inputs, interface.result,
                               (*interface.outputs, *specs))
    return made


def _spec(model: GraphModel, name: str, node: torch.fx.Node) -> TensorSpec:
    """A value of the graph as an output; its sizes are written with the names of the inputs' symbols."""
    names: dict = {}
    for placeholder, spec in zip(model.graph_module.graph.find_nodes(op="placeholder"), model.inputs, strict=True):
        exprs = shape_exprs(placeholder) or ()
        names |= {expr: sympy.Symbol(dim) for expr, dim in zip(exprs, spec.shape, strict=True) if isinstance(dim, str)}
    sizes = [expr.xreplace(names) for expr in shape_exprs(node) or ()]
    dims = tuple(int(expr) if expr.is_number else str(expr) for expr in sizes)
    return TensorSpec(name, dtype_name(node.meta["val"].dtype), dims)
