"""Finds what in a block looks at rows by their place, outside of attention: a convolution over the sequence, say.

Attention asks what a row holds, and a mask or positions say where it was. A convolution asks for what lies beside it:
of chosen rows that is another row than of all. Such a block can be routed, but not even with all rows, where some are
padding, is it the dense one: padding passes by it, and is then mixed into its neighbours in the next.
"""

from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
import torch.fx

from modcompile.shapes import shape_exprs

__all__ = ["sees_places"]

aten = torch.ops.aten
# Each window is of the dims from the third on.
CONVOLUTIONS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, aten.conv_transpose1d,
                          aten.conv_transpose2d, aten.conv_transpose3d})
POOLS = frozenset({aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten.max_pool1d, aten.max_pool2d,
                   aten.max_pool3d})
PADS = frozenset({aten.pad, aten.constant_pad_nd})
# What takes, moves, sums or transforms the places along the dims that it names.
ALONG = frozenset({aten.chunk, aten.cumprod, aten.cumsum, aten.flip, aten.narrow, aten.roll, aten.select, aten.slice,
                   aten.split, aten.split_with_sizes, aten.unbind, aten.unfold})


def sees_places(body: Iterable[torch.fx.Node], rows: sympy.Expr, in_rows: Callable[[sympy.Expr], sympy.Expr]
                ) -> torch.fx.Node | None:
    """The first node of a block that looks at rows by their place, outside of attention.

    Args:
        body: What the block makes of its hidden state.
        rows: What stands for the number of rows.
        in_rows: Puts it into a size.
    """
    for node in body:
        value = node.all_input_nodes[0]
        along = [rows in in_rows(size).free_symbols for size in shape_exprs(value) or ()]
        # Scores have rows along both of their last dims.
        if any(along) and not all(along[-2:]) and _looks_along(node, along):
            return node
    return None


def _looks_along(node: torch.fx.Node, along: list[bool]) -> bool:
    """Whether a node looks along dims of its first operand that are marked."""
    packet: Any = getattr(node.target, "overloadpacket", None)
    if packet in CONVOLUTIONS:
        kernel = shape_exprs(node.args[1]) or ()
        return any(marked and size != 1 for marked, size in zip(along[2:], kernel[2:], strict=False))
    if packet in POOLS:
        return any(along[2:])
    if packet in PADS:
        # From the last dim, two numbers each.
        before = node.args[1]
        return any(marked and (before[2 * i] != 0 or before[2 * i + 1] != 0)
                   for i, marked in enumerate(reversed(along)) if 2 * i < len(before))
    if packet in ALONG or getattr(packet, "__name__", "").startswith("fft_"):
        dims = _dims(node)
        return any(along[dim] for dim in dims) if dims else any(along)
    return False


def _dims(node: torch.fx.Node) -> list[int]:
    """The dims that a call names; none where that is all of them."""
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.name in ("dim", "dims", "dimension"):
            given = argument.default_value if argument.has_default_value() else None
            dims = node.args[place] if len(node.args) > place else node.kwargs.get(argument.name, given)
            return [dims] if isinstance(dims, int) else list(dims or ())
    return []
