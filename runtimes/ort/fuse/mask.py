"""The numbers of a mask are made before its rows are chosen and spread, once and not in every block.

    before:  %rows = Transpose(GatherRows(Transpose(%valid), %positions))        bool [B, 1, 1, K]
             %bias: [B, 1, K, K] = Cast(Where(Expand(%rows), 0, -inf))           in each routed block, six kernels
    after:   %bias = Expand(Reshape(GatherRows(%numbers, %positions)));  %numbers = Reshape(Where(%valid, 0, -inf))

A transpose that moves no dim but those of size 1 is a reshape, and takes no kernel.
"""

__all__ = ["fuse_masks"]

import numpy as np
import onnx_ir as ir
from modcompile.runtimes.ort.custom_ops import DOMAIN
from onnx_ir.passes import common
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet

# B batch  K capacity


def fuse_masks(model: ir.Model) -> None:
    """Rewrites a model in place."""
    RewriteRuleSet([_CastNumbers.rule()]).apply_to_model(model)
    rules = RewriteRuleSet([_SpreadNumbers.rule(), _TurnedNumbers.rule(), _GatheredNumbers.rule()])
    while rules.apply_to_model(model):
        # Every block makes the same numbers now, and the next step up is for what has one user.
        common.CommonSubexpressionEliminationPass()(model)


def _scalar(value: ir.Value) -> np.ndarray | None:
    tensor = ir.convenience.get_const_tensor(value)
    # One of more dims would give the condition more, too.
    return None if tensor is None or tensor.size != 1 or len(tensor.shape) > 1 else tensor.numpy()


class _Numbers(RewriteRuleClassBase):
    """A choice between two numbers, which can be made before what its condition comes from."""

    def check(self, op, yes, no, **_) -> MatchResult:
        result = MatchResult()
        return result if _scalar(yes) is not None and _scalar(no) is not None else result.fail("no two numbers")


class _CastNumbers(_Numbers):
    """Cast afterwards."""

    def pattern(self, op, condition, yes, no):
        return op.Cast(op.Where(condition, yes, no), _outputs=["cast"])

    def rewrite(self, op, condition, yes, no, cast):
        dtype = ir.DataType(cast.producer().attributes.get_int("to")).numpy()
        with np.errstate(over="ignore"):  # the lowest number of a wider dtype becomes -inf, as a cast makes it
            made = [np.asarray(_scalar(value)).astype(dtype) for value in (yes, no)]
        return op.Where(condition, *(op.Constant(value=ir.tensor(number)) for number in made))


class _SpreadNumbers(_Numbers):
    """Made of a condition that is spread."""

    def pattern(self, op, condition, shape, yes, no):
        return op.Where(op.Expand(condition, shape), yes, no)

    def rewrite(self, op, condition, shape, yes, no):
        return op.Expand(op.Where(condition, yes, no), shape)


class _TurnedNumbers(_Numbers):
    """Made of a condition whose dims change places, but for those of size 1 in their order."""

    def pattern(self, op, condition, yes, no):
        return op.Where(op.Transpose(condition, _outputs=["turned"]), yes, no)

    def check(self, op, yes, no, **others) -> MatchResult:
        result, turned = super().check(op, yes, no), others["turned"]
        perm = turned.producer().attributes.get_ints("perm", ())
        if turned.shape is None or not turned.shape.is_static() or not perm:
            return result.fail("sizes that are not known")
        moved = [axis for axis, size in zip(perm, turned.shape, strict=True) if size != 1]
        return result if moved == sorted(moved) else result.fail("dims change places")

    def rewrite(self, op, condition, yes, no, turned):
        return op.Reshape(op.Where(condition, yes, no), op.Constant(value_ints=list(turned.shape)))


class _GatheredNumbers(_Numbers):
    """Made of a condition whose rows are chosen."""

    def pattern(self, op, condition, positions, yes, no):
        return op.Where(op.GatherRows(condition, positions, _domain=DOMAIN), yes, no)

    def rewrite(self, op, condition, positions, yes, no):
        return op.GatherRows(op.Where(condition, yes, no), positions, _domain=DOMAIN)
