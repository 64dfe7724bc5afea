"""A bias and GELU in one operator.

before:  %h = Add(%p, %b);  %y = Gelu(%h, approximate="tanh")
after:   %y = FastGelu(%p, %b)
"""

__all__ = ["fuse_gelu"]

import onnx_ir as ir
from modcompile.runtimes.ort.fuse.edit import MICROSOFT
from modcompile.runtimes.ort.fuse.source import fits_bias
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet


def fuse_gelu(model: ir.Model) -> None:
    """Rewrites a model in place."""
    RewriteRuleSet([*_FastGelu.rule().commute(), *_BiasGelu.rule().commute()]).apply_to_model(model)


class _BiasGelu(RewriteRuleClassBase):
    """A bias [N] and the exact GELU."""

    approximate, op_type = "none", "BiasGelu"

    def pattern(self, op, x, bias):
        return op.Gelu(op.Add(x, bias), _outputs=["gelu"])

    def check(self, op, x, bias, gelu, **_) -> MatchResult:
        result = MatchResult()
        found = gelu.producer().attributes.get_string("approximate", "none")
        if found != self.approximate or not fits_bias(x, bias):
            return result.fail("another GELU, or no bias [N]")
        return result

    def rewrite(self, op, x, bias, **_):
        return getattr(op, self.op_type)(x, bias, _domain=MICROSOFT)


class _FastGelu(_BiasGelu):
    """A bias [N] and the tanh form of GELU."""

    approximate, op_type = "tanh", "FastGelu"
