"""How weft's model gets into peft's `PeftModel`, and the two functions most users start with.

peft finds the class of a model in a table by its type. `register_with_peft` puts weft's classes there for X-LoRA;
without it, peft's table stays as it is, and `from_adapters` and `from_pretrained` build the same object.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import CONFIG_NAME, PeftType, TaskType
from torch import nn

from weft.base_model.loading import base_errors, load_whole
from weft.checkpoint.adapters import local_folder
from weft.checkpoint.xlora_layout import is_original
from weft.config import XLoraConfig
from weft.errors import CheckpointError, ConfigError
from weft.files.writing import settle
from weft.model.inject import uncompiled
from weft.model.model import XLoraModel
from weft.model.saving import load_gate, save_whole

_peft_own: dict[str, Any] = {}
# Tasks whose models have a head to be trained.
_WITH_HEADS: dict[str, Any] = {
    TaskType.SEQ_CLS: transformers.AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: transformers.AutoModelForTokenClassification,
    TaskType.QUESTION_ANS: transformers.AutoModelForQuestionAnswering,
}


def register_with_peft() -> None:
    """Let peft's `get_peft_model` and `PeftModel.from_pretrained` build weft's X-LoRA, also from peft's `XLoraConfig`.

    So do transformers' own functions that take an adapter's folder: `AutoModelForCausalLM.from_pretrained`, `pipeline`.
    Idempotent; `unregister_from_peft` undoes it. Models that exist already stay what they are.

    Example:
        >>> weft.register_with_peft()
        >>> model = peft.get_peft_model(base, peft.XLoraConfig(...))  # an existing script, as it was
    """
    if not _peft_own:
        _peft_own["from_pretrained"] = PeftConfigMixin.__dict__["from_pretrained"]
        PeftConfigMixin.from_pretrained = classmethod(_config_of_folder)  # type: ignore[assignment]
        _peft_own["type_of"] = PeftConfigMixin.__dict__["_get_peft_type"]
        PeftConfigMixin._get_peft_type = classmethod(_type_of_folder)  # type: ignore[assignment]
        _peft_own["config"] = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.XLORA]
        _peft_own["model"] = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.XLORA]
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.XLORA] = XLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.XLORA] = XLoraModel


def unregister_from_peft() -> None:
    """Give peft its own X-LoRA back. Idempotent."""
    if _peft_own:
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.XLORA] = _peft_own["config"]
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.XLORA] = _peft_own["model"]
        PeftConfigMixin.from_pretrained = _peft_own["from_pretrained"]  # type: ignore[method-assign]
        PeftConfigMixin._get_peft_type = _peft_own["type_of"]  # type: ignore[method-assign]
        _peft_own.clear()


def _config_of_folder(cls: type, path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
    """peft's `from_pretrained` of configs, after which a mixture's knows its folder, by whatever class it was read.

    transformers reads it by `PeftConfig`, which looks for the experts in the present directory.
    """
    settle(Path(path, subfolder or ""))
    config = _peft_own["from_pretrained"].__get__(None, cls)(path, subfolder=subfolder, **kwargs)
    return XLoraConfig.from_pretrained(path, subfolder=subfolder) if isinstance(config, XLoraConfig) else config


def _type_of_folder(cls: type, model_id: Any, **kwargs: Any) -> Any:
    """peft's look at an adapter's folder, before which its old files are put back where a writer was killed."""
    settle(Path(model_id, kwargs.get("subfolder") or ""))
    return _peft_own["type_of"].__get__(None, cls)(model_id, **kwargs)


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
        options.task_type = _task_type(model)
    return _build_peft_model(model, options)


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
    folder = local_folder(path, "the X-LoRA model", revision=revision, token=token)
    options = XLoraConfig.from_pretrained(folder, adapters=adapters)
    options.inference_mode = not is_trainable
    if token is not None:
        options.adapters = _fetched(options.adapters, token)
    loading = {"device_map": device_map, "dtype": dtype, "revision": options.revision, "token": token}
    model = base_model_of(base, options, trust_remote_code=trust_remote_code, **loading)
    if options.task_type is None:
        options.task_type = _task_type(model)
    was_training = model.training
    peft_model = _build_peft_model(model, options)
    try:
        load_gate(peft_model, folder)
    except BaseException:
        tuner: Any = peft_model.base_model
        tuner.unload()
        model.train(was_training)
        raise
    return peft_model if is_trainable else peft_model.eval()


def _build_peft_model(model: nn.Module, options: XLoraConfig) -> PeftModel:
    """peft's model class for the task, with weft's X-LoRA in it whether or not weft is registered."""
    wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(options.task_type or "", PeftModel)
    if options.task_type in _WITH_HEADS:
        # peft's own classes would take the gate for a head, by the end of its name; the mixture adds its heads itself.
        wrapper = PeftModel
    with _private_type(options):
        peft_model = wrapper(model, options)
    peft_model.peft_type = PeftType.XLORA
    # peft writes file by file, over those of the model that was saved there before.
    peft_model.save_pretrained = partial(save_whole, peft_model)  # type: ignore[method-assign]
    return peft_model


@contextmanager
def _private_type(options: XLoraConfig) -> Iterator[None]:
    """Give the config a type of its own in peft's table, so that no other user of peft's X-LoRA sees weft's."""
    own_type: Any = f"WEFT_{uuid.uuid4().hex}"
    PEFT_TYPE_TO_TUNER_MAPPING[own_type] = XLoraModel
    options.peft_type = own_type
    try:
        yield
    finally:
        options.peft_type = PeftType.XLORA
        del PEFT_TYPE_TO_TUNER_MAPPING[own_type]


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


def base_model_of(
    base: nn.Module | str | os.PathLike[str] | None,
    options: XLoraConfig | None,
    *,
    trust_remote_code: bool,
    **loading: Any,
) -> nn.Module:
    """The base model itself, or the one of that name; None takes the one that the options name.

    Args:
        base: see above.
        options: of the mixture.
        trust_remote_code: run code that comes with a base model that is loaded.
        **loading: options of transformers' `from_pretrained`; None stands for one that is not given.

    Raises:
        CheckpointError: there is none.
        ConfigError: options of loading, where there is nothing to load.
    """
    given = {name: value for name, value in loading.items() if value is not None}
    if isinstance(base, nn.Module):
        useless = [name for name in ("device_map", "dtype") if name in given]
        if useless:
            raise ConfigError(
                f"{useless[0]} ({given[useless[0]]!r}) has no effect on a base model that is loaded already "
                f"({type(base).__name__}): give it to its from_pretrained, or give the base model by its name"
            )
        return uncompiled(base)
    name = base
    if options is not None and base is None:
        name = options.base_model_name_or_path
    if name is None:
        raise CheckpointError("base (None) must be given: the folder does not name its base model")
    # Never left out: transformers would ask on the standard input, where anything may stand.
    trust = {"trust_remote_code": trust_remote_code}
    with base_errors(name, "Pass the base model or its path"):
        name = os.fspath(name)
        fetching = {name: given[name] for name in ("revision", "token") if name in given}
        kind = model_class(name, options, **fetching, **trust)
        # A head on the backbone is the mixture's to bring.
        has_head = options is not None and options.task_type in _WITH_HEADS
        return load_whole(kind, name, may_lack=_is_of_a_head if has_head else None, **given, **trust)


def _is_of_a_head(model: Any, key: str) -> bool:
    """Whether a weight stands outside of the model's backbone."""
    return not key.startswith(f"{model.base_model_prefix}.")


def model_class(name: str, options: XLoraConfig | None, *, trust_remote_code: bool, **fetching: Any) -> Any:
    """The class that the base model of this name has, or most likely has."""
    saved_class = (options.auto_mapping or {}).get("base_model_class") if options is not None else None
    found = getattr(transformers, str(saved_class), None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    task_type = options.task_type if options is not None else None
    if task_type in _WITH_HEADS:
        return _WITH_HEADS[task_type]
    if task_type is None:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **fetching)
        task_type = TaskType.SEQ_2_SEQ_LM if config.is_encoder_decoder else None
    if task_type == TaskType.SEQ_2_SEQ_LM:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def _task_type(model: Any) -> TaskType | None:
    if not getattr(model, "can_generate", lambda: False)():
        return None
    if not getattr(model.config, "is_encoder_decoder", False):
        return TaskType.CAUSAL_LM
    # peft's class for the task hands on input_ids, given or not, which a model of speech does not take.
    return TaskType.SEQ_2_SEQ_LM if model.main_input_name == "input_ids" else None
