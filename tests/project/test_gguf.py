"""What docs/gguf.md does before llama.cpp's scripts take over, and what these need of a folded adapter."""

import json
import re
import shlex
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import weft
from models import quietly
from weft.cli import main

PAGE = (Path(__file__).parents[2] / "docs/gguf.md").read_text()


def test_the_page_folds_and_merges_what_the_scripts_take(base_folder, base_adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my-model").symlink_to(base_folder)
    adapters = dict(zip(("code", "law"), base_adapters.values(), strict=True))
    weft.from_adapters("my-model", adapters).save_pretrained("my-mixture")
    command = re.search(r"^weft (fold .*--weights .*?) *#", PAGE, flags=re.M)[1]
    assert main(shlex.split(command)) == 0

    config, tensors = (
        json.loads(Path("folded/adapter_config.json").read_text()),
        load_file("folded/adapter_model.safetensors"),
    )
    kinds = {name.rpartition(".lora_")[2] for name in tensors}
    assert kinds == {"A.weight", "B.weight"}
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {config["r"]}
    assert config["lora_alpha"] == config["r"]
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)

    quietly(exec, re.search(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)[1], {})
    ids = torch.randint(0, 200, (2, 9))
    base = AutoModelForCausalLM.from_pretrained("my-model")
    beside = peft.PeftModel.from_pretrained(base, "folded").eval()(ids).logits
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()(ids).logits
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-5)
