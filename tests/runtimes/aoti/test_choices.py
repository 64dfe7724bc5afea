"""Which rows a compiled kernel keeps: what Inductor keeps, and short ones of which it knows nothing."""

from types import SimpleNamespace

import pytest
import sympy
from modcompile.runtimes.aoti.choices import GatheredRows
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint


def kernel(hint: ReductionHint, size: sympy.Expr) -> SimpleNamespace:
    return SimpleNamespace(get_reduction_hint=lambda: hint, reduction_numel=size)


@pytest.mark.parametrize(("hint", "size", "cooperative", "kept"), [
    (ReductionHint.DEFAULT, sympy.Integer(1024), False, True),
    (ReductionHint.DEFAULT, sympy.Integer(1025), False, False),
    (ReductionHint.DEFAULT, sympy.Symbol("s0"), False, False),
    (ReductionHint.DEFAULT, sympy.Integer(64), True, False),
    (ReductionHint.OUTER, sympy.Integer(64), False, False)])
def test_short_rows_of_which_nothing_is_known_are_kept(monkeypatch, hint, size, cooperative, kept):
    monkeypatch.setattr(InductorChoices, "should_use_persistent_reduction", staticmethod(lambda *_: False))
    assert GatheredRows().should_use_persistent_reduction(kernel(hint, size), cooperative) is kept


def test_what_inductor_keeps_is_kept(monkeypatch):
    monkeypatch.setattr(InductorChoices, "should_use_persistent_reduction", staticmethod(lambda *_: True))
    assert GatheredRows().should_use_persistent_reduction(kernel(ReductionHint.OUTER, sympy.Integer(9)), False)
