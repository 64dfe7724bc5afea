"""The figures against a plain recount, and the page as an HTML parser and a browser see it."""

import html.parser
import json

import pytest
import torch
from browser import Browser, chromium
from tiny import Mlp, randomise_routers
from torch import nn

from modcompile import MoDConfig, convert, trace_routing
from modcompile.errors import UsageError
from modcompile.insight import Passage, measure, read_passages, render, write_page
from modcompile.insight.graph import picture_of
from modcompile.insight.passages import KINDS, kind_of

WORDS, WIDTH = 41, 8
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"


class Layer(nn.Module):
    """Attention under a mask [B, 1, S, S], and an MLP."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.mlp = Mlp(WIDTH)

    def forward(self, x, keep):
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        return self.mlp(x + nn.functional.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).flatten(2))


class Reader(nn.Module):
    """Words in, logits of words or hidden states out."""

    def __init__(self, causal, head):
        super().__init__()
        self.words, self.causal = nn.Embedding(WORDS, WIDTH), causal
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(WIDTH, WORDS) if head else nn.Identity()

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids)
        keep = (attention_mask != 0)[:, None, None, :]
        if self.causal:
            at = torch.arange(input_ids.shape[1])
            keep = keep & (at[None, :] <= at[:, None])
        for layer in self.layers:
            x = layer(x, keep)
        return self.head(x)


def routed(causal=True, head=True, **options):
    torch.manual_seed(0)
    ids = torch.randint(WORDS, (2, 9))
    config = MoDConfig(**{"blocks": (1, 2), "capacity_ratio": 0.25, "gate": "sigmoid"} | options)
    return randomise_routers(convert(Reader(causal, head).eval(), (ids, torch.ones_like(ids)), config))


def passages(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [Passage(tuple(torch.randint(WORDS, (rows,), generator=generator).tolist()),
                    tuple(EVIL if i == 1 else f" w{i}" for i in range(rows)),
                    tuple(KINDS[i % 3] for i in range(rows))) for rows in lengths]


@pytest.fixture(scope="module")
def causal():
    mod = routed()
    return mod, measure(mod, passages(16, 16, 16), batch=2)


@pytest.fixture(scope="module")
def page(causal):
    return render(*causal, model="a <b>model</b>", text="text & more")


def test_kinds():
    assert [kind_of(*case) for case in [("é", True), ("ing", False), (" x", False), ("½3", True), ("--", False),
                                        ("=", False), (" \n", False), ("x1", True)]] == [
        "word, its start", "word, a later part", "word, its start", "number", "punctuation", "symbol", "space", "mixed"]


def test_the_choice_is_the_trace(causal):
    mod, insight = causal
    ids = torch.tensor([item.passage.ids for item in insight.passages])
    with trace_routing(mod) as trace, torch.no_grad():
        logits = mod(ids, torch.ones_like(ids))
    for i, path in enumerate(mod.routers):
        for b, item in enumerate(insight.passages):
            assert item.taken[i].tolist() == trace[path].taken()[b].tolist()
            assert torch.allclose(torch.tensor(item.logits[i]), trace[path].logits[b], atol=1e-5)
    assert insight.overall.rate == pytest.approx(0.25)
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert {v.name: v.loss for v in insight.variants}["routed"] == pytest.approx(expected.item(), abs=1e-5)
    entropy = torch.distributions.Categorical(logits=logits[0]).entropy()
    assert torch.allclose(torch.tensor(insight.passages[0].entropy), entropy, atol=1e-5)


def test_groups_share_out_every_row(causal):
    _, insight = causal
    for groups in (insight.by_kind, insight.by_frequency, insight.by_position, insight.by_entropy):
        assert sum(group.rows for group in groups) == 48
        assert sum(group.rate * group.rows for group in groups) == pytest.approx(48 * insight.overall.rate)


def test_agreement_is_counted(causal):
    _, insight = causal
    for i, item in enumerate(insight.agreement):
        same = [(logit > 0) == taken for p in insight.passages
                for logit, taken in zip(p.logits[i], p.taken[i], strict=True)]
        assert item.sign == pytest.approx(sum(same) / 48)
        assert (item.constant, item.flat) == (0.75, False)
        assert 0 <= item.threshold <= 1


def test_untrained_routers_are_called_so():
    mod = routed()
    with torch.no_grad():
        for router in mod.routers.values():
            router.weight.zero_()
    insight = measure(mod, passages(16, 16))
    assert all(item.flat and not item.sign_decides for item in insight.agreement)
    assert "every row has the same logit" in " ".join(render(mod, insight, model="m", text="t").split())


def test_padding_is_in_no_figure():
    mod = routed(causal=False, head=False, attend_to="all")
    insight = measure(mod, passages(16, 3), batch=2)
    assert (insight.overall.rows, insight.padding) == (19, pytest.approx(13 / 32))
    assert [item.taken.shape for item in insight.passages] == [(2, 16), (2, 3)]
    # Of 4 slots the short passage fills 3.
    assert [block.empty for block in insight.routed] == [pytest.approx(1 / 8)] * 2
    assert "no logits" in insight.by_entropy and insight.no_loss == insight.by_entropy
    assert "Left out: the model returns no logits" in render(mod, insight, model="m", text="t")


def test_a_model_that_looks_ahead_has_no_loss():
    insight = measure(routed(causal=False), passages(16))
    assert "later" in insight.no_loss
    assert all(variant.loss is None for variant in insight.variants) and not isinstance(insight.by_entropy, str)


def test_routed_sequences():
    mod = routed(axis="sequence", capacity_ratio=0.5)
    insight = measure(mod, passages(9, 9), batch=2)
    assert insight.overall.rate == 0.5
    assert {tuple(set(row)) for item in insight.passages for row in item.taken.tolist()} == {(True,), (False,)}
    assert "[B, S, D]" in render(mod, insight, model="m", text="t")


@pytest.mark.parametrize("made, message", [
    (lambda: measure(routed(), []), "nothing to read"),
    (lambda: measure(routed(blocks=("layers.0",), dropped=("layers.0",)), passages(9)), "routes no block"),
    (lambda: measure(routed(), [Passage((WORDS,), ("x",), ("symbol",))]), "vocabulary"),
    (lambda: read_passages("some text", object()), "does not say which characters"),
])
def test_errors(made, message):
    with pytest.raises(UsageError, match=message):
        made()


def test_a_block_that_is_left_out_takes_no_rows():
    insight = measure(routed(blocks=("layers.1",), dropped=("layers.2",)), passages(16))
    facts = {block.path: block for block in insight.blocks}
    assert (facts["layers.2"].rate, facts["layers.2"].capacity, facts["layers.2"].flops) == (0.0, 0, 0)
    assert facts["layers.0"].rate == 1 and facts["layers.0"].capacity == 16 and 0 < facts["layers.1"].rate < 1


def test_rows_that_are_no_words_rows():
    """A row more than words, as a class token makes it."""
    class Classified(Reader):
        def forward(self, input_ids, attention_mask):
            x = self.words(input_ids)
            x = torch.cat([x.mean(1, keepdim=True), x], 1)
            keep = torch.cat([attention_mask[:, :1], attention_mask], 1)[:, None, None, :] != 0
            for layer in self.layers:
                x = layer(x, keep)
            return self.head(x[:, 0])

    ids = torch.randint(WORDS, (2, 9))
    mod = randomise_routers(convert(Classified(False, True).eval(), (ids, torch.ones_like(ids)),
                                    MoDConfig(blocks=(1,), capacity_ratio=0.5)))
    (block,) = mod.routed_blocks
    at = block.at({"sequence": 8})
    assert (block.rows, at.rows, at.capacity) == ("sequence + 1", 9, 5)
    with pytest.raises(UsageError, match=r"(?s)not the words'.*sequence \+ 1 rows in block layers\.1"):
        measure(mod, passages(9))


def test_the_mode_of_the_model_is_put_back():
    mod = routed().train()
    measure(mod, passages(9))
    assert mod.training


def test_the_figures_are_json(causal):
    assert json.loads(json.dumps(causal[1].to_dict()))["tokens"] == 48


@pytest.mark.parametrize("attend_to, kinds", [
    ("chosen", ["router", "route", "gather rows", "block", "merge rows"]),
    ("all", ["router", "route", "block", "merge rows"])])
def test_the_picture_is_of_the_graph(attend_to, kinds):
    mod = routed(attend_to=attend_to)
    picture = picture_of(mod)
    assert [step.kind for step in picture.steps] == kinds
    assert [step.shape for step in picture.steps if step.kind == "block"] == ["[B, K, D]"]
    assert len(picture.before) == len(picture.after) == 4 and picture.nodes_after > picture.nodes_before


class Elements(html.parser.HTMLParser):
    """Every element with its attributes, and how often each text comes."""

    def __init__(self, page):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_holds_what_was_measured(page):
    elements = Elements(page)
    tags = [tag for tag, _ in elements.found]
    assert ("html", {"lang": "en"}) in elements.found and tags.count("title") >= 1
    spans = [attributes for tag, attributes in elements.found if tag == "span" and "--h" in attributes.get("style", "")]
    assert len(spans) == 48
    assert tags.count("h1") == 1 and all(attributes.get("scope") for tag, attributes in elements.found if tag == "th")
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_no_text_is_markup(page):
    elements = Elements(page)
    assert [attributes for tag, attributes in elements.found if tag == "script"] == [
        {"type": "application/json", "id": "data"}, {}]
    assert not [tag for tag, _ in elements.found if tag in ("img", "b>", "iframe")]
    assert elements.texts.count(EVIL) == 3


def test_the_page_names_no_address(page):
    assert "http://" not in page and "https://" not in page and "@import" not in page and "url(" not in page


@pytest.fixture(scope="module")
def browser():
    chromium()
    with Browser() as opened:
        yield opened


@pytest.mark.browser
@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)])
def test_a_reader_points_and_presses_keys(browser, causal, tmp_path, width, dark):
    path = write_page(tmp_path / "page.html", *causal, model="a <b>model</b>", text="text")
    tab = browser.open(path, width=width, dark=dark)
    tab.point(".text span:nth-child(4)")
    assert tab.run("document.querySelector('#piece').textContent") == "␣w3"
    tab.run("document.querySelector('.text').focus()")
    tab.press("ArrowRight")
    tab.press("ArrowDown")
    item = causal[1].passages[0]
    said = tab.run("document.querySelector('#said').textContent")
    assert said == (f"␣w4, position 4, block 2: logit {item.logits[1][4]:.3f}, "
                    f"{'chosen' if item.taken[1][4] else 'passes by'}")
    marks = tab.run("[...document.querySelectorAll('#logits .mark')].map(e => e.textContent).join('')")
    assert marks == "".join("○●"[int(value)] for value in item.taken[:, 4])
    tab.run("document.querySelector('#shade').value = '1';"
            "document.querySelector('#shade').dispatchEvent(new Event('change'))")
    assert tab.run("document.querySelectorAll('.passage:not([hidden]) .text .taken').length") == item.taken[1].sum()
    assert tab.run("document.title") == "Routing of a <b>model</b> on text"
    # Nothing was loaded, nothing went wrong, and nothing sticks out.
    assert tab.requests() == [path.as_uri()] and tab.complaints() == []
    assert tab.run("document.documentElement.scrollWidth") == width


@pytest.mark.browser
def test_without_scripts_every_passage_is_there(browser, causal, tmp_path):
    tab = browser.open(write_page(tmp_path / "page.html", *causal, model="m", text="t"), scripts=False)
    layout = json.dumps(tab.send("DOM.getDocument", depth=-1)["root"])
    # What only a script fills stays hidden.
    assert (layout.count('"data-passage"'), layout.count('"hidden", ""')) == (3, 2)
