"""Makes a mixture from adapters, and loads a saved one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from weft.base_model.loading import base_model_of, load_placed_base, load_tokenizer, task_type_of
from weft.base_model.state import Flags
from weft.checkpoint.adapters import is_base_model, local_folder
from weft.checkpoint.base_place import refuse_missing_base
from weft.checkpoint.folder import open_mixture, saved_base
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
    """Make a mixture of a base model and several LoRA adapters (X-LoRA, arXiv 2402.07148). Its gate must be trained.

    Args:
        base: a transformers model, which is changed in place; or the folder or Hub id of a causal or
            sequence-to-sequence language model.
        adapters: expert name -> folder or Hub id, in the order of the gate's outputs.
        device_map: as in transformers; only if `base` is a folder or Hub id.
        dtype: dtype of the base model; only if `base` is a folder or Hub id.
        revision: branch, tag or commit of the base model on the Hub; only if `base` is a Hub id.
        token: token for the Hub, for the base model and the adapters.
        trust_remote_code: run code that comes with the base model. If False, a base model with such code is refused.
        **config: options of `XLoraConfig`.

    Returns:
        peft's `PeftModel`. The gate is trainable, and with `use_trainable_adapters` also the experts.

    Raises:
        ConfigError: an option is unknown or out of range.
        AdapterError: an adapter cannot be read, or does not fit the base model.
        CheckpointError: the base model cannot be loaded.

    Example:
        >>> model = weft.from_adapters(base, {"math": "adapters/math", "code": "adapters/code"}, top_k_lora=1)
        >>> model.print_trainable_parameters()
    """
    if isinstance(base, dict) and not isinstance(adapters, dict):  # the arguments are in the other order
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
    """Load a saved mixture: a folder of weft, of peft's X-LoRA, or of the original xlora library.

    Args:
        path: folder or Hub id of the mixture.
        base: the base model, its folder or its Hub id; None takes the one that the mixture's folder names.
        adapters: name -> path of the experts, if they are not where the folder says.
        is_trainable: make the gate trainable. If False, it is frozen and the model is in evaluation mode.
        device_map: as in transformers; not with a base model that is loaded already.
        dtype: dtype of the base model; not with a base model that is loaded already.
        revision: branch, tag or commit of the mixture on the Hub. The base model's revision is in the mixture's folder.
        token: token for the Hub, for the mixture, the base model and the experts.
        trust_remote_code: run code that comes with the base model. If False, a base model with such code is refused. A
            mixture never contains code.

    Returns:
        peft's `PeftModel`.

    Raises:
        ConfigError: `path` is a model, or `device_map` or `dtype` is given with a base model that is loaded already.
        CheckpointError: files are missing, broken, changed, or belong to another model. A base model that was passed in
            is unchanged then.

    Example:
        >>> model = weft.from_pretrained("my-mixture")
        >>> tokenizer = AutoTokenizer.from_pretrained("my-model")
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
    """Load a saved mixture with its base model, and the base model's tokenizer. For the arguments see `load_base`.

    Raises:
        CheckpointError: one of them is missing, broken or belongs to another model.
        ConfigError: bitsandbytes is not installed.
    """
    name = base_name(path, base)
    placed = load_placed_base(name, dtype, quantization, trust_remote_code=trust_remote_code)
    return from_pretrained(path, placed), load_tokenizer(name, trust_remote_code=trust_remote_code)


def base_name(path: str, base: str | None) -> str:
    """The folder or Hub id of a mixture's base model: `base`, or else the one that the mixture names.

    Raises:
        CheckpointError: there is no mixture at `path`, or it does not name its base model, or names a folder that does
            not exist.
    """
    folder = local_folder(path, "model")
    named = saved_base(folder)  # also where another is given: what is no mixture's folder is refused
    name = base or named
    if name is None:
        raise CheckpointError(f"{folder} does not name its base model: give it with --base")
    if not base:
        refuse_missing_base(folder, name)
    return name


def _in_order(path: Any, base: Any) -> tuple[Any, Any]:
    """(mixture, base model), also if they were given in the order of `from_adapters`, which takes the base first.

    Raises:
        ConfigError: the mixture is a model.
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
    """Whether this is the folder of a full model, not of an adapter or mixture."""
    return isinstance(path, str | os.PathLike) and is_base_model(Path(os.path.expanduser(path)))


def _fetched(adapters: dict[str, str] | None, token: str | bool) -> dict[str, str]:
    """name -> local folder of the adapters; adapters on the Hub are downloaded with this token."""
    return {name: str(local_folder(at, f"adapter {name!r}", token=token)) for name, at in (adapters or {}).items()}
