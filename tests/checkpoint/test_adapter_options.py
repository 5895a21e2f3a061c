"""An adapter's options against the types of peft's `LoraConfig`, and its ranks against its tensors."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from models import lora, tiny_llama
from weft.checkpoint.adapter_options import option_problems, rank_problems
from weft.errors import AdapterError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

WRONG = [
    ({"r": "8"}, r"r ('8') must be a whole number"),
    ({"r": 10**400}, "must be a whole number"),
    ({"r": True}, "r (True) must be a whole number"),
    ({"r": -4}, "r (-4) must be a whole number of at least 1"),
    ({"lora_alpha": float("nan")}, "lora_alpha (nan) must be a finite number"),
    ({"lora_alpha": [8]}, "lora_alpha ([8]) must be a finite number"),
    ({"lora_dropout": None}, "lora_dropout (None) must be a finite number"),
    ({"lora_dropout": 1.5}, "lora_dropout (1.5) must be in [0, 1]"),
    (
        {"target_modules": {"q_proj": 1}},
        "target_modules ({'q_proj': 1}) must be a list, each a string or a string or null",
    ),
    ({"target_modules": ["q_proj", None]}, "target_modules (['q_proj', None]) must be a list, each a string"),
    ({"target_modules": "(q_proj"}, "target_modules ('(q_proj') is no regular expression: missing )"),
    ({"exclude_modules": "*"}, "exclude_modules ('*') is no regular expression: nothing to repeat"),
    ({"modules_to_save": ["lm_head("]}, "modules_to_save ('lm_head(') is no regular expression"),
    ({"rank_pattern": {"(": 4}}, "rank_pattern ('(') is no regular expression"),
    ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern of 'q_proj' ('4') must be a whole number of at least 1"),
    ({"rank_pattern": [4]}, "rank_pattern ([4]) must be a JSON object or null"),
    ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern of 'q_proj' (None) must be a finite number"),
    ({"layers_to_transform": [0, "1"]}, "layers_to_transform ([0, '1']) must be a list, each a whole number"),
    ({"layers_pattern": "["}, "layers_pattern ('[') is no regular expression"),
    ({"use_dora": "yes"}, "use_dora ('yes') must be true or false"),
    ({"bias": 3}, "bias (3) must be a string"),
    ({"layer_replication": [[0, 1, 2]]}, "layer_replication ([[0, 1, 2]]) must be a list, each a list"),
    ({"base_model_name_or_path": 5}, "base_model_name_or_path (5) must be a string or null"),
    ({"loftq_config": [1]}, "loftq_config ([1]) must be a JSON object"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_options_of_the_wrong_kind_are_named(values, message):
    problems = option_problems(values)
    assert len(problems) == 1
    assert message in problems[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.0\..*"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 0.5}, "layers_to_transform": [0, 1]},
        {"use_dora": True, "modules_to_save": ["lm_head"]},
        {"init_lora_weights": "gaussian", "layers_to_transform": 1},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}, "layer_replication": [[0, 2], [1, 2]]},
    ],
    ids=str,
)
def test_what_peft_writes_is_right(options, tmp_path):
    lora(**options).save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    assert option_problems({**values, "an_option_of_tomorrow": [1]}) == []
    assert option_problems({**values, "lora_alpha": 0.5, "use_rslora": None}) == []


def test_ranks_are_those_of_the_tensors_or_refused_before_they_are_allocated(llama_adapters):
    weights = load_file(f"{llama_adapters['math']}/{TENSORS}")
    fine = {"r": 8, "rank_pattern": {"q_proj": 4, "v_proj": 4, "up_proj": 4}}
    assert rank_problems(peft.LoraConfig(r=4), weights) == []
    assert rank_problems(peft.LoraConfig(**fine), weights) == []
    (problem,) = rank_problems(peft.LoraConfig(r=5), weights)
    assert problem.startswith("r (5) must be the rank of its tensors: base_model.model.model.layers.0.")
    (problem,) = rank_problems(peft.LoraConfig(r=4, rank_pattern={"q_proj": 10**8}), weights)
    assert problem.startswith("rank_pattern of 'q_proj' (100000000) is more than any size of its tensors (48)")
    assert "it holds no lora_A or lora_embedding_A" in rank_problems(peft.LoraConfig(r=4), {})[0]
    scalar = rank_problems(peft.LoraConfig(r=4), {A: torch.tensor(1.0)})
    assert scalar == [f"{A} has shape [], expected two axes or more"]
    whole = rank_problems(peft.LoraConfig(r=4), {A: torch.ones(4, 32, dtype=torch.int64)})
    assert whole == [f"{A} is of dtype torch.int64, expected floating-point numbers"]


@pytest.mark.parametrize("name", ["r", "rank_pattern"])
def test_a_hostile_rank_is_refused_by_expert_option_and_value(name, llama_adapters, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(llama_adapters["math"], folder)
    values = json.loads((folder / CONFIG).read_text())
    values[name] = 10**8 if name == "r" else {".*": 10**8}
    (folder / CONFIG).write_text(json.dumps(values))
    with pytest.raises(
        AdapterError, match=rf"adapter 'bad': .*/{CONFIG} does not fit {TENSORS}: {name}.* \(100000000\)"
    ):
        weft.from_adapters(tiny_llama(), {"bad": str(folder)})


def test_rows_of_tokens_that_do_not_fit_are_refused(llama_adapters, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(llama_adapters["math"], folder)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, "trainable_token_indices": [-3, 5]}))
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    for rows in (torch.ones(2, 32), torch.ones(2, 7), torch.tensor(1.0)):
        save_file({**load_file(folder / TENSORS), key: rows}, folder / TENSORS)
        with pytest.raises(AdapterError, match=r"adapter 'bad' trains \d rows of model.embed_tokens.weight"):
            weft.from_adapters(tiny_llama(), {"bad": str(folder)})
