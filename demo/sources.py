"""The raw texts of the four domains, all found or made on the user's own machine."""

import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

from dedupe import without_repeats
from records import record_batch

RECORD_BATCHES = 120
LICENCE_NAME = re.compile(r"(.*licen[cs]e|copying|notice)[^.]*(\.txt|\.md|\.rst)?", re.IGNORECASE)


def read_all(root: Path, paths: list[Path]) -> dict[str, str]:
    """Read text files.

    Args:
        root: The folder to which the names shall be relative.
        paths: The files.

    Returns:
        The texts by name.
    """
    return {str(path.relative_to(root)): path.read_text("utf-8", errors="replace") for path in paths}


def python_sources() -> dict[str, str]:
    """Read the top-level modules of the standard library.

    Returns:
        The source texts by name.
    """
    root = Path(sysconfig.get_path("stdlib"))
    return read_all(root, list(root.glob("*.py")))


def licence_texts() -> dict[str, str]:
    """Read the licence files of the installed packages.

    Returns:
        The licence texts by name.
    """
    root = Path(sysconfig.get_path("purelib"))
    return read_all(root, [p for p in root.rglob("*") if LICENCE_NAME.fullmatch(p.name) and p.is_file()])


def domain_texts() -> dict[str, dict[str, str]]:
    """Collect the texts of every domain.

    Returns:
        For each domain its texts by name; no paragraph occurs in two of them.
    """
    return {
        "python": without_repeats(python_sources()),
        "reference": without_repeats(topics),
        "licences": without_repeats(licence_texts()),
        "records": {f"batch {seed:03d}": record_batch(seed) for seed in range(RECORD_BATCHES)},
    }
