"""Runs weft in a pseudo-terminal, as a person sees it."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from contextlib import suppress

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """`python` with these arguments in a terminal; what is left of it is killed at the end.

    Attributes:
        shown: all that it has written.
    """

    def __init__(self, *command, columns=80, **environment):
        import fcntl
        import pty
        import struct
        import termios

        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        kept |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "INPUTRC": os.devnull, **environment}
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=theirs, stdout=theirs, stderr=theirs, env=kept, process_group=0
        )
        os.close(theirs)
        self.shown = ""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def wait_for(self, pattern, timeout=100):
        """Read until what was shown since the last call has this in it; return it."""
        start, deadline = len(self.shown), time.monotonic() + timeout
        while not re.search(pattern, self.shown[start:]):
            assert self._read(deadline), f"no {pattern!r} in {self.shown!r}"
        return self.shown[start:]

    def type(self, text):
        os.write(self._ours, text.encode())

    def end(self, timeout=100):
        """Read all that is still to come; return the exit code."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass
        return self.process.wait(timeout)

    def _read(self, deadline):
        """Read some more; False at the end."""
        ready, _, _ = select.select([self._ours], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"nothing came any more after {self.shown!r}"
        part = b""
        with suppress(OSError):  # of the end
            part = os.read(self._ours, 65536)
        self.shown += part.decode(errors="replace")
        return bool(part)


def widths(shown):
    """How many columns each line takes that was written."""
    return [len(line) for line in re.split(r"[\r\n]+", _ESCAPES.sub("", shown))]
