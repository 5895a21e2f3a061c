"""The errors that weft raises on purpose. The command line prints them without a traceback.

Each one is also a built-in error, such as `ValueError`. Its message says what is wrong (name = value), what was
expected, and what to do.

Example:
    >>> try:
    ...     model = weft.from_pretrained("my-mixture")
    ... except weft.errors.WeftError as err:
    ...     print(err)
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

# Messages of torch, CUDA, numpy and the system for out of memory. torch has a class for it on GPUs only. The static TLS
# block has a fixed size.
_NO_MEMORY = re.compile(
    "can(no|')t allocate memory(?! in static TLS)|not enough memory|out of memory|unable to allocate|ALLOC_FAILED|"
    "failed to map segment from shared object",
    re.IGNORECASE,
)
_NO_THREAD = "can't start new thread"  # there may be too many, or no memory for its stack


class WeftError(Exception):
    """Base class of weft's errors: problems that a user can correct.

    Attributes:
        in_all_processes: True if all processes of a distributed training raise this error at the same point.
    """

    in_all_processes = False


class ConfigError(WeftError, ValueError):
    """An option, or a combination of options, is not valid.

    Args:
        message: what is wrong, or the title of a list of problems.
        problems: one sentence for each problem.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems = list(problems)
        super().__init__(message + bullet_list(self.problems))


class AdapterError(WeftError, ValueError):
    """A LoRA adapter cannot be an expert of this model."""


class CheckpointError(WeftError, ValueError):
    """A saved folder is incomplete, was changed, or belongs to another model."""


class DataError(WeftError, ValueError):
    """A data file cannot be read, or has no usable rows."""


class TrainingError(WeftError, ArithmeticError):
    """A training failed, for example with a loss that is not finite. Its last checkpoint is kept."""


class CacheError(WeftError, ValueError):
    """weft does not support this KV cache, or this use of it."""


class OutOfMemoryError(WeftError, MemoryError):
    """There is not enough memory to read a file or to load a base model."""


class ThreadError(WeftError, RuntimeError):
    """Two threads use one model at the same time."""


class HubError(WeftError, ConnectionError):
    """A request to the Hugging Face Hub failed: no token, no permission, no such repository, or no network."""


def first_line(err: BaseException) -> str:
    """The first line of an error's message, or its type where it has no message."""
    return str(err).strip().partition("\n")[0] or type(err).__name__


def lack_of_memory(err: BaseException) -> BaseException | None:
    """The error for out of memory: this one or a cause of it; None if there is none."""
    cause: BaseException | None = err
    while cause is not None:
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return cause
        # For errors of weft, the cause decides, for the system's their number, which some libraries leave out.
        known = isinstance(cause, WeftError) or (isinstance(cause, OSError) and cause.errno is not None)
        if not known and (_NO_MEMORY.search(str(cause)) or (_NO_THREAD in str(cause) and memory_limit() is not None)):
            return cause
        cause = cause.__cause__
    return None


def memory_limit() -> int | None:
    """The most bytes that this process may allocate; None for no limit."""
    if resource is None:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def bullet_list(problems: Iterable[str]) -> str:
    """The problems as a list for a message, one per line."""
    return "".join(f"\n  - {problem}" for problem in problems)
