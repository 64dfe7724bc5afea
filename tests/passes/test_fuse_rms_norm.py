"""A norm that is written out becomes one node, if it is that norm."""

import pytest
import torch
from modcompile.passes.fuse_rms_norm import FuseRmsNorm
from tiny import assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten
from tolerances import TOLERANCES

aten = torch.ops.aten
EAGER = TOLERANCES["eager"][torch.float32]
X = {"x": (3, 63, 8)}
WEIGHTS = {"weight": randn(8, seed=1), "square": randn(8, 8, seed=2)}
FUSED = ["aten.rms_norm.default"]


def square(call, x):
    return call(aten.pow.Tensor_Scalar, x, 2)


def normalised(call, x, squared=square, dims=(-1,), keep=True, eps=1e-6, swapped=False):
    moment = call(aten.mean.dim, squared(call, x), list(dims), keep)
    factor = call(aten.rsqrt.default, call(aten.add.Tensor, moment, eps))
    return call(aten.mul.Tensor, *((factor, x) if swapped else (x, factor)))


def weighted(call, value, swapped=False):
    weight = call.tensor("weight")
    return call(aten.mul.Tensor, *((value, weight) if swapped else (weight, value)))


def fused(build, inputs=X, shape=(3, 63, 8)):
    """What a graph calls after the pass, which keeps its numbers."""
    before, after, _ = rewritten(FuseRmsNorm(), lambda: graph_of(inputs, build, WEIGHTS))
    assert_same(before, after, randn(*shape), tolerance=EAGER)
    return nodes_of(after)


def test_golden():
    before, after, _ = rewritten(FuseRmsNorm(), lambda: graph_of(
        {"x": ("batch", "sequence", 8)}, lambda call, x: weighted(call, normalised(call, x)), WEIGHTS))
    check_rewrite("fuse_rms_norm", before, after)


@pytest.mark.parametrize("squared", [square, lambda call, x: call(aten.mul.Tensor, x, x)])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("dims", [(-1,), (2,)])
def test_case_1_the_square_and_the_sides_of_products(squared, swapped, dims):
    assert fused(lambda call, x: weighted(call, normalised(call, x, squared, dims, swapped=swapped), swapped)) == FUSED


def test_case_2_without_a_weight():
    assert fused(lambda call, x: call(aten.neg.default, normalised(call, x))) == [*FUSED, "aten.neg.default"]


def test_case_2_a_product_with_something_else_stays():
    def build(call, x):
        return call(aten.mul.Tensor, normalised(call, x), call(aten.sigmoid.default, x))

    assert fused(build) == [*FUSED, "aten.sigmoid.default", "aten.mul.Tensor"]


def test_case_2_a_number_is_no_weight():
    assert fused(lambda call, x: call(aten.mul.Tensor, normalised(call, x), 2.0)) == [*FUSED, "aten.mul.Tensor"]


def test_case_2_a_value_that_is_read_twice_has_its_weight_outside():
    def build(call, x):
        value = normalised(call, x)
        return weighted(call, value), value

    assert fused(build) == [*FUSED, "aten.mul.Tensor"]


def test_a_weight_that_is_computed():
    """One plus what is trained."""
    def build(call, x):
        weight = call(aten.add.Tensor, call.tensor("weight"), 1.0)
        return call(aten.mul.Tensor, normalised(call, x), weight)

    assert fused(build) == ["aten.add.Tensor", *FUSED]


def test_the_epsilon_is_the_norms_own():
    def build(call, x):
        return normalised(call, x, eps=0.5), normalised(call, x, eps=1)

    assert fused(build) == FUSED * 2


def moment_is_read_again(call, x):
    factor = call(aten.rsqrt.default, call(aten.add.Tensor, call(aten.mean.dim, square(call, x), [-1], True), 1e-6))
    return call(aten.mul.Tensor, x, factor), factor


def without_epsilon(call, x):
    return call(aten.mul.Tensor, x, call(aten.rsqrt.default, call(aten.mean.dim, square(call, x), [-1], True)))


def epsilon_that_is_computed(call, x):
    return normalised(call, x, eps=call(aten.select.int, call.tensor("weight"), 0, 2))


def of_another_value(call, x):
    moment = call(aten.mean.dim, square(call, call(aten.sigmoid.default, x)), [-1], True)
    return call(aten.mul.Tensor, x, call(aten.rsqrt.default, call(aten.add.Tensor, moment, 1e-6)))


def product_of_two(call, x):
    return normalised(call, x, lambda call, x: call(aten.mul.Tensor, x, call(aten.sigmoid.default, x)))


@pytest.mark.parametrize("build", [
    moment_is_read_again, without_epsilon, of_another_value,
    lambda call, x: normalised(call, x, eps=99.0, squared=lambda call, x: call(aten.pow.Tensor_Scalar, x, 3)),
    lambda call, x: normalised(call, x, dims=(1,)),
    lambda call, x: normalised(call, x, dims=(1, 2)),
    lambda call, x: normalised(call, x, dims=(0, 1, 2), keep=False),
])
def test_what_is_another_norm_stays(build):
    nodes = fused(build)
    assert "aten.rsqrt.default" in nodes and not set(FUSED) & set(nodes)


@pytest.mark.parametrize("build", [epsilon_that_is_computed, product_of_two])
def test_what_may_be_negative_under_the_root_stays(build):
    _, after, _ = rewritten(FuseRmsNorm(), lambda: graph_of(X, build, {"weight": WEIGHTS["weight"].abs()}))
    assert "aten.rsqrt.default" in nodes_of(after)


def test_a_width_that_varies_stays():
    assert "aten.rsqrt.default" in fused(normalised, {"x": ("batch", "width")}, (3, 63))
