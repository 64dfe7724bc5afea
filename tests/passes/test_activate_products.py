"""A product in half precision takes the tanh form of GELU that follows; whatever cuBLASLt does not take stays."""

import pytest
import torch
from modcompile.passes.activate_products import ActivateProducts
from tiny import assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten
from tolerances import TOLERANCES

# B batch  S rows of a sequence  R rows  D width before  N width after

aten = torch.ops.aten
GELU, JOINED = "aten.gelu.default", "aten._addmm_activation.default"
FORMS = {"addmm": {"rows": ("rows", 8), "weight": (8, 16), "bias": (16,)},
         "linear": {"x": ("batch", "sequence", 8), "weight": (16, 8), "bias": (16,)}}


def tanh_form(call, x):
    return call(aten.gelu.default, x, approximate="tanh")


def addmm(call, rows, weight, bias):
    return call(aten.addmm.default, bias, rows, weight)


def flattened(call, x, weight, bias):
    """As transformers' Conv1D."""
    flat = call(aten.reshape.default, x, [-1, 8])
    return call(aten.reshape.default, addmm(call, flat, weight, bias), [call(aten.sym_size.int, x, 0), -1, 16])


def linear(call, x, weight, bias):
    return call(aten.linear.default, x, weight, bias)


def activated(inputs, build, dtype="float16"):
    return rewritten(ActivateProducts(), lambda: graph_of(inputs, build, dtypes=dict.fromkeys(inputs, dtype)))[:2]


def followed(product, activation=tanh_form):
    return lambda call, *given: activation(call, product(call, *given))


@pytest.mark.parametrize(("form", "product"), [("addmm", addmm), ("linear", linear)])
def test_golden(form, product):
    before, after = activated(FORMS[form], followed(product))
    check_rewrite(f"activate_products_{form}", before, after)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("product", "inputs"), [
    (addmm, FORMS["addmm"]), (addmm, {**FORMS["addmm"], "rows": (5, 8)}),
    (flattened, {**FORMS["addmm"], "rows": ("batch", "sequence", 8)}),
    (linear, FORMS["linear"]), (linear, {**FORMS["linear"], "x": (3, 63, 8)}), (linear, {**FORMS["linear"],
                                                                                     "x": ("rows", 8)}),
    (linear, {**FORMS["linear"], "x": ("batch", "sequence", 2, 8)}),
])
def test_shapes_and_numbers(product, inputs, dtype):
    before, after = activated(inputs, followed(product), dtype)
    assert GELU not in nodes_of(after) and nodes_of(after).count(JOINED) == 1
    output_before, output = (graph.graph.output_node().args[0][0].meta["val"] for graph in (before, after))
    assert (tuple(map(str, output.shape)), output.dtype, output.stride()[-1]) == (
        tuple(map(str, output_before.shape)), output_before.dtype, 1)
    sizes = {"batch": 3, "sequence": 63, "rows": 5}
    given = [randn(*(sizes.get(dim, dim) for dim in shape), seed=seed).to(getattr(torch, dtype))
             for seed, shape in enumerate(inputs.values())]
    # The op is the tanh form on CUDA alone; on a CPU it is the exact one.
    (node,) = before.graph.find_nodes(op="call_function", target=aten.gelu.default)
    node.kwargs = {}
    before.recompile()
    assert_same(before, after, *given, tolerance=TOLERANCES["eager"][getattr(torch, dtype)])


def test_the_op_is_the_tanh_form_on_cuda():
    """By PyTorch's own decomposition, on tensors that say where they are and hold nothing."""
    from torch._decomp import decomposition_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Forms(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is aten.gelu.default:
                self.seen = (*self.seen, (kwargs or {}).get("approximate", "none"))
            return func(*args, **(kwargs or {}))

    found = {}
    for device in ("cpu", "cuda"):
        with FakeTensorMode(), Forms() as forms:
            given = [torch.empty(shape, device=device, dtype=torch.float16) for shape in ((16,), (5, 8), (8, 16))]
            decomposition_table[aten._addmm_activation.default](*given, use_gelu=True)
        found[device] = forms.seen
    assert found == {"cpu": ("none",), "cuda": ("tanh",)}


def exact(call, x):
    return call(aten.gelu.default, x)


def relu(call, x):
    return call(aten.relu.default, x)


def another_user(call, *given):
    product = addmm(call, *given)
    return tanh_form(call, product), call(aten.neg.default, product)


def another_user_of_its_dims(call, x, weight, bias):
    value = flattened(call, x, weight, bias)
    return tanh_form(call, value), call(aten.neg.default, value)


def handed_out(call, *given):
    product = linear(call, *given)
    return tanh_form(call, product), product


def without_bias(call, x, weight, bias):
    return tanh_form(call, call(aten.linear.default, x, weight))


def mm(call, rows, weight, bias):
    return tanh_form(call, call(aten.mm.default, rows, weight))


def with_a_factor(call, rows, weight, bias):
    return tanh_form(call, call(aten.addmm.default, bias, rows, weight, beta=0.5))


def of_a_sum(call, rows, weight, bias):
    return tanh_form(call, call(aten.add.Tensor, call(aten.mm.default, rows, weight), bias))


@pytest.mark.parametrize(("build", "inputs"), [
    (followed(addmm, exact), FORMS["addmm"]), (followed(linear, exact), FORMS["linear"]),
    (followed(addmm, relu), FORMS["addmm"]),
    (another_user, FORMS["addmm"]), (another_user_of_its_dims, {**FORMS["addmm"], "rows": ("batch", "sequence", 8)}),
    (handed_out, FORMS["linear"]),
    (without_bias, FORMS["linear"]), (mm, FORMS["addmm"]), (with_a_factor, FORMS["addmm"]), (of_a_sum, FORMS["addmm"]),
    # A bias for each row, and one number.
    (followed(addmm), {**FORMS["addmm"], "rows": (5, 8), "bias": (5, 16)}),
    (followed(addmm), {**FORMS["addmm"], "bias": (1,)}),
    # One row, one term, one column.
    (followed(addmm), {**FORMS["addmm"], "rows": (1, 8)}), (followed(linear), {**FORMS["linear"], "x": (1, 1, 8)}),
    (followed(linear), {**FORMS["linear"], "x": (8,)}),
    (followed(addmm), {"rows": ("rows", 1), "weight": (1, 16), "bias": (16,)}),
    (followed(linear), {**FORMS["linear"], "weight": (1, 8), "bias": (1,)}),
])
def test_other_products_stay(build, inputs):
    before, after = activated(inputs, build)
    assert nodes_of(after) == nodes_of(before)


def test_float32_stays():
    before, after = activated(FORMS["addmm"], followed(addmm), "float32")
    assert nodes_of(after) == nodes_of(before)
