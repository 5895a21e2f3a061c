"""Reading LoRA adapters from folders or the Hub.

Everything is read and checked before the base model is changed (`model/inject.py`). Only safetensors files are read;
pickles are not opened.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from weft.checkpoint.adapter_keys import KEY_PREFIX, own_keys
from weft.checkpoint.adapter_options import option_problems, rank_problems
from weft.checkpoint.xlora_layout import is_original
from weft.errors import AdapterError, CheckpointError, bullet_list, first_line
from weft.files.names import name_problems
from weft.files.reading import kind_shown, path_shown, read_json, shown
from weft.files.tensors import Opened, taken
from weft.files.writing import settle

_MOST_REASON = 400  # maximum number of characters of another library's message
# Options of a LoraConfig that do more than add B A x to a layer's output: such adapters cannot be mixed.
_UNMIXABLE = {
    "layer_replication": "replicates layers of the base model",
    "target_parameters": "adapts bare parameters",
    "alora_invocation_tokens": "acts on a part of the text only",
    "arrow_config": "routes between other adapters",
    "megatron_config": "has peft import a module that the config names",
}
# Options of LoRA variants, which do not compute B A x, or change the base model's weights when they are loaded. Later
# versions of peft also mark them in the metadata of the options. DoRA is a variant that can be mixed.
_VARIANTS = {"use_qalora", "velora_config", "monteclora_config", "use_bdlora", "kasa_config"}


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter as read from its folder.

    Attributes:
        name: the name of the expert.
        folder: the folder of its files.
        config: its options, as peft's `LoraConfig`.
        weights: all tensors except `heads`, under peft's keys.
        heads: tensors of full modules that are saved with the adapter (`modules_to_save`) but not used in the mixture.
    """

    name: str
    folder: Path
    config: LoraConfig
    weights: dict[str, Tensor]
    heads: dict[str, Tensor]


# Initialisations that subtract the adapter's initial value from the base weights: the adapter needs these weights.
_BASE_CHANGING_STARTS = ("pissa", "corda", "olora", "loftq", "lora_ga")


def read_adapters(
    paths: dict[str, str],
    *,
    allow_dora: bool = False,
    heads: Sequence[str] = (),
    base_is_known: bool = False,
    opened: Opened | None = None,
) -> list[Adapter]:
    """Read the adapters of one base model.

    Args:
        paths: name -> folder or Hub id, in the order of the gate's outputs.
        allow_dora: accept adapters with DoRA.
        heads: paths of modules that the mixture trains itself. An adapter's weights for them are not used.
        base_is_known: the base model is given, and its layers will be compared with the adapters. If False, the
            adapters' `base_model_name_or_path` must agree.
        opened: tensors of files that were read already.

    Raises:
        AdapterError: files are missing or unreadable, an adapter cannot be mixed, or the base models differ; all
            problems at once.
    """
    adapters: list[Adapter] = []
    problems: list[str] = []
    for name, path in paths.items():
        try:
            adapters.append(_read_adapter(name, path, allow_dora=allow_dora, heads=heads, opened=opened))
        except AdapterError as err:
            problems.append(str(err))
    named = None if base_is_known else different_bases(adapters)
    if named is not None:
        problems.append(
            f"they are of different base models ({named}): expected one base model for all. The names alone say so: "
            "give the base model too (base, or --base), and what fits it is taken"
        )
    if problems:
        raise AdapterError(f"the adapters cannot be experts of one model:{bullet_list(problems)}")
    return adapters


def table_problems(adapters: dict[str, str] | None, expert_names: list[str] | None) -> list[str]:
    """The problems of a mixture's `adapters` ({name: path}) and `expert_names`, one sentence each."""
    if not adapters or not isinstance(adapters, dict):
        return [f"adapters ({shown(adapters)}) must name at least one expert: {{name: folder or Hub id}}"]
    problems = []
    for name, path in adapters.items():
        if not path or not isinstance(path, (str, os.PathLike)):
            problems.append(f"adapters ({shown(path)} for {shown(name)}) must be a folder or Hub id")
    problems += name_problems(adapters)
    folded = [str(name).lower() for name in adapters]
    if len(set(folded)) < len(folded):
        problems.append(
            f"adapters ({shown(list(adapters))}) must have names that differ in more than upper and lower case"
        )
    if expert_names is not None and (
        not isinstance(expert_names, list) or sorted(map(repr, expert_names)) != sorted(map(repr, adapters))
    ):
        problems.append(f"expert_names ({shown(expert_names)}) must be the names in adapters ({shown(list(adapters))})")
    return problems


def local_folder(
    path: str | os.PathLike[str], what: str, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """A local folder, or the downloaded snapshot of a Hub id (user/repository, or user/repository/folder).

    A local folder that a killed process left half replaced is restored first (`weft.files.writing`).

    Args:
        path: folder or Hub id.
        what: what the messages call it.
        revision: branch, tag or commit on the Hub; None takes the main branch.
        token: token for the Hub; None takes the machine's token, if there is one.

    Raises:
        CheckpointError: there is no such folder or Hub id, or the folder cannot be restored.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise CheckpointError(f"{what} ({shown(path)}) must be a folder or Hub id")
    path = os.fspath(path)
    try:
        folder = Path(path).expanduser()
    except RuntimeError as err:  # ~name of an unknown user
        raise CheckpointError(f"{what} ({path}) cannot be found: {first_line(err)}") from err
    if os.path.isdir(folder):
        if not os.access(folder, os.R_OK | os.X_OK):
            raise CheckpointError(f"{what} ({path}) cannot be read: the folder is not yours to read")
        settle(folder)
        return folder
    inside = re.fullmatch(r"([^/]+/[^/]+)/(.+?)/*", path)
    repository, below = (inside[1], f"{inside[2]}/") if inside else (path, "")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = [f"{below}{pattern}" for pattern in ("*.json", "*.safetensors", "*README.md")]
        snapshot = snapshot_download(repository, allow_patterns=wanted, revision=revision, token=token)
        return Path(snapshot) / below
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as err:
        message = (
            f"{what} ({path_shown(path)}) is neither a folder here nor a Hub id that can be read: "
            f"{first_line(err)[:_MOST_REASON]}"
        )
        raise CheckpointError(message) from err


def is_base_model(folder: Path) -> bool:
    """Whether this is the folder of a whole model, and of no mixture or adapter."""
    if not os.path.isfile(folder / "config.json"):
        return False
    return not os.path.lexists(folder / CONFIG_NAME) and not is_original(folder)


def _read_adapter(name: str, path: str, *, allow_dora: bool, heads: Sequence[str], opened: Opened | None) -> Adapter:
    try:
        folder = local_folder(path, f"adapter {name!r}")
    except CheckpointError as err:
        raise AdapterError(str(err)) from err
    try:
        config = _read_config(name, path, folder)
        if not _is_there(folder / SAFETENSORS_WEIGHTS_NAME) and _is_there(folder / "adapter_model.bin"):
            raise AdapterError(
                f"adapter {name!r} ({path}) is saved as a pickle (adapter_model.bin), which weft does not open: "
                "save it again with peft, which writes safetensors"
            )
        weights = own_keys(taken(folder / SAFETENSORS_WEIGHTS_NAME, opened))
    except CheckpointError as err:
        # Only safetensors are downloaded from the Hub, so a pickle there is not seen.
        unfetched = not os.path.isdir(path) and not _is_there(folder / SAFETENSORS_WEIGHTS_NAME)
        hint = "; weft does not fetch or open pickles (adapter_model.bin)" if unfetched else ""
        raise AdapterError(f"adapter {name!r}: {err}{hint}") from err
    if config.use_dora and not allow_dora:
        refuse_dora(name)
    _refuse_unmixable(name, config)
    problems = rank_problems(config, weights)
    if problems:
        raise AdapterError(
            f"adapter {name!r}: {folder / CONFIG_NAME} does not fit {SAFETENSORS_WEIGHTS_NAME}: {'; '.join(problems)}"
        )
    prefixes = tuple(f"{KEY_PREFIX}{path}." for path in heads)
    own = {key: weights.pop(key) for key in list(weights) if key.startswith(prefixes) and ".lora_" not in key}
    return Adapter(name, folder, config, weights, own)


def _is_there(file: Path) -> bool:
    return os.path.lexists(file)


def _read_config(name: str, path: str, folder: Path) -> LoraConfig:
    file = folder / CONFIG_NAME
    if is_base_model(folder):
        raise AdapterError(f"adapter {name!r} ({path}) is a base model, not a LoRA adapter of one: give it with --base")
    values = read_json(file)
    kind = values.get("peft_type")
    if kind != "LORA":
        what = ": it is a mixture, whose experts are adapters" if kind == "XLORA" else ""
        raise AdapterError(f"adapter {name!r} ({path}) is of type {kind_shown(kind)}, not LORA{what}")
    problems = option_problems(values)
    if problems:
        raise AdapterError(f"adapter {name!r}: {file} cannot be read: {'; '.join(problems)}")
    try:
        return LoraConfig.from_pretrained(str(folder))
    except Exception as err:  # LoraConfig's own checks
        raise AdapterError(f"adapter {name!r}: peft refuses {file}: {first_line(err)}") from err


def _refuse_unmixable(name: str, config: LoraConfig) -> None:
    start = str(config.init_lora_weights).lower()
    if start.startswith(_BASE_CHANGING_STARTS):
        raise AdapterError(
            f"adapter {name!r} has init_lora_weights ({start!r}), which changes the base model's weights, and that "
            "cannot be mixed: save it again as a plain LoRA (peft's path_initial_model_for_weight_conversion)"
        )
    for option, what in _UNMIXABLE.items():
        value = getattr(config, option, None)
        if value:
            raise AdapterError(f"adapter {name!r} has {option} ({value!r}): it {what}, which cannot be mixed")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_variant = field.name in _VARIANTS or field.metadata.get("is_lora_variant")
        if (is_variant and value and field.name != "use_dora") or value in field.metadata.get("lora_variants", ()):
            raise AdapterError(
                f"adapter {name!r} has {field.name} ({value!r}): it is a variant of LoRA, which X-LoRA does not "
                "support: leave it out, or turn it into a plain LoRA with peft's convert_to_lora"
            )
    if config.bias != "none":
        raise AdapterError(
            f"adapter {name!r} has bias ({config.bias!r}): it changes the base model's biases, which cannot be mixed; "
            "expected 'none'"
        )


def different_bases(adapters: list[Adapter]) -> str | None:
    """The adapters' base models as text ('a' of X; 'b' of Y) if they differ; else None.

    Only the last part of each path or Hub id is compared, as mirrors and moved folders change the rest.
    """
    names = {adapter.name: str(adapter.config.base_model_name_or_path or "") for adapter in adapters}
    if len({model_name(base) for base in names.values() if base}) < 2:
        return None
    return "; ".join(f"{name!r} of {base}" for name, base in names.items() if base)


def model_name(base: str) -> str:
    """The last part of a base model's path or Hub id, in lower case."""
    cached = re.search(r"models--([^/]+)", base)  # in the Hub's cache: .../models--org--model/snapshots/<commit>
    return (cached.group(1).split("--")[-1] if cached else Path(base).name).lower()


def refuse_dora(name: str) -> None:
    """Raise for an adapter with DoRA if `allow_dora` is off.

    Raises:
        AdapterError: always.
    """
    raise AdapterError(
        f"adapter {name!r} uses DoRA, for which allow_dora (False) must be True, as it needs a norm of every adapted "
        "weight: set it, leave the adapter out, or turn it into a plain LoRA with peft's convert_to_lora"
    )
