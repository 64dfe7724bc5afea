"""Options that several verbs take, and how their texts are read."""

__all__ = [
    "AsJson",
    "AttendTo",
    "Axis",
    "Blocks",
    "CapacityMultiple",
    "CapacityRatio",
    "Conversion",
    "Dropped",
    "Gate",
    "ModelArgument",
    "Options",
    "Overwrite",
    "PaddingMask",
    "Precision",
    "Router",
    "RouterHidden",
    "Shapes",
    "config_from",
    "read_options",
    "read_profiles",
    "read_shapes",
    "takes_conversion",
]

import functools
import inspect
import json
import re
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from modcompile.errors import UsageError

if TYPE_CHECKING:
    from modcompile.config import MoDConfig

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or package.module:function.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier call wrote there.")]
Precision = Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Of weights and arithmetic.")]
Shapes = Annotated[list[str] | None, typer.Option(
    "--shape", metavar="NAME=SIZES", help="An input's shape, as input_ids=8x1024. May be repeated.")]
Options = Annotated[list[str] | None, typer.Option(
    "--option", metavar="NAME=VALUE", help="An option of the runtime's, such as intra_op_threads=2 or cuda_graph=true. "
    "VALUE is JSON, or text where it is none. May be repeated.")]

# The options of a conversion. None stands for MoDConfig's default, which the help repeats.
Blocks = Annotated[str | None, typer.Option(
    help="every-other (the default), all, indices such as 1,3,5, or globs of module paths, separated by commas.")]
CapacityRatio = Annotated[str | None, typer.Option(
    help="K/S: a number such as 0.125 (the default) or 1/8, or one for each routed block, separated by commas.")]
CapacityMultiple = Annotated[int | None, typer.Option(help="Round K up to a multiple of this; 1 by default.")]
Gate = Annotated[Literal["raw", "sigmoid", "tanh", "straight-through", "scale"] | None, typer.Option(
    help="The weight of a chosen row's update; raw by default.")]
Router = Annotated[Literal["linear", "mlp", "depth", "attention", "noise"] | None, typer.Option(
    help="What scores the rows; linear by default. depth goes with --axis sequence, attention with --gate "
    "straight-through or scale; noise is a control, of which no engine can be made.")]
RouterHidden = Annotated[int | None, typer.Option(
    help="The width of the hidden layer of mlp and depth; by default a quarter of the hidden state's.")]
Dropped = Annotated[str | None, typer.Option(
    metavar="PATHS", help="Blocks to leave out for every row, as module paths separated by commas.")]
AttendTo = Annotated[Literal["chosen", "all"] | None, typer.Option(
    help="Which rows a chosen row attends to; chosen by default.")]
Axis = Annotated[Literal["token", "sequence"] | None, typer.Option(
    help="Choose among the rows of a sequence (the default), or the sequences of a batch.")]
PaddingMask = Annotated[str | None, typer.Option(
    metavar="INPUT", help='The input of shape [B, S] that is nonzero at valid tokens; with "~", at padding. '
    "attention_mask by default, if there is one.")]


# Those that were given, by name.
Conversion = dict[str, Any]

_CONVERSION = {"blocks": Blocks, "capacity_ratio": CapacityRatio, "capacity_multiple": CapacityMultiple, "gate": Gate,
               "router": Router, "router_hidden": RouterHidden, "dropped": Dropped, "attend_to": AttendTo, "axis": Axis,
               "padding_mask": PaddingMask}


def takes_conversion(verb: Callable[..., None]) -> Callable[..., None]:
    """Gives a verb the options of a conversion in the place of its parameter ``conversion``, a ``Conversion``."""

    @functools.wraps(verb)
    def wrapper(**values: Any) -> None:
        given = {name: values.pop(name) for name in _CONVERSION}
        verb(conversion={name: value for name, value in given.items() if value is not None}, **values)

    options = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
               for name, annotation in _CONVERSION.items()]
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb).parameters.values():
        parameters += options if parameter.name == "conversion" else [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    # Typer reads both.
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def config_from(*, blocks: str | None = None, capacity_ratio: str | None = None, dropped: str | None = None,
                **options: Any) -> "MoDConfig":
    """The configuration that the conversion's options stand for; those that are None keep its defaults.

    Raises:
        UsageError: An option that does not fit.

    Example:
        >>> config = config_from(blocks="1,3", capacity_ratio="1/8", gate=None)
        >>> config.blocks, config.capacity_ratio, config.gate
        ((1, 3), 0.125, 'raw')
    """
    from modcompile.config import MoDConfig

    options |= {"blocks": blocks and _read_blocks(blocks),
                "dropped": dropped and tuple(path.strip() for path in dropped.split(",")),
                "capacity_ratio": capacity_ratio and _read_ratio(capacity_ratio)}
    return MoDConfig(**{name: value for name, value in options.items() if value is not None})


def _read_blocks(text: str) -> str | tuple[int, ...] | tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if all(part.isdecimal() for part in parts):
        return tuple(int(part) for part in parts)
    return parts if len(parts) > 1 else text


def _read_ratio(text: str) -> Fraction | list[Fraction]:
    try:
        # As fractions, 1/8 can be said, and 0.1 is 1/10.
        ratios = [Fraction(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise UsageError("the capacity ratio is not a number", expected="a number such as 0.125 or 1/8, or several",
                         found=text, where="--capacity-ratio") from None
    return ratios if len(ratios) > 1 else ratios[0]


_IN_JSON = {"True": "true", "False": "false", "None": "null"}


def read_options(texts: list[str] | None) -> dict[str, Any]:
    """A runtime's options by name. The runtime itself refuses those that it does not have.

    Raises:
        UsageError: A text that is not NAME=VALUE, an option given twice, or a word of Python's in the place of JSON's.

    Example:
        >>> read_options(["intra_op_threads=2", 'providers=["CPUExecutionProvider"]', "custom_ops=build/library.so"])
        {'intra_op_threads': 2, 'providers': ['CPUExecutionProvider'], 'custom_ops': 'build/library.so'}
    """
    options: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not name.isidentifier() or not equals:
            raise UsageError("the option cannot be read", expected="NAME=VALUE, such as intra_op_threads=2", found=text,
                             where="--option")
        if name in options:
            raise UsageError(f"the option {name} is given twice", found=text, where="--option")
        if value in _IN_JSON:
            # As a text, each of them would be true.
            raise UsageError("the option's value is Python's, not JSON's", expected="true, false or null", found=text,
                             where="--option", fix=f"--option {name}={_IN_JSON[value]}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def read_shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]] | None:
    """Shapes by input name; None if there are none.

    Raises:
        UsageError: A text that is not NAME=SIZES, or an input named twice.

    Example:
        >>> read_shapes(["input_ids=8x1024", "attention_mask=8x1024"])
        {'input_ids': (8, 1024), 'attention_mask': (8, 1024)}
    """
    shapes = read_profiles(texts)
    for name, shape in (shapes or {}).items():
        if isinstance(shape[0], tuple):
            raise UsageError("a range of shapes is for building TensorRT engines", expected=f"{name}=SIZES",
                             found=f"three shapes for {name}", where="--shape")
    return cast(dict[str, tuple[int, ...]] | None, shapes)


def read_profiles(texts: list[str] | None) -> dict[str, tuple[Any, ...]] | None:
    """As ``read_shapes``, where a shape may be three of them: the smallest, the usual and the largest.

    Example:
        >>> read_profiles(["input_ids=1x128:8x128:16x128"])
        {'input_ids': ((1, 128), (8, 128), (16, 128))}
    """
    shapes: dict[str, tuple[Any, ...]] = {}
    for text in texts or ():
        name, _, sizes = text.rpartition("=")
        parts = sizes.split(":")
        if not name or len(parts) not in (1, 3) or not all(re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", p) for p in parts):
            raise UsageError("the shape cannot be read", expected="NAME=SIZES, such as input_ids=8x1024, or "
                             "NAME=MIN:USUAL:MAX", found=text, where="--shape")
        if name in shapes:
            raise UsageError(f"input {name} has two shapes", found=text, where="--shape")
        found = tuple(tuple(int(size) for size in part.split("x")) for part in parts)
        shapes[name] = found if len(found) == 3 else found[0]
    return shapes or None
