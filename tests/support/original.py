"""The original xlora library's layout and arithmetic, rebuilt small: what weft reads, and what it must compute."""

from __future__ import annotations

import json
import shutil

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from models import mixture_by_loop, quietly, tiny_llama

OPTIONS = {
    "hidden_size": 32,
    "base_model_id": "tiny/llama",
    "enable_softmax": True,
    "enable_softmax_topk": False,
    "layerwise_scalings": True,
    "xlora_depth": 1,
    "xlora_size": 16,
    "enable_relu_and_dropout": True,
    "use_bias": True,
    "xlora_dropout_p": 0.2,
    "use_trainable_adapters": False,
    "softmax_temperature": 1.0,
    "top_k_lora": None,
    "scaling_pass_value": 0.0,
    "global_scaling_weight": 1.0,
}


class OriginalGate(nn.Module):
    """`inner`, a list in which ReLU and Dropout count too, and `last`."""

    def __init__(self, options, num_experts, num_layers):
        super().__init__()
        self.options, self.shape = options, (num_layers if options["layerwise_scalings"] else 1, num_experts)
        width, bias = options["hidden_size"], options["use_bias"]
        self.inner = nn.ModuleList()
        for _ in range(options["xlora_depth"] - 1):
            self.inner.append(nn.Linear(width, options["xlora_size"], bias=bias))
            if options["enable_relu_and_dropout"]:
                self.inner += [nn.ReLU(), nn.Dropout(options["xlora_dropout_p"])]
            width = options["xlora_size"]
        self.last = nn.Linear(width, self.shape[0] * num_experts, bias=bias)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.eval()

    def forward(self, hidden):
        for layer in self.inner:
            hidden = layer(hidden)
        scalings = self.last(hidden).unflatten(-1, self.shape)
        if self.options["enable_softmax"]:
            scalings = (scalings / self.options["softmax_temperature"]).softmax(-1)
        if self.options["top_k_lora"] is not None:
            kept = scalings.topk(self.options["top_k_lora"], dim=-1).indices
            scalings = scalings * torch.zeros_like(scalings).scatter(-1, kept, 1.0)
        return scalings


def lora_layers(adapters):
    """(a model of peft's with all adapters active, its LoRA layers)."""
    names = list(adapters)
    model = quietly(peft.PeftModel.from_pretrained, tiny_llama(), adapters[names[0]], names[0])
    for name in names[1:]:
        quietly(model.load_adapter, adapters[name], name)
    model.base_model.set_adapter(names)
    return model.eval(), [module for module in model.modules() if isinstance(module, LoraLayer)]


@torch.no_grad()
def original_logits(gate, adapters, tokens):
    """Two passes by the formula, expert after expert."""
    scalings = gate(tiny_llama().model(tokens).last_hidden_state)
    model, layers = lora_layers(adapters)
    for number, layer in enumerate(layers):

        def forward(x, layer=layer, column=number if gate.options["layerwise_scalings"] else 0):
            weight = gate.options["global_scaling_weight"]
            return mixture_by_loop(layer, x, scalings[:, :, column], global_weight=weight)

        layer.forward = forward
    return model(tokens).logits


def make_gate(adapters, **options):
    """A gate of the original library for these adapters."""
    _, layers = lora_layers(adapters)
    torch.manual_seed(11)
    return OriginalGate({**OPTIONS, **options}, len(adapters), len(layers))


def write_original(folder, gate, adapters, *, named="list", below="", dtype=torch.float32):
    """A folder as the library writes it, or as people put it on the Hub.

    Args:
        folder: to be made.
        gate: its gate.
        adapters: {name: folder}, copied.
        named: how the config names them: "list", "table" (of ids on the Hub), or not at all (None).
        below: folder of the adapters' folders.
        dtype: of the gate's tensors.
    """
    folder.mkdir(parents=True)
    for name, path in adapters.items():
        shutil.copytree(path, folder / below / name)
    config = dict(gate.options)
    if named == "list":
        config["adapters"] = list(adapters)
    elif named == "table":
        config["adapters"] = {name: f"tiny/mixture/{name}/" for name in adapters}
    (folder / "xlora_config.json").write_text(json.dumps(config))
    tensors = {key: value.to(dtype).contiguous() for key, value in gate.state_dict().items()}
    save_file(tensors, folder / "xlora_classifier.safetensors")
    return folder
