"""Tiny Llama models that are quantised while they are loaded, as users do it."""

from __future__ import annotations

import torch
import transformers

from models import quietly, tiny_llama
from weft.base_model.state import keep_unpacked

SIZES = {"hidden_size": 64, "intermediate_size": 128}


def wide_llama(**options):
    """Wide enough for the blocks of every quantisation."""
    return tiny_llama(**SIZES, **options)


def quantization_config(kind):
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=kind == "nf4-double"
    )


def load_quantised(folder, kind, *, repack=False, dtype=torch.float32):
    """A saved model, quantised; `repack` leaves it to bitsandbytes to repack it for the CPU, as it does by default."""
    model = quietly(
        transformers.AutoModelForCausalLM.from_pretrained,
        folder,
        quantization_config=quantization_config(kind),
        dtype=dtype,
    )
    model.generation_config.pad_token_id = 0
    if not repack:
        keep_unpacked(model)
    return model.eval()
