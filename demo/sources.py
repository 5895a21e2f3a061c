"""The raw texts of the four domains, all found or made on the user's own machine."""

import re
import sysconfig
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from pydoc_data.topics import topics

from packaging.requirements import Requirement

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


def installed(package: str, found: dict[str, Distribution] | None = None) -> dict[str, Distribution]:
    """List a package and what it needs, directly or not, as far as installed: no extras, no tools.

    Args:
        package: The name of the package.
        found: What is known already; it receives the others.

    Returns:
        The packages by name, in lower case.
    """
    found = {} if found is None else found
    name = re.sub(r"[-_.]+", "-", package).lower()
    if name in found:
        return found
    try:
        found[name] = distribution(package)
    except PackageNotFoundError:
        return found
    for line in found[name].requires or []:
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            installed(needed.name, found)
    return found


def licence_texts() -> dict[str, str]:
    """Read the licence files of weft's own requirements, whatever else is installed beside them.

    Returns:
        The licence texts by name.
    """
    root = Path(sysconfig.get_path("purelib"))
    files = [
        Path(package.locate_file(file))
        for package in installed("weft").values()
        for file in package.files or []
        if LICENCE_NAME.fullmatch(file.name)
    ]
    return read_all(root, [path for path in files if path.is_file() and path.is_relative_to(root)])


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
