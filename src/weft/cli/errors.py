"""Prints errors in one line, and once if several processes fail.

Exit codes: 0 success, 1 an error that the user can correct (printed without a traceback), 2 wrong usage, 130
interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Sequence

from weft.errors import CheckpointError, WeftError, bullet_list, first_line
from weft.files.reading import reason
from weft.screen.visible import say

# Seconds that other processes wait, so that the first one prints an error of all processes.
WAIT_FOR_THE_FIRST = 15


class UsageError(WeftError, ValueError):
    """A command line is not valid.

    Args:
        problems: one sentence for each problem.
    """

    in_all_processes = True

    def __init__(self, problems: Sequence[str]) -> None:
        several = f"these options cannot be read:{bullet_list(problems)}"
        super().__init__(problems[0] if len(problems) == 1 else several)


def is_first_process() -> bool:
    """Whether this is the first of several processes, which prints for all."""
    return os.environ.get("RANK", "0") == "0"


def report(command: str, err: WeftError) -> None:
    """Print an error. If the first process fails too, the launcher ends the others while they wait here."""
    which = ""
    if not is_first_process():
        time.sleep(WAIT_FOR_THE_FIRST)
        if err.in_all_processes:
            return
        which = f" in process {os.environ['RANK']}"
    say(f"{f'weft {command}'.strip()}: error{which}: {err}", file=sys.stderr)


def report_unforeseen(command: str, err: Exception) -> None:
    """Print an unexpected error in one line. A RuntimeError is raised again, as it is a bug and needs its traceback."""
    if isinstance(err, RuntimeError) and not isinstance(err, RecursionError):
        raise err
    if isinstance(err, OSError) and err.filename is None and err.errno in (errno.ENOSPC, errno.EPIPE):
        # The standard output cannot be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again at exit
        if err.errno == errno.ENOSPC:  # a closed pipe is no error
            report(command, CheckpointError(f"the output cannot be written: {err.strerror}; free some space"))
    else:
        report(command, WeftError(_in_a_line(err)))


def _in_a_line(err: Exception) -> str:
    """The system's message, with the files that it is about."""
    files = [str(file) for file in (getattr(err, "filename", None), getattr(err, "filename2", None)) if file]
    return f"{', '.join(files)}: {reason(err)}" if files else f"{type(err).__name__}: {first_line(err)}"
