"""Results that are either complete or absent, so that a stopped demo can simply be started again."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Lend a temporary path for a file or folder, which becomes `target` once the block has succeeded.

    Args:
        target: Where the finished result shall lie. Nothing may lie there yet if the result is a folder.

    Yields:
        A path beside `target` at which the block creates the result.
    """
    partial = target.with_name(target.name + ".partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    os.replace(partial, target)
