"""Limits of this process, for a while."""

from __future__ import annotations

import resource
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def little_memory(more):
    """In this block only so many more bytes can be allocated."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    with memory_limit(pages * resource.getpagesize() + more):
        yield


def memory_limit(limit):
    """In this block the process is limited to so many bytes."""
    return limited(resource.RLIMIT_AS, limit)


@contextmanager
def limited(kind, limit):
    """In this block the process has this limit of a kind of `resource`."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))
