"""Base models, tokenizers and mixtures, loaded as the command line names them."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from weft.base_model.loading import base_errors, load_whole
from weft.checkpoint.adapters import local_folder
from weft.checkpoint.folder import saved_base
from weft.errors import CheckpointError, ConfigError
from weft.model.build import from_pretrained


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
    model = from_pretrained(local_folder(path, "model"), placed)
    return model, load_tokenizer(name, trust_remote_code=trust_remote_code)
