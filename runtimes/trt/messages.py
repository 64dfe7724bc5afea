"""TensorRT's errors in this package's words: which node, why, and what to do."""

__all__ = ["build_error", "crash_error", "ended", "parse_error", "plain"]

import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from modcompile.errors import ModcompileError, RuntimeUnavailableError, UnsupportedGraphError

_OTHER = 'replace what is named, or build with runtime="ort"'
# What to do about a reason, in order: the first pattern found in it.
_FIXES = (
    (r"reduction", "write rows by an overwriting scatter, or add them before it"),
    (r"softcap|softmax precision", "export with opset 22 or lower, where attention is plain operators"),
    (r"[Mm]ask cannot be used together", "add the causal part to the mask and drop is_causal"),
    (r"only supports Attention nodes with one output", "export without past keys and values"),
    (r"FP32 GEMM is not supported", "leave 7.5 out of compute_capabilities, or export with precision='fp16'"),
    (r"shape input|dynamic or shape inputs", "make this input a constant: TensorRT computes sizes from it"),
    (r"K exceeds the maximum", 'a smaller capacity_ratio, a smaller largest shape, or runtime="ort"'),
    (r"must have same input types", "export the model in one precision: TensorRT casts nothing by itself"),
    (r"[Pp]lugin", "this operator would be a plugin's: write it in standard ONNX operators"),
)


def parse_error(errors: Sequence[Mapping[str, Any]], nodes: Sequence[ir.Node], path: Path) -> UnsupportedGraphError:
    """What the parser found wrong with the graph, all of it.

    Args:
        errors: The parser's errors: "node", "name", "operator", "function", "reason".
        nodes: The graph's nodes, in the parser's order.
        path: The ONNX file.
    """
    lines = []
    for error in errors:
        # Some come without their node; the function that raised them is named after its operator.
        operator = error["operator"] or error["function"].removeprefix("import")
        known = nodes[error["node"]].name if 0 <= error["node"] < len(nodes) else None
        reason = plain(error["reason"])
        lines.append(f"{error['name'] or known or 'a node'} ({operator}): "
                     + (f"TensorRT has no operator {operator}" if reason == "false" else reason))
    return UnsupportedGraphError("TensorRT's parser does not take the graph", found=_lines(lines), where=path,
                                 fix=_fix(lines))


def build_error(messages: Sequence[str], path: Path) -> UnsupportedGraphError:
    """Why the builder made no engine of a graph that was parsed."""
    reasons = list(dict.fromkeys(text for text in map(plain, messages) if text))
    return UnsupportedGraphError("TensorRT cannot build an engine from the graph",
                                 found=_lines(reasons) or "no reason given", where=path, fix=_fix(reasons))


def crash_error(returncode: int, phase: str, printed: str, path: Path) -> ModcompileError:
    """Why the process that builds ended before it had a result.

    Args:
        returncode: Its exit status, negative for a signal.
        phase: What it was doing.
        printed: What it had printed.
        path: The ONNX file.
    """
    found = _lines([f"{ended(returncode)} while {phase}", *printed.strip().splitlines()[-5:]])
    if returncode == -getattr(signal, "SIGKILL", 9):
        return RuntimeUnavailableError("the build was killed, most likely for lack of memory", found=found, where=path,
                                       fix="more memory, or a smaller model")
    return UnsupportedGraphError("TensorRT crashed on the graph", found=found, where=path,
                                 fix='export it with another opset, or build with runtime="ort"')


def ended(returncode: int) -> str:
    """An exit status, or the name of the signal that ended a process."""
    return signal.Signals(-returncode).name if returncode < 0 else f"exit status {returncode}"


def plain(text: str) -> str:
    """A message without places in TensorRT's source, conditions in C++, and the GPU that nobody asked for."""
    kept = [line for line in text.splitlines() if "catchCudaError" not in line]
    if len(kept) > 1 and kept[0].startswith("Invalid Node - "):
        del kept[0]
    reason = " ".join(kept)
    if wrapped := re.search(r"Error Code \d+: [\w ]+? ?\((.*)\)$", reason):
        reason = wrapped[1]
    reason = re.sub(r" ?In \S+ at /\S+:\d+", "", reason)
    reason = re.sub(r"\[\S+:\d+: \w+\] ", "", reason)
    reason = re.sub(r"^Assertion failed: .*?: (?=\S)", "", reason)
    if quoted := re.search(r'&& "(.*)"$', reason):
        reason = quoted[1]
    return reason.strip()


def _fix(reasons: Sequence[str]) -> str:
    text = " ".join(reasons)
    return next((fix for pattern, fix in _FIXES if re.search(pattern, text)), _OTHER)


def _lines(texts: Sequence[str]) -> str:
    return "\n    ".join(texts)
