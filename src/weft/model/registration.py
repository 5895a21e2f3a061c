"""Builds peft's `PeftModel` with weft's model in it.

peft has tables from the type of an adapter to its classes. `register_with_peft` enters weft's classes there for X-LoRA.
Without it peft's tables are unchanged; `peft_model_of` builds the same object in both cases.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from torch import nn

from weft.base_model.loading import WITH_HEADS
from weft.config import XLoraConfig
from weft.files.writing import settle
from weft.model.model import XLoraModel
from weft.model.saving import save_whole
from weft.screen.libraries import deprecations_of_peft_hidden

_peft_own: dict[str, Any] = {}


def register_with_peft() -> None:
    """Let peft's `get_peft_model` and `PeftModel.from_pretrained` build weft's X-LoRA, also from peft's `XLoraConfig`.

    This includes functions of transformers that take an adapter's folder: `AutoModelForCausalLM.from_pretrained`,
    `pipeline`. It can be called several times; `unregister_from_peft` undoes it. Existing models are not changed.

    Example:
        >>> weft.register_with_peft()
        >>> config = peft.XLoraConfig(adapters={"math": "adapters/math", "code": "adapters/code"})
        >>> model = peft.get_peft_model(base, config)
    """
    if not _peft_own:
        _peft_own["from_pretrained"] = PeftConfigMixin.__dict__["from_pretrained"]
        PeftConfigMixin.from_pretrained = classmethod(_config_of_folder)  # type: ignore[assignment]
        _peft_own["type_of"] = PeftConfigMixin.__dict__["_get_peft_type"]
        PeftConfigMixin._get_peft_type = classmethod(_type_of_folder)  # type: ignore[assignment]
        _peft_own["init"] = PeftModel.__init__
        PeftModel.__init__ = _init_hushed  # type: ignore[method-assign]
        _peft_own["config"] = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.XLORA]
        _peft_own["model"] = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.XLORA]
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.XLORA] = XLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.XLORA] = XLoraModel


def unregister_from_peft() -> None:
    """Restore peft's own X-LoRA. Without an earlier `register_with_peft` it does nothing.

    Example:
        >>> weft.register_with_peft()
        >>> weft.unregister_from_peft()
    """
    if _peft_own:
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.XLORA] = _peft_own["config"]
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.XLORA] = _peft_own["model"]
        PeftConfigMixin.from_pretrained = _peft_own["from_pretrained"]  # type: ignore[method-assign]
        PeftConfigMixin._get_peft_type = _peft_own["type_of"]  # type: ignore[method-assign]
        PeftModel.__init__ = _peft_own["init"]  # type: ignore[method-assign]
        _peft_own.clear()


def _config_of_folder(cls: type, path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
    """peft's `from_pretrained` for configs; the config of a mixture is read by `XLoraConfig`, whatever `cls` is.

    transformers reads it with `PeftConfig`, which would look for the experts in the working directory.
    """
    settle(Path(path, subfolder or ""))
    config = _peft_own["from_pretrained"].__get__(None, cls)(path, subfolder=subfolder, **kwargs)
    if not isinstance(config, XLoraConfig):
        return config
    fetching = {name: kwargs.get(name) for name in ("revision", "token")}
    return XLoraConfig.from_pretrained(path, subfolder=subfolder, **fetching)


def _type_of_folder(cls: type, model_id: Any, **kwargs: Any) -> Any:
    """peft's function for the type of an adapter's folder, which is first restored after a killed write."""
    settle(Path(model_id, kwargs.get("subfolder") or ""))
    return _peft_own["type_of"].__get__(None, cls)(model_id, **kwargs)


@functools.wraps(PeftModel.__init__)
def _init_hushed(self: Any, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
    """peft's constructor, without a warning to peft's developers for mixtures."""
    with deprecations_of_peft_hidden() if peft_config.peft_type == PeftType.XLORA else nullcontext():
        _peft_own["init"](self, model, peft_config, *args, **kwargs)


def peft_model_of(model: nn.Module, options: XLoraConfig) -> PeftModel:
    """Build peft's model class for the task with weft's X-LoRA in it, whether or not weft is registered."""
    wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(options.task_type or "", PeftModel)
    if options.task_type in WITH_HEADS:
        # The name of the gate ends in "classifier", so peft's classes would treat it as a head.
        wrapper = PeftModel
    with _private_type(options), deprecations_of_peft_hidden():
        peft_model = wrapper(model, options)
    peft_model.peft_type = PeftType.XLORA
    # peft's own save_pretrained would overwrite an earlier model file by file.
    peft_model.save_pretrained = partial(save_whole, peft_model)  # type: ignore[method-assign]
    return peft_model


@contextmanager
def _private_type(options: XLoraConfig) -> Iterator[None]:
    """Give the config a temporary type in peft's table, so that other users of peft's X-LoRA are not affected."""
    own_type: Any = f"WEFT_{uuid.uuid4().hex}"
    PEFT_TYPE_TO_TUNER_MAPPING[own_type] = XLoraModel
    options.peft_type = own_type
    try:
        yield
    finally:
        options.peft_type = PeftType.XLORA
        del PEFT_TYPE_TO_TUNER_MAPPING[own_type]
