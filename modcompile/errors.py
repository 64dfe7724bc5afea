"""The one family of errors: each says what was expected, what was found, where, and what to do.

The command line exits with the error's ``exit_code``: 2 usage, 3 unsupported graph, 4 parity,
5 environment or version, 6 integrity.
"""

__all__ = [
    "IntegrityError",
    "ModcompileError",
    "ModcompileWarning",
    "ParityError",
    "PassContractError",
    "RuntimeUnavailableError",
    "UnsupportedGraphError",
    "UsageError",
]


class ModcompileError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        problem: One sentence, the most specific true statement of what went wrong.
        expected: What would have been right.
        found: What was there instead, with shapes and dtypes where they matter.
        where: The node, module path, file or option.
        fix: What the reader can do about it.

    Example:
        >>> print(ModcompileError("capacity is too large", expected="K <= 8", found="K = 9"))
        capacity is too large
          expected: K <= 8
          found: K = 9
    """

    exit_code = 1

    def __init__(self, problem: str, *, expected: object = None, found: object = None, where: object = None,
                 fix: object = None):
        self.problem = problem
        self.details = {
            name: str(value)
            for name, value in (("expected", expected), ("found", found), ("where", where), ("fix", fix))
            if value is not None
        }
        super().__init__("\n".join([problem, *(f"  {name}: {text}" for name, text in self.details.items())]))


class UsageError(ModcompileError, ValueError):
    """An argument, option, input name, dtype or shape is not what the call takes."""

    exit_code = 2


class UnsupportedGraphError(ModcompileError):
    """The model's graph cannot be captured, rewritten or lowered."""

    exit_code = 3


class PassContractError(UnsupportedGraphError):
    """A pass found its precondition broken, or broke its postcondition."""


class ParityError(ModcompileError):
    """An engine's numbers differ from the model's by more than the tolerance."""

    exit_code = 4


class RuntimeUnavailableError(ModcompileError, RuntimeError):
    """A package, provider, driver or version that the call needs is missing or unfit."""

    exit_code = 5


class IntegrityError(ModcompileError):
    """A file is missing, truncated, edited or outside its folder."""

    exit_code = 6


class ModcompileWarning(UserWarning):
    """What was asked for is done, but is less than a user may take it for; the command line shows it too."""
