"""The errors weft raises on purpose, so that a command line can print them without a traceback.

Each is also the built-in error a Python caller would expect (`ValueError`), and its message says what is wrong
(name = value), what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable


class WeftError(Exception):
    """Base class: something the user can mend.

    Attributes:
        in_all_processes: all processes of a training raise this error, at the same point.
    """

    in_all_processes = False


class ConfigError(WeftError, ValueError):
    """An option, or a combination of options, that cannot work.

    Args:
        message: what is wrong, or the title of a list of problems.
        problems: a sentence for each.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems = list(problems)
        super().__init__(message + bullet_list(self.problems))


class AdapterError(WeftError, ValueError):
    """A LoRA adapter that cannot be an expert of this model."""


class CheckpointError(WeftError, ValueError):
    """A saved folder that is incomplete, altered, or of another model."""


class DataError(WeftError, ValueError):
    """A data file that cannot be read or holds nothing to learn from."""


class TrainingError(WeftError, ArithmeticError):
    """A training that went wrong, whose result so far is kept."""


class CacheError(WeftError, ValueError):
    """A key/value cache was asked for where weft does not support one."""


class ThreadError(WeftError, RuntimeError):
    """A model is called in one thread while another one uses it."""


class HubError(WeftError, ConnectionError):
    """The Hugging Face Hub did not do what it was asked for: no token, no right, no such repository, no network."""


def first_line(err: BaseException) -> str:
    """What an error says, in one line."""
    return str(err).strip().partition("\n")[0] or type(err).__name__


def bullet_list(problems: Iterable[str]) -> str:
    """Join problems into one message, a line each."""
    return "".join(f"\n  - {problem}" for problem in problems)
