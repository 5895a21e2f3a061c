"""`weft.push` and `weft.pull`: a saved mixture to the Hugging Face Hub and back, through huggingface_hub.

Only what belongs to the mixture goes up: its own files, its experts, tokenizer, tables and texts; no checkpoints of a
training, and no pickles.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from weft.adapters import read_json
from weft.card import card_text, is_hub_id, is_own
from weft.checkpoint import read_config
from weft.errors import ConfigError, HubError, first_line
from weft.licences import CARD
from weft.manifest import EXPERTS_FOLDER
from weft.original import ORIGINAL_CONFIG
from weft.whole import replace_folder

_SUFFIXES = {".json", ".jinja", ".md", ".model", ".png", ".safetensors", ".svg", ".txt"}
_LICENCES = ("LICENSE", "LICENCE", "NOTICE")


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    base: str | None = None,
    licence: str | None = None,
    evaluation: str | os.PathLike[str] | None = None,
    message: str = "A mixture of LoRA experts, saved by weft",
) -> str:
    """Put a saved mixture on the Hub, with a model card, in one commit.

    Args:
        folder: of a mixture that weft saved.
        repo_id: user/name; made if it is not there.
        private: of a repository that is made; one that exists stays as it is.
        base: the base model's Hub id, where the mixture names a folder; written to the card and the config there.
        licence: of the mixture itself; None declares none.
        evaluation: what `weft eval --output` wrote; None takes the folder's eval.json, if there is one.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        ConfigError: the repository's or the base model's name cannot be one.
        CheckpointError: the folder is not whole, or not weft's.
        HubError: no token, no right to write, or no Hub in reach. What could not be committed changes nothing.

    Example:
        >>> weft.push("my-mixture", "me/my-mixture", base="HuggingFaceTB/SmolLM2-135M", licence="apache-2.0")
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    source = Path(folder).expanduser()
    _check_id(repo_id)
    if base is not None and not is_hub_id(base):
        raise ConfigError(f"base ({base!r}) must be a Hub id, user/name, which others can load")
    texts = {CONFIG_NAME: _config_text(source, base)}  # reads and verifies the folder
    if not is_own(source):
        texts[CARD] = card_text(source, name=repo_id, base=base, licence=licence, evaluation=evaluation)
    operations = [
        CommitOperationAdd(name, texts[name].encode() if name in texts else str(source / name))
        for name in sorted({*files_to_push(source), *texts})
    ]
    if get_token() is None:
        raise HubError(
            f"repo_id ({repo_id}) cannot be written without a token: make one at "
            "https://huggingface.co/settings/tokens and log in with  hf auth login,  or set HF_TOKEN"
        )
    api = HfApi()
    with _errors_of(f"repo_id ({repo_id}) cannot be written"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.create_commit(repo_id, operations, commit_message=message).commit_url


def pull(repo_id: str, output: str | os.PathLike[str] | None = None, *, revision: str | None = None) -> Path:
    """Get a mixture from the Hub into a folder, whole and verified, or not at all.

    Args:
        repo_id: user/name, of a mixture in weft's layout, peft's or the original xlora library's.
        output: a new or empty folder; None takes one of the repository's name here.
        revision: branch, tag or commit; None takes the main branch.

    Returns:
        The folder.

    Raises:
        ConfigError: the name cannot be one, or the output is not empty.
        HubError: there is no such repository or revision, no right to read it, or no Hub in reach.
        CheckpointError: what is there is no mixture, or damaged.

    Example:
        >>> model = weft.from_pretrained(weft.pull("me/my-mixture"))
    """
    from huggingface_hub import snapshot_download

    _check_id(repo_id)
    target = Path(output if output is not None else repo_id.partition("/")[2]).expanduser()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConfigError(f"output ({target}) exists already: give a new or empty folder")
    patterns = [f"*{suffix}" for suffix in sorted(_SUFFIXES)] + [f"*{name}*" for name in _LICENCES]
    with _errors_of(f"repo_id ({repo_id}) cannot be read"):
        snapshot = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    last = CONFIG_NAME if (snapshot / CONFIG_NAME).exists() else ORIGINAL_CONFIG
    read_config(snapshot)  # verifies
    replace_folder(target, lambda part: _copy(snapshot, part), last)
    return target


def files_to_push(folder: Path) -> list[str]:
    """The files of a mixture that belong on the Hub, relative to its folder."""
    beside = [file for file in folder.iterdir() if file.is_file()]
    experts = [file for file in (folder / EXPERTS_FOLDER).rglob("*") if file.is_file()]
    wanted = [
        file
        for file in beside + experts
        if (file.suffix in _SUFFIXES or file.name.startswith(_LICENCES)) and file.name != "trainer_state.json"
    ]
    return sorted(file.relative_to(folder).as_posix() for file in wanted)


def _copy(snapshot: Path, part: Path) -> None:
    for name in os.listdir(snapshot):
        if (snapshot / name).is_dir():
            shutil.copytree(snapshot / name, part / name)  # follows the links of the cache
        else:
            shutil.copy(snapshot / name, part / name)


def _config_text(folder: Path, base: str | None) -> str:
    if not folder.is_dir():
        raise ConfigError(f"folder ({folder}) must be a saved mixture's folder here")
    read_config(folder)
    values = read_json(folder / CONFIG_NAME)
    if base is not None:
        values["base_model_name_or_path"] = base
    return json.dumps(values, indent=2, sort_keys=True)


def _check_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as err:
        raise ConfigError(f"repo_id ({repo_id!r}) must be user/name: {first_line(err)}") from err
    if repo_id.count("/") != 1:
        raise ConfigError(f"repo_id ({repo_id!r}) must be user/name")


@contextlib.contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """What huggingface_hub raises as one error that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    network: Any = HfHubHTTPError.__bases__[0]  # of the HTTP library that huggingface_hub uses
    try:
        yield
    except GatedRepoError as err:
        raise HubError(
            f"{what}: its owner grants access one by one. Ask on its page, and log in with  hf auth login"
        ) from err
    except RevisionNotFoundError as err:
        raise HubError(f"{what}: there is no such revision: {first_line(err)}") from err
    except RepositoryNotFoundError as err:
        raise HubError(f"{what}: there is no such repository, or it is private: log in with  hf auth login") from err
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as err:
        if isinstance(err, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
            raise HubError(f"{what}: HF_HUB_OFFLINE is set: unset it") from err
        cause = first_line(err.__cause__ or err)
        raise HubError(f"{what}: the Hub is not in reach ({cause}): look at the network") from err
    except HfHubHTTPError as err:
        status = err.response.status_code if err.response is not None else None
        if status in (401, 403):
            raise HubError(f"{what}: the token is wrong, or may not do that ({status}): hf auth login") from err
        raise HubError(f"{what}: {first_line(err)}") from err
    except (network, ConnectionError) as err:
        raise HubError(f"{what}: the Hub is not in reach ({first_line(err)}): look at the network") from err
