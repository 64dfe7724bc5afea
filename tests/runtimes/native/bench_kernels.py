"""Times the kernels on a GPU that does nothing else: ``python bench_kernels.py -o kernels.json``.

A variant is a CUDA graph of many launches. Where bytes decide, inputs and outputs rotate among buffers that together
are far larger than L2. Variants take turns in one process, each of them twice a round: the two columns differ by noise
alone. Times are medians of rounds, divided by the launches of a graph; they include the gap between two launches, which
the first line shows alone.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from modcompile.ops import route

# What pytest finds for its conftest.
sys.path.append(str(Path(__file__).parents[2]))
from conftest import Kernels, build_for_gpu

# B batch  S rows  K capacity  D width

ROTATED_BYTES = 512 * 2**20
ROUNDS = 30
TARGET_US = {"route, 8 x 1024 to 128": 5, "route, 8 x 8192 to 1024": 10}
TARGET_OF_COPY = {"merge_rows, 8 x 2048 x 2048 to 256": 0.85}


class Variant:
    """A call in a CUDA graph.

    Args:
        what: The work; variants of one work are compared.
        who: Who does it.
        call: Launches it once on one set of buffers.
        buffers: Makes a set of buffers, the arguments of ``call``.
        moved: The bytes that must be read or written, or 0 where latency decides.
    """

    def __init__(self, what, who, call, buffers, moved=0):
        self.what, self.who, self.moved = what, who, moved
        first = buffers()
        size = sum(value.numel() * value.itemsize for value in first if isinstance(value, torch.Tensor))
        self.sets = [first, *(buffers() for _ in range(min(63, ROTATED_BYTES // size)))]
        self.launches = math.ceil((20 if moved else 200) / len(self.sets)) * len(self.sets)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # the buffers are being filled
        with torch.cuda.stream(stream):  # compiles and allocates what a capture must not
            call(*first)
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for buffers_of_one in itertools.islice(itertools.cycle(self.sets), self.launches):
                call(*buffers_of_one)
        self.times_us = ([], [])

    def time(self, which):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph.replay()
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        self.times_us[which].append(start.elapsed_time(end) * 1000 / self.launches)


def route_variants(kernels, batch, rows, capacity, kind=""):
    def buffers():
        logits = (torch.ones if kind == "all equal" else torch.randn)(batch, rows, device="cuda")
        valid = torch.rand(batch, rows, device="cuda") < 0.7 if kind == "masked" else None
        positions = torch.empty(batch, capacity, dtype=torch.int64, device="cuda")
        return logits, valid, positions, torch.empty(batch, capacity, dtype=torch.bool, device="cuda")

    what = f"route, {batch} x {rows} to {capacity}" + (f", {kind}" if kind else "")
    yield Variant(what, "CUDA", kernels.route, buffers)
    yield Variant(what, "Triton", lambda logits, valid, *_: route(logits, valid, capacity), buffers)
    if kind != "masked":
        yield Variant(what, "torch.topk + sort",
                      lambda logits, *_: torch.topk(logits, capacity).indices.sort().values, buffers)


def route_rows_variants(kernels, batch, rows, width, capacity, dtype):
    def buffers():
        x = torch.randn(batch, rows, width, device="cuda").to(dtype)
        weight, bias = torch.randn(width, device="cuda"), torch.ones(1, device="cuda")
        positions = torch.empty(batch, capacity, dtype=torch.int64, device="cuda")
        filled = torch.empty(batch, capacity, dtype=torch.bool, device="cuda")
        logits = torch.empty(batch, rows, device="cuda")
        return x, weight, bias, None, logits, positions, filled, kernels.workspace(batch, rows)

    def apart(x, weight, bias, valid, logits, positions, filled, workspace):
        logits.copy_(torch.nn.functional.linear(x.float(), weight[None], bias)[..., 0])
        kernels.route(logits, valid, positions, filled)

    what = f"route_rows, {batch} x {rows} x {width} {dtype} to {capacity}"
    moved = batch * rows * (width * dtype.itemsize + 4)
    yield Variant(what, "CUDA", kernels.route_rows, buffers, moved)
    yield Variant(what, "torch linear, then CUDA route", apart, buffers, moved)


def border_variants(kernels, batch, rows, width, capacity, dtype):
    def buffers():
        residual, product = (torch.randn(batch, rows, width, device="cuda").to(dtype) for _ in range(2))
        product_bias, norm_weight, norm_bias = (torch.randn(width, device="cuda").to(dtype) for _ in range(3))
        weight, bias = torch.randn(width, device="cuda"), torch.ones(1, device="cuda")
        positions = torch.empty(batch, capacity, dtype=torch.int64, device="cuda")
        filled = torch.empty(batch, capacity, dtype=torch.bool, device="cuda")
        logits = torch.empty(batch, rows, device="cuda")
        return (residual, product, product_bias, norm_weight, norm_bias, 1e-5, True, weight, bias, None,
                torch.empty_like(residual), torch.empty_like(residual), logits, positions, filled,
                kernels.workspace(batch, rows))

    def apart(residual, product, product_bias, norm_weight, norm_bias, epsilon, _, weight, bias, valid, summed, normed,
              logits, positions, filled, workspace):
        torch.add(residual, product + product_bias, out=summed)
        normed.copy_(torch.nn.functional.layer_norm(summed, [width], norm_weight, norm_bias, epsilon))
        kernels.route_rows(summed, weight, bias, valid, logits, positions, filled, workspace)

    what = f"sum_norm_route_rows, {batch} x {rows} x {width} {dtype} to {capacity}"
    moved = 4 * batch * rows * width * dtype.itemsize
    yield Variant(what, "CUDA", kernels.sum_norm_route_rows, buffers, moved)
    yield Variant(what, "torch, then CUDA route_rows", apart, buffers, moved)


def row_variants(kernels, batch, rows, width, capacities, dtype):
    row_bytes = width * dtype.itemsize

    def stream():
        return torch.randn(batch, rows, width, device="cuda").to(dtype)

    def buffers(capacity):
        positions = torch.rand(batch, rows, device="cuda").argsort(1)[:, :capacity].sort(1).values
        gate = torch.rand(batch, capacity, device="cuda").to(dtype)  # neither 0 nor 1, mostly: x and y are both read
        y = torch.randn(batch, capacity, width, device="cuda").to(dtype)
        return stream(), y, positions, gate, torch.empty(batch, rows, width, device="cuda", dtype=dtype)

    shape = f"{batch} x {rows} x {width}"
    yield Variant(f"copy, {shape}", "torch", lambda x, out: out.copy_(x), lambda: (stream(), stream()),
                  2 * batch * rows * row_bytes)
    for capacity in capacities:
        def make(capacity=capacity):
            return buffers(capacity)

        chosen = batch * capacity * row_bytes
        yield Variant(f"merge_rows, {shape} to {capacity}", "CUDA", kernels.merge_rows, make,
                      2 * batch * rows * row_bytes + chosen)
        yield Variant(f"merge_rows in place, {shape} to {capacity}", "CUDA",
                      lambda x, y, positions, gate, _: kernels.merge_rows(x, y, positions, gate, x), make, 3 * chosen)

        def twice(x, y, positions, gate, other):
            kernels.merge_rows(x, y, positions, gate, x)
            kernels.merge_rows(other, y, positions, gate, other)

        pairs = f"merge_row_pairs in place, {shape} to {capacity}"
        yield Variant(pairs, "CUDA", lambda x, y, positions, gate, other: kernels.merge_row_pairs(
            x, y, other, y, positions, gate, x, other), make, 5 * chosen)
        yield Variant(pairs, "CUDA merge_rows, twice", twice, make, 5 * chosen)
        yield Variant(f"gather_rows, {shape} to {capacity}", "CUDA",
                      lambda x, y, positions, *_: kernels.gather_rows(x, positions, y), make, 2 * chosen)
        yield Variant(f"gather_rows, {shape} to {capacity}", "torch.take_along_dim",
                      lambda x, y, positions, *_: torch.take_along_dim(x, positions[..., None], 1), make, 2 * chosen)


def groups(kernels):
    """Variants that take turns. One group at a time: the buffers of all would not fit."""
    yield [Variant("one launch", "torch, one element", lambda x: x.zero_(), lambda: (torch.empty(1, device="cuda"),))]
    for rows, capacity in ((1024, 128), (8192, 1024), (65536, 8192)):
        for kind in ("", "masked", "all equal"):
            yield list(route_variants(kernels, 8, rows, capacity, kind))
    yield list(route_rows_variants(kernels, 8, 1024, 1024, 128, torch.float16))
    yield list(route_rows_variants(kernels, 1, 1024, 1024, 128, torch.float16))
    yield list(route_rows_variants(kernels, 8, 8192, 1024, 1024, torch.bfloat16))
    yield list(border_variants(kernels, 8, 1024, 1024, 128, torch.float16))
    yield list(row_variants(kernels, 8, 2048, 2048, (256, 1024), torch.bfloat16))
    yield list(row_variants(kernels, 8, 1024, 1024, (128,), torch.float16))


def report(measured):
    """One dict a variant, with the bandwidth of the copy of the same shape as the measure of those that move bytes."""
    copies = {}
    for variant in measured:
        medians = [statistics.median(times) for times in variant.times_us]
        row = {"what": variant.what, "who": variant.who, "us": medians[0], "us_again": medians[1],
               "us_least": min(variant.times_us[0])}
        if variant.moved:
            row["gb_per_s"] = variant.moved / medians[0] / 1000
        if variant.what.startswith("copy"):
            copies[variant.what.partition(", ")[2]] = row["gb_per_s"]
        shape = variant.what.partition(", ")[2].partition(" to ")[0]
        if shape in copies:
            row["of_copy"] = row["gb_per_s"] / copies[shape]
        if variant.who == "CUDA" and variant.what in TARGET_US:
            row["meets_target"] = medians[0] <= TARGET_US[variant.what]
        if variant.who == "CUDA" and variant.what in TARGET_OF_COPY:
            row["meets_target"] = row["of_copy"] >= TARGET_OF_COPY[variant.what]
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    parser.add_argument("--only", default="", help="time the groups whose first variant begins like this")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kernels = Kernels(build_for_gpu(Path(folder)), "cuda")
    measured = []
    for group in groups(kernels):
        if not group[0].what.startswith(arguments.only):
            continue
        for _, which, variant in itertools.product(range(ROUNDS), (0, 1), group):
            variant.time(which)
        for variant in group:
            del variant.graph, variant.sets
        measured += group
    results = list(report(measured))
    print(f"{'':55} {'':30} {'us':>9} {'again':>9} {'GB/s':>7} {'of copy':>8}")
    for row in results:
        bandwidth = f"{row['gb_per_s']:7.0f}" if "gb_per_s" in row else " " * 7
        of_copy = f"{row['of_copy']:8.2f}" if "of_copy" in row else " " * 8
        target = "" if row.get("meets_target", True) else "  misses its target"
        print(f"{row['what']:55} {row['who']:30} {row['us']:9.2f} {row['us_again']:9.2f} {bandwidth} {of_copy}{target}")
    if arguments.output:
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
                   "kernels": kernels.version(), "rounds": ROUNDS}
        arguments.output.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
