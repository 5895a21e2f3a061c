"""Packing is refused where a model does not keep texts apart (tests/data/test_packing.py has models that do)."""

import pytest
import torch
import transformers

import weft
from models import _common, adapters_of, lora, quietly, save_adapter, weft_model
from weft.errors import ConfigError
from weft.train.packing_check import check_packing


def test_a_model_without_position_ids_is_refused(tmp_path):
    model = weft_model(adapters_of("bloom", tmp_path))
    with pytest.raises(ConfigError, match=r"packing \(True\) needs a base model that takes position_ids.*Bloom"):
        check_packing(model, 2)


def recurrent():
    torch.manual_seed(0)
    options = _common(intermediate_size=48, num_key_value_heads=2)
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "head_dim": 8,
    }
    config = transformers.Qwen3NextConfig(**options, **linear, layer_types=["linear_attention", "full_attention"])
    return transformers.Qwen3NextForCausalLM(config)


def test_a_model_that_mixes_texts_up_in_spite_of_position_ids_is_refused(tmp_path):
    path = save_adapter(recurrent(), lora(target_modules=["q_proj"]), tmp_path / "a", seed=1)
    model = quietly(weft.from_adapters, recurrent(), {"a": path})
    message = r"packing \(True\) does not keep texts apart in Qwen3NextForCausalLM with \w+ attention \(.* by \d+\.\d%"
    for batch_size in (1, 2):
        with pytest.raises(ConfigError, match=message):
            check_packing(model, batch_size)
    with pytest.raises(ConfigError, match=r"does not keep texts apart in OPTForCausalLM with sdpa attention"):
        check_packing(weft_model(adapters_of("opt", tmp_path)), 2)
