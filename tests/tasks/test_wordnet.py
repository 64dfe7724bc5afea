"""Reading WordNet's format, and our own constructions, on a small hierarchy of made-up nouns."""

import itertools

import pytest

from modcompile.errors import UsageError
from modcompile.tasks import Labelled, Question, WordNet, wordnet_entailment, wordnet_questions, wordnet_similarity

LICENCE = "  1 A licence stands here.  \n"
VOWELS = "aeiou"


def line(place, words, above=(), gloss="a made-up thing", pointers=()):
    links = [*(f"@ {id:08d} n 0000" for id in above), *pointers]
    entries = " ".join(f"{word} 0" for word in words)
    return f"{place:08d} 03 n {len(words):02x} {entries} {len(links):03d} {' '.join(links)} | {gloss}  \n"


def written(folder, *lines):
    (folder / "data.noun").write_text(LICENCE + "".join(lines))
    return folder


SMALL = (
    line(100, ["thing"]),
    line(200, ["animal", "beast"], [100], "a living thing", ["~ 00000300 n 0000", "! 00000900 n 0101"]),
    line(300, ["house_cat"], [200], 'a small animal; "the cat said \\"no\\""; "cats; all of them"- A. Nonymous'),
    line(400, ["Rex"], [], "a dog", ["@i 00000200 n 0000", "= 00001740 a 0000"]),
    line(500, ["toy"], [100], "a thing to play with; of children"),
    line(600, ["toy_cat"], [500, 300], "a toy like a cat"),
    line(900, ["plant"], [100]),
)


def test_the_format(tmp_path):
    net = WordNet(written(tmp_path, *SMALL))
    assert list(net.synsets) == [100, 200, 300, 400, 500, 600, 900]
    assert net.synsets[200].words == ("animal", "beast")
    cat = net.synsets[300]
    assert (cat.name, cat.definition) == ("house cat", "a small animal")
    assert cat.examples[-1] == "cats; all of them"
    assert net.synsets[500].definition == "a thing to play with; of children"
    assert net.synsets[400].above == (200,)
    assert net.below == {100: [200, 500, 900], 200: [300, 400], 500: [600], 300: [600]}


def test_distances(tmp_path):
    net = WordNet(written(tmp_path, *SMALL))
    # By the shortest way: 600 is under 100 by 500, and by 300 and 200.
    assert net.ancestors(600) == {600: 0, 500: 1, 300: 1, 100: 2, 200: 2}
    assert (net.depth(100), net.depth(300), net.depth(600)) == (1, 3, 3)
    assert net.similarity(300, 300) == 1
    assert net.similarity(300, 400) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert net.similarity(900, 300) == net.similarity(300, 900) == pytest.approx(2 / (2 + 1 + 2))
    # Of what both are a kind of, the nearest counts: 300, not 100 or 200.
    assert net.similarity(600, 300) == pytest.approx(2 * 3 / (2 * 3 + 1))


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([], "the file has no synsets"),
        (["00000100 03 n 01 thing 0\n"], "this is no line of WordNet's nouns"),
        (["00000100 03 n zz thing 0 000 | a thing\n"], "this is no line of WordNet's nouns"),
        (["00000100 03 v 01 think 0 000 | a verb\n"], "this is no line of WordNet's nouns"),
        (["00000100 03 n 01 thing 0 002 @ 00000200 n 0000 | cut off\n"], "this is no line of WordNet's nouns"),
        (["thing, a thing\n"], "this is no line of WordNet's nouns"),
        ([line(100, ["thing"], [200])], "a synset is a kind of what is not there"),
    ],
)
def test_files_that_are_refused(tmp_path, lines, problem):
    with pytest.raises(UsageError, match=problem) as raised:
        WordNet(written(tmp_path, *lines))
    assert str(tmp_path) in raised.value.details["where"]


def test_a_circle_and_a_folder_without_a_wordnet(tmp_path):
    with pytest.raises(UsageError, match="a synset is a kind of itself"):
        WordNet(written(tmp_path, line(100, ["hen"], [200]), line(200, ["egg"], [100]))).depth(100)
    with pytest.raises(UsageError, match="there is no WordNet here"):
        WordNet(tmp_path / "other")


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """Four levels above, then 6 kinds of each of 6 kinds of 12: each name is two or three syllables."""
    names = ("".join(parts) for parts in itertools.product("bdfgk", VOWELS, "lmnr", VOWELS, "stp", VOWELS))
    lines, places = [], itertools.count(100)

    def add(above):
        place, name = next(places), next(names)
        lines.append(line(place, [name], above, f'what is called {name} by many; "they saw a {name}"'))
        return place

    parent = add([])
    for _ in range(3):
        parent = add([parent])
    for _ in range(12):
        middle = add([parent])
        for _ in range(6):
            low = add([middle])
            for _ in range(6):
                add([low])
    return WordNet(written(tmp_path_factory.mktemp("wordnet"), *lines))


def names_in(text, net):
    known = {synset.name for synset in net.synsets.values()}
    return known & set(text.replace(":", " ").replace(".", " ").replace("?", " ").split())


def texts_of(example):
    return [example.text, example.passage if isinstance(example, Question) else example.pair]


@pytest.mark.parametrize("make", [wordnet_entailment, wordnet_questions, wordnet_similarity])
def test_constructions_follow_the_seed_and_share_no_name(net, make):
    task = make(net, 90, 60, seed=3)
    assert (len(task.train), len(task.test)) == (90, 60)
    assert task == make(net, 90, 60, seed=3)
    assert task.train != make(net, 90, 60, seed=4).train
    assert task.name.endswith("(ours)")
    assert len(set(task.train)) == 90
    train, test = (set().union(*(names_in(text, net) for example in part for text in texts_of(example)))
                   for part in (task.train, task.test))
    assert len(train) > 20
    assert len(test) > 10
    assert not train & test


def test_labels_are_what_the_hierarchy_says(net):
    ids = {synset.name: synset.id for synset in net.synsets.values()}
    task = wordnet_entailment(net, 150, 60)
    counts = dict.fromkeys(("entailment", "neutral", "contradiction"), 0)
    for example in task.train:
        premise, hypothesis = ids[example.text.partition(":")[0]], ids[example.pair.rstrip(".").rpartition(" ")[2]]
        over, under = hypothesis in net.ancestors(premise), premise in net.ancestors(hypothesis)
        assert example.label == ("entailment" if over else "neutral" if under else "contradiction")
        if example.label == "contradiction":
            assert not any({premise, hypothesis} <= net.ancestors(id).keys() for id in net.synsets)
        counts[example.label] += 1
    assert set(counts.values()) == {50}


def test_a_question_has_one_right_answer_in_its_passage(net):
    ids = {synset.name: synset.id for synset in net.synsets.values()}
    kinds = 0
    for example in wordnet_questions(net, 80, 30).train:
        (answer,) = example.answers
        assert example.passage[answer.start:answer.start + len(answer.text)] == answer.text
        entries = [entry.partition(":")[0] for entry in example.passage.split(". ")]
        assert len(set(entries)) == 4
        assert answer.text in entries
        if example.text.startswith("Which is a kind of "):
            kind = ids[example.text.removeprefix("Which is a kind of ").rstrip("?")]
            assert [name for name in entries if kind in net.ancestors(ids[name])] == [answer.text]
            kinds += 1
        else:
            assert example.text == f"Which word means {net.synsets[ids[answer.text]].definition}?"
    assert kinds == 40


def test_similarity_has_every_degree(net):
    scores = [example.score for example in wordnet_similarity(net, 120, 40).train]
    assert sum(score == 1 for score in scores) == 30
    assert len(set(scores)) >= 4
    assert min(scores) < 0.75


def test_too_few_nouns(net, tmp_path):
    with pytest.raises(UsageError, match="WordNet has too few nouns"):
        wordnet_entailment(WordNet(written(tmp_path, *SMALL)), 10, 10)
    with pytest.raises(UsageError, match="WordNet has too few nouns") as raised:
        wordnet_similarity(net, 10**6, 1)
    assert raised.value.details["expected"] == "1000000 examples"


def test_labels_are_examples(net):
    assert isinstance(wordnet_entailment(net, 3, 3).test[0], Labelled)
