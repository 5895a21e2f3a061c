"""Base models and their tokenizers, loaded by transformers; an incomplete model is refused.

transformers only warns if weights are missing in a file, and initialises them randomly. A mixture on such a base model
would give other results after each load.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft.utils import TaskType
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from weft.checkpoint.base_place import is_path, refuse_missing_base
from weft.config import XLoraConfig
from weft.distributed import process_number
from weft.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    OutOfMemoryError,
    WeftError,
    first_line,
    lack_of_memory,
)
from weft.files.digests import weight_files
from weft.files.reading import read_json, shown
from weft.files.tensors import CONFIG_NAME, preview
from weft.screen.countdown import size
from weft.screen.waiting import waiting

_SHOWN = 5
# Tasks whose models have a head that must be trained.
WITH_HEADS: dict[str, Any] = {
    TaskType.SEQ_CLS: transformers.AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: transformers.AutoModelForTokenClassification,
    TaskType.QUESTION_ANS: transformers.AutoModelForQuestionAnswering,
}


@contextlib.contextmanager
def base_errors(name: Any, otherwise: str = "Give its folder or Hub id") -> Iterator[None]:
    """Turn any error in the block into one that names the base model and says what to do.

    Args:
        name: the base model's folder or Hub id.
        otherwise: what to do, for the message, if the cause is not a known one.

    Raises:
        CheckpointError: an error of another library was raised in the block, the name can only be that of a folder and
            there is none, or the folder is not a base model's.
        OutOfMemoryError: there was not enough memory in the block.
    """
    missing = isinstance(name, str | os.PathLike) and not os.path.lexists(name)
    if missing and is_path(os.fspath(name)):
        raise CheckpointError(f"base ({name}) cannot be loaded: there is no such folder. {otherwise}")
    _refuse_adapters(name)
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
        lack = lack_of_memory(err)
        if lack is not None:
            raise OutOfMemoryError(f"base ({name}){_weights(name)} cannot be loaded: {first_line(lack)}") from err
        cause = first_line(err).rstrip(".")
        if missing and isinstance(err, OSError | HFValidationError):
            cause = f"there is no folder {name} here, and as a Hub id: {cause}"
        raise CheckpointError(f"base ({name}) cannot be loaded: {cause}. {otherwise}") from err


def _weights(name: Any) -> str:
    """How large the files of the base model's weights are, as text; "" if they are not on this machine."""
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        cached = try_to_load_from_cache(os.fspath(name), "config.json")
        if not isinstance(cached, str):
            return ""
        folder = Path(cached).parent
    sizes = [file.stat().st_size for file in weight_files(folder)]
    return f" with {size(sum(sizes))} of weights" if sizes else ""


def _refuse_adapters(name: Any) -> None:
    """Raise where the folder of an adapter or a mixture stands for a base model's: transformers would load its base."""
    folder = Path(os.path.expanduser(name)) if isinstance(name, str | os.PathLike) else None
    if folder is None or os.path.lexists(folder / "config.json") or not os.path.isfile(folder / CONFIG_NAME):
        return
    config = read_json(folder / CONFIG_NAME)
    what = "a mixture" if config.get("peft_type") == "XLORA" else "an adapter"
    made_for = config.get("base_model_name_or_path")
    raise CheckpointError(
        f"base ({name}) is {what}, not a base model: give the one that it is made for"
        + (f" ({shown(made_for)})" if made_for else "")
    )


def load_whole(
    model_class: Any, name: str, *, may_lack: Callable[[Any, str], bool] | None = None, **loading: Any
) -> Any:
    """Load a model with transformers' `from_pretrained`, and check that all weights come from its files.

    Args:
        model_class: the class of transformers.
        name: folder or Hub id.
        may_lack: whether the weight `key` of a model may be missing in the files; None allows no missing weight.
        **loading: arguments of `from_pretrained`.

    Raises:
        CheckpointError: weights are missing, or have shapes that do not fit the config.
        Exception: an error of transformers.
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
    """Return the base model, or load it by name.

    Args:
        base: the base model, its folder or its Hub id; None takes the name in the options.
        options: the mixture's options.
        trust_remote_code: run code that comes with the base model.
        **loading: options of transformers' `from_pretrained`; None means not given.

    Raises:
        CheckpointError: no base model is named, or it cannot be loaded.
        ConfigError: `dtype` or `device_map` is given for a model that is loaded already.
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
        if name is not None and options.folder is not None:
            refuse_missing_base(options.folder, name)
    if isinstance(name, str | os.PathLike):
        name = os.path.expanduser(name)
    if name is None:
        raise CheckpointError("base (None) must be given: the folder does not name its base model")
    # Always given: without it, transformers would ask on the standard input.
    trust = {"trust_remote_code": trust_remote_code}
    with base_errors(name, "Pass the base model or its path"):
        name = os.fspath(name)
        fetching = {name: given[name] for name in ("revision", "token") if name in given}
        kind = model_class(name, options, **fetching, **trust)
        # The mixture brings the weights of the head.
        has_head = options is not None and options.task_type in WITH_HEADS
        return load_whole(kind, name, may_lack=_is_of_a_head if has_head else None, **given, **trust)


def _is_of_a_head(model: Any, key: str) -> bool:
    """Whether a weight is outside of the model's backbone."""
    return not key.startswith(f"{model.base_model_prefix}.")


def model_class(name: str, options: XLoraConfig | None, *, trust_remote_code: bool, **fetching: Any) -> Any:
    """The class of transformers for a base model: the saved one, or the one for its task."""
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
    """peft's task type for the base model; None if none fits."""
    if not getattr(model, "can_generate", lambda: False)():
        return None
    if not getattr(model.config, "is_encoder_decoder", False):
        return TaskType.CAUSAL_LM
    # peft's class for this task always passes input_ids, which speech models do not take.
    return TaskType.SEQ_2_SEQ_LM if model.main_input_name == "input_ids" else None


def uncompiled(base: Any) -> Any:
    """The model inside a `torch.compile(base)` wrapper, which would change the names of all layers.

    A model that was compiled in place with `base.compile()` stays compiled: it is traced again with the experts.

    Raises:
        AdapterError: only parts of the model are compiled, or it is wrapped for data parallelism.
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
    """The arguments of `load_base` in a command's options."""
    return {name: getattr(options, name) for name in ("dtype", "quantization", "trust_remote_code")}


def load_base(name: str, dtype: str, quantization: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load a causal language model.

    Args:
        name: folder or Hub id.
        dtype: dtype of the weights that are not quantised; "auto" takes the saved one.
        quantization: "nf4" or "int8"; None does not quantise.
        trust_remote_code: run code that comes with the model.

    Raises:
        CheckpointError: there is no such model, it is incomplete, or it needs its own code.
        ConfigError: bitsandbytes is not installed.
    """
    if quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization ({quantization!r}) needs the package bitsandbytes, which is not installed: "
            "pip install bitsandbytes, or leave quantization out"
        )
    options: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype)}
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with (
        waiting(f"loading {name}", hidden=process_number() > 0),
        base_errors(name, "Expected the folder or Hub id of a causal language model"),
    ):
        if quantization is not None:
            options["quantization_config"] = _quantization_config(name, options["dtype"], quantization, **trust)
        return load_whole(AutoModelForCausalLM, name, **options, **trust)


def _quantization_config(name: str, dtype: Any, quantization: str, **trust: bool) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # By default, four-bit layers compute in float32, independent of the model's dtype.
    compute = AutoConfig.from_pretrained(name, **trust).dtype if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def load_placed_base(name: str, dtype: str, quantization: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load a causal language model in evaluation mode, on the GPU if there is one. See `load_base`."""
    base = load_base(name, dtype, quantization, trust_remote_code=trust_remote_code).eval()
    if torch.cuda.is_available() and not getattr(base, "is_quantized", False):  # a quantised model is there already
        base.to("cuda")
    return base


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model. If it has no padding token, the end-of-text token is used.

    Raises:
        CheckpointError: there is no tokenizer, or it needs its own code.
    """
    with base_errors(name, "Expected a model with a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
