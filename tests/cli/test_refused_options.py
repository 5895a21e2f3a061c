"""Over all of peft's LoRA options: whatever one says, the base model is afterwards what it was, bit for bit."""

import dataclasses
import json
import shutil

import peft
import pytest
import torch

import weft
from models import quietly, tiny_llama
from weft.errors import AdapterError, ConfigError

# A value for each option that is not its default; tables are what the options' own classes are saved as.
OTHER = {
    "task_type": "SEQ_CLS",
    "revision": "main",
    "inference_mode": False,
    "r": 3,
    "target_modules": ["k_proj"],
    "exclude_modules": ["v_proj"],
    "lora_alpha": 3,
    "lora_dropout": 0.5,
    "fan_in_fan_out": True,
    "bias": "all",
    "use_rslora": True,
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "megatron_config": {"a": 1},
    "megatron_core": "antigravity",
    "trainable_token_indices": [1],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "ArBr"},
    "use_dora": True,
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "qalora_group_size": 8,
    "monteclora_config": {"num_samples": 2},
    "layer_replication": [[0, 2]],
    "lora_bias": True,
    "target_parameters": ["q_proj.weight"],
    "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q_proj"]},
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 0.001},
    "ensure_weight_tying": True,
    "peft_type": "LOHA",
    "auto_mapping": {"base_model_class": "pipeline", "parent_library": "antigravity"},
    "base_model_name_or_path": "another/model",
    "peft_version": "99.0",
}
STARTS = [
    "gaussian",
    "eva",
    "olora",
    "pissa",
    "pissa_niter_4",
    "corda",
    "loftq",
    "orthogonal",
    "lora_ga",
    "mica",
    False,
]
SKIPPED = {"runtime_config", "init_lora_weights"}  # not saved; each start below
OPTIONS = [(field.name, OTHER.get(field.name)) for field in dataclasses.fields(peft.LoraConfig)]
CASES = [(name, value) for name, value in OPTIONS if name not in SKIPPED]
CASES += [("init_lora_weights", start) for start in STARTS]


def parts(base):
    """All that a base model is: its weights, which of them train, and what its modules are and do."""
    return (
        {name: value.clone() for name, value in base.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in base.named_parameters()},
        [
            (name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks), module.training)
            for name, module in base.named_modules()
        ],
    )


def assert_same(base, before):
    weights, *rest = parts(base)
    assert weights.keys() == before[0].keys()
    assert all(torch.equal(value, before[0][name]) for name, value in weights.items())
    assert rest == list(before[1:])


@pytest.mark.parametrize(("option", "value"), CASES, ids=lambda part: str(part)[:40])
def test_the_base_model_is_as_it_was(option, value, llama_adapters, tmp_path):
    assert value is not None or option in OTHER, f"peft has the option {option}: give it a value here"
    adapter = shutil.copytree(llama_adapters["code"], tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), option: value}))
    base = tiny_llama()
    before = parts(base)
    try:
        model = quietly(weft.from_adapters, base, {"math": llama_adapters["math"], "other": str(adapter)})
    except (AdapterError, ConfigError) as err:
        assert "'other'" in str(err)  # noqa: PT017
    else:
        model.base_model.unload()
    assert_same(base, before)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((name, OTHER[name]) for name in ("velora_config", "monteclora_config", "use_bdlora", "kasa_config")),
        ("use_qalora", True),
        ("init_lora_weights", "mica"),
    ],
    ids=str,
)
def test_variants_are_refused_by_their_option(option, value, llama_adapters, tmp_path):
    if option not in {field.name for field in dataclasses.fields(peft.LoraConfig)} or (
        value == "mica" and "lora_variants" not in peft.LoraConfig.__dataclass_fields__["init_lora_weights"].metadata
    ):
        pytest.skip("this peft has no such option")
    adapter = shutil.copytree(llama_adapters["code"], tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), option: value}))
    with pytest.raises(AdapterError, match=rf"adapter 'other' has {option} \(.*\): it is a variant of LoRA"):
        weft.from_adapters(tiny_llama(), {"other": str(adapter)})
