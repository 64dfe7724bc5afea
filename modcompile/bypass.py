"""A trained low-rank update for the rows that pass a block by, which are otherwise left as they are.

    b(x) = x + W_up silu(W_down n(x))      n(x) = x / sqrt(mean(x^2) + 1e-6), row by row

W_down is [R, D] and W_up [D, R], with a rank R far below the model dim D: 4 R D FLOPs a row, where a block of a usual
decoder takes 24 D^2 and more. A pretrained model's rows miss something when they pass by; what all of them miss, few
directions can give back, and only training can find them: W_up starts at 0, where b(x) = x. A row that is chosen takes
its update from the block instead.
"""

__all__ = ["add_bypass", "bypass_parameters", "bypass_path", "emit_bypass"]

import math

import torch
import torch.fx
from torch import nn

# B batch  S rows  D model dim  R rank

aten = torch.ops.aten
EPSILON = 1e-6
PREFIX = "bypass."


def bypass_path(block: str) -> str:
    """Where the parameters of a block's bypass are.

    Example:
        >>> bypass_path("encoder.layer.1")
        'bypass.encoder.layer.1'
    """
    return f"{PREFIX}{block}"


def add_bypass(graph_module: torch.fx.GraphModule, block: str, width: int, rank: int, device: torch.device) -> None:
    """Registers a block's two matrices: W_down random, W_up 0.

    Args:
        graph_module: The model's.
        block: Its module path.
        width: D.
        rank: R.
        device: Where the parameters are.
    """
    # A module of its own, so that the parameters have a place in the graph module's tree.
    place = nn.Module()
    place.down = nn.Parameter(torch.randn(rank, width, device=device) / math.sqrt(width))
    place.up = nn.Parameter(torch.zeros(width, rank, device=device))
    graph_module.add_submodule(bypass_path(block), place)


def emit_bypass(graph: torch.fx.Graph, hidden: torch.fx.Node, block: str) -> torch.fx.Node:
    """b(x), [B, S, D], at the graph's insertion point. The parameters are the graph's: they are saved and exported."""
    path = bypass_path(block)

    def call(target, *args):
        node = graph.call_function(target, args)
        # By which its FLOPs are counted.
        node.meta["nn_module_stack"] = {path: (path, "")}
        return node

    normed = call(aten.rms_norm.default, hidden, [int(hidden.meta["val"].shape[-1])], None, EPSILON)
    inner = call(aten.silu.default, call(aten.linear.default, normed, graph.get_attr(f"{path}.down")))
    passed = call(aten.add.Tensor, hidden, call(aten.linear.default, inner, graph.get_attr(f"{path}.up")))
    # Shaped as before: the next block reads its sizes from here.
    passed.meta["val"] = hidden.meta["val"]
    return passed


def bypass_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of every bypass, by name; none where the configuration has no ``bypass_rank``."""
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(PREFIX)}
