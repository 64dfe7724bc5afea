"""Writes what was measured as one HTML page: no file beside it, no network, and nothing that a text could inject.

The text, the maps and the tables are in the HTML itself, so that the page says what it has to say with scripts off, to
a screen reader and on paper; a small script adds what hovering and arrow keys show. Charts are tables with bars in
their cells, and drawings are inline SVG. plotly.js alone would be 4 MB in a page of a few hundred kB, and a screen
reader reads none of its charts.
"""

__all__ = ["render", "write_page"]

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import modcompile
from modcompile.files import write_whole
from modcompile.insight.figures import Group, Insight, PassageRouting
from modcompile.insight.graph import picture_of
from modcompile.insight.passages import KINDS
from modcompile.model import MoDModel

# L routed blocks  S rows

_FOLDER = Path(__file__).parent
# Passages that the page shows; its figures are of all that were read.
SHOWN = 8
# No space to break at between a number and its unit.
_GLUE = "\N{NO-BREAK SPACE}"


def write_page(path: str | os.PathLike, mod: MoDModel, insight: Insight, *, model: str, text: str) -> Path:
    """Writes the page.

    Args:
        path: The HTML file; one that exists is replaced.
        mod: The model that was measured.
        insight: What was measured.
        model: What to call the model.
        text: What to call the text.

    Raises:
        UsageError: The file cannot be written.
    """
    content = render(mod, insight, model=model, text=text).encode()
    write_whole(Path(path), lambda file: file.write(content))
    return Path(path)


def render(mod: MoDModel, insight: Insight, *, model: str, text: str) -> str:
    """The page as HTML. The arguments are those of ``write_page``."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "engineering": _engineering}
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    paths = [block.path for block in insight.blocks]
    # All blocks of one list share what is before the last dot.
    prefixes = {path.rpartition(".")[0] for path in paths}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    names = {path: path.removeprefix(f"{prefix}.") for path in paths}
    shown = insight.passages[:SHOWN]
    counts = Counter(word for item in insight.passages for word in item.passage.ids)
    return environment.get_template("page.html").render(
        version=modcompile.__version__, model=model, text=text, insight=insight, picture=picture_of(mod), names=names,
        prefix=prefix, style=(_FOLDER / "page.css").read_text(encoding="utf-8"), script=script,
        # The page's own script runs, and no other: what a text holds is text even where escaping failed.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_inside_script({"blocks": [names[block.path] for block in insight.routed], "kinds": KINDS,
                             "passages": [_passage_data(item, counts) for item in shown]}),
        passages=[_passage_view(item) for item in shown], axes=list(_axes(insight)),
        variants={variant.name: variant for variant in insight.variants})


def _passage_view(item: PassageRouting) -> dict[str, Any]:
    """A passage as the template draws it without any script."""
    shares = item.taken.mean(axis=0)
    return {
        "tokens": [(piece, kind == "special", f"{share:.2f}".lstrip("0").rstrip("0").rstrip(".") or "0")
                   for piece, kind, share in zip(item.passage.pieces, item.passage.kinds, shares, strict=True)],
        "rows": len(item.passage.ids),
        "paths": [_runs(row) for row in item.taken],
    }


def _passage_data(item: PassageRouting, counts: Counter[int]) -> dict[str, Any]:
    """A passage for the script, token by token."""
    return {
        "ids": item.passage.ids,
        "kinds": [KINDS.index(kind) for kind in item.passage.kinds],
        "counts": [counts[word] for word in item.passage.ids],
        "logits": [[_short(value) for value in row] for row in item.logits],
        "taken": ["".join("01"[int(value)] for value in row) for row in item.taken],
        "entropy": None if item.entropy is None else [_short(value) for value in item.entropy],
        "loss": None if item.loss is None else [_short(value) for value in item.loss],
    }


def _short(value: float) -> float | None:
    """Four digits, which is what the page shows. JSON has no NaN."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _inside_script(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    made = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return made.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _runs(taken: np.ndarray) -> str:
    """The rows that are true, bool [S], as the outline of an SVG path, one unit a row.

    Example:
        >>> _runs(np.array([True, True, False, True]))
        'M0 0h2v1h-2zM3 0h1v1h-1z'
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], taken.astype(int), [0]])))
    return "".join(f"M{start} 0h{end - start}v1h-{end - start}z"
                   for start, end in zip(edges[::2], edges[1::2], strict=True))


def _axes(insight: Insight) -> Iterator[dict[str, Any]]:
    """What the routing may depend on, each with its groups or the reason why there are none."""
    tables: Sequence[tuple[str, str, tuple[Group, ...] | str]] = (
        ("Kind of token", "By the Unicode categories of what a token stands for", insight.by_kind),
        ("Frequency", "How often the same token is in this text", insight.by_frequency),
        ("Position", "Where in its passage a token is, from 0", insight.by_position),
        ("Prediction entropy", "How uncertain the routed model's prediction at the token is, in eighths of the tokens",
         insight.by_entropy),
    )
    for title, hint, groups in tables:
        found = () if isinstance(groups, str) else groups
        yield {"title": title, "hint": hint, "reason": groups if isinstance(groups, str) else None, "groups": found,
               "top": max((group.rate for group in found), default=0.0) or 1.0,
               "peak": max((rate for group in found for rate in group.by_block), default=0.0) or 1.0}


def _percent(share: float, digits: int = 1) -> str:
    return f"{share * 100:.{digits}f}{_GLUE}%"


def _engineering(number: float) -> str:
    from modcompile.cli.console import engineering

    return engineering(number).replace(" ", _GLUE)
