"""`weft.push` and `weft.pull`: upload a saved mixture to the Hugging Face Hub, and download it, with huggingface_hub.

The files for the upload are selected in `publication.py`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from weft.checkpoint.xlora_layout import ORIGINAL_CONFIG
from weft.config import XLoraConfig
from weft.errors import CheckpointError, ConfigError, HubError, first_line
from weft.files.ownership import refuse_used_folder
from weft.files.writing import replace_folder
from weft.formats.card import is_hub_id, todays_license
from weft.formats.publication import publication

_SUFFIXES = {".json", ".jinja", ".md", ".model", ".png", ".safetensors", ".svg", ".txt"}
_LICENSES = ("LICENSE", "LICENCE", "NOTICE")


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    base: str | None = None,
    license: str | None = None,
    evaluation: str | os.PathLike[str] | None = None,
    message: str = "A mixture of LoRA experts, saved by weft",
    dry_run: bool = False,
    licence: str | None = None,
) -> str:
    """Upload a saved mixture to the Hub, with a model card, in one commit.

    Uploaded are gate, options, manifest, experts, tokenizer, licences, the card, and the files eval.json and gate.png
    or gate.svg that weft wrote. Other files and links are not. If the options name a local folder as the base model, it
    is replaced by `base` or left out.

    Args:
        folder: the folder of a mixture that weft saved.
        repo_id: user/name; the repository is created if it does not exist.
        private: create a private repository; no effect on an existing one.
        base: Hub id of the base model, if the mixture names a local folder; written to the uploaded card and config.
        license: licence of the mixture, as a Hub identifier; None declares none.
        evaluation: a file that `weft eval --output` wrote; None takes the folder's eval.json, if there is one.
        message: message of the commit.
        dry_run: upload nothing, and return a list of what would be uploaded.
        licence: the old spelling of `license`, until 0.2.

    Returns:
        The URL of the commit; with `dry_run`, one line for each file and for each change.

    Raises:
        ConfigError: `repo_id` or `base` is not valid, or a file contains a local path.
        CheckpointError: the folder is not a complete mixture of weft, or has a link in place of a file.
        HubError: no token, no permission to write, or no connection. Nothing is committed then.

    Example:
        >>> weft.push("my-mixture", "me/my-mixture", base="HuggingFaceTB/SmolLM2-135M", license="apache-2.0")
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    _check_id(repo_id)
    if base is not None and not is_hub_id(base):
        raise ConfigError(f"base ({base!r}) must be a Hub id, user/name, which others can load")
    license = todays_license(license, licence)
    found = publication(Path(folder).expanduser(), name=repo_id, base=base, license=license, evaluation=evaluation)
    if dry_run:
        return found.listing()
    operations = [CommitOperationAdd(name, found.content(name)) for name in found.names]
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
    """Download a mixture from the Hub to a folder. It is verified before the folder is written.

    Args:
        repo_id: user/name of a mixture in the layout of weft, peft or the original xlora library.
        output: a new or empty folder; None takes the repository's name, in the working directory.
        revision: branch, tag or commit; None takes the main branch.

    Returns:
        The output folder.

    Raises:
        ConfigError: `repo_id` is not valid, or the output is not empty.
        HubError: there is no such repository or revision, no permission to read it, or no connection.
        CheckpointError: the repository is not a mixture, or is damaged.

    Example:
        >>> model = weft.from_pretrained(weft.pull("me/my-mixture"))
    """
    from huggingface_hub import snapshot_download

    _check_id(repo_id)
    target = Path(output if output is not None else repo_id.partition("/")[2]).expanduser()
    refuse_used_folder(target)
    patterns = [f"*{suffix}" for suffix in sorted(_SUFFIXES)] + [f"*{name}*" for name in _LICENSES]
    with _errors_of(f"repo_id ({repo_id}) cannot be read"):
        snapshot = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    last = CONFIG_NAME if (snapshot / CONFIG_NAME).exists() else ORIGINAL_CONFIG
    XLoraConfig.from_pretrained(snapshot)  # verifies
    replace_folder(target, lambda part: _copy(snapshot, part), last)
    return target


def _copy(snapshot: Path, part: Path) -> None:
    for name in os.listdir(snapshot):
        if (snapshot / name).is_dir():
            shutil.copytree(snapshot / name, part / name)  # follows the links of the cache
        else:
            shutil.copy(snapshot / name, part / name)


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
    """Turn an error of huggingface_hub in the block into one that says what to do.

    Raises:
        HubError: the request failed.
        CheckpointError: the Hub's cache cannot be written.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    network: Any = HfHubHTTPError.__bases__[0]  # the base error of huggingface_hub's HTTP library
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
    except OSError as err:
        raise CheckpointError(
            f"{what}: the Hub's cache ({constants.HF_HUB_CACHE}) cannot be written: {first_line(err)}; free some "
            "space, or set HF_HUB_CACHE to another folder"
        ) from err
