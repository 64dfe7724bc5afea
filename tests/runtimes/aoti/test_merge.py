"""The merge that reads is the merge that writes, bit for bit, alone and in a routed model's program."""

import pytest
import torch
from modcompile.runtimes.aoti.merge import merge_by_reading
from tiny import Block, Stack, randn, randomise_routers

import modcompile as mc
from modcompile.export.flatten import flatten
from modcompile.export.lift import lift
from modcompile.ops import merge_rows, route

# B batch  S rows  K capacity  D model dim
MERGE = torch.ops.modcompile.merge_rows.default


def bits(tensor):
    """What equals bit for bit; NaN is one value."""
    return tensor.masked_fill(tensor.isnan(), torch.nan).view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "capacity"), [(1, 1), (63, 1), (63, 5), (63, 62), (63, 63)])
def test_bit_for_bit(dtype, rows, capacity):
    generator = torch.Generator().manual_seed(rows * capacity)
    for poison in (torch.nan, torch.inf, -torch.inf, -0.0):
        x = torch.randn(3, rows, 5, generator=generator).to(dtype)
        y = torch.randn(3, capacity, 5, generator=generator).to(dtype)
        for tensor in (x, y):
            tensor[torch.rand(tensor.shape, generator=generator) < 0.1] = poison
        positions, _ = route(torch.randn(3, rows, generator=generator), None, capacity)
        gate = torch.randn(3, capacity, generator=generator)
        ends = torch.rand(3, capacity, generator=generator)
        gate[ends < 0.3], gate[ends > 0.7] = 0, 1
        given = x, y, positions, gate
        assert torch.equal(bits(merge_by_reading(*given)), bits(merge_rows(*given)))


def test_in_a_program_of_any_size():
    example = {"hidden": randn(2, 5, 8), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    model = randomise_routers(mc.convert(Stack(Block(), Block()), example, mc.MoDConfig(capacity_ratio=0.25)))
    program = lift(flatten(model), opaque=False).run_decompositions({MERGE: merge_by_reading})
    targets = [node.target for node in program.graph.nodes]
    assert MERGE not in targets and torch.ops.modcompile.route.default in targets
    assert torch.ops.aten.searchsorted.Tensor in targets
    inputs = randn(3, 63, 8), (torch.arange(63) < torch.tensor([[63], [40], [9]])).long()
    with torch.no_grad():
        (expected,) = model.run_graph(list(inputs))
        (found,) = program.module(check_guards=False)(*inputs)
    assert torch.equal(found, expected)
