"""Masks that are causal, or true everywhere, leave attention; every other stays, and numbers do not change."""

import operator

import pytest
import torch
import torch.fx
from families import family
from modcompile.passes.simplify_masks import SimplifyMasks
from tiny import (
    Attention,
    Stack,
    assert_same,
    check_rewrite,
    graph_of,
    nodes_of,
    outlined,
    randn,
    randomise_routers,
    rewritten,
)
from torch import nn
from torch.nn import functional

import modcompile as mc
from modcompile.capture import capture
from modcompile.export.flatten import flatten
from modcompile.export.onnx_file import lowering_passes
from modcompile.mask_rules import follow
from modcompile.pass_manager import PassManager, PassResult
from modcompile.variants import oracle_model

# B batch  S rows  K capacity  H heads  d head dim

B, S, K = 3, 63, 5
aten, mod = torch.ops.aten, torch.ops.modcompile
SDPA = aten.scaled_dot_product_attention.default
HEADS = ("batch", 2, "sequence", 4)
CHOSEN = ("batch", 2, K, 4)
ALL_ROWS = {"query": HEADS, "key": HEADS, "value": HEADS}
CHOSEN_ROWS = {"query": CHOSEN, "key": CHOSEN, "value": CHOSEN, "logits": ("batch", "sequence")}
STAYS = ["the mask is not known to be causal, or true everywhere, at all sizes"]


def simplified(build, inputs=ALL_ROWS, **options):
    """The graph before and after, what attention takes beside its operands, and the reasons for what stayed."""
    before, after, skips = rewritten(SimplifyMasks(), lambda: graph_of(inputs, build, **options))
    return before, after, [node.args[3:] for node in after.graph.find_nodes(op="call_function", target=SDPA)], skips


def inputs_of(rows=S, **shapes):
    """Random numbers for the inputs above, B sequences of S rows."""
    sizes = {"batch": B, "sequence": rows}
    return [randn(*(sizes.get(dim, dim) for dim in shape), seed=i) for i, shape in enumerate(shapes.values())]


def numbers(call, like, dim, other=0):
    """The numbers of the rows along a dim of a value: [S, 1] to compare from the left, [S] from the right."""
    count = call(aten.arange.default, call(aten.sym_size.int, like, dim))
    count = call(aten.add.Tensor, count, other) if other else count
    return count


def causal(call, like, compare=aten.le.Tensor, shift=0):
    """[B, 1, S, S]: key <= query + shift, as transformers writes it."""
    batch = call(aten.sym_size.int, like, 0)
    queries = call(aten.unsqueeze.default, numbers(call, like, 2, shift), 1)
    keep = call(compare, numbers(call, like, 2), queries)
    keep = call(aten.unsqueeze.default, call(aten.unsqueeze.default, keep, 0), 0)
    return call(aten.expand.default, keep, [batch, -1, -1, -1])


def at(call, mask, positions, dims=(2, 3)):
    """A mask gathered at positions along dims, as route-blocks does it."""
    for dim in dims:
        mask = call(aten.transpose.int, mask, 1, dim)
        mask = call(aten.transpose.int, call(mod.gather_rows.default, mask, positions), 1, dim)
    return mask


def positions_of(call, logits, capacity=K):
    return call(operator.getitem, call(mod.route.default, logits, None, capacity), 0)


def mask_of_all(call, logits):
    """[B, 1, S, S], causal, for the rows that the logits score."""
    like = call(aten.unsqueeze.default, call(aten.unsqueeze.default, logits, 1), 3)
    return causal(call, like)


def test_golden():
    def build(call, query, key, value, logits):
        mask = at(call, mask_of_all(call, logits), positions_of(call, logits))
        return call(SDPA, query, key, value, mask, scale=0.5)

    before, after, taken, skips = simplified(build, CHOSEN_ROWS)
    check_rewrite("simplify_masks", before, after)
    assert taken == [(None, 0.0, True)] and not skips
    assert_same(before, after, *inputs_of(**CHOSEN_ROWS), tolerance=1e-6)


def test_a_causal_mask_of_all_rows():
    def build(call, query, key, value):
        return call(SDPA, query, key, value, causal(call, query), 0.1, False, scale=0.3, enable_gqa=False)

    _, after, taken, _ = simplified(build)
    assert taken == [(None, 0.1, True)]
    assert after.graph.find_nodes(op="call_function", target=SDPA)[0].kwargs == {"scale": 0.3, "enable_gqa": False}
    assert nodes_of(after) == [str(SDPA)]


@pytest.mark.parametrize(("compare", "shift", "is_causal"), [
    (aten.le.Tensor, 0, True),
    (aten.lt.Tensor, 1, True),
    (aten.lt.Tensor, 0, False),
    (aten.le.Tensor, 1, False),
    (aten.ge.Tensor, 0, False),
    (aten.gt.Tensor, 0, False),
    (aten.eq.Tensor, 0, False),
])
def test_only_the_diagonal_and_below_is_causal(compare, shift, is_causal):
    def build(call, query, key, value):
        return call(SDPA, query, key, value, causal(call, query, compare, shift))

    before, after, taken, skips = simplified(build)
    assert (taken == [(None, 0.0, True)], skips) == (is_causal, [] if is_causal else STAYS)
    inputs = inputs_of(**ALL_ROWS)
    assert_same(before, after, *inputs, tolerance=1e-6)


def test_a_mask_that_hides_nothing_goes():
    def build(call, query, key, value):
        row = call(aten.unsqueeze.default, numbers(call, query, 2), 1)
        ones = call(aten.new_ones.default, row, [], dtype=torch.bool)
        mask = call(aten.logical_and.default, ones, call(aten.ge.Scalar, row, 0))
        mask = call(aten.expand.default, mask, [call(aten.sym_size.int, query, 2)] * 2)
        return call(SDPA, query, key, value, mask)

    before, after, taken, skips = simplified(build)
    assert taken == [(None, 0.0, False)] and not skips
    assert_same(before, after, *inputs_of(**ALL_ROWS), tolerance=1e-6)


def test_a_mask_with_other_conditions_stays():
    def build(call, query, key, value, padding):
        valid = call(aten.unsqueeze.default, call(aten.unsqueeze.default, padding, 1), 1)
        return call(SDPA, query, key, value, call(aten.__and__.Tensor, causal(call, query), valid))

    *_, taken, skips = simplified(build, {**ALL_ROWS, "padding": ("batch", "sequence")}, dtypes={"padding": "bool"})
    assert len(taken[0]) == 1 and skips == STAYS


def test_a_condition_that_always_holds_goes_from_a_mask_of_the_keys():
    """As encoders' masks are traced: rows at least 0, and keys that are valid."""
    def build(call, query, key, value, padding):
        row = call(aten.unsqueeze.default, numbers(call, query, 2), 1)
        rows = call(aten.unsqueeze.default, call(aten.unsqueeze.default, row, 0), 0)  # [1, 1, S, 1]
        valid = call(aten.unsqueeze.default, call(aten.unsqueeze.default, padding, 1), 1)  # [B, 1, 1, S]
        return call(SDPA, query, key, value, call(aten.__and__.Tensor, call(aten.ge.Scalar, rows, 0), valid))

    before, after, taken, skips = simplified(build, {**ALL_ROWS, "padding": ("batch", "sequence")},
                                             dtypes={"padding": "bool"})
    assert len(taken[0]) == 1 and skips == STAYS
    assert tuple(taken[0][0].meta["val"].shape[1:3]) == (1, 1) and str(aten.ge.Scalar) not in nodes_of(after)
    padding = torch.arange(S) < torch.tensor([[S], [5], [1]])
    assert_same(before, after, *inputs_of(**ALL_ROWS), padding, tolerance=1e-6)


@pytest.mark.parametrize(("rows", "is_causal"), [("sequence", False), (9, False), (8, True)])
def test_a_window_counts_unless_it_holds_all_rows(rows, is_causal):
    shape = ("batch", 2, rows, 4)

    def build(call, query, key, value):
        queries = call(aten.unsqueeze.default, numbers(call, query, 2), 1)
        near = call(aten.gt.Tensor, numbers(call, query, 2), call(aten.sub.Tensor, queries, 8))
        return call(SDPA, query, key, value, call(aten.__and__.Tensor, causal(call, query), near))

    before, after, taken, _ = simplified(build, dict.fromkeys(ALL_ROWS, shape))
    assert (taken == [(None, 0.0, True)]) is is_causal
    if isinstance(rows, int):
        assert_same(before, after, *inputs_of(rows, **dict.fromkeys(ALL_ROWS, shape)), tolerance=1e-6)


def packed(call, like, ids):
    """Transformers' test for sequences packed in one row: where the numbers of positions jump, another one begins."""
    first = call(aten.slice.Tensor, ids, 1, 0, 1)
    jumps = call(aten.diff.default, ids, 1, -1, call(aten.sub.Tensor, first, 1))
    part = call(aten.cumsum.default, call(aten.ne.Scalar, jumps, 1), -1)
    batch = call(aten.arange.default, call(aten.sym_size.int, like, 0))
    for _ in range(3):
        batch = call(aten.unsqueeze.default, batch, -1)
    queries = call(aten.unsqueeze.default, numbers(call, like, 2), 1)
    rows = [call(aten.index.Tensor, part, [batch, index]) for index in (queries, numbers(call, like, 2))]
    return call(aten.__and__.Tensor, causal(call, like), call(aten.eq.Tensor, *rows))


@pytest.mark.parametrize("given", [False, True], ids=["made from sizes", "given"])
def test_packed_sequences(given):
    def build(call, query, key, value, *ids):
        made = call(aten.expand.default, call(aten.unsqueeze.default, numbers(call, query, 2, 7), 0),
                    [call(aten.sym_size.int, query, 0), -1])
        return call(SDPA, query, key, value, packed(call, query, ids[0] if given else made))

    ids = {"ids": ("batch", "sequence")} if given else {}
    before, after, taken, _ = simplified(build, {**ALL_ROWS, **ids}, dtypes={"ids": "int64"})
    assert (taken == [(None, 0.0, True)]) is not given
    if not given:
        assert_same(before, after, *inputs_of(**ALL_ROWS), tolerance=1e-6)


def one_dim(call, logits):
    return at(call, mask_of_all(call, logits), positions_of(call, logits), dims=(2,))


def two_routes(call, logits):
    other = positions_of(call, call(aten.neg.default, logits))
    return at(call, at(call, mask_of_all(call, logits), positions_of(call, logits), (2,)), other, (3,))


def given_positions(call, logits):
    positions = call(aten.to.dtype, call(aten.slice.Tensor, logits, 1, 0, K), torch.int64)
    return at(call, mask_of_all(call, logits), positions)


def filled_slots(call, logits):
    filled = call(operator.getitem, call(mod.route.default, logits, None, K), 1)
    return at(call, mask_of_all(call, logits), call(aten.to.dtype, filled, torch.int64))


def turned(call, logits):
    return call(aten.transpose.int, at(call, mask_of_all(call, logits), positions_of(call, logits)), 2, 3)


def sliced_later(call, logits):
    mask = at(call, mask_of_all(call, logits), positions_of(call, logits, K + 1), dims=(2,))
    return at(call, call(aten.slice.Tensor, mask, 2, 1), positions_of(call, logits), dims=(3,))


def one_key(call, logits):
    mask = at(call, mask_of_all(call, logits), positions_of(call, logits), dims=(2,))
    return at(call, mask, positions_of(call, logits, 1), dims=(3,))


def batch_moved(call, logits):
    """Away from dim 0, it is not known whose positions they are."""
    mask = at(call, mask_of_all(call, logits), positions_of(call, logits), dims=(2,))
    mask = call(aten.transpose.int, call(aten.transpose.int, mask, 0, 2), 0, 2)
    return at(call, mask, positions_of(call, logits), dims=(3,))


@pytest.mark.parametrize("mask", [one_dim, two_routes, given_positions, filled_slots, turned, sliced_later, one_key,
                                  batch_moved], ids=lambda mask: mask.__name__)
def test_gathered_masks_that_stay(mask):
    columns = "sequence" if mask is one_dim else K
    inputs = {**CHOSEN_ROWS, "key": ("batch", 2, columns, 4), "value": ("batch", 2, columns, 4)}
    *_, taken, skips = simplified(lambda call, q, k, v, logits: call(SDPA, q, k, v, mask(call, logits)), inputs)
    assert len(taken[0]) == 1 and skips == STAYS


def test_the_first_rows_of_a_causal_mask():
    def build(call, query, key, value, logits):
        mask = mask_of_all(call, logits)
        for dim in (2, 3):
            mask = call(aten.slice.Tensor, mask, dim, 0, K)
        return call(SDPA, query, key, value, mask)

    before, after, taken, _ = simplified(build, CHOSEN_ROWS)
    assert taken == [(None, 0.0, True)]
    assert_same(before, after, *inputs_of(**CHOSEN_ROWS), tolerance=1e-6)


def test_a_mask_without_a_batch_is_looked_up():
    """As route-blocks gathers a side input [1, 1, S, S]."""
    def build(call, query, key, value, logits):
        rows = numbers(call, logits, 1)
        keep = call(aten.le.Tensor, rows, call(aten.unsqueeze.default, rows, 1))
        mask = call(aten.unsqueeze.default, call(aten.unsqueeze.default, keep, 0), 0)
        positions = positions_of(call, logits)
        # Along dim 2: [1, 1, S, S] -> [S, 1, S] -> [B, K, 1, S] -> [B, 1, K, S]
        table = call(aten.transpose.int, call(aten.select.int, mask, 0, 0), 0, 1)
        mask = call(aten.transpose.int, call(aten.index.Tensor, table, [positions]), 1, 2)
        return call(SDPA, query, key, value, at(call, mask, positions, dims=(3,)))

    before, after, taken, _ = simplified(build, CHOSEN_ROWS)
    assert taken == [(None, 0.0, True)]
    assert_same(before, after, *inputs_of(**CHOSEN_ROWS), tolerance=1e-6)


def test_what_has_no_mask_is_left_alone():
    graph = outlined(Stack(Attention(causal=True), Attention()), {"hidden": torch.randn(2, 5, 8)}, [])
    manager = PassManager([SimplifyMasks()])
    manager(graph.graph_module)
    assert not manager.ran[0]["modified"] and not manager.skips["simplify-masks"]


def unpadded(name, batch, rows, seed=1):
    inputs = family(name).inputs(batch, rows, None, seed=seed)
    inputs.pop("attention_mask", None)
    return inputs


def masks_left(graph_module):
    """What each attention is left with: a mask, the causal flag, or neither."""
    PassManager([SimplifyMasks()])(graph_module)
    taken = [node.args for node in graph_module.graph.find_nodes(op="call_function", target=SDPA)]
    return ["mask" if args[3:4] not in ((), (None,)) else "causal" if args[5:] == (True,) else "none" for args in taken]


@pytest.mark.parametrize(("name", "left"), [("llama", "causal"), ("bert", "none")])
def test_families_without_padding(name, left):
    graph = capture(family(name).build(), unpadded(name, 2, 17))
    inputs = list(unpadded(name, 3, 33, seed=2).values())
    expected = graph.run_graph(inputs)
    assert masks_left(graph.graph_module) == [left] * 4
    torch.testing.assert_close(graph.run_graph(inputs), expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def routed():
    """Routed models by family and what rows attend to, each converted once."""
    made = {}

    def convert(name, attend_to="chosen"):
        if (name, attend_to) not in made:
            config = mc.MoDConfig(capacity_ratio=0.25, attend_to=attend_to)
            made[name, attend_to] = randomise_routers(mc.convert(family(name).build(), unpadded(name, 2, 17), config))
        return made[name, attend_to]

    return convert


@pytest.mark.parametrize(("attend_to", "left"), [("chosen", "causal"), ("all", "mask")])
def test_routed_blocks(routed, attend_to, left):
    model, inputs = routed("gpt2", attend_to), list(unpadded("gpt2", 3, 33, seed=2).values())
    expected = model.run_graph(inputs)
    for shapes in (None, {"input_ids": (3, 33)}):
        flat = flatten(model, shapes)
        assert masks_left(flat) == ["causal", left] * 2
        with torch.no_grad():
            torch.testing.assert_close(flat(*inputs), expected, rtol=0, atol=1e-6)
    # What the routed model is compared with has the same masks.
    assert masks_left(flatten(oracle_model(model))) == ["causal", left] * 2


class _Elements(torch.fx.Interpreter):
    """Compares what is known of every value with its elements."""

    def __init__(self, graph_module):
        super().__init__(graph_module, garbage_collect_values=False)
        self.known, self.compared = follow(graph_module.graph), set()

    def run_node(self, node):
        value = super().run_node(node)
        self.env[node] = value
        if node in self.known:
            found = self.known[node]
            if isinstance(found, tuple):
                true = torch.ones(value.shape, dtype=torch.bool)
                expected = torch.stack([true, *(self._elements(each, value.shape) >= 0 for each in found)]).all(0)
            else:
                expected = self._elements(found, value.shape)
            assert torch.equal(value, expected.to(value.dtype)), node.format_node()
            self.compared.add(node.target)
        return value

    def _elements(self, found, shape):
        total = torch.full(shape, found.constant)
        for (dim, positions), factor in found.factors.items():
            sizes = [1] * len(shape)
            sizes[dim] = shape[dim]
            if positions is None:
                place = torch.arange(shape[dim])
            else:
                sizes[0], place = shape[0], self.env[positions]
            total = total + factor * place.view(sizes)
        return total


@pytest.mark.parametrize("name", ["gpt2", pytest.param("gemma3", marks=pytest.mark.long)])
def test_what_is_known_of_elements_is_true(monkeypatch, name):
    """Packed sequences, and windows: every element that is followed, at sizes that are known and at any."""
    inputs = unpadded(name, 3, 33, seed=2)
    with monkeypatch.context() as patch:
        # As it was traced: a capture simplifies masks.
        patch.setattr(SimplifyMasks, "call", lambda _, graph_module: PassResult(graph_module, False))
        model = mc.convert(family(name).build(), unpadded(name, 2, 17), mc.MoDConfig(capacity_ratio=0.25))
    randomise_routers(model)
    for shapes in (None, {key: value.shape for key, value in inputs.items()}):
        elements = _Elements(flatten(model, shapes))
        with torch.no_grad():
            elements.run(*inputs.values())
        assert {aten.arange.default, aten.index.Tensor, operator.getitem, mod.gather_rows.default} <= elements.compared


# Masks that models make


class Masked(Attention):
    """Attention under a mask that a function of the number of rows makes; written out, or one node."""

    def __init__(self, mask, written=False):
        super().__init__()
        self.mask, self.written = mask, written

    def forward(self, hidden):
        parts = (self.query(hidden), self.key(hidden), self.value(hidden))
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts)
        mask = self.mask(hidden.shape[1])
        if not self.written:
            mixed = functional.scaled_dot_product_attention(query, key, value, mask)
        elif mask.dtype == torch.bool:
            mixed = (query @ key.transpose(-1, -2) / 2).masked_fill(~mask, -torch.inf).softmax(-1) @ value
        else:
            mixed = (query @ key.transpose(-1, -2) / 2 + mask).softmax(-1) @ value
        return hidden + self.out(mixed.transpose(1, 2).flatten(2))


def square(rows, value=1.0):
    return torch.full((rows, rows), value)


CAUSAL = [
    lambda rows: square(rows, True).tril(),
    lambda rows: ~square(rows, True).triu(1),
    lambda rows: torch.logical_not(torch.arange(rows) > torch.arange(rows)[:, None]),
    lambda rows: square(rows).tril() > 0,
    lambda rows: square(rows, 1).triu(diagonal=1) == 0,
    lambda rows: square(rows).tril().bool()[None, None],
    nn.Transformer.generate_square_subsequent_mask,
    lambda rows: square(rows, -1e9).triu(1).expand(2, -1, -1),
    lambda rows: (1.0 - square(rows).tril()) * torch.finfo(torch.float32).min,
    lambda rows: torch.zeros(rows, rows).masked_fill(square(rows, True).triu(1), -torch.inf),
    lambda rows: square(rows, -1e9).masked_fill(square(rows, True).tril(), 0.0),
    lambda rows: torch.where(square(rows).tril() != 0, 0.0, -torch.inf),
    lambda rows: torch.where(square(rows).triu(1) != 0, square(rows, -1e9), torch.zeros(rows, rows)),
]
OTHER = [
    lambda rows: square(rows, True).tril(1),
    lambda rows: ~square(rows, True).triu(),
    lambda rows: square(rows, True).triu(),
    lambda rows: square(rows, True).tril() & square(rows, True).triu(-3),
    # Ones and zeros that are added leave weight everywhere, as small numbers do.
    lambda rows: square(rows).tril(),
    lambda rows: square(rows, -5.0).triu(1),
    lambda rows: (1.0 - square(rows).tril()) * -5.0,
    lambda rows: (2.0 - square(rows).tril()) * -1e9,
    lambda rows: torch.where(square(rows).tril() > 0, -torch.inf, 0.0).tril(-1),
    lambda rows: torch.zeros(rows, rows).masked_fill(square(rows, True).triu(1), -5.0),
    lambda rows: square(rows, -torch.inf).triu(2),
]


class Beside(Stack):
    """What each layer makes of the same rows."""

    def forward(self, hidden):
        return torch.stack([layer(hidden) for layer in self.layers])


def kinds_of(graph_module):
    return [(node.args[3] is None, node.args[5:]) for node in
            graph_module.graph.find_nodes(op="call_function", target=SDPA)]


def test_triangles_are_causal_when_they_are_captured():
    model = Beside(*map(Masked, CAUSAL))
    graph = capture(model, (randn(2, 5, 8),))
    assert kinds_of(graph.graph_module) == [(True, (True,))] * len(CAUSAL)
    assert (graph(randn(3, S, 8)) - model(randn(3, S, 8))).abs().max() <= 1e-5


def test_other_triangles_stay():
    graph = capture(Beside(*map(Masked, OTHER)), (randn(2, 5, 8),))
    assert not any(without for without, _ in kinds_of(graph.graph_module))


def test_what_is_fused_at_export_is_causal_too():
    """The rows that were chosen are gathered from the masks, and ascend."""
    model = Stack(*(Masked(CAUSAL[place], written=True) for place in (1, 1, 6, 6)))
    mod = randomise_routers(mc.convert(model, (randn(2, 5, 8),), mc.MoDConfig(capacity_ratio=5 / 63)))
    flat = PassManager(lowering_passes(opset=23))(flatten(mod))
    assert kinds_of(flat) == [(True, (True,))] * 4
