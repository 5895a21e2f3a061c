"""Base models, tokenizers and mixtures, loaded as the command line names them."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.adapters import local_folder, read_json
from weft.errors import CheckpointError, first_line
from weft.integration import from_pretrained


def load_base(name: str, dtype: str) -> Any:
    """A causal language model.

    Raises:
        CheckpointError: there is none of that name.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto" if dtype == "auto" else getattr(torch, dtype))
    except (OSError, ValueError) as err:
        raise CheckpointError(f"base ({name}) cannot be loaded as a causal language model: {first_line(err)}") from err


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


def load_mixture(path: str, base: str | None, dtype: str) -> tuple[PeftModel, Any]:
    """A trained mixture on its base model, and the base's tokenizer.

    Raises:
        CheckpointError: one of them is missing, broken or of another model.
    """
    folder = local_folder(path, "model")
    config = read_json(folder / CONFIG_NAME)
    if config.get("peft_type") != "XLORA":
        raise CheckpointError(f"model ({path}) is of type {config.get('peft_type')}, expected XLORA: a trained mixture")
    name = base or config.get("base_model_name_or_path")
    if name is None:
        raise CheckpointError(f"{folder} does not name its base model: give it with --base")
    model = from_pretrained(folder, load_base(name, dtype))
    if torch.cuda.is_available():
        model.to("cuda")
    return model, load_tokenizer(name)
