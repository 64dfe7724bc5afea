"""Counts floating-point operations from a graph: of the whole of it, and of every module it came from."""

import collections
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch.utils.flop_counter import FlopCounterMode

from modcompile.block_view import module_paths
from modcompile.errors import UsageError
from modcompile.model import GraphModel
from modcompile.shapes import fake_inputs
from modcompile.spec import TensorSpec

__all__ = ["count_flops", "flops_by_module"]

# B batch  H heads  S queries  T keys  D size of a head


def count_flops(model: GraphModel, sizes: Mapping[str, int]) -> int:
    """Floating-point operations of one call, 2 per multiply-add, counted from the graph on fake tensors.

    Products, convolutions and attention count, attention in full whatever its mask; elementwise work does not.

    Args:
        model: Any captured, routed or pruned model.
        sizes: The size of each symbol of its inputs.

    Raises:
        UsageError: A symbol without a size, or sizes that the model does not take.

    Example:
        >>> from modcompile import capture
        >>> count_flops(capture(torch.nn.Linear(4, 2), (torch.randn(3, 4),)), {"batch": 10})
        160
    """
    return flops_by_module(model, sizes)[""]


def flops_by_module(model: GraphModel, sizes: Mapping[str, int]) -> dict[str, int]:
    """As ``count_flops``, by the path of the module that each operation came from; "" is the whole model.

    Nodes of a sub-graph count for the module that it is.
    """
    missing = {dim for spec in model.inputs for dim in spec.shape if isinstance(dim, str)} - set(sizes)
    if missing:
        raise UsageError("FLOPs need a size for every symbol", expected=model.interface.summary(),
                         found=f"no size for {', '.join(sorted(missing))}", where="count_flops")
    inputs: list[Any] = fake_inputs([TensorSpec(name=spec.name, dtype=spec.dtype, shape=tuple(
        sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)) for spec in model.inputs], like=model)
    counter = _Counter(model.graph_module)
    try:
        with torch.no_grad(), counter.flops, inputs[0].fake_mode:
            counter.run(*inputs)
    except RuntimeError as error:
        # Shapes alone are computed, so shapes alone can be at fault, as where a table of positions is too short.
        raise UsageError("the model does not take these sizes", expected=model.interface.summary(),
                         found=f"{', '.join(f'{name} {size}' for name, size in sizes.items())}: "
                               f"{str(error).partition(chr(10))[0]}", where="count_flops") from error
    return counter.by_module


class _Counter(torch.fx.Interpreter):
    def __init__(self, graph_module: torch.fx.GraphModule):
        super().__init__(graph_module)
        self.flops = FlopCounterMode(display=False, custom_mapping={
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        })
        self.by_module: dict[str, int] = collections.defaultdict(int)

    def fetch_attr(self, target: str) -> Any:
        # A part of a parameter would ask for a gradient, which torch's counter then looks for in vain.
        value = super().fetch_attr(target)
        return value.detach() if isinstance(value, torch.Tensor) else value

    def run_node(self, node: torch.fx.Node):
        before = self.flops.get_total_flops()
        value = super().run_node(node)
        spent = self.flops.get_total_flops() - before
        paths = [node.target] if node.op == "call_module" else module_paths(node)
        # A module that is entered twice is in the stack twice.
        for path in {"", *paths}:
            self.by_module[path] += spent
        return value


def _attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object,
                     **__: object) -> int:
    """QK^T [B, H, S, T] and its product with V. torch counts the GPU's attention ops, but not the CPU's."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])
