"""A base in four bits, whose layers go on computing by vLLM's own kernels, with experts around them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from engines import engine, llama, log_probs, prompts, served_log_probs, sharpen
from models import tiny_tokenizer

pytestmark = pytest.mark.serve
pytest_plugins = ["engines", "servers"]

GROUP = 32


def four_bits(weight):
    """(whole numbers from -8 to 7, their scales) of groups of columns."""
    groups = weight.view(len(weight), -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return (groups / scale).round().clamp(-8, 7).view_as(weight), scale[..., 0]


@pytest.fixture
def bases(tmp_path):
    """A model with rounded weights, and its folder as compressed-tensors has it."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    model = llama()
    packed = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                numbers, scale = four_bits(parameter)
                parameter.copy_((numbers.view(len(numbers), -1, GROUP) * scale[..., None]).view_as(numbers))
                stem = name.removesuffix("weight")
                packed[f"{stem}weight_packed"] = pack_to_int32(numbers.to(torch.int8), 4)
                packed[f"{stem}weight_scale"] = scale.to(torch.bfloat16)
                packed[f"{stem}weight_shape"] = torch.tensor(parameter.shape)
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = {name: value for name, value in load_file(folder / "model.safetensors").items() if "proj" not in name}
    save_file({**tensors, **packed}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model, folder


@pytest.mark.parametrize("options", [{}, {"gate_layer": 1}], ids=str)
def test_experts_on_a_base_in_four_bits(options, bases, adapters, tmp_path):
    rounded, folder = bases
    model = sharpen(weft.from_adapters(rounded, adapters, **options)).eval()
    with torch.no_grad():  # less sharp: the kernel for four bits runs in bfloat16, on which a sharp gate flips
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.mul_(0.2)
    model.save_pretrained(tmp_path / "mixture")
    texts = prompts()
    right = log_probs(model, texts)
    with model.disable_adapter():
        without = log_probs(model, texts)
    with engine(folder, tmp_path / "mixture", dtype="bfloat16") as llm:
        found = served_log_probs(llm, texts)
    assert (found - right).abs().mean() < (without - right).abs().mean() / 5
