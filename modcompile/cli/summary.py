"""What convert and report tell about a converted model."""

__all__ = ["summarise", "summary_table"]

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from modcompile.cli.console import engineering, sizes_text, table

if TYPE_CHECKING:
    from modcompile.model import MoDModel


def summarise(mod: "MoDModel", shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, Any]:
    """Routed blocks, capacities, parameters and FLOPs, as JSON-ready values.

    Args:
        mod: The converted model.
        shapes: Shapes by input name that FLOPs are counted for; by default those of the example.
    """
    from modcompile.flops import count_flops
    from modcompile.sample_inputs import symbol_sizes
    from modcompile.variants import dense_model, pruned_blocks, pruned_model

    sizes = {**mod.hints, **symbol_sizes(mod.inputs, shapes)}
    pruned = pruned_blocks(mod, sizes)
    parameters = {name: parameter.numel() for name, parameter in mod.named_parameters()}
    blocks = [{**block.model_dump(mode="json"),
               "parameters": sum(count for name, count in parameters.items() if name.startswith(f"{block.path}."))}
              for block in mod.routed_blocks]
    return {
        "config": mod.config.model_dump(mode="json"),
        "inputs": [str(spec) for spec in mod.inputs],
        "outputs": [str(spec) for spec in mod.outputs],
        "parameters": sum(parameters.values()),
        "router_parameters": sum(p.numel() for router in mod.routers.values() for p in router.parameters()),
        "routed_blocks": blocks,
        "sizes": sizes,
        "flops": {"dense": count_flops(dense_model(mod), sizes), "routed": count_flops(mod, sizes),
                  "pruned": count_flops(pruned_model(mod, pruned), sizes)},
        "pruned_blocks": pruned,
    }


def summary_table(name: str, summary: dict[str, Any]) -> RenderableType:
    """The summary for people."""
    rows = [(block["path"], block["capacity_ratio"], block["capacity"] or f"of {block['rows']}", block["attend_to"],
             block["gate"], block["axis"], engineering(block["parameters"])) for block in summary["routed_blocks"]]
    flops, sizes = summary["flops"], sizes_text(summary["sizes"])

    def share(kind: str) -> str:
        return f"{engineering(flops[kind])} ({flops[kind] / flops['dense']:.1%})"

    facts = (f"inputs      {', '.join(summary['inputs'])}\n"
             f"outputs     {', '.join(summary['outputs'])}\n"
             f"parameters  {engineering(summary['parameters'])}, of which routers "
             f"{engineering(summary['router_parameters'])}\n"
             f"FLOPs       for {sizes}: dense {engineering(flops['dense'])}, routed {share('routed')}, "
             f"pruned of {len(summary['pruned_blocks'])} blocks {share('pruned')}\n")
    columns = ("path", "K/S", "K", "attends to", "gate", "axis", "parameters")
    return Group(Text(name, "bold"), Text(facts), table("routed blocks", columns, rows))
