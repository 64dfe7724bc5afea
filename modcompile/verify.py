"""Compares an engine with its model on the same inputs, and finds the first block that differs.

Routing makes this more than a subtraction. Two rows whose logits are nearly equal may be ranked one way by the model
and the other way by the engine; the rows then differ by a whole block's update, and neither is wrong. So where outputs
differ, the model is run again with the engine's choices: if every number then agrees, and the engine ranked its own
logits as the contract of ``route`` says, the difference is one of near ties, which the report names. Anything else is
an error. Where each row decides for itself (``training.causal_model``), near a threshold is what nearly equal is here.
"""

__all__ = ["TOLERANCES", "Comparison", "RoutingDifference", "VerifyReport", "verify"]

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import torch
import torch.fx
from torch import Tensor

from modcompile.config import MoDConfig
from modcompile.convert import padded_blocks, padded_dims, padding_mask
from modcompile.engine import Engine, build_engine, is_torch, load_options
from modcompile.errors import ParityError, UsageError
from modcompile.manifest import RoutedBlock
from modcompile.model import GraphModel, MoDModel, evaluating
from modcompile.ops import route
from modcompile.passes.routing_outputs import ROLES
from modcompile.spec import TensorSpec, dtype_from_name
from modcompile.variants import block_paths, with_routing_outputs

if TYPE_CHECKING:
    from rich.console import RenderableType

# B batch  S rows  K capacity  D model dim

# How far an engine's floats may be from the model's, by the engine's precision. It bounds the relative L2 error, and
# the largest absolute error as a share of the largest magnitude expected (of 1, where that is smaller). Room for sums
# of thousands of terms in another order, at 23, 10 and 7 bits of mantissa, through dozens of blocks. Integers: equal.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
# Rows are ranked by how logits differ. These may lie close together beside a large one that all rows have, a bias, and
# so within the tolerance whatever their order: apart from their mean their relative L2 error is at most this.
_RANKING = 0.5


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tensor of the engine beside the model's. Rows of padding are left out.

    Attributes:
        name: The output's name; within a block, "encoder.layer.1 logits".
        shape: The engine's shape, which is the model's but in a failure.
        max_abs_error: The largest difference; ``limit``: the largest that passes.
        relative_l2: ``||engine - model|| / ||model||``.
        compared: How many elements were, being finite on both sides.
        not_finite: How many elements are NaN or infinite on one side and something else on the other.
        worst: Where the largest difference is, and the engine's and the model's number there.
    """

    name: str
    shape: tuple[int, ...]
    max_abs_error: float
    limit: float
    relative_l2: float
    compared: int
    not_finite: int
    worst: str
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the engine's tensor is the model's within the tolerance."""
        return self.not_finite == 0 and self.max_abs_error <= self.limit and self.relative_l2 <= self.tolerance


@dataclasses.dataclass(frozen=True)
class RoutingDifference:
    """A block into which the engine let other rows than the model, because their logits are nearly equal.

    Attributes:
        block: The block's path.
        rows: How many rows the engine let in that the model did not; or the other way, if these are more.
        margin: How far apart, in the model's logits, the most distant two rows are that changed places.
        logit_error: The largest difference between the engine's and the model's logits; it explains margins up to
            twice its size.
    """

    block: str
    rows: int
    margin: float
    logit_error: float

    def __str__(self):
        return (f"block {self.block}: {self.rows} rows chosen differently, with logits up to {self.margin:.2g} apart "
                f"where the engine's are up to {self.logit_error:.2g} from the model's")


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """An engine that passed.

    Attributes:
        engine: Its folder.
        runtime: Its runtime; ``precision``: of its weights.
        tolerance: What was asked for, see ``TOLERANCES``.
        outputs: The model's outputs; where they differed for near ties, those of the model with the engine's choices.
        blocks: Every value compared at the blocks' borders, in the model's order; empty if there was no need.
        routing: The near ties that were decided differently.
    """

    engine: str
    runtime: str
    precision: str
    tolerance: float
    outputs: tuple[Comparison, ...]
    blocks: tuple[Comparison, ...] = ()
    routing: tuple[RoutingDifference, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return dataclasses.asdict(self)

    def __rich__(self) -> "RenderableType":
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("compared", "shape", "largest error", "limit", "relative L2", box=None, header_style="bold",
                      pad_edge=False)
        for item in (*self.blocks, *self.outputs):
            table.add_row(Text(item.name), Text(str(list(item.shape))), f"{item.max_abs_error:.2g}",
                          f"{item.limit:.2g}", f"{item.relative_l2:.2g}")
        lines = [f"the engine agrees with the model: {self.runtime}, {self.precision}, tolerance {self.tolerance:g}"]
        if self.routing:
            lines.append("given the engine's choice among rows whose logits are nearly equal:")
        return Group(Text("\n".join([*lines, *map(str, self.routing)])), table)


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
        tolerance: Instead of the one of ``TOLERANCES``.
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
        values: What the engine hands out, by name.
        forced: Its choices, by block and role, up to the first block where they do not follow its own logits.
        expected: What the model gives with these choices; ``natural``: what it would have chosen itself.
    """

    model: GraphModel
    own: bool
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
        device = next((tensor.device for tensor in mod.tensors().values()), torch.device("cpu"))
        wanted = _cast({name: _as_torch(value) for name, value in inputs.items()}, mod.inputs)
        self.tensors = [wanted[spec.name].to(device) for spec in mod.inputs]
        config = mod.config if isinstance(mod, MoDModel) else MoDConfig()
        name, self.mask_dims = padding_mask(mod, config), padded_dims(mod, config)
        self.padded = padded_blocks(mod) if isinstance(mod, MoDModel) else frozenset[str]()
        self.thresholds = mod.thresholds if isinstance(mod, MoDModel) else {}
        self.valid: Tensor | None = None  # [B, S] bool
        if name is not None:
            mask = wanted[name.removeprefix("~")].cpu()
            self.valid = mask == 0 if name.startswith("~") else mask != 0
        with evaluating(mod):
            values = mod.run_graph(self.tensors)
        self.expected = {spec.name: value for spec, value in zip(mod.outputs, values, strict=True)}

    def compare(self, specs: Sequence[TensorSpec], found: Mapping[str, Any], expected: Mapping[str, Tensor],
                ) -> tuple[Comparison, ...]:
        """Every named output, on valid rows."""
        return tuple(_compare(spec.name, _as_torch(found[spec.name]).cpu(), expected[spec.name].cpu(), self.tolerance,
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
        values = {spec.name: _as_torch(found[spec.name]).cpu() for spec in model.outputs}
        forced = self._choices(values)
        run = _Forced(model.graph_module, {key: value.to(self.tensors[0].device) for key, value in forced.items()})
        with evaluating(model):
            expected = dict(zip((spec.name for spec in model.outputs), run.run(*self.tensors), strict=True))
        return _Probe(model, own, values, forced, expected, run.natural)

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

    def _choices(self, values: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
        """The engine's positions and filled slots, up to the first block where they do not follow its own logits."""
        assert isinstance(self.mod, MoDModel)
        forced: dict[tuple[str, str], Tensor] = {}
        for block in self.mod.routed_blocks:
            _, positions, filled = (values[f"routing.{block.path}.{role}"] for role in ROLES[:3])
            due = self._route(block, values, positions.shape[1])
            if not (torch.equal(positions, due[0]) and torch.equal(filled, due[1])):
                break
            forced |= {(block.path, "positions"): positions, (block.path, "filled"): filled}
        return forced

    def _compare_blocks(self, run: _Probe) -> tuple[list[Comparison], list[RoutingDifference]]:
        assert isinstance(self.mod, MoDModel)
        values = run.values
        specs = {spec.name: spec for spec in run.model.outputs}
        routed = {block.path: block for block in self.mod.routed_blocks}
        done: list[Comparison] = []
        routing: list[RoutingDifference] = []
        for path in (path for path in block_paths(self.mod) if path not in self.mod.config.dropped):
            for role in ("logits", "decision", "gate", "output") if path in routed else ("output",):
                name = f"routing.{path}.{role}"
                if name not in specs:
                    continue
                is_score = role in ("logits", "decision")
                rows = self._valid_for(routed[path]) if is_score else self._rows(specs[name])
                wanted = run.expected[name].cpu()
                item = _compare(f"{path} {role}", values[name], wanted, self.tolerance, rows)
                if not item.passed:
                    raise self.error(item, routing=routing, block=path, fix="everything before agrees: look at what "
                                     f"computes the {role} of this block")
                if is_score and _apart_from_mean(values[name], wanted, rows) > _RANKING:
                    raise self.error(item, routing=routing, block=path, fix="everything before agrees, and so do these "
                                     f"values, but not how rows differ: look at what computes the {role}")
                done.append(item)
                if role == "logits":
                    if (path, "positions") not in run.forced:
                        raise self._broken_order(path, values)
                    routing += self._difference(routed[path], run, item.max_abs_error)
        return done, routing

    def _difference(self, block: RoutedBlock, run: _Probe, logit_error: float) -> list[RoutingDifference]:
        """What the engine chose otherwise than the model would have, on the same history."""
        values, expected = run.values, {name: value.cpu() for name, value in run.expected.items()
                                        if name.startswith(f"routing.{block.path}.")}
        logits = expected[f"routing.{block.path}.logits"]

        def taken(positions, filled):
            return torch.zeros_like(logits, dtype=torch.bool).scatter(1, positions.cpu(), filled.cpu())

        model = taken(*(run.natural[block.path, role] for role in ("positions", "filled")))
        engine = taken(*(values[f"routing.{block.path}.{role}"] for role in ("positions", "filled")))
        swapped = model != engine
        rows = max(int((swapped & side).sum()) for side in (engine, model))
        if not rows:
            return []
        crossed = torch.zeros_like(swapped)
        margin = torch.zeros(())
        if block.path in self.thresholds:
            # Of those that decided otherwise, how far they are from the threshold; a row's slot may be another's then.
            crossed = swapped & (self._takes(block, expected) != self._takes(block, values))
            asked = expected.get(f"routing.{block.path}.decision", logits)
            margin = (asked - self.thresholds[block.path]).abs().masked_fill(~crossed, 0).max()
        score = logits.nan_to_num(nan=-torch.inf).clamp(min=torch.finfo(logits.dtype).min)
        left_out = score.masked_fill(~(swapped & model & ~crossed), -torch.inf).amax(1)
        let_in = score.masked_fill(~(swapped & engine & ~crossed), torch.inf).amin(1)
        margin = (left_out - let_in).nan_to_num(0, 0, 0).max().clamp(min=margin)
        return [RoutingDifference(block.path, rows, float(margin), logit_error)]

    def _broken_order(self, path: str, values: Mapping[str, Tensor]) -> ParityError:
        block = next(block for block in self.mod.routed_blocks if block.path == path)
        positions = values[f"routing.{path}.positions"]
        due, _ = self._route(block, values, positions.shape[1])
        row = int((due != positions).any(1).nonzero()[0]) if not torch.equal(due, positions) else 0
        return ParityError(
            f"the engine's routing does not follow its own logits, first in block {path}", where=self.engine.folder,
            expected=f"positions {due[row].tolist()} in sequence {row}, the contract of route on the engine's logits",
            found=f"positions {positions[row].tolist()}, filled {values[f'routing.{path}.filled'][row].tolist()}",
            fix="this is a defect of the runtime's TopK or of the lowering of route: please report it")

    def _route(self, block: RoutedBlock, values: Mapping[str, Tensor], capacity: int) -> tuple[Tensor, Tensor]:
        """What follows from a side's logits by the contract."""
        takes = self._takes(block, values) if block.path in self.thresholds else self._valid_for(block)
        return route(values[f"routing.{block.path}.logits"], takes, capacity)

    def _takes(self, block: RoutedBlock, values: Mapping[str, Tensor]) -> Tensor:
        """The rows that want to enter, where each decides for itself."""
        asked = values.get(f"routing.{block.path}.decision", values[f"routing.{block.path}.logits"]).cpu()
        takes, valid = asked > self.thresholds[block.path], self._valid_for(block)
        return takes if valid is None else takes & valid

    def _valid_for(self, block: RoutedBlock) -> Tensor | None:
        """Which rows of a block are no padding, of the shape of its logits."""
        if self.valid is None or block.path not in self.padded:
            return None
        return self.valid if block.axis == "token" else self.valid.any(1)[None]  # [1, B]

    def _rows(self, spec: TensorSpec) -> Tensor | None:
        """Which leading dims of an output are compared: [B, S], [B], or all."""
        if self.valid is None or self.mask_dims is None or spec.shape[:1] != self.mask_dims[:1]:
            return None
        return self.valid if spec.shape[:2] == self.mask_dims else self.valid.any(1)


class _Forced(torch.fx.Interpreter):
    """Runs a routed graph with given choices in the place of its own, which it notes."""

    def __init__(self, graph_module: torch.fx.GraphModule, forced: Mapping[tuple[str, str], Tensor]):
        super().__init__(graph_module)
        self.forced = forced
        self.natural: dict[tuple[str, str], Tensor] = {}

    def run_node(self, node: torch.fx.Node):
        value = super().run_node(node)
        if "role" in node.meta:
            key = tuple(node.meta["role"])
            self.natural[key] = value
            return self.forced.get(key, value)
        return value


def _apart_from_mean(found: Tensor, expected: Tensor, rows: Tensor | None) -> float:
    """The relative L2 error of scores [B, S] apart from each sequence's mean, over rows that are numbers on both sides.

    Zero where the expected ones are alike but for the last bits of float32: then nothing is ranked.
    """
    a, b = found.double(), expected.double()
    keep = a.isfinite() & b.isfinite() & (torch.ones_like(a, dtype=torch.bool) if rows is None else rows)
    count = keep.sum(1, keepdim=True).clamp(min=1)
    a, b = (torch.where(keep, x, 0) for x in (a, b))
    apart, wanted = (torch.where(keep, x - x.sum(1, keepdim=True) / count, 0) for x in (a - b, b))
    error, size, whole = (float(torch.linalg.vector_norm(x)) for x in (apart, wanted, b))
    return error / size if size > 1e-6 * whole else 0.0


def _compare(name: str, found: Tensor, expected: Tensor, tolerance: float, rows: Tensor | None) -> Comparison:
    shape = tuple(found.shape)
    if found.shape != expected.shape:
        return Comparison(name, shape, torch.inf, 0.0, torch.inf, 0, 0, f"for shape {list(expected.shape)}", tolerance)
    if not expected.is_floating_point():
        tolerance = 0.0
    dtype = torch.float64 if expected.dtype == torch.float64 or not expected.is_floating_point() else torch.float32
    a, b = found.to(dtype), expected.to(dtype)
    keep = torch.ones((), dtype=torch.bool)
    if rows is not None:
        keep = rows.reshape(*rows.shape, *[1] * (b.dim() - rows.dim()))
        a, b = (side.masked_fill(~keep, 0) for side in (a, b))
    finite = a.isfinite() & b.isfinite()
    # Where both are NaN, or infinite with one sign, they agree.
    not_finite = int((~finite & ~((a == b) | (a.isnan() & b.isnan()))).sum())
    a, b = (side.masked_fill(~finite, 0) for side in (a, b))
    error = (a - b).abs()
    if error.numel() == 0:
        return Comparison(name, shape, 0.0, 0.0, 0.0, 0, 0, "", tolerance)
    at = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    norm, size = (float(torch.linalg.vector_norm(side, dtype=torch.float64)) for side in (error, b))
    return Comparison(name, shape, float(error.max()), tolerance * max(1.0, float(b.abs().max())),
                      norm / size if size else float(norm > 0), int((finite & keep).sum()), not_finite,
                      f"at {at}: {float(a[tuple(at)]):.6g} for {float(b[tuple(at)]):.6g}", tolerance)


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


def _as_torch(value: Any) -> Tensor:
    if is_torch(value):
        return value
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(value)
