"""The models that are compared: base, one LoRA, weft and peft's X-LoRA, over the same base weights and adapters."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.xlora import XLoraModel as PeftXLoraModel

import weft

ROOT = Path(__file__).parent.parent
RANK = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_base() -> Any:
    """SmolLM2-135M in float32."""
    sys.path.insert(0, str(ROOT / "demo"))
    from model import ensure_model

    folder = ROOT / ".demo" / "model"
    ensure_model(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def sharing_weights(base: Any) -> Any:
    """A copy of the model that holds the same parameters: only what is added to it takes memory."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def one_lora(base: Any, rank: int) -> Any:
    """One plain LoRA of peft on all seven projections, frozen, with random weights."""
    config = peft.LoraConfig(r=rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(sharing_weights(base), config)
    _randomise(model, seed=0)
    return model.eval().requires_grad_(False)


def save_adapters(base: Any, number: int, folder: Path) -> dict[str, str]:
    """Random adapters, named as peft's X-LoRA needs them."""
    paths = {}
    for index in range(number):
        paths[str(index)] = str(folder / str(index))
        if not (folder / str(index)).exists():
            model = one_lora(base, RANK)
            _randomise(model, seed=index)
            model.save_pretrained(paths[str(index)])
    return paths


def weft_model(base: Any, adapters: dict[str, str]) -> Any:
    """weft's X-LoRA with a gate per layer."""
    torch.manual_seed(0)
    return weft.from_adapters(sharing_weights(base), adapters, layerwise_scalings=True).eval()


def peft_model(base: Any, adapters: dict[str, str]) -> Any:
    """peft's X-LoRA with the same gate as weft's."""
    own = sharing_weights(base)
    own.config = copy.deepcopy(own.config)
    own.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=own.config.hidden_size, adapters=adapters, layerwise_scalings=True
    )
    model = peft.get_peft_model(own, config).eval()
    assert isinstance(model.base_model, PeftXLoraModel)
    return model


def same_gate(one: Any, other: Any) -> None:
    """Give the second model the first one's gate."""
    other.internal_xlora_classifier.load_state_dict(one.internal_xlora_classifier.state_dict())


def _randomise(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A." in name or "lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def quiet() -> None:
    """Keep the libraries' warnings out of the table."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
