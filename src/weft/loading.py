"""Base models, tokenizers and mixtures, loaded as the command line names them."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from weft.adapters import local_folder
from weft.checkpoint import saved_base
from weft.errors import CheckpointError, ConfigError, first_line
from weft.integration import from_pretrained


def load_base(name: str, dtype: str, quantization: str | None = None) -> Any:
    """A causal language model.

    Args:
        name: folder or Hub id.
        dtype: the number format of what is not quantised; "auto" takes what it is saved in.
        quantization: "nf4" or "int8"; None takes the model as it is saved.

    Raises:
        CheckpointError: there is none of that name.
        ConfigError: the library for the quantisation is missing.
    """
    if quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization ({quantization!r}) needs the package bitsandbytes, which is not installed: "
            "pip install bitsandbytes, or leave quantization out"
        )
    options: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype)}
    try:
        if quantization is not None:
            options["quantization_config"] = _quantization_config(name, options["dtype"], quantization)
        return AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError) as err:
        raise CheckpointError(f"base ({name}) cannot be loaded as a causal language model: {first_line(err)}") from err


def _quantization_config(name: str, dtype: Any, quantization: str) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # Without this, four-bit layers compute in float32, whatever the model's dtype.
    compute = AutoConfig.from_pretrained(name).dtype if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, with a padding token.

    Raises:
        CheckpointError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as err:
        raise CheckpointError(f"base ({name}) has no tokenizer that can be loaded: {first_line(err)}") from err
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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


def load_placed_base(name: str, dtype: str, quantization: str | None = None) -> Any:
    """A causal language model in evaluation mode, on the GPU where there is one.

    Raises:
        CheckpointError: there is none of that name.
        ConfigError: the library for the quantisation is missing.
    """
    base = load_base(name, dtype, quantization).eval()
    if torch.cuda.is_available() and not getattr(base, "is_quantized", False):  # which is there already
        base.to("cuda")
    return base


def load_mixture(path: str, base: str | None, dtype: str, quantization: str | None = None) -> tuple[PeftModel, Any]:
    """A trained mixture on its base model, and the base's tokenizer.

    Raises:
        CheckpointError: one of them is missing, broken or of another model.
        ConfigError: the library for the quantisation is missing.
    """
    name = base_name(path, base)
    model = from_pretrained(local_folder(path, "model"), load_placed_base(name, dtype, quantization))
    return model, load_tokenizer(name)
