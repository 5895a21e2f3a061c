"""The superuser, who may read and write whatever the modes of files say, as an ordinary user for a time."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

_VERSION = 0x20080522
_DAC_OVERRIDE_AND_READ_SEARCH = 0b110


@contextlib.contextmanager
def ordinary_rights() -> Iterator[None]:
    """A block in which the modes of files mean something; for users who are ordinary already it changes nothing."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    within = (ctypes.c_uint32 * 6)(*before)
    within[0] &= ~_DAC_OVERRIDE_AND_READ_SEARCH  # those in effect; they may be taken back
    assert libc.capset(header, within) == 0
    try:
        yield
    finally:
        libc.capset(header, before)
