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


@contextmanager
def memory_limit(limit):
    """In this block the process is limited to so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
