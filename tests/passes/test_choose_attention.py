"""Attention gets another kernel where that one is faster, and stays where not every kernel takes it."""

import pytest
import torch
from modcompile.passes import choose_attention
from modcompile.passes.choose_attention import ChooseAttention
from tiny import check_rewrite, graph_of, nodes_of, randn, rewritten, run_graph
from tolerances import TOLERANCES

# B batch  H heads  S rows  d head dim

aten = torch.ops.aten
ATTENTION = "aten.scaled_dot_product_attention.default"
KERNELS = {name: f"aten._scaled_dot_product_{name}_attention.default" for name in ("flash", "efficient")}
ROWS = (2, 7, 3, 8)  # [B, S, H, d], as projections give it
NAMES = ("query", "key", "value")


def attention(*args, **kwargs):
    def build(call, *rows):
        return call(aten.scaled_dot_product_attention.default, *(call(aten.transpose.int, part, 1, 2) for part in rows),
                    *args, **kwargs)
    return build


@pytest.fixture
def times(monkeypatch):
    """Microseconds of PyTorch's choice, the flash and the efficient kernel, in this order; one call for each."""
    given, asked = [10.0, 10.0, 10.0], []

    def time_us(run, device):
        assert device == "cpu"
        asked.append(run)
        return given[(len(asked) - 1) % 3]

    monkeypatch.setattr(choose_attention, "time_us", time_us)
    return given, asked


def chosen(build, inputs=None, dtype="float16"):
    inputs = inputs or dict.fromkeys(NAMES, ROWS)
    return rewritten(ChooseAttention("cpu"), lambda: graph_of(inputs, build, dtypes=dict.fromkeys(inputs, dtype)))


def kernels(graph):
    return [name for name in nodes_of(graph) if name in (ATTENTION, *KERNELS.values())]


@pytest.mark.parametrize("name", KERNELS)
def test_golden(times, name):
    times[0][1 + list(KERNELS).index(name)] = 5.0
    before, after = chosen(attention(None, 0.0, True, scale=0.5))[:2]
    check_rewrite(f"choose_attention_{name}", before, after)
    output_before, output = (graph.graph.output_node().args[0][0].meta["val"] for graph in (before, after))
    assert output.shape == output_before.shape and output.dtype == output_before.dtype


@pytest.mark.parametrize(("given", "expected"), [
    ((10.0, 9.0, 9.2), "flash"), ((10.0, 8.9, 8.0), "efficient"), ((10.0, 9.6, 10.1), None), ((5.0, 10.0, 10.0), None)])
def test_the_fastest_is_taken_where_it_saves_a_twentieth(times, given, expected):
    times[0][:] = given
    after = chosen(attention())[1]
    assert kernels(after) == [KERNELS[expected] if expected else ATTENTION]


def test_a_kind_is_timed_once(times):
    def build(call, query, key, value):
        same = [attention(None, 0.0, causal)(call, query, key, value) for causal in (False, False, True)]
        return call(aten.cat.default, same)

    times[0][1] = 5.0
    after = chosen(build)[1]
    # Not again in the pass's second run, which finds nothing.
    assert kernels(after) == [KERNELS["flash"]] * 3 and len(times[1]) == 2 * 3


@pytest.mark.parametrize(("build", "inputs", "dtype", "reason"), [
    (attention(), None, "float32", "half precision"),
    (attention(None, 0.1), None, "float16", "dropout"),
    (attention(), dict.fromkeys(NAMES, ("batch", 7, 3, 8)), "float16", "not known"),
    (attention(), dict.fromkeys(NAMES, (2, 7, 3, 12)), "float16", "width"),
    (attention(), dict.fromkeys(NAMES, (2, 7, 3, 264)), "float16", "width"),
    (attention(), {"query": (2, 5, 3, 8), "key": ROWS, "value": ROWS}, "float16", "more keys"),
    (attention(), {"query": ROWS, "key": ROWS, "value": (2, 7, 3, 16)}, "float16", "differ"),
    (attention(enable_gqa=True), {"query": (2, 7, 6, 8), "key": ROWS, "value": ROWS}, "float16", "differ"),
])
def test_what_not_every_kernel_takes_stays(times, build, inputs, dtype, reason):
    times[0][:] = 10.0, 1.0, 1.0
    before, after, reasons = chosen(build, inputs, dtype)
    assert kernels(after) == kernels(before) == [ATTENTION] and not times[1]
    assert reason in reasons[0]


def test_a_mask_and_repeated_values_stay(times):
    def masked(call, query, key, value, mask):
        return attention(mask)(call, query, key, value)

    def repeated(call, query, key, value):
        wide = call(aten.expand.default, value, [2, 7, 3, 8])
        return attention()(call, query, key, wide)

    assert kernels(chosen(masked, {**dict.fromkeys(NAMES, ROWS), "mask": (2, 1, 1, 7)})[1]) == [ATTENTION]
    assert kernels(chosen(repeated, {**dict.fromkeys(NAMES, ROWS), "value": (2, 7, 1, 8)})[1]) == [ATTENTION]
    assert not times[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_times_on_a_gpu():
    small, large = (torch.randn(size, size, device="cuda") for size in (32, 4096))
    assert 0 < choose_attention.time_us(lambda: small @ small, "cuda") < choose_attention.time_us(
        lambda: large @ large, "cuda:0") < 100_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 63, 128, 1024])
def test_numbers_on_a_gpu(monkeypatch, dtype, causal, rows):
    """Of every kernel, whichever is the fastest here."""
    inputs = dict.fromkeys(NAMES, (2, rows, 4, 64))
    given = [randn(*inputs["query"], seed=seed).to("cuda", getattr(torch, dtype)) for seed in range(3)]
    build = attention(None, 0.0, causal, scale=0.2)
    for name in KERNELS:
        left = iter([10.0, *(1.0 if name == other else 10.0 for other in KERNELS)] * 2)
        monkeypatch.setattr(choose_attention, "time_us", lambda run, _, left=left: (run(), next(left))[1])
        before, after = rewritten(ChooseAttention("cuda"), lambda: graph_of(
            inputs, build, dtypes=dict.fromkeys(inputs, dtype)))[:2]
        assert kernels(after) == [KERNELS[name]]
        exact = run_graph(before, *(part.double() for part in given))[0]
        torch.testing.assert_close(run_graph(after, *given)[0].double(), exact, rtol=0,
                                   atol=TOLERANCES["aoti"][given[0].dtype])
