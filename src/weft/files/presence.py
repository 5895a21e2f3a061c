"""Checks that the models and files that options name exist. No file is read, and there is no request to the Hub.

Offline, a name that is no folder here must be in the Hub's cache.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from weft.files.reading import path_shown

LINES = {".jsonl", ".json", ".ndjson"}
TABLES = {".csv": ",", ".tsv": "\t"}  # what is between the columns
# Files that hold texts in a form that is not read, and what to do.
_NOT_READ = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"), "is compressed: unpack it first"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "is a spreadsheet: save it as .csv"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub"), "has formatted text: save it as .txt"),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".avro", ".db", ".sqlite"), "is not read: save it as .parquet"),
}
DATA_FILES = {*LINES, *TABLES, *_NOT_READ, ".parquet", ".txt", ".md"}
EXPECTED = ".jsonl, .csv, .tsv, .parquet or text files"
_LONGEST_NAME = 1000  # of a data set
_OFFLINE = "and the Hub cannot be asked, as HF_HUB_OFFLINE is set"


def file_is_missing(source: str) -> bool:
    """Whether a source of texts can only be a file, and that file does not exist."""
    if os.path.isfile(source) or os.path.isdir(source):
        return False
    path = Path(source)
    return path.suffix.lower() in DATA_FILES or path.is_absolute() or len(source) > _LONGEST_NAME


def source_problem(what: str, source: str) -> str | None:
    """The problem of a source of texts; None if it can be read, or may be the name of a data set."""
    suffix = Path(source).suffix.lower()
    if not source.strip():
        return f"{what} ({source}) names no file: give {EXPECTED}, or a data set's name"
    if os.path.isfile(source):
        return f"{what} ({source}) {_NOT_READ[suffix]} (expected {EXPECTED})" if suffix in _NOT_READ else None
    if os.path.isdir(source):
        return _folder_problem(what, source)
    if file_is_missing(source) or source.count("/") > 1 or not may_be_hub_id(source):
        return f"{what} ({path_shown(source)}) is not a file: give {EXPECTED}, or a data set's name"
    if _is_offline() and not _is_cached_data_set(source):
        return f"{what} ({source}) is neither a file nor a folder here, {_OFFLINE}: give {EXPECTED}"
    return None


def _folder_problem(what: str, folder: str) -> str | None:
    """The problem of a folder that is given for texts, if it is a model's."""
    names = set(os.listdir(folder)) if os.access(folder, os.R_OK) else set()
    is_model = "config.json" in names and any(name.endswith(".safetensors") for name in names)
    if is_model or names & {"adapter_config.json", "xlora_config.json"}:
        return f"{what} ({folder}) is the folder of a model or adapter: give {EXPECTED}"
    return None


def _is_offline() -> bool:
    """Whether the Hub must not be asked."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _is_cached_data_set(name: str) -> bool:
    """Whether a data set of the Hub may be in the cache. Without a user's name, it can be any folder that was read."""
    from huggingface_hub import constants

    prepared = os.environ.get("HF_DATASETS_CACHE") or os.path.join(constants.HF_HOME, "datasets")
    fetched = os.path.join(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    return "/" in name and (os.path.isdir(os.path.join(prepared, name.replace("/", "___"))) or os.path.isdir(fetched))


def file_missing(what: str, file: str, written_by: str) -> str | None:
    """The problem of a file that must exist; None if it does."""
    if os.path.isfile(file):
        return None
    return f"{what} ({path_shown(file)}) is not a file: give one that {written_by} has written"


def model_problem(what: str, name: str) -> str | None:
    """The problem of the name of a model or adapter; None if it is a folder, or may be a Hub id.

    Args:
        what: the model or adapter, for the message.
        name: folder or Hub id.
    """
    if os.path.isdir(name):
        return None
    if os.path.isfile(name):
        return f"{what} ({path_shown(name)}) is a file, expected a folder or Hub id"
    if not may_be_hub_id(name):
        return f"{what} ({path_shown(name)}) is neither a folder here nor a Hub id"
    if _is_offline() and not _is_cached(name):
        return f"{what} ({name}) is no folder here, {_OFFLINE}: give a folder"
    return None


def _is_cached(name: str) -> bool:
    """Whether the files of a Hub id, or some of them, are on this machine."""
    from huggingface_hub import constants

    repository = "--".join(name.split("/")[:2])
    return os.path.isdir(os.path.join(constants.HF_HUB_CACHE, f"models--{repository}"))


def model_doubt(what: str, name: str) -> str | None:
    """A sentence for a name that may be a Hub id or a mistyped folder; None for other names."""
    at = Path(name)
    if os.path.lexists(name) or not may_be_hub_id(name) or not os.path.isdir(at.parent):
        return None
    return f"{what} ({name}) is no folder here: if it is not on the Hub either, correct it too"


def may_be_hub_id(name: str) -> bool:
    """Whether this is user/repository, a repository's name alone, or user/repository/folder."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    inside = re.fullmatch(r"([^/]+/[^/]+)/(.+?)/*", name)
    try:
        validate_repo_id(inside[1] if inside else name)
    except HFValidationError:
        return False
    return True
