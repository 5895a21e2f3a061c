"""vLLM's class of a base model with a mixture in it, named `Weft` + architecture; it is made on first access."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationMode
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform

from weft.errors import ConfigError
from weft.serve.choices import Choices, register
from weft.serve.following import Following
from weft.serve.layers import MixtureMethod, Slice, own_part
from weft.serve.mixture import ServedMixture, read_mixture
from weft.serve.passes import BothPasses, backbone_of, decoder_of, scaling_backbone
from weft.serve.plugin import PREFIX

SETTING = "weft"  # in vLLM's additional_config: the mixture's folder


def __getattr__(name: str) -> Any:
    """The class of an architecture, which vLLM gets by name in each of its processes."""
    if not name.startswith(PREFIX):
        raise AttributeError(name)
    made = globals()[name] = mixture_class(name.removeprefix(PREFIX))
    return made


def mixture_class(architecture: str) -> Any:
    """Make vLLM's class of this architecture with a mixture in it."""
    base: Any = ModelRegistry._try_load_model_cls(architecture)

    class WithMixture(base):
        """vLLM creates it like the base model; the experts are added after the weights are loaded."""

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            _graft(self, vllm_config)

        def forward(
            self,
            input_ids: torch.Tensor | None,
            positions: torch.Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: torch.Tensor | None = None,
        ) -> Any:
            choices = self.weft_following.choices
            choices.before(positions)
            output = self.weft_passes[0](input_ids, positions, intermediate_tensors, inputs_embeds)
            choices.after()
            return output

        def process_weights_after_loading(self) -> None:
            """vLLM's hook, after those of the layers: add the experts to the layers' methods."""
            _give_experts(self)

    WithMixture.__name__ = WithMixture.__qualname__ = f"{PREFIX}{architecture}"
    return WithMixture


def _graft(model: Any, vllm_config: Any) -> None:
    """Add the gate and the passes to a model."""
    mixture = read_mixture(vllm_config.additional_config[SETTING])
    choices = Choices(
        mixture,
        vllm_config.scheduler_config.max_num_seqs,
        vllm_config.scheduler_config.max_num_batched_tokens,
        static=not current_platform.is_cpu() or vllm_config.compilation_config.mode != CompilationMode.NONE,
    )
    register(vllm_config, choices)
    following = Following(mixture, choices, vllm_config.model_config.dtype)
    model.weft_following, model.weft_mixture = following, mixture
    backbone, gate_layer = backbone_of(model), mixture.options.get("gate_layer")
    scaling = None
    if gate_layer is None:
        scaling = scaling_backbone(vllm_config, backbone, mixture.options.get("scaling_pass_layers"))
        # Only its attention modules become submodules of the model; all other modules are shared and in it already.
        attention = [part for part in scaling.modules() if isinstance(part, AttentionLayerBase)]
        model.weft_scaling_attention = nn.ModuleList(attention)
    else:
        decoder = decoder_of(backbone)
        _ask_at(getattr(decoder.owner, decoder.layers)[gate_layer], following)
    passes = BothPasses(vllm_config=vllm_config, backbone=backbone, scaling=scaling, following=following)
    model.weft_passes = (passes,)


def _ask_at(layer: nn.Module, following: Following) -> None:
    """Run the gate on the input of a decoder layer, which in vLLM is one tensor, or hidden states and residual."""
    names = list(inspect.signature(layer.forward).parameters)
    hidden_at = names.index("hidden_states")
    residual_at = names.index("residual") if "residual" in names else None

    def ask(_: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[hidden_at] if hidden_at < len(args) else kwargs["hidden_states"]
        residual = None
        if residual_at is not None:
            residual = args[residual_at] if residual_at < len(args) else kwargs["residual"]
        following.ask(hidden if residual is None else hidden + residual, normalise=True)

    layer.register_forward_pre_hook(ask, with_kwargs=True)


def _give_experts(model: Any) -> None:
    """Add the experts to the methods of the layers that they adapt.

    Raises:
        ConfigError: the model does not have these layers.
    """
    mixture: ServedMixture = model.weft_mixture
    number = {layer: place for place, layer in enumerate(mixture.layers)}
    packed = getattr(model, "packed_modules_mapping", {})
    found: list[list[int]] = []  # for each layer, the numbers of its LoRA layers
    for name, layer in model.named_modules():
        if not isinstance(layer, LinearBase) or isinstance(layer.quant_method, MixtureMethod):
            continue
        stem, _, last = name.rpartition(".")
        parts = [f"{stem}.{part}" for part in packed.get(last, [last])]
        widths = _widths(layer, len(parts))
        starts = [sum(widths[:place]) for place in range(len(widths))]
        slices = [
            Slice(number[part], start, width, own_part(layer, mixture.factors[part], place, width))
            for place, (part, start, width) in enumerate(zip(parts, starts, widths, strict=True))
            if part in number
        ]
        if slices:
            device = next(iter(layer.parameters())).device
            layer.quant_method = MixtureMethod(
                layer.quant_method, model.weft_following, len(found), slices, layer_width=sum(widths), device=device
            )
            found.append([each.number for each in slices])
    missing = sorted({*range(len(mixture.layers))} - {number for of in found for number in of})
    if missing:
        raise ConfigError(
            f"model ({mixture.folder}) adapts layers that vLLM's {type(model).__name__.removeprefix(PREFIX)} does not "
            f"have: {[mixture.layers[number] for number in missing[:5]]}"
        )
    model.weft_following.arrange(found)


def _widths(layer: Any, parts: int) -> list[int]:
    """The numbers of channels of a layer's slices in this process."""
    sizes = list(getattr(layer, "output_partition_sizes", [layer.output_size]))
    return sizes if len(sizes) == parts else [sum(sizes)]
