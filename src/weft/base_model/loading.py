"""Base models and their tokenizers as transformers loads them: whole, or refused in one sentence.

transformers fills weights that a file lacks with random numbers, and only warns. A mixture on such a base would be
another one at each load, without a word.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from peft.utils import TaskType
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from weft.config import XLoraConfig
from weft.errors import AdapterError, CheckpointError, ConfigError, WeftError, first_line
from weft.files.tensors import preview

_SHOWN = 5
# Tasks whose models have a head to be trained.
WITH_HEADS: dict[str, Any] = {
    TaskType.SEQ_CLS: transformers.AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: transformers.AutoModelForTokenClassification,
    TaskType.QUESTION_ANS: transformers.AutoModelForQuestionAnswering,
}


@contextlib.contextmanager
def base_errors(name: Any, otherwise: str = "Give its folder or Hub id") -> Iterator[None]:
    """Whatever is raised inside, as one error that names the base model and says what to do.

    Args:
        name: its folder or Hub id.
        otherwise: what to do where the cause is none that is known here.

    Raises:
        CheckpointError: something was raised: by the libraries that read its files, each of which has its own errors.
    """
    try:
        yield
    except WeftError:
        raise
    except Exception as err:
        if "trust_remote_code" in str(err):
            raise CheckpointError(
                f"base ({name}) needs code that it brings along, which was not run: read it, and if you trust it, give "
                "--trust-remote-code (in Python trust_remote_code=True)"
            ) from err
        raise CheckpointError(f"base ({name}) cannot be loaded: {first_line(err).rstrip('.')}. {otherwise}") from err


def load_whole(
    model_class: Any, name: str, *, may_lack: Callable[[Any, str], bool] | None = None, **loading: Any
) -> Any:
    """A model by transformers' `from_pretrained`, all of whose weights come from its files.

    Args:
        model_class: transformers' class.
        name: folder or Hub id.
        may_lack: says of (model, key) whether that weight may be new; None lets none be.
        **loading: handed on.

    Raises:
        CheckpointError: weights are missing, or have other shapes than the config says.
        Exception: any, of transformers.
    """
    model, info = model_class.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **loading)
    mismatched = sorted(info.get("mismatched_keys") or (), key=lambda one: one[0])
    if mismatched:
        shown = [f"{key} has shape {list(there)}, expected {list(here)}" for key, there, here in mismatched[:_SHOWN]]
        raise CheckpointError(
            f"base ({name}) cannot be loaded: {', '.join(shown)}{_more(mismatched)}: its config.json and its weights "
            "do not belong together"
        )
    missing = sorted(key for key in info.get("missing_keys") or () if may_lack is None or not may_lack(model, key))
    if missing:
        raise CheckpointError(
            f"base ({name}) cannot be loaded: its files lack {', '.join(missing[:_SHOWN])}{_more(missing)}, which "
            "would be random numbers: copy it again, or give the model that has these weights"
        )
    return model


def _more(things: list[Any]) -> str:
    return f" and {len(things) - _SHOWN} more" if len(things) > _SHOWN else ""


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
        has_head = options is not None and options.task_type in WITH_HEADS
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
    if task_type in WITH_HEADS:
        return WITH_HEADS[task_type]
    if task_type is None:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **fetching)
        task_type = TaskType.SEQ_2_SEQ_LM if config.is_encoder_decoder else None
    if task_type == TaskType.SEQ_2_SEQ_LM:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def task_type_of(model: Any) -> TaskType | None:
    """peft's name of what the base model does; None where its classes for tasks have none that fits."""
    if not getattr(model, "can_generate", lambda: False)():
        return None
    if not getattr(model.config, "is_encoder_decoder", False):
        return TaskType.CAUSAL_LM
    # peft's class for the task hands on input_ids, given or not, which a model of speech does not take.
    return TaskType.SEQ_2_SEQ_LM if model.main_input_name == "input_ids" else None


def uncompiled(base: Any) -> Any:
    """The model inside of what `torch.compile(base)` gave, whose attribute would be in the names of all layers.

    What `base.compile()` compiled stays that: it is traced again with the experts in it.

    Raises:
        AdapterError: only parts of the model are compiled, or it is wrapped for several processes.
    """
    while "_orig_mod" in base._modules:
        base = base._orig_mod
    if isinstance(base, (DataParallel, DistributedDataParallel)):
        raise AdapterError(
            f"the base model is wrapped as {type(base).__name__}: pass the model itself (.module), and wrap the mixture"
        )
    parts = [path for path, module in base.named_modules() if "_orig_mod" in module._modules]
    if parts:
        raise AdapterError(
            f"parts of the base model are compiled ({preview(parts)}): pass it uncompiled, and compile them in the "
            "mixture"
        )
    return base


def loading_options(options: Any) -> dict[str, Any]:
    """How a command's options say that its base model is loaded, by the names of `load_base`."""
    return {name: getattr(options, name) for name in ("dtype", "quantization", "trust_remote_code")}


def load_base(name: str, dtype: str, quantization: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """A causal language model.

    Args:
        name: folder or Hub id.
        dtype: the number format of what is not quantised; "auto" takes what it is saved in.
        quantization: "nf4" or "int8"; None takes the model as it is saved.
        trust_remote_code: run code that comes with it.

    Raises:
        CheckpointError: there is none of that name, or it needs such code.
        ConfigError: the library for the quantisation is missing.
    """
    if quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization ({quantization!r}) needs the package bitsandbytes, which is not installed: "
            "pip install bitsandbytes, or leave quantization out"
        )
    options: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype)}
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with base_errors(name, "Expected the folder or Hub id of a causal language model"):
        if quantization is not None:
            options["quantization_config"] = _quantization_config(name, options["dtype"], quantization, **trust)
        return load_whole(AutoModelForCausalLM, name, **options, **trust)


def _quantization_config(name: str, dtype: Any, quantization: str, **trust: bool) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # Without this, four-bit layers compute in float32, whatever the model's dtype.
    compute = AutoConfig.from_pretrained(name, **trust).dtype if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def load_placed_base(name: str, dtype: str, quantization: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """A causal language model in evaluation mode, on the GPU where there is one.

    Raises:
        CheckpointError: there is none of that name.
        ConfigError: the library for the quantisation is missing.
    """
    base = load_base(name, dtype, quantization, trust_remote_code=trust_remote_code).eval()
    if torch.cuda.is_available() and not getattr(base, "is_quantized", False):  # which is there already
        base.to("cuda")
    return base


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, with a padding token.

    Raises:
        CheckpointError: there is none, or it needs code that comes with it.
    """
    with base_errors(name, "Expected a model with a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
