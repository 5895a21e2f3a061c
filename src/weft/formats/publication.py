"""Selects and checks the files of a saved mixture for the Hub. No local path is published.

Only files on a list are uploaded: those of the mixture, its experts and a tokenizer, licences, and results of
`weft eval` and `weft inspect`. Links are not followed. If options and cards name a local folder as the base model, the
uploaded copy has the base model's Hub id or no base model; the local files are not changed. A local path in any other
place is an error, and nothing is uploaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from weft.checkpoint.base_place import FROM_HERE, is_path
from weft.checkpoint.folder import open_mixture
from weft.checkpoint.licenses import CARD, declared_license, is_own
from weft.checkpoint.manifest import EXPERTS_FOLDER, MANIFEST_NAME, options_digest
from weft.config import XLoraConfig
from weft.errors import CheckpointError, ConfigError, bullet_list
from weft.files.reading import read_json, read_text
from weft.formats.card import EVAL_FILE, PICTURES, card_text, has_results

_ADAPTER = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
# Files of transformers' tokenizers and processors.
_TOKENIZER = (
    *("added_tokens.json", "chat_template.jinja", "generation_config.json", "merges.txt", "preprocessor_config.json"),
    *("processor_config.json", "sentencepiece.bpe.model", "source.spm", "special_tokens_map.json", "spiece.model"),
    *("target.spm", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"),
)
_TEMPLATES = "additional_chat_templates"
_LICENSE = re.compile(r"(LICEN[SC]E|NOTICE)(\.md|\.txt)?")
_TEXTS = {".json", ".jinja", ".md", ".txt", ""}
_VOCABULARIES = {"merges.txt", "tokenizer.json", "vocab.json", "vocab.txt"}  # parts of a path may be tokens
# Options with the path or Hub id from which a model or tokenizer was loaded.
_ORIGINS = ("base_model_name_or_path", "name_or_path", "_name_or_path")


@dataclass
class Publication:
    """The files to upload.

    Attributes:
        folder: the mixture's folder.
        names: names of all files, relative to the folder.
        texts: name -> content, for files that differ from those in the folder or are not in it.
        notes: the changes, one sentence each.
    """

    folder: Path
    names: list[str]
    texts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def content(self, name: str) -> bytes | str:
        """The content of a file as bytes, or its local path."""
        return self.texts[name].encode() if name in self.texts else str(self.folder / name)

    def listing(self) -> str:
        """The files with their sizes in bytes, and the changes, as text."""
        sizes = {
            name: len(self.texts[name].encode()) if name in self.texts else (self.folder / name).stat().st_size
            for name in self.names
        }
        return "\n".join([*(f"{size:>14,}  {name}" for name, size in sizes.items()), *self.notes])


def publication(
    folder: Path, *, name: str, base: str | None, license: str | None, evaluation: str | os.PathLike[str] | None
) -> Publication:
    """The files of a mixture for the upload; the folder is verified first.

    Args:
        folder: the mixture's folder.
        name: the mixture's Hub id.
        base: Hub id of the base model; None takes the one that the mixture names, if it is a Hub id.
        license: licence of the mixture, for its card.
        evaluation: a file that `weft eval --output` wrote, for its card.

    Raises:
        CheckpointError: the folder is not a complete mixture of weft, or has a link in place of a file.
        ConfigError: it is not a local folder, or a file contains a local path.
    """
    if not folder.is_dir():
        raise ConfigError(f"folder ({folder}) must be a saved mixture's folder here")
    saved = open_mixture(folder, keep_experts=False)
    names = list(_wanted(folder, XLoraConfig.of_saved(saved).expert_names or []))
    _refuse_links(folder, names)
    found = Publication(folder, names)
    local = _rewrite_origins(found, base)
    if not is_own(folder):
        found.texts[CARD] = card_text(saved, name=name, base=base, license=license, evaluation=evaluation)
    found.names = sorted({*names, *found.texts})
    _refuse_paths(found, local)
    return found


def _wanted(folder: Path, experts: list[str]) -> Iterator[str]:
    """The names of files that are on the list and exist."""
    entries = sorted(entry.name for entry in folder.iterdir())
    for name in (*_ADAPTER, MANIFEST_NAME, CARD, *PICTURES, *_TOKENIZER):
        if name in entries:
            yield name
    yield from filter(_LICENSE.fullmatch, entries)
    if has_results(folder / EVAL_FILE):
        yield EVAL_FILE
    if _TEMPLATES in entries and (folder / _TEMPLATES).is_dir():
        yield from (f"{_TEMPLATES}/{file.name}" for file in sorted((folder / _TEMPLATES).glob("*.jinja")))
    for expert in experts:
        inside = folder / EXPERTS_FOLDER / expert
        yield from (f"{EXPERTS_FOLDER}/{expert}/{name}" for name in _ADAPTER if (inside / name).exists())
        licenses = sorted(file.name for file in inside.iterdir() if _LICENSE.fullmatch(file.name))
        cards = [CARD] if declared_license(inside / CARD) is not None else []
        yield from (f"{EXPERTS_FOLDER}/{expert}/{name}" for name in [*cards, *licenses])


def _refuse_links(folder: Path, names: list[str]) -> None:
    for name in names:
        for part in (name, *map(str, Path(name).parents)):
            if part != "." and (folder / part).is_symlink():
                raise CheckpointError(
                    f"{folder / part} is a link, which is not followed to the Hub: put a copy of what it points to in "
                    "its place"
                )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is no file: move it away")


def _rewrite_origins(found: Publication, base: str | None) -> list[str]:
    """Replace local folders of the base model by its Hub id, or remove them; returns these folders."""
    local: list[str] = []
    changed: dict[str, dict[str, Any]] = {}
    for name in found.names:
        if not name.endswith(".json") or name in {MANIFEST_NAME, EVAL_FILE, *_VOCABULARIES}:
            continue
        values = read_json(found.folder / name)
        paths = [key for key in _ORIGINS if isinstance(values.get(key), str) and is_local(values[key])]
        local += [values[key] for key in paths]
        given = {CONFIG_NAME: {"base_model_name_or_path": base}}.get(name, {}) if base is not None else {}
        if paths or given:
            changed[name] = {**values, **dict.fromkeys(paths, base), **given}
    for name, rewritten in changed.items():
        found.texts[name] = json.dumps(rewritten, indent=2, sort_keys=True)
    experts = [name for name in changed if name.startswith(f"{EXPERTS_FOLDER}/")]
    if MANIFEST_NAME in found.names:
        _rewrite_manifest(found, {name: options_digest(changed[name]) for name in experts})
    for name in found.names:
        if name.endswith(f"/{CARD}"):
            text = card = read_text(found.folder / name)
            for path in local:
                text = text.replace(path, base or "the base model")
            if text != card:
                found.texts[name] = text
    for path in dict.fromkeys(local):
        instead = f"{base} stands in its place" if base is not None else "it is left out; --base HUB_ID names it"
        found.notes.append(f"base model {path} is a folder here: {instead}")
    return local


def _rewrite_manifest(found: Publication, options: dict[str, str]) -> None:
    """Write new digests of the experts' options into the manifest, and remove the local path of the base model."""
    manifest: dict[str, Any] = read_json(found.folder / MANIFEST_NAME)
    if options or FROM_HERE in manifest:
        manifest.pop(FROM_HERE, None)
        manifest["options"] |= options
        found.texts[MANIFEST_NAME] = json.dumps(manifest, indent=1)


def is_local(name: str) -> bool:
    """Whether a base model's name is a local path and not a Hub id."""
    return is_path(name) or Path(name).is_dir()


def _refuse_paths(found: Publication, local: list[str]) -> None:
    """Raise if a text file for the upload contains a local path.

    Raises:
        ConfigError: a file contains one; all of them at once.
    """
    here = [str(Path.home()), str(found.folder.resolve()), str(Path.cwd()), *local]
    # Only full paths: a home folder "/" or a model named "llama" would be found in any text.
    paths = {path for path in here if path.count("/") + path.count("\\") > 1 or (path.startswith("/") and path != "/")}
    whole = {path: re.compile(rf"(?<![\w/.]){re.escape(path)}(?![\w-])") for path in paths}
    problems = []
    for name in found.names:
        if Path(name).suffix in _TEXTS and name not in _VOCABULARIES:
            text = found.texts.get(name)
            if text is None:
                text = (found.folder / name).read_text(encoding="utf-8", errors="replace")
            problems += [f"{name}: {path}" for path, pattern in whole.items() if pattern.search(text)]
    if problems:
        raise ConfigError(
            f"folder ({found.folder}) has files with paths of this machine, which are not sent: take them out"
            f"{bullet_list(sorted(problems))}"
        )
