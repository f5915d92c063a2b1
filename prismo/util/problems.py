"""Several independent checks whose errors are shown together, so that a user mends everything at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class ProblemsError(ValueError):
    """More than one thing is wrong.

    Attributes:
        problems: one text each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n  ".join([f"{len(problems)} problems:", *problems]))
        self.problems = tuple(problems)


def check_all(*checks: Callable[[], object]) -> None:
    """Make checks that do not depend on each other.

    Raises:
        ValueError, OSError: the error of the one check that failed.
        ProblemsError: several failed.
    """
    errors: list[Exception] = []
    for check in checks:
        try:
            check()
        except (ValueError, OSError) as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        texts = [error.problems if isinstance(error, ProblemsError) else (str(error),) for error in errors]
        raise ProblemsError([text for several in texts for text in several])
