"""Compares an engine with its model on the same inputs, and finds the first block that differs.

Routing makes this more than a subtraction. Two rows whose logits are nearly equal may be ranked one way by the model
and the other way by the engine; the rows then differ by a whole block's update, and neither is wrong. So where outputs
differ, the model is run again with the engine's choices: if every number then agrees, and the engine ranked its own
logits as the contract of ``route`` says, the difference is one of near ties, which the report names. Anything else is
an error. Where each row decides for itself (``training.causal_model``), near a threshold is what nearly equal is here.
"""

__all__ = ["verify"]

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
from torch import Tensor

from modcompile.config import MoDConfig
from modcompile.convert import padded_dims, padding_mask, valid_rows
from modcompile.engine import Engine, as_torch, build_engine, is_torch, load_options
from modcompile.errors import ParityError, UsageError
from modcompile.model import GraphModel, MoDModel, device_of, evaluating
from modcompile.spec import TensorSpec, dtype_from_name
from modcompile.variants import block_paths, with_routing_outputs
from modcompile.verify_compare import TOLERANCES, Comparison, apart_from_mean, compare
from modcompile.verify_report import RoutingDifference, VerifyReport
from modcompile.verify_routing import ForcedRouting, RoutingRules

# B batch  S rows

# Rows are ranked by how logits differ. These may lie close together beside a large one that all rows have, a bias, and
# so within the tolerance whatever their order: apart from their mean their relative L2 error is at most this.
_RANKING = 0.5


def verify(mod: GraphModel, engine: Engine, inputs: Mapping[str, Any], *, per_block: bool = False,
           tolerance: float | None = None, options: Mapping[str, Any] | None = None) -> VerifyReport:
    """Runs the model and the engine on the same inputs and compares every output.

    Rows of padding, as ``MoDConfig.padding_mask`` has them, may differ and are left out of outputs [B, S, ...]; so are
    sequences that are all padding of outputs [B, ...].

    Where the outputs of a routed model differ, an engine of the same runtime and precision that also hands out its
    routing is built in a temporary folder, unless ``engine`` is one (see ``modcompile.variants.with_routing_outputs``):
    near ties that it decided differently are no failure, see the head of this file. If they do not explain the outputs,
    and with ``per_block`` in any case, one is built that hands out every block's output too, and compared border by
    border.

    Args:
        mod: The model, routed or captured; it computes in its own precision, wherever its tensors are.
        engine: An engine of it.
        inputs: Every input by name, as numpy arrays or torch tensors. Floats are cast to what either side takes.
        per_block: Compare every block; needs a routed model.
        tolerance: Instead of the one of ``modcompile.verify_compare.TOLERANCES``.
        options: Of ``build_engine``, for the temporary engines.

    Raises:
        ParityError: An output differs. It says where, names the first block that differs if one does, and otherwise
            what that tells.
        UsageError: Inputs that do not fit, or an engine that is not of this model.

    Example:
        >>> verify(mod, engine, {"input_ids": ids, "attention_mask": mask}).outputs[0].max_abs_error  # doctest: +SKIP
        1.1e-06
    """
    if per_block and not isinstance(mod, MoDModel):
        raise UsageError("only a converted model knows its blocks", expected="a MoDModel", found=type(mod).__name__,
                         where="verify(per_block=True)", fix="convert the model, or leave per_block out")
    if not isinstance(inputs, Mapping) or not all(hasattr(value, "dtype") for value in inputs.values()):
        given = inputs.values() if isinstance(inputs, Mapping) else [inputs]
        raise UsageError("the inputs are not arrays by name", expected="a dict of numpy arrays or torch tensors",
                         found=", ".join(sorted({type(value).__name__ for value in given})), where="verify")
    if {spec.name for spec in engine.inputs} != {spec.name for spec in mod.inputs} or \
            len(engine.outputs) < len(mod.outputs):
        raise UsageError("the engine is not one of this model", expected=_signature(mod), found=_signature(engine),
                         where=engine.folder, fix="name the model that it was built from")
    case = _Case(mod, engine, _cast(inputs, engine.inputs),
                 TOLERANCES[engine.manifest.precision] if tolerance is None else tolerance)
    outputs = case.compare(mod.outputs, case.found, case.expected)
    failed = next((item for item in outputs if not item.passed), None)
    if not failed and not any(item.compared for item in outputs):
        raise UsageError("there is nothing to compare", expected="outputs with rows that are valid and finite",
                         found=", ".join(f"{item.name} {list(item.shape)}" for item in outputs), where="verify",
                         fix="give inputs with rows that are not padding, and see that the model's outputs are numbers")
    if isinstance(mod, MoDModel) and (per_block or failed):
        explained = None if per_block else case.explain(dict(options or {}))
        return explained or case.walk(outputs, failed, dict(options or {}))
    if failed:
        raise case.error(failed, fix="see that the engine was built from this model, with these weights")
    return case.report(outputs)


@dataclasses.dataclass(frozen=True)
class _Probe:
    """An engine that hands out more than the model's outputs, and the model beside it.

    Attributes:
        model: The model with these outputs; ``own``: the engine is the one in question, and no other was built.
        rules: How the model chooses rows.
        values: What the engine hands out, by name.
        forced: Its choices, by block and role, up to the first block where they do not follow its own logits.
        expected: What the model gives with these choices; ``natural``: what it would have chosen itself.
    """

    model: GraphModel
    own: bool
    rules: RoutingRules
    values: dict[str, Tensor]
    forced: dict[tuple[str, str], Tensor]
    expected: dict[str, Tensor]
    natural: dict[tuple[str, str], Tensor]


class _Case:
    """One verification: both sides' outputs on the same inputs."""

    def __init__(self, mod: GraphModel, engine: Engine, inputs: dict[str, Any], tolerance: float):
        self.mod, self.engine, self.inputs, self.tolerance = mod, engine, inputs, tolerance
        # First, for the engine checks what it is given.
        self.found = _outputs(engine, inputs, mod.outputs)
        device = device_of(mod)
        wanted = _cast({name: as_torch(value) for name, value in inputs.items()}, mod.inputs)
        self.tensors = [wanted[spec.name].to(device) for spec in mod.inputs]
        config = mod.config if isinstance(mod, MoDModel) else MoDConfig()
        name, self.mask_dims = padding_mask(mod, config), padded_dims(mod, config)
        self.valid: Tensor | None = None  # [B, S] bool
        if name is not None:
            self.valid = valid_rows(name, wanted[name.removeprefix("~")].cpu())
        with evaluating(mod):
            values = mod.run_graph(self.tensors)
        self.expected = {spec.name: value for spec, value in zip(mod.outputs, values, strict=True)}

    def compare(self, specs: Sequence[TensorSpec], found: Mapping[str, Any], expected: Mapping[str, Tensor],
                ) -> tuple[Comparison, ...]:
        """Every named output, on valid rows."""
        return tuple(compare(spec.name, as_torch(found[spec.name]).cpu(), expected[spec.name].cpu(), self.tolerance,
                             self._rows(spec)) for spec in specs)

    def report(self, outputs: Sequence[Comparison], blocks: Sequence[Comparison] = (),
               routing: Sequence[RoutingDifference] = ()) -> VerifyReport:
        """What passed."""
        engine = self.engine
        return VerifyReport(str(engine.folder), engine.runtime, engine.manifest.precision, self.tolerance,
                            tuple(outputs), tuple(blocks), tuple(routing))

    def error(self, failed: Comparison, fix: str, routing: Sequence[RoutingDifference] = (), block: str = "",
              ) -> ParityError:
        """What did not."""
        relative = f"relative L2 {failed.relative_l2:.3g}"
        found = f"largest error {failed.max_abs_error:.3g} {failed.worst}, {relative}"
        if failed.not_finite:
            found += f", {failed.not_finite} elements NaN or infinite on one side alone"
        return ParityError(
            f"the engine differs from the model, first in block {block}" if block else
            f"the engine's output {failed.name} differs from the model's",
            expected=f"largest error {failed.limit:.3g}, relative L2 {failed.tolerance:g} at most "
                     f"({self.engine.manifest.precision})",
            found="; ".join([found, *map(str, routing)]),
            where=f"{failed.name} {list(failed.shape)} of {self.engine.folder}", fix=fix)

    def explain(self, options: dict[str, Any]) -> VerifyReport | None:
        """The report, if the outputs are the model's given the choices of an engine that hands out its routing alone.

        Such an engine computes as this one does: one that hands out every hidden state too fuses less, and decides
        near ties in ways of its own.
        """
        run = self._probe(options, outputs=False)
        given_choices = self.compare(self.mod.outputs, self.found, run.expected)
        if not all(item.passed for item in given_choices):
            return None
        # Another engine may differ where the one in question does not; of this one itself it is the last word.
        with contextlib.nullcontext() if run.own else contextlib.suppress(ParityError):
            return self.report(given_choices, *self._compare_blocks(run))
        return None

    def walk(self, outputs: tuple[Comparison, ...], failed: Comparison | None, options: dict[str, Any]) -> VerifyReport:
        """Compares border by border; ``failed`` is the output that differs, if one does."""
        run = self._probe(options, outputs=True)
        blocks, routing = self._compare_blocks(run)
        given_choices = self.compare(self.mod.outputs, run.values, run.expected)
        wrong = next((item for item in given_choices if not item.passed), None)
        if wrong:
            raise self.error(wrong, fix="the blocks agree: look at what follows the last one", routing=routing)
        if failed and not run.own:
            # The new engine is right. Is this one the same?
            same = self.compare(self.mod.outputs, self.found, run.values)
            if not all(item.passed for item in same):
                raise self.error(failed, routing=routing, fix="a new engine of this model agrees with it: this one was "
                                 "built from other weights or options, or decides near ties in a way of its own; build "
                                 "it again, or from modcompile.variants.with_routing_outputs(mod) to know")
        return self.report(given_choices if failed else outputs, blocks, routing)

    def _probe(self, options: dict[str, Any], *, outputs: bool) -> _Probe:
        """What an engine hands out beside the model's outputs, and the model's values with its choices."""
        assert isinstance(self.mod, MoDModel)
        model = with_routing_outputs(self.mod, outputs=outputs)
        own = all(spec.name in self.found for spec in model.outputs)
        found = self.found if own else self._run_probe(model, options)
        values = {spec.name: as_torch(found[spec.name]).cpu() for spec in model.outputs}
        rules = RoutingRules(self.mod, self.valid)
        forced = rules.choices(values)
        device = self.tensors[0].device
        run = ForcedRouting(model.graph_module, {key: value.to(device) for key, value in forced.items()})
        with evaluating(model):
            expected = dict(zip((spec.name for spec in model.outputs), run.run(*self.tensors), strict=True))
        return _Probe(model, own, rules, values, forced, expected, run.natural)

    def _run_probe(self, probe: GraphModel, options: dict[str, Any]) -> dict[str, Any]:
        engine = self.engine
        if engine.manifest.providers:
            options.setdefault("providers", engine.manifest.providers)
        if engine.runtime == "aoti":
            options.setdefault("device", engine.manifest.target["device"])
        # It runs once, and hands out constants, such as a gate of 1: a CUDA graph of ONNX Runtime's cannot.
        options |= load_options(engine.runtime, {"cuda_graph": False})
        # A dynamic engine's probe is dynamic too, for its graph is another one; but TensorRT then wants a profile, and
        # gets the inputs' own sizes.
        dynamic = engine.runtime in ("ort", "aoti") and any(
            isinstance(dim, str) for spec in engine.inputs for dim in spec.shape)
        shapes = None if dynamic else {name: tuple(value.shape) for name, value in self.inputs.items()}
        with tempfile.TemporaryDirectory() as folder, build_engine(
                probe, Path(folder) / "probe", runtime=engine.runtime, precision=engine.manifest.precision,
                shapes=shapes, **options) as built:
            return _outputs(built, _cast(self.inputs, built.inputs), probe.outputs)

    def _compare_blocks(self, run: _Probe) -> tuple[list[Comparison], list[RoutingDifference]]:
        assert isinstance(self.mod, MoDModel)
        values, rules = run.values, run.rules
        specs = {spec.name: spec for spec in run.model.outputs}
        done: list[Comparison] = []
        routing: list[RoutingDifference] = []
        for path in (path for path in block_paths(self.mod) if path not in self.mod.config.dropped):
            for role in ("logits", "decision", "gate", "output") if path in rules.blocks else ("output",):
                name = f"routing.{path}.{role}"
                if name not in specs:
                    continue
                is_score = role in ("logits", "decision")
                rows = rules.valid_for(path) if is_score else self._rows(specs[name])
                wanted = run.expected[name].cpu()
                item = compare(f"{path} {role}", values[name], wanted, self.tolerance, rows)
                if not item.passed:
                    raise self.error(item, routing=routing, block=path, fix="everything before agrees: look at what "
                                     f"computes the {role} of this block")
                if is_score and apart_from_mean(values[name], wanted, rows) > _RANKING:
                    raise self.error(item, routing=routing, block=path, fix="everything before agrees, and so do these "
                                     f"values, but not how rows differ: look at what computes the {role}")
                done.append(item)
                if role == "logits":
                    if (path, "positions") not in run.forced:
                        raise rules.broken_order(path, values, self.engine.folder)
                    routing += rules.difference(path, values, run.expected, run.natural, item.max_abs_error)
        return done, routing

    def _rows(self, spec: TensorSpec) -> Tensor | None:
        """Which leading dims of an output are compared: [B, S], [B], or all."""
        if self.valid is None or self.mask_dims is None or spec.shape[:1] != self.mask_dims[:1]:
            return None
        return self.valid if spec.shape[:2] == self.mask_dims else self.valid.any(1)


def _signature(model: GraphModel | Engine) -> str:
    return " -> ".join(", ".join(spec.name for spec in specs) for specs in (model.inputs, model.outputs))


def _outputs(engine: Engine, inputs: dict[str, Any], specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """The engine's outputs by the model's names, and what it gives beyond them by its own.

    Names differ where ONNX cannot have the model's: an output of an input's name.
    """
    values = engine.run(inputs)
    names = [spec.name for spec in (*specs, *engine.outputs[len(specs):])]
    return {name: values[spec.name] for name, spec in zip(names, engine.outputs, strict=True)}


def _cast(inputs: Mapping[str, Any], specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """The inputs with floats in the dtypes of ``specs``; whatever else does not fit is left to who takes it."""
    dtypes = {spec.name: spec.dtype for spec in specs if "float" in spec.dtype}
    made = dict(inputs)
    for name in dtypes.keys() & inputs.keys():
        value, dtype = inputs[name], dtypes[name]
        if is_torch(value) and value.is_floating_point():
            made[name] = value.to(dtype_from_name(dtype))
        elif not is_torch(value) and "float" in str(value.dtype):
            made[name] = value.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype, copy=False)
    return made
