"""The graph before and after in a few shapes: every block as a bar, and the steps of the first routed block."""

__all__ = ["Picture", "Step", "picture_of"]

import dataclasses

import sympy
import torch
import torch.fx

from modcompile.model import MoDModel
from modcompile.program import Program
from modcompile.routers import router_path
from modcompile.shapes import shape_exprs

# B batch  S rows  K capacity  D model dim

OUR_OPS = {"modcompile.route.default": "route", "modcompile.gather_rows.default": "gather rows",
           "modcompile.merge_rows.default": "merge rows"}


@dataclasses.dataclass(frozen=True)
class Step:
    """A node of the routed graph.

    Attributes:
        kind: "router", "route", "gather rows", "block", "merge rows".
        shape: Of its result, with the letters B, S, K and D.
        note: What else the graph says of it.
    """

    kind: str
    shape: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """What there is to draw.

    Attributes:
        before: The blocks that the dense graph calls, in order; ``after``: those that the routed graph calls.
        nodes_before: The number of nodes, those inside the blocks too; ``nodes_after``: in the routed graph.
        steps: From the first routed block's hidden state to what replaces it; ``hidden``: that state's shape.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    nodes_before: int
    nodes_after: int
    hidden: str
    steps: tuple[Step, ...]


def picture_of(mod: MoDModel) -> Picture:
    """Reads the two graphs of a routed model.

    Example:
        >>> from modcompile import MoDConfig, convert
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> mod = convert(torch.nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 8),), MoDConfig(capacity_ratio=0.5))
        >>> for step in picture_of(mod).steps:
        ...     print(step.kind, step.shape)
        router [B, S]
        route [B, K]
        gather rows [B, K, D]
        block [B, K, D]
        merge rows [B, S, D]
    """
    dense, routed = mod.dense_program, mod.program
    path = mod.routed_blocks[0].path
    nodes = list(routed.graph.nodes)
    start = next(i for i, node in enumerate(nodes) if node.target == router_path(path))
    end = next(i for i, node in enumerate(nodes) if node.meta.get("role") == (path, "output"))
    call = next(node for node in nodes if node.target == path)
    hidden = _hidden_state(nodes[end], call)
    letters = _letters(hidden, nodes[start:end + 1])
    steps = []
    for node in nodes[start:end + 1]:
        if node.target == router_path(path):
            steps.append(Step("router", _shape(node, letters), "float32 logits"))
        elif node.target == path:
            inside = "modcompile.gather_rows.default" in map(str, [n.target for n in routed.bodies[path].nodes])
            note = "all rows' keys and values" if inside else "K rows alone"
            steps.append(Step("block", _shape(node, letters), note))
        elif (kind := OUR_OPS.get(str(node.target))) and not (kind == "gather rows" and _of_side(node, hidden)):
            steps.append(Step(kind, _shape(node, letters), {
                "route": "the K best, ascending", "merge rows": f"gate {mod.config.gate}",
            }.get(kind, "")))
    return Picture(_blocks(dense, dense), _blocks(routed, dense), _count(dense), _count(routed),
                   _shape(hidden, letters), tuple(steps))


def _hidden_state(merged: torch.fx.Node, call: torch.fx.Node) -> torch.fx.Node:
    """What the block's update is merged into: on the sequence axis, what has the merged value's shape."""
    if str(merged.target) == "modcompile.merge_rows.default":
        return merged.args[0]
    shape = shape_exprs(merged)
    earlier = [node for node in call.graph.nodes if node < call and shape_exprs(node) == shape]
    return earlier[-1]


def _of_side(node: torch.fx.Node, hidden: torch.fx.Node) -> bool:
    """Whether rows of a mask or a table are gathered, which the picture leaves out."""
    return len(shape_exprs(node) or ()) != 3 or (shape_exprs(node) or ())[-1] != (shape_exprs(hidden) or ())[-1]


def _letters(hidden: torch.fx.Node, nodes: list[torch.fx.Node]) -> dict[sympy.Expr, str]:
    names = dict(zip(shape_exprs(hidden) or (), "BSD", strict=True))
    for node in nodes:
        if str(node.target) == "modcompile.route.default":
            # One value of the route's two: what the graph takes out of it has a shape.
            capacity = (shape_exprs(next(iter(node.users))) or ())[-1]
            names.setdefault(capacity, "K")
    return names


def _shape(node: torch.fx.Node, letters: dict[sympy.Expr, str]) -> str:
    if shape_exprs(node) is None and node.users:
        node = next(iter(node.users))
    return f"[{', '.join(letters.get(expr, str(expr)) for expr in shape_exprs(node) or ())}]"


def _blocks(program: Program, dense: Program) -> tuple[str, ...]:
    return tuple(node.target for node in program.graph.nodes
                 if node.op == "call_module" and node.target in dense.bodies)


def _count(program: Program) -> int:
    return sum(len(graph.nodes) for graph in (program.graph, *program.bodies.values()))
