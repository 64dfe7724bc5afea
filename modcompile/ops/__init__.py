"""The three operations of a routed block. One file each: reference, fake, ONNX bodies, kernel registration."""

__all__ = ["ONNX_DOMAIN", "ONNX_DOMAIN_VERSION", "ONNX_OPSETS", "gather_rows", "merge_rows", "onnx_functions", "route"]

from typing import TYPE_CHECKING

from modcompile.errors import UsageError
from modcompile.ops.gather_rows import ONNX_BODIES as _GATHER_ROWS_BODIES
from modcompile.ops.gather_rows import gather_rows
from modcompile.ops.merge_rows import ONNX_BODIES as _MERGE_ROWS_BODIES
from modcompile.ops.merge_rows import merge_rows
from modcompile.ops.route import ONNX_BODIES as _ROUTE_BODIES
from modcompile.ops.route import route

if TYPE_CHECKING:
    import onnx

ONNX_DOMAIN = "modcompile"
ONNX_DOMAIN_VERSION = 1
ONNX_OPSETS = range(17, 24)


def onnx_functions(opset: int) -> "list[onnx.FunctionProto]":
    """The bodies of ``Route``, ``MaskedRoute``, ``GatherRows`` and ``MergeRows``, for ``ModelProto.functions``.

    Each is written in standard operators alone; ``capacity`` is an int64 tensor of shape ``[]``. The model that holds
    them imports ``ONNX_DOMAIN`` at ``ONNX_DOMAIN_VERSION``.

    Args:
        opset: The model's version of the default domain, one of ``ONNX_OPSETS``.

    Returns:
        One function for each op type.

    Raises:
        UsageError: The opset is none of ``ONNX_OPSETS``.

    Example:
        >>> [function.name for function in onnx_functions(18)]
        ['Route', 'MaskedRoute', 'GatherRows', 'MergeRows']
    """
    import onnx.parser

    if opset not in ONNX_OPSETS:
        raise UsageError(
            "the function bodies are not written for this opset",
            expected=f"{ONNX_OPSETS.start} <= opset <= {ONNX_OPSETS.stop - 1}",
            found=f"opset = {opset}",
            where="onnx_functions, argument opset",
            fix="export with another opset",
        )
    header = f'<domain: "{ONNX_DOMAIN}", opset_import: ["": {opset}]>'
    bodies = (*_ROUTE_BODIES, *_GATHER_ROWS_BODIES, *_MERGE_ROWS_BODIES)
    return [onnx.parser.parse_function(header + body) for body in bodies]
