"""The errors that a user can act on."""

from collections.abc import Sequence


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, the value, and what to do.

    Commands print the message alone and exit with status 1. Any other exception is a defect of
    this project and keeps its traceback.
    """


class ExampleError(InputError):
    """Some examples of a batch cannot be used; the others may.

    Args:
        problems: Pairs of a row of the batch and what is wrong with it, at least one.
        first: Names the first of these examples, for the message.
    """

    def __init__(self, problems: Sequence[tuple[int, str]], first: str = "") -> None:
        super().__init__(problems, first)
        self.problems = tuple(problems)
        self._first = first

    def __str__(self) -> str:
        return f"{self._first}{self.problems[0][1]}"


class AbandonedError(InputError):
    """A job was given up while threads of this process may still be at it."""
