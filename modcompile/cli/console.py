"""What every verb shares: the app, its errors and exit codes, progress on stderr, results on stdout."""

__all__ = ["app", "emit", "engineering", "main", "settings", "shape_text", "sizes_text", "table", "working"]

import contextlib
import dataclasses
import json
import math
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

import modcompile
from modcompile.errors import ModcompileError, ModcompileWarning

HELP = """Rewrites dense transformers into Mixture-of-Depths form and compiles them into engines.

MODEL is a folder that 'convert' wrote, a transformers folder (config.json and safetensors), or
package.module:function, which is imported and called, and returns (model, example_inputs).
Nothing is ever downloaded.

Exit codes: 0 ok, 1 a defect of this program, 2 usage, 3 unsupported graph, 4 parity failure,
5 environment or version, 6 integrity, 7 figures that lack a variant.
"""


@dataclasses.dataclass
class Settings:
    """The options before the verb, and the whole command line."""

    debug: bool = False
    quiet: bool = False
    command_line: str = ""


settings = Settings()


app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]})


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"modcompile {modcompile.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                          help="Print the version.")] = False,
) -> None:
    """Takes the options before the verb."""
    settings.debug, settings.quiet = debug, quiet
    if not debug:
        # What libraries warn their callers of.
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", ModcompileWarning)


@contextlib.contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """Shows ``text`` on a terminal's stderr while the block runs, and gives a function that changes it."""
    console = Console(stderr=True)
    if settings.quiet or not console.is_terminal:
        yield lambda text: None
        return
    with console.status(Text(text)) as status:
        yield lambda text: status.update(Text(text))


def emit(as_json: bool, data: Any, renderable: RenderableType) -> None:
    """Prints a result on stdout: ``data`` as JSON, or ``renderable`` for people."""
    if as_json:
        typer.echo(json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False))
        return
    # A pipe has no width to fit lines into, and what is cut there is lost.
    console = Console() if sys.stdout.isatty() else Console(width=10_000)
    console.print(renderable, soft_wrap=isinstance(renderable, Text))


def _finite(data: Any) -> Any:
    """The same with null for what JSON has no number for: NaN and infinities."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def engineering(number: float) -> str:
    """A large number with a unit prefix.

    Example:
        >>> engineering(134_515_008), engineering(950)
        ('134.5 M', '950')
    """
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(number) >= 10**power:
            return f"{number / 10**power:.4g} {prefix}"
    return f"{number:.4g}"


def shape_text(shape: Iterable[int | str] | None) -> str:
    """A shape as messages show it.

    Example:
        >>> shape_text(("batch", 128, 768))
        '[batch, 128, 768]'
    """
    return "" if shape is None else f"[{', '.join(map(str, shape))}]"


def sizes_text(sizes: Mapping[str, int]) -> str:
    """The sizes of symbols.

    Example:
        >>> sizes_text({"batch": 8, "sequence": 256})
        'batch 8, sequence 256'
    """
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> RenderableType:
    """A table of plain text: square brackets in a cell are no markup. A cell may be a styled ``Text``."""
    made = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return Group(Text(title, "bold"), made)


def main(args: list[str] | None = None) -> None:
    """Runs a command line, by default this process's, and exits with its code."""
    settings.command_line = shlex.join(["modcompile", *(sys.argv[1:] if args is None else args)])
    try:
        app(args, prog_name="modcompile")
    except ModcompileError as error:
        _fail(error, str(error), error.exit_code)
    except (OSError, MemoryError, ImportError) as error:
        _fail(error, f"{type(error).__name__}: {error}", exit_code=5)
    except Exception as error:
        _fail(error, f"{type(error).__name__}: {error}\n  fix: this is a defect of modcompile; please report what "
                     "modcompile --debug shows", exit_code=1)


def _fail(error: BaseException, message: str, exit_code: int) -> NoReturn:
    if settings.debug:
        traceback.print_exception(error)
    else:
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), message))
    sys.exit(exit_code)
