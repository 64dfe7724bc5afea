"""What is done to the gathered rows of a table is done to the table instead, once and not in every block.

    before:  %rows: [B, K, 1, D] = Gather(%table: [S, 1, D], %positions)
             %cos: [B, K, D] = Cast(Squeeze(Transpose(%rows)))              in each routed block, three kernels
    after:   %cos = Gather(%halves, %positions);  %halves: [S, D] = Cast(Squeeze(%table))       once, or folded

The rotary tables of a routed block, cosines and sines, are such rows.
"""

__all__ = ["fuse_tables"]

import onnx_ir as ir
from modcompile.runtimes.ort.fuse.source import depends_on_inputs
from onnx_ir.passes import common
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet

# B batch  S rows  K capacity  D model dim


def fuse_tables(model: ir.Model) -> None:
    """Rewrites a model in place."""
    if RewriteRuleSet([_SqueezedRows.rule(), _CastRows.rule()]).apply_to_model(model):
        # Every block has made the same of the table.
        common.CommonSubexpressionEliminationPass()(model)


class _SqueezedRows(RewriteRuleClassBase):
    """Rows of [1, D], with that 1 before them for a product with heads, and gone again."""

    def pattern(self, op, table, positions, axes):
        rows = op.Transpose(op.Gather(table, positions, _outputs=["gathered"]), perm=[0, 2, 1, 3])
        return op.Squeeze(rows, axes)

    def check(self, op, table, positions, axes, gathered, **_) -> MatchResult:
        result = MatchResult()
        if not _takes_rows(gathered) or table.shape is None or len(table.shape) != 3 or table.shape[1] != 1:
            return result.fail("no gather of rows [1, D]")
        if positions.shape is None or len(positions.shape) != 2:
            return result.fail("no positions [B, K]")
        axis = ir.convenience.get_const_tensor(axes)
        return result if axis is not None and axis.numpy().tolist() == [1] else result.fail("another axis is dropped")

    def rewrite(self, op, table, positions, axes, **_):
        return op.Gather(op.Squeeze(table, axes), positions, axis=0)


class _CastRows(RewriteRuleClassBase):
    """Rows that are cast, of a table that is computed: a weight would be kept twice."""

    def pattern(self, op, table, positions):
        return op.Cast(op.Gather(table, positions, _outputs=["gathered"]), _outputs=["cast"])

    def check(self, op, table, positions, gathered, **_) -> MatchResult:
        result = MatchResult()
        # A table that a call brings may have more rows than are taken of it.
        if not _takes_rows(gathered) or table.producer() is None or depends_on_inputs(table):
            return result.fail("no gather of a computed table's rows")
        return result

    def rewrite(self, op, table, positions, cast, **_):
        return op.Gather(op.Cast(table, to=cast.producer().attributes.get_int("to")), positions, axis=0)


def _takes_rows(gathered: ir.Value) -> bool:
    node = gathered.producer()
    return node is not None and node.attributes.get_int("axis", 0) == 0
