"""What to route, how many rows, and with which gate: the options of a conversion."""

import difflib
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from modcompile.errors import UsageError

__all__ = ["MoDConfig", "as_fraction", "capacity"]

# A capacity ratio is taken as an exact fraction with at most this denominator, so that Python, a symbolic
# graph and an ONNX file count the same K.
MAX_DENOMINATOR = 4096


def as_fraction(ratio: float | Fraction) -> Fraction:
    """The exact fraction p/q that stands for ``ratio`` everywhere.

    Example:
        >>> as_fraction(5 / 33)
        Fraction(5, 33)
    """
    return Fraction(ratio).limit_denominator(MAX_DENOMINATOR)


def capacity(ratio: float | Fraction, rows: int, multiple: int = 1) -> int:
    """K = ceil(ratio * rows) in integers, rounded up to a multiple, never above ``rows``.

    Example:
        >>> capacity(5 / 33, 33), capacity(0.125, 1000, multiple=64), capacity(0.5, 3, multiple=64)
        (5, 128, 3)
    """
    p, q = as_fraction(ratio).as_integer_ratio()
    k = (p * rows + q - 1) // q
    return min(rows, -(-k // multiple) * multiple)


# Finer than that, K would be 0.
Ratio = Annotated[float, Field(ge=1 / MAX_DENOMINATOR, le=1.0, allow_inf_nan=False)]

# What an option of several types takes: pydantic would tell of the first type only.
TAKES = {
    "blocks": '"every-other", "all", a list of indices, a path glob or a list of those',
    "capacity_ratio": f"a number in (0, 1], at least 1/{MAX_DENOMINATOR}, or a list with one per routed block",
    "dropped": "a list of block paths",
}


class MoDConfig(BaseModel):
    """The options of a conversion. Immutable; a wrong value raises ``UsageError`` and says what fits.

    Attributes:
        blocks: Which blocks to route, among those that can be: "every-other" (the 2nd, 4th, ...: indices 1, 3, ...,
            the paper's choice), "all", a list of indices, or path globs such as "encoder.layer.1*".
        capacity_ratio: K/S in (0, 1]: one for all, or a list with one per routed block, in the model's order.
        capacity_multiple: K is rounded up to a multiple of this (GEMM tiles like 64 or 128), never above S.
        gate: The weight g of a chosen row's update, from its router logit r: "raw" g = r (the paper, equation 1),
            "sigmoid", "tanh", or "straight-through", g = 1 with the gradient of sigmoid(r): what a pretrained model
            wants. "scale" is one learned number per block: the logits then only choose, and learn from
            ``modcompile.training.routing_losses`` or by calibration.
        router: What scores the rows: "linear" (the paper), "mlp", "depth" (one network predicts a depth for a whole
            input, whose deeper routed blocks it skips: axis "sequence"), "attention" (no parameters: a row counts by
            the attention it received in the block before; gate "straight-through" or "scale"), or "noise", the control
            of quality tables.
        router_hidden: The width of the hidden layer of "mlp" and "depth"; by default a quarter of the hidden state's.
        dropped: Paths of blocks to leave out for every row, as a pruned model does; they are not routed. Calibration
            finds them.
        attend_to: What a chosen row attends to: "chosen" rows only (the paper), or "all" rows, which then offer keys
            and values.
        axis: "token" picks rows of each sequence; "sequence" picks sequences of the batch, by their mean valid row.
        padding_mask: The model input of shape [B, S] that is nonzero at valid tokens. By default the input
            ``attention_mask``, if the model takes one. A leading "~" inverts it, for masks that are true at padding.

    Example:
        >>> MoDConfig(capacity_ratio=0.25).gate
        'raw'
        >>> MoDConfig(capacity_ratio=0)
        Traceback (most recent call last):
        ...
        modcompile.errors.UsageError: capacity_ratio does not fit
          expected: a number in (0, 1], at least 1/4096, or a list with one per routed block
          found: 0
          where: MoDConfig.capacity_ratio
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    blocks: Literal["every-other", "all"] | tuple[int, ...] | tuple[str, ...] | str = "every-other"
    capacity_ratio: Ratio | tuple[Ratio, ...] = 0.125
    capacity_multiple: Annotated[int, Field(ge=1)] = 1
    gate: Literal["raw", "sigmoid", "tanh", "straight-through", "scale"] = "raw"
    router: Literal["linear", "mlp", "depth", "attention", "noise"] = "linear"
    router_hidden: Annotated[int, Field(ge=1)] | None = None
    dropped: tuple[str, ...] = ()
    attend_to: Literal["chosen", "all"] = "chosen"
    axis: Literal["token", "sequence"] = "token"
    padding_mask: str | None = None

    def __init__(self, **options):
        try:
            super().__init__(**options)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            if name not in type(self).model_fields:
                near = difflib.get_close_matches(name, type(self).model_fields, 1)
                raise UsageError(f"there is no option {name}", expected=", ".join(type(self).model_fields), found=name,
                                 where="MoDConfig", fix=f"did you mean {near[0]}?" if near else None) from None
            alone = name == "dropped" and isinstance(options[name], str)
            raise UsageError(f"{name} does not fit", found=repr(options[name]), where=f"MoDConfig.{name}",
                             expected=TAKES.get(name) or first["msg"].removeprefix("Input should be "),
                             fix=f"for one block, {name}=[{options[name]!r}]" if alone else None) from None
        if self.router == "depth" and self.axis != "sequence":
            raise UsageError("a depth is predicted for a whole input", expected='axis="sequence"', found=self.axis,
                             where="MoDConfig.router", fix='use axis="sequence", or another router')
        if self.router == "attention" and (self.axis != "token" or self.gate not in ("straight-through", "scale")):
            raise UsageError("attention says which tokens to take, not how much of their update",
                             expected='axis="token", and gate="straight-through" or "scale"',
                             found=f'axis="{self.axis}", gate="{self.gate}"', where="MoDConfig.router",
                             fix='add gate="straight-through"')
        if self.router_hidden is not None and self.router not in ("mlp", "depth"):
            raise UsageError("this router has no hidden layer", expected='router="mlp" or "depth"', found=self.router,
                             where="MoDConfig.router_hidden", fix="leave router_hidden out, or choose such a router")

    @field_validator("capacity_ratio", mode="before")
    @classmethod
    def _exact(cls, ratio):
        if isinstance(ratio, Fraction):
            return float(ratio)
        if isinstance(ratio, list | tuple):
            return tuple(float(r) if isinstance(r, Fraction) else r for r in ratio)
        return ratio

    def ratios(self, routed: list[str]) -> list[Fraction]:
        """The ratio of each routed block, as exact fractions.

        Raises:
            UsageError: A list of ratios whose length is not the number of routed blocks.
        """
        if isinstance(self.capacity_ratio, tuple):
            if len(self.capacity_ratio) != len(routed):
                raise UsageError("capacity_ratio is a list of the wrong length",
                                 expected=f"{len(routed)} ratios, one per routed block", found=len(self.capacity_ratio),
                                 where="MoDConfig.capacity_ratio", fix=f"the routed blocks are {', '.join(routed)}")
            return [as_fraction(ratio) for ratio in self.capacity_ratio]
        return [as_fraction(self.capacity_ratio)] * len(routed)
