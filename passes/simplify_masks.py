"""Takes masks off attention that say no more than causality, or nothing at all.

    before:  %keep: bool[B, 1, S, S] = aten.le(%keys, %queries)       numbers of rows, made from S alone
             %kept: bool[B, 1, K, K] = %keep, gathered at %positions along both dims
             %y = aten.scaled_dot_product_attention(%q, %k, %v, %kept)
    after:   %y = aten.scaled_dot_product_attention(%q, %k, %v, None, 0.0, True)

Why: tracing writes out the mask that a model otherwise leaves to the causal flag. A mask costs S * S bytes a sequence,
and keeps runtimes from their kernel for causal attention, which reads none and computes half of the scores.

Each element of a mask is followed as a function of its own indices (``modcompile.mask_elements``). That takes no sizes,
so what is found holds for all of them.

1. A mask that is true everywhere goes, or that adds nothing anywhere.
2. One that is true, or adds nothing, only where the key's index is at most the query's becomes the causal flag. The
   rows that ``route`` chose ascend, so their order is that of their positions.
3. Of two masks that must both hold, one that is true everywhere goes. What is left, often of the keys alone, has size 1
   along the queries: nothing is gathered along them then.
4. Any other stays, such as one that depends on an input's values.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from modcompile.attention import SDPA, attention_arguments
from modcompile.mask_elements import ALWAYS, Bias, Conditions, Elements
from modcompile.mask_rules import BOTH, follow
from modcompile.pass_manager import Pass, PassResult, Skip
from modcompile.shapes import shape_exprs

__all__ = ["SimplifyMasks"]

# B batch  S rows  K capacity


@dataclasses.dataclass(frozen=True)
class SimplifyMasks(Pass):
    """Simplifies the mask of every scaled_dot_product_attention in a graph; the sub-graphs it calls are left alone."""

    name: ClassVar[str] = "simplify-masks"

    def call(self, graph_module: GraphModule) -> PassResult:
        """Follows the graph's integers and bools once, then looks at each attention."""
        attentions = graph_module.graph.find_nodes(op="call_function", target=SDPA)
        masked = [node for node in attentions if attention_arguments(node)["attn_mask"] is not None]
        values = follow(graph_module.graph) if masked else {}
        modified, skips = False, {}
        for node in masked:
            arguments = attention_arguments(node)
            query, key, value, given = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
            mask = _without_true(given, values)
            kept = _kept_by(mask, values)
            causal = _is_causal(kept, mask, query, key)
            if kept != ALWAYS and not causal:
                if mask is not given:
                    node.replace_input_with(given, mask)
                    modified = True
                skips[mask] = Skip("the mask is not known to be causal, or true everywhere, at all sizes", mask.name)
                continue
            node.args = (query, key, value, None, arguments["dropout_p"], causal)
            node.kwargs = {name: node.kwargs[name] for name in ("scale", "enable_gqa") if name in node.kwargs}
            modified = True
        return PassResult(graph_module, modified, tuple(skips.values()))


def _without_true(mask: Node, values: Mapping[Node, Elements]) -> Node:
    """The operand that a mask is, where the other is true everywhere."""
    while mask.target in BOTH:
        left = [operand for operand in mask.args if values.get(operand) != ALWAYS]
        if len(left) != 1 or not isinstance(left[0], Node) or len(_shape(left[0])) != len(_shape(mask)):
            break
        mask = left[0]
    return mask


def _kept_by(mask: Node, values: Mapping[Node, Elements]) -> Conditions | None:
    """Where a mask keeps scores; None if that is not known."""
    value = values.get(mask)
    if isinstance(value, Bias):
        return value.kept
    return value if isinstance(value, tuple) and mask.meta["val"].dtype == torch.bool else None


def _is_causal(kept: Conditions | None, mask: Node, query: Node, key: Node) -> bool:
    if kept is None or len(kept) != 1 or len(kept[0].factors) != 2 or kept[0].constant != 0:
        return False
    shape, rows, columns = _shape(mask), _shape(query)[-2], _shape(key)[-2]
    (one, factor), (other, opposite) = sorted(kept[0].factors.items(), key=lambda item: item[0].dim)
    return (shape[-2:] == (rows, columns) and rows == columns
            and (one.dim, other.dim) == (len(shape) - 2, len(shape) - 1)
            and one.positions is other.positions and factor == -opposite and factor > 0)


def _shape(node: Node) -> tuple:
    return shape_exprs(node) or ()
