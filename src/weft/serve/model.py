"""vLLM's class of a base model with a mixture in it, named `Weft` + architecture; it is made on first access."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
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
from weft.serve.layers import MixtureMethod, ScalingLoraMethod, Slice, own_part
from weft.serve.mixture import Factors, ServedMixture, read_mixture
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
    """Add the experts, and the gate's own LoRA, to the methods of the layers that they adapt.

    Raises:
        ConfigError: the model does not have these layers.
    """
    mixture: ServedMixture = model.weft_mixture
    number = {layer: place for place, layer in enumerate(mixture.layers)}
    lora = {layer: (factors,) for layer, factors in mixture.scaling_lora.items()}
    found: list[list[int]] = []  # for each layer, the numbers of its LoRA layers
    read: set[str] = set()  # layers with the gate's own LoRA
    packed = getattr(model, "packed_modules_mapping", {})
    for name, layer in model.named_modules():
        if not isinstance(layer, LinearBase) or isinstance(layer.quant_method, (MixtureMethod, ScalingLoraMethod)):
            continue
        stem, _, last = name.rpartition(".")
        parts = [f"{stem}.{part}" for part in packed.get(last, [last])]
        device, following = next(iter(layer.parameters())).device, model.weft_following
        slices = _slices(layer, parts, mixture.factors, number)
        if slices:
            layer.quant_method = MixtureMethod(
                layer.quant_method,
                following,
                len(found),
                slices,
                layer_width=sum(_widths(layer, len(parts))),
                device=device,
            )
            found.append([each.number for each in slices])
        slices = _slices(layer, parts, lora, dict.fromkeys(lora, 0))
        if slices:
            layer.quant_method = ScalingLoraMethod(layer.quant_method, following, slices, device=device)
            read.update(parts)
    missing = [mixture.layers[place] for place in sorted({*number.values()} - {place for of in found for place in of})]
    missing += sorted(set(lora) - read)
    if missing:
        raise ConfigError(
            f"model ({mixture.folder}) adapts layers that vLLM's {type(model).__name__.removeprefix(PREFIX)} does not "
            f"have: {missing[:5]}"
        )
    model.weft_following.arrange(found)


def _slices(
    layer: Any, parts: list[str], factors: Mapping[str, tuple[Factors | None, ...]], number: Mapping[str, int]
) -> list[Slice]:
    """The slices of a layer of vLLM that these factors adapt.

    Args:
        layer: the layer.
        parts: names of its slices in transformers' model.
        factors: name -> factors.
        number: name -> number of the LoRA layer.
    """
    widths = _widths(layer, len(parts))
    starts = [sum(widths[:place]) for place in range(len(widths))]
    return [
        Slice(number[part], start, width, own_part(layer, factors[part], place, width))
        for place, (part, start, width) in enumerate(zip(parts, starts, widths, strict=True))
        if part in factors
    ]


def _widths(layer: Any, parts: int) -> list[int]:
    """The numbers of channels of a layer's slices in this process."""
    sizes = list(getattr(layer, "output_partition_sizes", [layer.output_size]))
    return sizes if len(sizes) == parts else [sum(sizes)]
