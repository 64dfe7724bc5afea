"""Prepares a graph for ONNX Runtime's CUDA provider: its own operators in the place of standard ones and their sums.

Why: between products a block is bound by memory, and each sum of its own reads and writes the whole of it once more.
ONNX Runtime fuses some of this itself, but not where the sum is used again, as every pre-norm block's is, and not
around rows that are gathered and merged; and a product with a bias it makes of two kernels, one of which only copies
the bias. What is not reached stays as it is, and means the same.
"""

__all__ = ["fuse_for_cuda"]

import onnx_ir as ir
from modcompile.runtimes.ort.fuse.attention import fuse_attention
from modcompile.runtimes.ort.fuse.edit import MICROSOFT
from modcompile.runtimes.ort.fuse.gather import fuse_gathers
from modcompile.runtimes.ort.fuse.gelu import fuse_gelu
from modcompile.runtimes.ort.fuse.mask import fuse_masks
from modcompile.runtimes.ort.fuse.norm import fuse_lone_norms, fuse_norms
from modcompile.runtimes.ort.fuse.router import fuse_routers
from modcompile.runtimes.ort.fuse.sum import fuse_sums
from modcompile.runtimes.ort.fuse.table import fuse_tables
from onnx_ir.passes import common


def fuse_for_cuda(model: ir.Model, *, custom_ops: bool = False) -> ir.Model:
    """Rewrites a model in place, and returns it.

    Args:
        model: A model as ``export_onnx`` writes it, not inlined.
        custom_ops: Also what only our custom-op library runs well: without it, function bodies take its place.
    """
    fuse_attention(model)
    fuse_norms(model)
    if custom_ops:
        fuse_gathers(model)
        fuse_routers(model)
        fuse_sums(model)
    fuse_lone_norms(model)
    fuse_gelu(model)
    fuse_tables(model)
    fuse_masks(model)
    # New nodes stand where the last of the old ones stood, which may be behind a user of another output.
    model.graph.sort()
    common.RemoveUnusedNodesPass()(model)
    model.opset_imports.setdefault(MICROSOFT, 1)
    return model
