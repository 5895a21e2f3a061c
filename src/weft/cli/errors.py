"""What went wrong, in a line on the screen: of several processes once.

Exit codes: 0 done, 1 something the user can mend (printed without a traceback), 2 wrong usage, 130 interrupted.
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

# Seconds in which the first process has said what all fail with.
WAIT_FOR_THE_FIRST = 15


class UsageError(WeftError, ValueError):
    """A command line that says nothing that can be done.

    Args:
        problems: a sentence for each.
    """

    in_all_processes = True

    def __init__(self, problems: Sequence[str]) -> None:
        several = f"these options cannot be read:{bullet_list(problems)}"
        super().__init__(problems[0] if len(problems) == 1 else several)


def speaks() -> bool:
    """Whether this is the one of several processes that says what they did."""
    return os.environ.get("RANK", "0") == "0"


def report(command: str, err: WeftError) -> None:
    """Say what went wrong, once: where the first process fails too, the launcher ends this one while it waits."""
    which = ""
    if not speaks():
        time.sleep(WAIT_FOR_THE_FIRST)
        if err.in_all_processes:
            return
        which = f" in process {os.environ['RANK']}"
    say(f"{f'weft {command}'.strip()}: error{which}: {err}", file=sys.stderr)


def report_unforeseen(command: str, err: Exception) -> None:
    """Say in a line what was not foreseen where it happened; what is no more than a fault of the program is raised."""
    if isinstance(err, RuntimeError) and not isinstance(err, RecursionError):
        raise err
    if isinstance(err, OSError) and err.filename is None and err.errno in (errno.ENOSPC, errno.EPIPE):
        # Of what the output goes to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again when it ends
        if err.errno == errno.ENOSPC:  # who closes a pipe has seen enough
            report(command, CheckpointError(f"what it prints cannot be written: {err.strerror}; free some space"))
    else:
        report(command, WeftError(_in_a_line(err)))


def _in_a_line(err: Exception) -> str:
    """What the system says, and of which file."""
    files = [str(file) for file in (getattr(err, "filename", None), getattr(err, "filename2", None)) if file]
    return f"{', '.join(files)}: {reason(err)}" if files else f"{type(err).__name__}: {first_line(err)}"
