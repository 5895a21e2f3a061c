"""A disk that is full, and what lies on one."""

import resource
from contextlib import contextmanager

from models import folder_files


@contextmanager
def full_disk(size=3000):
    """No file can grow beyond this size: writing fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {name: (folder / name).read_bytes() for name in folder_files(folder)}
