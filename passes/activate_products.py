"""Makes the tanh form of GELU part of the product before it, for a GPU.

    before:  %p: float16[R, N] = aten.addmm(%bias, %rows, %weight)                     rows[R, D]  weight[D, N]  bias[N]
             %y: float16[B, S, N] = aten.gelu(aten.reshape(%p, [B, S, N]), approximate="tanh")
    after:   %p: float16[R, N] = aten._addmm_activation(%bias, %rows, %weight, use_gelu=True)
             %y: float16[B, S, N] = aten.reshape(%p, [B, S, N])

Why: cuBLASLt adds the bias and applies the activation to what it still has in registers. As a kernel of its own the
activation reads and writes a block's widest value once more, which for 8192 x 4096 takes an H200 31 us at the least.
In a CUDA graph product and activation took 155 us apart and 121 in one; with 1024 rows, 23.0 and 16.7.

On CUDA the op is the tanh form; on a CPU it is the exact one, so this pass is of pipelines for CUDA alone. There,
PyTorch hands it to cuBLASLt where the bias is one row and no matrix has a dim of 1 (``isInputCompliesAddmmCudaLt`` in
aten/src/ATen/native/cuda/Blas.cpp), and otherwise runs a product and a GELU of its own, with a copy of the bias before.

1. A ``linear`` has its rows flattened, its weight transposed, and its result's dims restored.
2. What has another user before it is activated stays: both are needed.
3. So does what cuBLASLt does not take: no bias or not one of shape [N], other factors, a single row, column or term.
4. So does float32, for which the compiler joins the bias and the activation into one kernel behind the product.
"""

import dataclasses
import math
from typing import ClassVar

import torch
import torch.fx

from modcompile.pass_manager import Pass, PassResult, call_for
from modcompile.shapes import shape_exprs

__all__ = ["ActivateProducts"]

# B batch  S rows of a sequence  R rows  D width before  N width after

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class ActivateProducts(Pass):
    """Rewrites every product in half precision, with a bias, whose only user is a GELU in its tanh form."""

    name: ClassVar[str] = "activate-products"

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Starts from each activation."""
        found = graph_module.graph.find_nodes(op="call_function", target=aten.gelu.default)
        return PassResult(graph_module, any([_activate(node) for node in found]))


def _activate(gelu: torch.fx.Node) -> bool:
    value = gelu.args[0]
    product = value.args[0] if value.target is aten.reshape.default else value
    # Case 2.
    if gelu.kwargs.get("approximate") != "tanh" or len(value.users) != 1 or len(product.users) != 1:
        return False
    if product.target not in (aten.addmm.default, aten.linear.default) or not _fits(product):
        return False
    graph = product.graph
    with graph.inserting_before(product):
        if product.target is aten.addmm.default:
            made = call_for(product, aten._addmm_activation.default, *product.args, use_gelu=True)
        else:
            # Case 1.
            x, weight, bias = product.args
            *leading, width = x.meta["val"].shape
            flat = x if len(leading) == 1 else call_for(product, aten.reshape.default, x, [-1, width])
            turned = call_for(product, aten.t.default, weight)
            made = call_for(product, aten._addmm_activation.default, bias, flat, turned, use_gelu=True)
            if len(leading) > 1:
                sizes = [dim if isinstance(dim, int) else call_for(product, aten.sym_size.int, x, index)
                         for index, dim in enumerate(leading)]
                made = call_for(product, aten.reshape.default, made, [*sizes, weight.meta["val"].shape[0]])
    product.replace_all_uses_with(made)
    gelu.replace_all_uses_with(gelu.args[0])
    graph.erase_node(gelu)
    graph.erase_node(product)
    return True


def _fits(product: torch.fx.Node) -> bool:
    """Cases 3 and 4."""
    if product.target is aten.addmm.default:
        bias, rows, _ = product.args
    else:
        rows, _, bias = (*product.args, None)[:3]
    biased, before, after = (shape_exprs(node) if isinstance(node, torch.fx.Node) else None
                             for node in (bias, rows, product))
    if product.kwargs or biased is None or before is None or after is None:
        return False
    *leading, terms = before
    columns = after[-1]
    return (product.meta["val"].dtype in (torch.float16, torch.bfloat16) and bool(leading) and biased == (columns,)
            and columns.is_Integer and terms.is_Integer and 1 not in (math.prod(leading), terms, columns))
