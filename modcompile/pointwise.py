"""Which operations compute each element by itself."""

__all__ = ["is_pointwise"]

import torch

aten = torch.ops.aten
# Ops that broadcast, of which torch tags some overloads alone, or none.
UNTAGGED = (aten.where, aten.masked_fill, aten.__and__, aten.__or__, aten.__xor__, aten.rsub, aten.floor_divide,
            aten.subtract, aten.multiply, aten.divide, aten.true_divide)


def is_pointwise(target: object) -> bool:
    """Whether an op computes each element of its broadcast operands by itself. torch tags not every overload of one."""
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags
        # With a condition alone it says where that holds.
        or (target.overloadpacket in UNTAGGED and target is not aten.where.default))
