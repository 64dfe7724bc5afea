"""Whether an engine computes what its model does, before it is timed.

In float32 ``modcompile.verify`` decides. In half precision its tolerance does not fit every model:

1. Some models have rows that rounding moves far, in any implementation: of SmolLM2-135M on 1024 tokens of a play, a row
   in 50 is further than 1 % from the float32 model's when transformers computes it in float16.
2. A routed engine ranks some rows whose logits are nearly equal otherwise than the model. They miss a block's update,
   or have one more, and rows that attend to them differ for it. To prove that of an engine, ``verify`` builds another
   one, which for a large model on a GPU takes longer than the benchmark.

So here rows are counted: how many are far from the float32 model's in the engine, and how many in PyTorch on the same
graph in the engine's precision. An engine may have twice PyTorch's, and a routed one a hundredth of all rows more. If
it has more than that, ``verify`` has the last word. Where PyTorch has most of them, as with random routers in a deep
model, any number passes, and the report says so: only ``verify``, with the engine's own choices, tells more.
"""

__all__ = ["SHOWS_LITTLE", "Agreement", "check", "inputs_for"]

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modcompile.engine import Engine
from modcompile.export.flatten import flatten
from modcompile.model import GraphModel, device_of, evaluating
from modcompile.pass_manager import PassManager
from modcompile.spec import dtype_from_name
from modcompile.verify import verify
from modcompile.verify_compare import TOLERANCES

# Of all rows, where there is routing; as a relative L2 error, what that many rows make that are wholly wrong.
_SLACK = 0.01
# Where more of PyTorch's own rows are far, any number of far rows passes.
SHOWS_LITTLE = 0.5


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How near outputs are to the model's.

    Attributes:
        max_abs_error: The largest difference; ``relative_l2``: of the whole, the largest of all outputs.
        far_rows: The share of rows, the vectors along the last dim, whose relative L2 error is above the tolerance of
            ``verify``. Zero where ``verify`` passed the engine.
        torch_far_rows: The same of PyTorch in the engine's precision; None where that was not asked.
        routing: Near ties that the engine decided otherwise, as ``verify`` found them.
    """

    max_abs_error: float
    relative_l2: float
    far_rows: float = 0.0
    torch_far_rows: float | None = None
    routing: tuple[str, ...] = ()


def check(model: GraphModel, engine: Engine, inputs: Mapping[str, Any], *, routed: bool,
          options: Mapping[str, Any]) -> Agreement:
    """Compares every output; all rows are valid.

    Args:
        model: What the engine was built from.
        engine: The engine.
        inputs: Every input by name, as numpy arrays.
        routed: Whether the model ranks rows.
        options: Of ``build_engine``, see ``modcompile.verify``.

    Raises:
        ParityError: They differ.
    """
    precision = engine.manifest.precision
    if precision != "fp32":
        tolerance = TOLERANCES[precision]
        device = device_of(model)
        with evaluating(model):
            expected = model.run_graph([torch.as_tensor(inputs[spec.name]).to(device) for spec in model.inputs])
        found = _compare(list(engine.run(inputs_for(engine, inputs, device)).values()), expected, tolerance)
        if found.far_rows == 0:
            return found
        with evaluating(model):
            own = _compare(_in_torch(model, engine, inputs, device), expected, tolerance)
        slack = _SLACK if routed else 0.0
        if found.far_rows <= 2 * own.far_rows + slack and \
                found.relative_l2 <= 2 * own.relative_l2 + math.sqrt(slack):
            return dataclasses.replace(found, torch_far_rows=own.far_rows)
    report = verify(model, engine, inputs, options=options)
    return Agreement(max(item.max_abs_error for item in report.outputs),
                     max(item.relative_l2 for item in report.outputs), routing=tuple(map(str, report.routing)))


def inputs_for(engine: Engine, inputs: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The inputs on a device, floats in the type that the engine takes."""
    tensors = {spec.name: torch.as_tensor(inputs[spec.name]) for spec in engine.inputs}
    return {spec.name: tensors[spec.name].to(
        device, dtype_from_name(spec.dtype) if tensors[spec.name].is_floating_point() else None)
        for spec in engine.inputs}


def _in_torch(model: GraphModel, engine: Engine, inputs: Mapping[str, Any], device: torch.device) -> Sequence[Tensor]:
    """The outputs of PyTorch, an op at a time, in the engine's precision."""
    # It imports the compiler, which is not used here.
    from modcompile.runtimes.aoti.builder import lowering_passes

    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    flat = PassManager(lowering_passes(engine.manifest.precision))(flatten(model, shapes))
    given = [torch.as_tensor(inputs[spec.name]) for spec in model.inputs]
    dtypes = [node.meta["val"].dtype for node in flat.graph.find_nodes(op="placeholder")]
    return flat(*(value.to(device, dtype) for value, dtype in zip(given, dtypes, strict=True)))


def _compare(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> Agreement:
    largest, relative, far, rows = 0.0, 0.0, 0, 0
    # An engine may hand out more than its model.
    for actual, wanted in zip(found, expected, strict=False):
        right = wanted.float().reshape(-1, wanted.shape[-1])  # [rows, D]
        apart = actual.to(wanted.device).float().reshape(right.shape) - right
        error, size = (torch.linalg.vector_norm(side, dim=-1) for side in (apart, right))  # [rows]
        # What is NaN is far.
        far += int((~(error <= tolerance * size)).sum())
        rows += len(error)
        largest = max(largest, float(apart.abs().max()))
        whole = float(torch.linalg.vector_norm(error) / torch.linalg.vector_norm(size))
        relative = max(relative, math.inf if math.isnan(whole) else whole)
    return Agreement(largest, relative, far / rows)
