"""The custom-op library for ONNX Runtime: its ops against the references, in sessions and in engines; and what is no
such library. The CPU's half is built here, where there are a compiler and ONNX Runtime's headers."""

import math
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx.parser
import onnxruntime
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modcompile.runtimes.ort import custom_ops
from modcompile.runtimes.ort.custom_ops import LIBRARY
from modcompile.runtimes.ort.session import open_session
from onnx import TensorProto, helper
from tolerances import TOLERANCES, deviation

import modcompile as mc
from modcompile.cli import main
from modcompile.doctor import diagnose, find_ort_headers
from modcompile.engine import build_engine, load_engine
from modcompile.errors import IntegrityError, RuntimeUnavailableError, UsageError
from modcompile.manifest import read_manifest
from modcompile.ops import ONNX_DOMAIN, ONNX_DOMAIN_VERSION, gather_rows, merge_rows, route
from modcompile.variants import other_attention_model

# B batch  S rows  K capacity  D width
NATIVE = Path(__file__).parents[3] / "runtimes" / "native"
TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16,
         torch.float64: TensorProto.DOUBLE, torch.bool: TensorProto.BOOL, torch.int32: TensorProto.INT32,
         torch.int64: TensorProto.INT64}
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid(ONNX_DOMAIN, ONNX_DOMAIN_VERSION)]
CORNERS = [0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, -3.4e38, 1e-45, 3.5]


HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no onnxruntime-gpu")]
PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """Builds the library, once for each device."""
    made = {}

    def build(device):
        if device not in made:
            missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
            missing += [] if find_ort_headers() else ["headers of ONNX Runtime"]
            if missing:
                pytest.skip(f"to build the library there is no {' and no '.join(missing)}")
            folder = tmp_path_factory.mktemp("native")
            cuda = ["-DCMAKE_CUDA_ARCHITECTURES=native"] if device == "cuda" else ["-DMODCOMPILE_CUDA=OFF"]
            for command in (["cmake", "-S", NATIVE, "-B", folder, "-DMODCOMPILE_ORT=ON", *cuda,
                             f"-DONNXRUNTIME_INCLUDE_DIR={find_ort_headers()}"], ["cmake", "--build", folder]):
                done = subprocess.run(command, capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr
            made[device] = folder / "ort" / LIBRARY
        return made[device]

    return build


@pytest.fixture(scope="session")
def library(libraries):
    """The library for the CPU."""
    return libraries("cpu")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=ON_CUDA)])
def session(request, libraries):
    """Makes, once each, a session on one node of our domain; its model has no function bodies."""
    path = libraries(request.param)
    ops = custom_ops.open_library(custom_ops.read_library(path), path)
    made = {}

    def make(op_type, inputs, outputs, constants=(), attributes=()):
        key = (op_type, *inputs, *outputs, *constants, *attributes)
        if key not in made:
            nodes = [helper.make_node("Constant", [], [name], value_int=value) for name, value in constants]
            names = [*(name for name, *_ in inputs), *(name for name, _ in constants)]
            nodes.append(helper.make_node(op_type, names, [name for name, *_ in outputs], domain=ONNX_DOMAIN,
                                          **dict(attributes)))
            values = ([helper.make_tensor_value_info(name, dtype, [None] * rank) for name, dtype, rank in specs]
                      for specs in (inputs, outputs))
            model = helper.make_model(helper.make_graph(nodes, op_type, *values), opset_imports=OPSETS, ir_version=10)
            made[key] = open_session(model.SerializeToString(), Path(), where=Path(op_type), custom_ops=ops,
                                     providers=PROVIDERS[request.param], intra_op_threads=1)
        return made[key]

    return make


def run(session, *tensors):
    """Tensors of any dtype in, and out again, by way of the session's device."""
    device = "cuda" if "CUDAExecutionProvider" in session.get_providers() else "cpu"
    binding = session.io_binding()
    # A capacity is read on the host.
    places = ["cpu" if tensor.dim() == 0 else device for tensor in tensors]
    given = [tensor.to(place) for tensor, place in zip(tensors, places, strict=True)]
    if device == "cuda":
        torch.cuda.synchronize()
    for info, tensor, place in zip(session.get_inputs(), given, places, strict=True):
        binding.bind_input(info.name, place, 0, TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    for info in session.get_outputs():
        binding.bind_output(info.name, device)
    session.run_with_iobinding(binding)
    return [torch.from_dlpack(value._ortvalue).cpu().clone() for value in binding.get_outputs()]


def run_route(session, logits, valid, capacity, constant=False):
    chosen = (("positions", TensorProto.INT64, 2), ("filled", TensorProto.BOOL, 2))
    given = [("logits", TensorProto.FLOAT, 2)] + ([] if valid is None else [("valid", TensorProto.BOOL, 2)])
    tensors = [logits] if valid is None else [logits, valid]
    name = "Route" if valid is None else "MaskedRoute"
    if constant:
        return run(session(name, given, chosen, (("capacity", capacity),)), *tensors)
    return run(session(name, [*given, ("capacity", TensorProto.INT64, 0)], chosen), *tensors, torch.tensor(capacity))


def run_route_rows(session, x, weight, bias, valid, capacity):
    given = [("x", TYPES[x.dtype], 3), ("weight", TensorProto.FLOAT, 2), ("bias", TensorProto.FLOAT, 1),
             *([] if valid is None else [("valid", TensorProto.BOOL, 2)]), ("capacity", TensorProto.INT64, 0)]
    made = (("logits", TensorProto.FLOAT, 2), ("positions", TensorProto.INT64, 2), ("filled", TensorProto.BOOL, 2))
    return run(session("RouteRows" if valid is None else "MaskedRouteRows", given, made), x, weight, bias,
               *([] if valid is None else [valid]), torch.tensor(capacity))


def run_sum(session, product, residual, norm_weight, biases, weight, bias, valid, capacity, epsilon=1e-5):
    kind = TYPES[product.dtype]
    norms = (("norm_weight", kind, 1), *((("norm_bias", kind, 1), ("product_bias", kind, 1)) if biases else ()))
    given = (("product", kind, 3), ("residual", kind, 3), *norms, ("weight", TensorProto.FLOAT, 2),
             ("bias", TensorProto.FLOAT, 1), *([] if valid is None else [("valid", TensorProto.BOOL, 2)]),
             ("capacity", TensorProto.INT64, 0))
    made = (("normed", kind, 3), ("summed", kind, 3), ("logits", TensorProto.FLOAT, 2),
            ("positions", TensorProto.INT64, 2), ("filled", TensorProto.BOOL, 2))
    name = ("" if valid is None else "Masked") + ("SkipLayerNormRouteRows" if biases else "SkipRmsNormRouteRows")
    return run(session(name, given, made, attributes=(("epsilon", epsilon),)), product, residual, norm_weight, *biases,
               weight, bias, *([] if valid is None else [valid]), torch.tensor(capacity))


def run_gather(session, x, positions):
    kind = TYPES[x.dtype]
    return run(session("GatherRows", (("x", kind, x.dim()), ("positions", TensorProto.INT64, 2)),
                       (("rows", kind, x.dim()),)), x, positions)[0]


def run_gather_norm(session, x, positions, weight, bias, epsilon=1e-5):
    kind = TYPES[x.dtype]
    given = [("x", kind, 3), ("positions", TensorProto.INT64, 2), ("weight", kind, 1),
             *([] if bias is None else [("bias", kind, 1)])]
    opened = session("GatherRmsNorm" if bias is None else "GatherLayerNorm", tuple(given),
                     (("rows", kind, 3), ("normed", kind, 3)), attributes=(("epsilon", epsilon),))
    return run(opened, x, positions, weight, *([] if bias is None else [bias]))


def run_merge(session, x, y, positions, gate):
    kind = TYPES[x.dtype]
    given = (("x", kind, 3), ("y", kind, 3), ("positions", TensorProto.INT64, 2), ("gate", kind, 2))
    return run(session("MergeRows", given, (("merged", kind, 3),)), x, y, positions, gate)[0]


def run_merge_pairs(session, x, y, positions, gate, other_x, other_y):
    kind = TYPES[x.dtype]
    given = (("x", kind, 3), ("y", kind, 3), ("positions", TensorProto.INT64, 2), ("gate", kind, 2),
             ("other_x", kind, 3), ("other_y", kind, 3))
    return run(session("MergeRowPairs", given, (("merged", kind, 3), ("other_merged", kind, 3))), x, y, positions, gate,
               other_x, other_y)


def same(actual, expected):
    """Equal bit for bit, any NaN apart."""
    actual, expected = (torch.where(side.isnan(), torch.full_like(side, math.nan), side) for side in (actual, expected))
    return actual.dtype == expected.dtype and torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


def random_positions(generator, batch, rows, capacity):
    return torch.stack([torch.randperm(rows, generator=generator)[:capacity].sort().values for _ in range(batch)])


# The ops


@st.composite
def routings(draw):
    batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 17))
    score = draw(st.sampled_from([st.sampled_from(CORNERS), st.floats(width=32), st.just(1.0)]))
    logits = draw(st.lists(score, min_size=batch * rows, max_size=batch * rows))
    valid = draw(st.none() | st.lists(st.booleans(), min_size=batch * rows, max_size=batch * rows))
    return (torch.tensor(logits).view(batch, rows), None if valid is None else torch.tensor(valid).view(batch, rows),
            draw(st.integers(1, rows)))


@given(case=routings())
@settings(max_examples=200, deadline=None)
def test_route_is_the_reference(session, case):
    for actual, expected in zip(run_route(session, *case), route(*case), strict=True):
        assert torch.equal(actual.view(expected.dtype), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("values", [None, 3, 1])
@pytest.mark.parametrize(("rows", "capacity"), [(1, 1), (63, 1), (63, 63), (1024, 128), (8193, 4100)])
def test_route_on_long_rows(session, rows, capacity, values, masked):
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(3, rows, generator=generator) if values is None else \
        torch.randint(values, (3, rows), generator=generator).float()
    # Fewer valid rows than K, as many as K, all.
    count = torch.tensor([[capacity // 2], [capacity], [rows]])
    valid = torch.rand(3, rows, generator=generator).argsort(1) < count if masked else None
    for constant in (False, True):
        positions, filled = run_route(session, logits, valid, capacity, constant)
        expected = route(logits, valid, capacity)
        assert torch.equal(positions, expected[0]) and torch.equal(filled.view(torch.bool), expected[1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("batch", "rows", "width", "capacity"), [(1, 1, 1, 1), (3, 63, 33, 5), (2, 1024, 128, 128)])
def test_route_rows_is_a_router_and_its_route(session, batch, rows, width, capacity, dtype, masked):
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = torch.randn(batch, rows, width, generator=generator).to(dtype), torch.randn(
        width, 1, generator=generator), torch.randn(1, generator=generator)
    valid = torch.rand(batch, rows, generator=generator) < 0.7 if masked else None
    # Again, in memory that the last call left as it was.
    for _ in range(2):
        logits, positions, filled = run_route_rows(session, x, weight, bias, valid, capacity)
        exact = x.double() @ weight.double() + bias
        assert (logits - exact[..., 0]).abs().max() < 1e-5 * max(1, exact.abs().max())
        expected = route(logits, valid, capacity)
        assert torch.equal(positions, expected[0]) and torch.equal(filled.view(torch.bool), expected[1])


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("shape", [(2, 9), (2, 9, 5), (1, 9, 1, 7), (3, 1, 16)])
def test_gather_rows_of_any_dtype(session, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2**30, 2**30, shape, generator=generator).to(dtype)
    for capacity in {1, (shape[1] + 1) // 2, shape[1]}:
        positions = random_positions(generator, *shape[:2], capacity)
        rows = run_gather(session, x, positions)
        assert torch.equal(rows.view(dtype) if dtype == torch.bool else rows, gather_rows(x, positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("centered", [True, False])
def test_gathered_rows_and_their_norm(session, dtype, centered):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 63, 24, generator=generator).to(dtype)
    weight, bias = (torch.randn(24, generator=generator).to(dtype) for _ in range(2))
    positions = random_positions(generator, 2, 63, 5)
    rows, normed = run_gather_norm(session, x, positions, weight, bias if centered else None)
    assert torch.equal(rows, gather_rows(x, positions))
    exact, norm = rows.double(), torch.nn.functional
    expected = norm.layer_norm(exact, [24], weight.double(), bias.double()) if centered else \
        norm.rms_norm(exact, [24], weight.double(), 1e-5)
    assert ((normed.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 2e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_a_sum_its_norm_and_its_route(session, dtype, centered, masked):
    generator = torch.Generator().manual_seed(7)
    product, residual = (torch.randn(2, 63, 24, generator=generator).to(dtype) for _ in range(2))
    norm_weight, *biases = (torch.randn(24, generator=generator).to(dtype) for _ in range(3 if centered else 1))
    weight, bias = torch.randn(24, 1, generator=generator), torch.randn(1, generator=generator)
    valid = torch.rand(2, 63, generator=generator) < 0.7 if masked else None
    normed, summed, *routed = run_sum(session, product, residual, norm_weight, biases, weight, bias, valid, 8)
    exact = residual.double() + product.double() + (biases[1].double() if centered else 0)
    assert ((summed.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()
    norm = torch.nn.functional
    expected = norm.layer_norm(summed.double(), [24], norm_weight.double(), biases[0].double()) if centered else \
        norm.rms_norm(summed.double(), [24], norm_weight.double(), 1e-5)
    assert ((normed.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 2e-6).all()
    for mine, other in zip(routed, run_route_rows(session, summed, weight, bias, valid, 8), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "capacity", "width"), [(1, 1, 1), (63, 5, 33), (63, 1, 8), (63, 63, 8)])
def test_merge_rows_rounds_as_the_reference(session, dtype, rows, capacity, width):
    generator = torch.Generator().manual_seed(rows * capacity)
    x, y = (torch.randn(2, count, width, generator=generator).to(dtype) for count in (rows, capacity))
    positions = random_positions(generator, 2, rows, capacity)
    gate = torch.randn(2, capacity, generator=generator).to(dtype)
    assert same(run_merge(session, x, y, positions, gate), merge_rows(x, y, positions, gate))


@pytest.mark.parametrize("dtype", FLOATS)
def test_pairs_are_merged_each_by_itself(session, dtype):
    generator = torch.Generator().manual_seed(1)
    x, other_x = (torch.randn(2, 63, 24, generator=generator).to(dtype) for _ in range(2))
    y, other_y = (torch.randn(2, 5, 24, generator=generator).to(dtype) for _ in range(2))
    slots = random_positions(generator, 2, 63, 5), torch.randn(2, 5, generator=generator).to(dtype)
    merged, other_merged = run_merge_pairs(session, x, y, *slots, other_x, other_y)
    assert same(merged, merge_rows(x, y, *slots)) and same(other_merged, merge_rows(other_x, other_y, *slots))


@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_rows_at_its_ends_and_on_corners(session, dtype):
    values = torch.tensor(CORNERS).to(dtype)
    pairs = torch.cartesian_prod(values, values)
    x, y = (pairs[:, side].expand(1, 6, -1).contiguous() for side in range(2))
    positions = torch.arange(6)[None]
    gate = torch.tensor([[0.0, 1.0, -0.0, math.nan, math.inf, 0.25]]).to(dtype)
    merged = run_merge(session, x, y, positions, gate)
    assert same(merged, merge_rows(x, y, positions, gate))
    # Not even the payload of a NaN changes behind an open or a closed gate.
    assert merged[0, [0, 1, 2]].view(torch.uint8).tolist() == \
        torch.stack([x[0, 0], y[0, 1], x[0, 2]]).view(torch.uint8).tolist()


def test_a_batch_of_none(session):
    positions, filled = run_route(session, torch.zeros(0, 5), None, 2)
    assert positions.shape == filled.shape == (0, 2)
    logits, *_ = run_route_rows(session, torch.zeros(0, 5, 3), torch.zeros(3, 1), torch.zeros(1), None, 2)
    assert logits.shape == (0, 5)
    assert run_gather(session, torch.zeros(0, 5, 3), positions).shape == (0, 2, 3)
    merged = run_merge(session, torch.zeros(0, 5, 3), torch.zeros(0, 2, 3), positions, torch.zeros(0, 2))
    assert merged.shape == (0, 5, 3)


@pytest.mark.parametrize(("call", "message"), [
    (lambda s: run_route(s, torch.zeros(2, 5), None, 6), "from 1 to 5 rows, found 6"),
    (lambda s: run_route(s, torch.zeros(2, 5), None, 0, constant=True), "from 1 to 5 rows, found 0"),
    (lambda s: run_route(s, torch.zeros(2, 5), torch.zeros(2, 4).bool(), 2), r"valid \[2, 5\], found \[2, 4\]"),
    (lambda s: run_route_rows(s, torch.zeros(2, 5, 3), torch.zeros(4, 1), torch.zeros(1), None, 2),
     r"weight \[3, 1\], found \[4, 1\]"),
    (lambda s: run_route_rows(s, torch.zeros(2, 5, 3), torch.zeros(3, 1), torch.zeros(1), None, 6),
     "from 1 to 5 rows, found 6"),
    (lambda s: run_sum(s, torch.zeros(1, 5, 3), torch.zeros(1, 4, 3), torch.zeros(3), [], torch.zeros(3, 1),
                       torch.zeros(1), None, 2), r"residual \[1, 5, 3\], found \[1, 4, 3\]"),
    (lambda s: run_sum(s, torch.zeros(1, 5, 3), torch.zeros(1, 5, 3), torch.zeros(3), [torch.zeros(2), torch.zeros(3)],
                       torch.zeros(3, 1), torch.zeros(1), None, 2), r"norm_bias \[3\], found \[2\]"),
    (lambda s: run_sum(s, torch.zeros(1, 5, 3), torch.zeros(1, 5, 3), torch.zeros(3), [torch.zeros(3), torch.zeros(4)],
                       torch.zeros(3, 1), torch.zeros(1), None, 2), r"product_bias \[3\], found \[4\]"),
    (lambda s: run_gather(s, torch.zeros(5), torch.tensor([[0]])), r"x \[B, S, ...\], found \[5\]"),
    (lambda s: run_gather(s, torch.zeros(2, 5, 3), torch.tensor([[0]])), r"positions \[2, K\], found \[1, 1\]"),
    (lambda s: run_gather_norm(s, torch.zeros(1, 5, 3), torch.tensor([[0, 1]]), torch.zeros(4), None),
     r"weight \[3\], found \[4\]"),
    (lambda s: run_gather_norm(s, torch.zeros(1, 5, 3), torch.tensor([[0, 1]]), torch.zeros(3), torch.zeros(2)),
     r"bias \[3\], found \[2\]"),
    (lambda s: run_merge(s, torch.zeros(1, 5, 3), torch.zeros(1, 2, 4), torch.tensor([[0, 1]]), torch.zeros(1, 2)),
     r"y \[1, 2, 3\], found \[1, 2, 4\]"),
    (lambda s: run_merge(s, torch.zeros(1, 5, 3), torch.zeros(1, 2, 3), torch.tensor([[0, 1]]), torch.zeros(1, 1)),
     r"gate \[1, 2\], found \[1, 1\]"),
    (lambda s: run_merge(s, torch.zeros(1, 1, 3), torch.zeros(1, 2, 3), torch.tensor([[0, 0]]), torch.ones(1, 2)),
     r"from 1 to 1 positions, found \[1, 2\]"),
    (lambda s: run_merge_pairs(s, torch.zeros(1, 5, 3), torch.zeros(1, 2, 3), torch.tensor([[0, 1]]), torch.zeros(1, 2),
                               torch.zeros(1, 5, 4), torch.zeros(1, 2, 3)), r"other_x \[1, 5, 3\], found \[1, 5, 4\]"),
    (lambda s: run_merge_pairs(s, torch.zeros(1, 5, 3), torch.zeros(1, 2, 3), torch.tensor([[0, 1]]), torch.zeros(1, 2),
                               torch.zeros(1, 5, 3), torch.zeros(1, 3, 3)), r"other_y \[1, 2, 3\], found \[1, 3, 3\]"),
])
def test_what_an_op_refuses(session, call, message):
    with pytest.raises(Exception, match=message):
        call(session)


@pytest.mark.parametrize(("position", "slot"), [(5, 1), (-1, 0)])
def test_the_cpu_refuses_positions_that_are_none(session, position, slot):
    positions = torch.tensor([[0, 1]])
    positions[0, slot] = position
    gathering = session("GatherRows", (("x", TensorProto.FLOAT, 3), ("positions", TensorProto.INT64, 2)),
                        (("rows", TensorProto.FLOAT, 3),))
    if "CUDAExecutionProvider" in gathering.get_providers():
        pytest.skip("on CUDA nobody waits to hear of it")
    for call in (lambda: run(gathering, torch.zeros(1, 5, 3), positions),
                 lambda: run_merge(session, torch.zeros(1, 5, 3), torch.zeros(1, 2, 3), positions, torch.ones(1, 2))):
        with pytest.raises(Exception, match=f"position {position} in slot {slot}"):
            call()


def test_doubles_are_merged(session):
    case = (torch.randn(2, 9, 3).double(), torch.randn(2, 4, 3).double(),
            random_positions(torch.Generator().manual_seed(0), 2, 9, 4), torch.randn(2, 4).double())
    # Where CUDA has no kernel for a type, ONNX Runtime falls back to the CPU's.
    assert torch.equal(run_merge(session, *case), merge_rows(*case))


def test_threads_share_a_session(session):
    cases = [(torch.randn(2, 257, generator=torch.Generator().manual_seed(seed)), None, 33) for seed in range(8)]
    wrong = []

    def work(case):
        expected = route(*case)[0]
        wrong.extend(case for _ in range(50) if not torch.equal(run_route(session, *case)[0], expected))

    # Made before it is shared.
    run_route(session, *cases[0])
    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Engines


@pytest.fixture(scope="module")
def mod():
    model = tiny.Stack(*(tiny.Block(causal=True) for _ in range(4)))
    inputs = {"hidden": torch.randn(2, 5, tiny.WIDTH), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    return tiny.randomise_routers(mc.convert(model, inputs, mc.MoDConfig(capacity_ratio=0.25)))


@pytest.fixture(scope="module")
def exported(mod, tmp_path_factory):
    return {precision: mc.export_onnx(mod, tmp_path_factory.mktemp("onnx") / "mod.onnx", precision=precision)
            for precision in ("fp32", "fp16")}


def batch(dtype=np.float32, rows=63):
    generator = np.random.default_rng(rows)
    mask = (np.arange(rows) < np.array([[rows], [rows // 8]])).astype(np.int64)
    return {"hidden": generator.standard_normal((2, rows, tiny.WIDTH)).astype(dtype), "attention_mask": mask}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("shapes", [None, {"hidden": (2, 63, tiny.WIDTH)}])
def test_an_engine_with_custom_ops_gives_the_bodies_numbers(library, exported, tmp_path, precision, shapes):
    dtype = np.float16 if precision == "fp16" else np.float32
    with build_engine(exported[precision], tmp_path / "ops", shapes=shapes, custom_ops=library) as one, \
            build_engine(exported[precision], tmp_path / "bodies", shapes=shapes) as other:
        for rows in (63,) if shapes else (63, 1, 8):
            actual, expected = (engine.run(batch(dtype, rows))["output"] for engine in (one, other))
            if precision == "fp32":
                np.testing.assert_array_equal(actual, expected)
            # The CPU runs bodies of float16 in float32, and rounds where the body ends.
            sides = (torch.from_numpy(side) for side in (actual, expected))
            assert deviation(*sides) <= TOLERANCES["ort"][torch.float16]


def test_what_a_model_has_of_ours_is_told_by_its_graph(library, tmp_path):
    """The other attend_to is a variant of a routed model, and names no routed blocks."""
    torch.manual_seed(0)
    routed = mc.convert(tiny.Stack(*(tiny.Block() for _ in range(2))), {"hidden": torch.randn(2, 5, tiny.WIDTH)},
                        mc.MoDConfig(capacity_ratio=0.25))
    build_engine(other_attention_model(routed), tmp_path / "engine", custom_ops=library, fuse=True,
                 shapes={"hidden": (2, 63, tiny.WIDTH)}).close()
    model = onnx.load(tmp_path / "engine" / "model.onnx", load_external_data=False)
    assert any(node.op_type.endswith("RouteRows") for node in model.graph.node)


def test_the_library_takes_the_bodies_place(library, exported):
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.enable_profiling = True
    options.profile_file_prefix = str(exported["fp32"].parent / "profile")
    session = onnxruntime.InferenceSession(exported["fp32"], options, providers=["CPUExecutionProvider"])
    session.run(None, batch())
    text = Path(session.end_profiling()).read_text()
    kinds = ("MaskedRoute", "GatherRows", "MergeRows", "TopK", "ScatterND")
    assert [text.count(f'"op_name" : "{kind}"') for kind in kinds] == [2, 2, 2, 0, 0]


def test_x_stays_where_it_is_used_again(library):
    """ONNX Runtime may give the merged rows x's memory, but not while something reads x."""
    graph = onnx.parser.parse_graph("""
        merged (float[1, 9, 4] input, float[1, 2, 4] y, int64[1, 2] positions, float[1, 2] gate)
            => (float[1, 9, 4] merged, float[1, 9, 4] again)
        { x = Neg (input) merged = modcompile.MergeRows (x, y, positions, gate) again = Add (x, merged) }""")
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10)
    opened = open_session(model.SerializeToString(), Path(), where=Path("merged"), providers=["CPUExecutionProvider"],
                          custom_ops=custom_ops.open_library(library.read_bytes(), library))
    case = torch.randn(1, 9, 4), torch.randn(1, 2, 4), torch.tensor([[3, 8]]), torch.tensor([[1.0, 0.5]])
    expected = merge_rows(-case[0], *case[1:])
    merged, again = run(opened, *case)
    assert torch.equal(merged, expected) and torch.equal(again, expected - case[0])


@pytest.mark.parametrize("used_again", ["", "x", "other_x"])
def test_either_of_a_pair_stays_where_it_is_used_again(library, used_again):
    graph = onnx.parser.parse_graph("""
        merged (float[1, 9, 4] input, float[1, 2, 4] y, int64[1, 2] positions, float[1, 2] gate)
            => (float[1, 9, 4] merged, float[1, 9, 4] other_merged, float[1, 9, 4] again)
        { x = Neg (input) other_x = Abs (input)
          merged, other_merged = modcompile.MergeRowPairs (x, y, positions, gate, other_x, y)
          again = Add (%s, merged) }""" % (used_again or "other_merged"))
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10)
    opened = open_session(model.SerializeToString(), Path(), where=Path("pair"), providers=["CPUExecutionProvider"],
                          custom_ops=custom_ops.open_library(library.read_bytes(), library))
    x, *rest = torch.randn(1, 9, 4), torch.randn(1, 2, 4), torch.tensor([[3, 8]]), torch.tensor([[1.0, 0.5]])
    expected, other = merge_rows(-x, *rest), merge_rows(x.abs(), *rest)
    merged, other_merged, again = run(opened, x, *rest)
    assert torch.equal(merged, expected) and torch.equal(other_merged, other)
    assert torch.equal(again, expected + {"": other, "x": -x, "other_x": x.abs()}[used_again])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no onnxruntime-gpu")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_an_engine_on_cuda(libraries, exported, tmp_path, precision, cuda_graph):
    dtype = np.float16 if precision == "fp16" else np.float32
    shapes = {"hidden": (2, 63, tiny.WIDTH)}
    with build_engine(exported[precision], tmp_path / "cpu", shapes=shapes) as engine:
        expected = torch.from_numpy(engine.run(batch(dtype))["output"])
    # Alone: a node that ended up on the CPU would be an error.
    with build_engine(exported[precision], tmp_path / "engine", shapes=shapes, custom_ops=libraries("cuda"),
                      providers=["CUDAExecutionProvider"], cuda_graph=cuda_graph) as engine:
        for _ in range(3):
            inputs = {name: torch.from_numpy(value).cuda() for name, value in batch(dtype).items()}
            output = engine.run(inputs)["output"]
            assert output.device.type == "cuda"
            assert deviation(output.cpu(), expected) <= TOLERANCES["ort"][expected.dtype]
        assert deviation(torch.from_numpy(engine.run(batch(dtype))["output"]), expected) <= \
            TOLERANCES["ort"][expected.dtype]


def test_the_engine_folder_is_complete(library, exported, tmp_path):
    build_engine(exported["fp32"], tmp_path / "engine", custom_ops=library).close()
    manifest = read_manifest(tmp_path / "engine")
    assert LIBRARY in manifest.files
    assert manifest.target == {"custom_ops": f"{mc.__version__} for CPU"}
    # Bodies stay in the model, so it runs without the library as well.
    assert {f.name for f in onnx.load(tmp_path / "engine" / "model.onnx", load_external_data=False).functions} == {
        "MaskedRoute", "GatherRows", "MergeRows"}
    expected = None
    for choice in (None, library, False):
        with load_engine(tmp_path / "engine", custom_ops=choice, intra_op_threads=1) as engine:
            output = engine.run(batch())["output"]
        expected = output if expected is None else expected
        np.testing.assert_array_equal(output, expected)


def test_models_without_ops_of_ours(library, exported, tmp_path):
    flat = onnx.inliner.inline_local_functions(onnx.load(exported["fp32"]))
    for entry in [entry for entry in flat.opset_import if entry.domain == ONNX_DOMAIN]:
        flat.opset_import.remove(entry)
    onnx.save(flat, tmp_path / "flat.onnx")
    with pytest.raises(UsageError, match="without inline=True"):
        build_engine(tmp_path / "flat.onnx", tmp_path / "engine", custom_ops=library)
    # Without its metadata it could be a dense one, which is built all the same.
    del flat.metadata_props[:]
    onnx.save(flat, tmp_path / "flat.onnx")
    with build_engine(tmp_path / "flat.onnx", tmp_path / "engine", custom_ops=library) as engine:
        assert LIBRARY not in engine.manifest.files and engine.manifest.target == {}
        assert engine.run(batch())["output"].shape == (2, 63, tiny.WIDTH)


def test_the_command_line_takes_the_library(library, exported, tmp_path, capsys):
    for path, code in ((library, 0), (tmp_path / "absent.so", 5)):
        with pytest.raises(SystemExit) as exit:
            main(["build", str(exported["fp32"]), "-o", str(tmp_path / path.name), "--custom-ops", str(path)])
        assert (exit.value.code or 0) == code
    assert (tmp_path / LIBRARY / LIBRARY).exists()
    assert "absent.so" in capsys.readouterr().err


def test_a_changed_library_is_refused_before_it_is_loaded(library, exported, tmp_path, monkeypatch):
    build_engine(exported["fp32"], tmp_path / "engine", custom_ops=library).close()
    path = tmp_path / "engine" / LIBRARY
    whole = path.read_bytes()
    monkeypatch.setattr(custom_ops.ctypes, "CDLL", lambda *_: pytest.fail("a library was loaded"))
    for content in (whole[:-1], whole[:100], b"", whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]):
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match=LIBRARY):
            load_engine(tmp_path / "engine")
    path.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        load_engine(tmp_path / "engine")


# What is no library of ours


@pytest.fixture
def compile_library(tmp_path, library):
    """Makes a shared library of a line of C++."""
    def make(source):
        path = tmp_path / "other.so"
        subprocess.run(["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=source, text=True, check=True)
        return path

    return make


DECLARED = 'extern "C" const char* modcompile_ort_version() { return "9.9"; }' \
    'extern "C" const char* modcompile_ort_providers() { return "CPUExecutionProvider"; }'


def refusal(path, exported, tmp_path):
    """The message of a build and of a load with this library; both leave the process alive and no folder."""
    messages = []
    with pytest.raises(RuntimeUnavailableError) as caught:
        build_engine(exported["fp32"], tmp_path / "engine", custom_ops=path)
    messages.append(str(caught.value))
    assert not (tmp_path / "engine").exists()
    build_engine(exported["fp32"], tmp_path / "engine").close()
    with pytest.raises(RuntimeUnavailableError) as caught:
        load_engine(tmp_path / "engine", custom_ops=path)
    messages.append(str(caught.value))
    assert messages[0] == messages[1]
    return messages[0]


def test_no_file(exported, tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.so", exported, tmp_path)


def test_a_file_that_is_no_library(exported, tmp_path):
    (tmp_path / "text.so").write_text("not a library\n" * 100)
    assert "invalid ELF header" in refusal(tmp_path / "text.so", exported, tmp_path)


@pytest.mark.parametrize("share", [0, 0.1, 0.5])
def test_a_library_that_was_cut_short(library, exported, tmp_path, share):
    whole = library.read_bytes()
    (tmp_path / "cut.so").write_bytes(whole[:int(len(whole) * share)])
    message = refusal(tmp_path / "cut.so", exported, tmp_path)
    assert "does not load" in message and "cut.so" in message and "-DMODCOMPILE_ORT=ON" in message


def test_another_library(exported, tmp_path, compile_library):
    message = refusal(compile_library("int answer() { return 42; }"), exported, tmp_path)
    assert "not modcompile's custom-op library" in message and "modcompile_ort_domain_version" in message


def test_another_version_of_the_ops(exported, tmp_path, compile_library):
    path = compile_library(DECLARED + 'extern "C" int modcompile_ort_domain_version() { return 2; }')
    assert "found: version 2, of modcompile 9.9" in refusal(path, exported, tmp_path)


def test_a_library_that_onnx_runtime_does_not_take(exported, tmp_path, compile_library):
    path = compile_library(DECLARED + 'extern "C" int modcompile_ort_domain_version() { return 1; }')
    assert "ONNX Runtime does not take the custom-op library" in refusal(path, exported, tmp_path)


def test_a_library_of_the_cpu_alone_with_the_cuda_provider(library, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError, match="no kernels for CUDA"):
        build_engine(exported["fp32"], tmp_path / "engine", custom_ops=library, providers=["CUDAExecutionProvider"])


def test_a_library_for_another_gpu(exported, tmp_path, compile_library, monkeypatch):
    """As CUDA says it: the library's own answer is compiled in here, for there may be no GPU."""
    path = compile_library('''extern "C" {
        int modcompile_ort_domain_version() { return 1; }
        const char* modcompile_ort_version() { return "9.9"; }
        const char* modcompile_ort_providers() { return "CPUExecutionProvider CUDAExecutionProvider"; }
        const char* modcompile_ort_cuda_error(int device) { return device == 1 ? "no kernel image" : 0; }
    }''')
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    providers = [("CUDAExecutionProvider", {"device_id": 1})]
    with pytest.raises(RuntimeUnavailableError, match="do not run on this GPU") as caught:
        build_engine(exported["fp32"], tmp_path / "engine", custom_ops=path, providers=providers)
    assert "cuda:1" in str(caught.value) and "no kernel image" in str(caught.value)
    # The other one is not at fault.
    with pytest.raises(RuntimeUnavailableError, match="does not take the custom-op library"):
        build_engine(exported["fp32"], tmp_path / "engine", custom_ops=path, providers=["CUDAExecutionProvider"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_the_kernels_run_here(gpu_kernels):
    assert gpu_kernels.library.modcompile_kernels_run_here() == 0


def test_headers_are_found_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXRUNTIME_INCLUDE_DIR", str(tmp_path))
    assert find_ort_headers() is None
    finding = next(finding for finding in diagnose() if finding.name == "ONNX Runtime's headers")
    assert finding.state == "missing" and "fetch_headers.sh" in finding.fix
    (tmp_path / "onnxruntime_cxx_api.h").touch()
    assert find_ort_headers() == tmp_path


def test_the_domains_version_is_the_ops():
    assert (custom_ops.DOMAIN, custom_ops.DOMAIN_VERSION) == (ONNX_DOMAIN, ONNX_DOMAIN_VERSION)


def test_one_library_is_loaded_once_from_where_nobody_else_may_write(library, tmp_path):
    again = shutil.copy(library, tmp_path / "again.so")
    first, second = (custom_ops.open_library(custom_ops.read_library(path), path) for path in (library, again))
    assert first == second
    assert oct(first.path.parent.stat().st_mode)[-3:] == "700"
