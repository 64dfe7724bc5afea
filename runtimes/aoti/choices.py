"""Where the compiler's rules of thumb are another's than ours.

Whether a kernel keeps a row in registers, or reads it a second time for what a norm makes of it, it decides by how the
kernel's inputs lie in memory. Gathered rows lie wherever their positions say, so it knows nothing and reads them twice:
of 1,024 rows of 1,024 float16 on an H100 the norm took 6.2 us, and that of rows that lie in order 4.2 us. But within a
row they lie as any row does.
"""

__all__ = ["GatheredRows"]

from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
from torch._inductor.runtime.hints import ReductionHint

# The longest row that the compiler itself keeps, where it knows how it lies.
LONGEST_KEPT = 1024


class GatheredRows(InductorChoices):
    """Inductor's choices, and rows of which it knows nothing are kept as well."""

    @staticmethod
    def should_use_persistent_reduction(features: SIMDKernelFeatures, cooperative_reduction: bool) -> bool:
        """Whether a kernel's row is read once."""
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        size, unknown = features.reduction_numel, features.get_reduction_hint() == ReductionHint.DEFAULT
        return unknown and not cooperative_reduction and bool(size.is_Integer) and int(size) <= LONGEST_KEPT
