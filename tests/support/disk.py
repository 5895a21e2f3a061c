"""A disk that is full, and what lies on one."""

import resource

from limits import limited
from models import folder_files


def full_disk(size=3000):
    """In this block no file can grow beyond this size: writing fails half-way, as on a full disk."""
    return limited(resource.RLIMIT_FSIZE, size)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in folder_files(folder)}
