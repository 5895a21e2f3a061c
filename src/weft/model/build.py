"""A mixture made of adapters, and a saved one loaded: by whom it may be, and as the command line names it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn

from weft.base_model.loading import base_model_of, load_placed_base, load_tokenizer, task_type_of
from weft.base_model.state import Flags
from weft.checkpoint.adapters import local_folder
from weft.checkpoint.folder import open_mixture, saved_base
from weft.checkpoint.xlora_layout import is_original
from weft.config import XLoraConfig
from weft.errors import CheckpointError, ConfigError
from weft.model.registration import peft_model_of
from weft.model.saving import load_gate


def from_adapters(
    base: nn.Module | str | os.PathLike[str],
    adapters: dict[str, str],
    *,
    device_map: Any = None,
    dtype: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    **config: Any,
) -> PeftModel:
    """Make one model of a base model and several LoRA adapters of it. The gate is new: train it.

    Args:
        base: a transformers model (changed in place), or the name or path of a causal or sequence-to-sequence language
            model.
        adapters: expert name -> folder or Hub id, in the order of the gate's outputs.
        device_map: where the base model is loaded, as in transformers; for one that is named.
        dtype: the base model's number format; likewise.
        revision: the base model's branch, tag or commit on the Hub; likewise.
        token: for the Hub, of the base model and the adapters.
        trust_remote_code: run the code that the base model brings along; else a base that needs such code is refused.
        **config: options of `XLoraConfig`.

    Returns:
        peft's `PeftModel`, with the gate (and, with `use_trainable_adapters`, the experts) trainable.

    Raises:
        ConfigError: an option is unknown or out of range.
        AdapterError: an adapter cannot be read, or does not fit.

    Example:
        >>> model = weft.from_adapters(base, {"math": "adapters/math", "code": "adapters/code"}, top_k_lora=1)
        >>> model.print_trainable_parameters()
    """
    if isinstance(base, dict) and not isinstance(adapters, dict):  # the other way round
        base, adapters = adapters, base
    options = XLoraConfig(adapters=adapters, revision=revision, **config)
    if token is not None:
        options.adapters = _fetched(options.adapters, token)
    loading = {"device_map": device_map, "dtype": dtype, "revision": revision, "token": token}
    model = base_model_of(base, None, trust_remote_code=trust_remote_code, **loading)
    if options.base_model_name_or_path is None:
        options.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    if options.task_type is None:
        options.task_type = task_type_of(model)
    return peft_model_of(model, options)


def from_pretrained(
    path: str | os.PathLike[str],
    base: nn.Module | str | os.PathLike[str] | None = None,
    *,
    adapters: dict[str, str] | None = None,
    is_trainable: bool = False,
    device_map: Any = None,
    dtype: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> PeftModel:
    """Load a saved mixture: a folder of weft's, of peft's X-LoRA, or of the original xlora library.

    Args:
        path: folder or Hub id.
        base: the base model, or its name or path; None takes the one that the folder names.
        adapters: where the experts are, if not where the folder says.
        is_trainable: leave the gate trainable; otherwise it is frozen and the model in evaluation mode.
        device_map: where the base model is loaded, as in transformers; for one that is named.
        dtype: the base model's number format; likewise.
        revision: the mixture's branch, tag or commit on the Hub; the base model's is in its folder.
        token: for the Hub, of the mixture, the base model and the experts.
        trust_remote_code: run the code that the base model brings along; else a base that needs such code is refused.
            A mixture never has code.

    Raises:
        ConfigError: the mixture is a model, or `device_map` or `dtype` are given with a base model that is one.
        CheckpointError: files are missing, broken, altered, or of another model. Nothing is loaded then, and a base
            model that was passed in is as it was.

    Example:
        >>> model = weft.from_pretrained("my-mixture")
        >>> model.generate(**tokenizer("Hello", return_tensors="pt"))
    """
    path, base = _in_order(path, base)
    saved = open_mixture(path, adapters=adapters, revision=revision, token=token)
    options = XLoraConfig.of_saved(saved)
    options.inference_mode = not is_trainable
    if token is not None:
        options.adapters = _fetched(options.adapters, token)
    loading = {"device_map": device_map, "dtype": dtype, "revision": options.revision, "token": token}
    model = base_model_of(base, options, trust_remote_code=trust_remote_code, **loading)
    if options.task_type is None:
        options.task_type = task_type_of(model)
    flags = Flags(model)
    peft_model = peft_model_of(model, options.carry(saved))
    try:
        load_gate(peft_model, saved)
    except BaseException:
        tuner: Any = peft_model.base_model
        tuner.unload()
        flags.restore(model)
        raise
    return peft_model if is_trainable else peft_model.eval()


def load_mixture(
    path: str, base: str | None, dtype: str, quantization: str | None = None, *, trust_remote_code: bool = False
) -> tuple[PeftModel, Any]:
    """A trained mixture on its base model, and the base's tokenizer.

    Raises:
        CheckpointError: one of them is missing, broken or of another model.
        ConfigError: the library for the quantisation is missing.
    """
    name = base_name(path, base)
    placed = load_placed_base(name, dtype, quantization, trust_remote_code=trust_remote_code)
    return from_pretrained(path, placed), load_tokenizer(name, trust_remote_code=trust_remote_code)


def base_name(path: str, base: str | None) -> str:
    """The base model of a mixture: the one that is given, or that the mixture names.

    Raises:
        CheckpointError: there is no mixture, or it names none.
    """
    folder = local_folder(path, "model")
    name = base or saved_base(folder)
    if name is None:
        raise CheckpointError(f"{folder} does not name its base model: give it with --base")
    return name


def _in_order(path: Any, base: Any) -> tuple[Any, Any]:
    """(the mixture, its base model), in whichever order they were given: `from_adapters` takes the base first.

    Raises:
        ConfigError: a model stands where the mixture should.
    """
    if isinstance(path, nn.Module):
        if base is None or isinstance(base, nn.Module):
            raise ConfigError(
                f"path ({type(path).__name__}) must be the folder or Hub id of a mixture: "
                "weft.from_pretrained(mixture, base). weft.from_adapters(base, adapters) makes a new one"
            )
        return base, path
    if base is not None and not isinstance(base, nn.Module) and _is_a_models(path) and not _is_a_models(base):
        return base, path
    return path, base


def _is_a_models(path: Any) -> bool:
    """Whether this is the folder of a whole model."""
    if not isinstance(path, str | os.PathLike):
        return False
    folder = Path(os.path.expanduser(path))
    if not os.path.isfile(folder / "config.json"):
        return False
    return not os.path.isfile(folder / CONFIG_NAME) and not is_original(folder)


def _fetched(adapters: dict[str, str] | None, token: str | bool) -> dict[str, str]:
    """The adapters' folders, those on the Hub fetched with this token."""
    return {name: str(local_folder(at, f"adapter {name!r}", token=token)) for name, at in (adapters or {}).items()}
