"""What weft needs to know of a base model: its backbone, its last hidden state, its width.

The scaling pass needs the last hidden state alone, so it runs the backbone: no LM head, no logits, no list of hidden
states; with a cache of its own where the call keeps one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from weft.errors import CacheError, ConfigError
from weft.placement import where_it_starts
from weft.short_backbone import ShortBackbone

# Outputs the scaling pass does not want, whoever asked for them.
_OUTPUT_OPTIONS = {"output_hidden_states", "output_attentions", "return_dict", "use_cache", "past_key_values"}
# Arguments of the loss, which models take through **kwargs; the last one is TRL's.
_LOSS_OPTIONS = {"num_items_in_batch", "shift_labels", "fused_lm_head"}


class Backbone:
    """The base model without its head.

    Args:
        base: a transformers model.

    Raises:
        ValueError: `base` is no transformers model.
    """

    def __init__(self, base: Any) -> None:
        config = getattr(base, "config", None)
        if config is None or not hasattr(base, "base_model_prefix"):
            raise ValueError(f"the base model ({type(base).__name__}) must be a transformers PreTrainedModel")
        self.base = base
        self.is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self._positional = [
            name
            for name, parameter in inspect.signature(base.forward).parameters.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        parameters = inspect.signature(self.module.forward).parameters
        self._accepted = set(parameters)
        self._open = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        # What the head names in its own signature and the backbone does not is the head's business: labels,
        # logits_to_keep, ...
        self._heads_own = set(self._positional) - self._accepted
        self._short: ShortBackbone | None = None

    @property
    def module(self) -> nn.Module:
        """The module that runs the layers; the base model itself where it has no head."""
        return getattr(self.base, self.base.base_model_prefix, self.base)

    @property
    def text_model(self) -> nn.Module | None:
        """The part that reads text, where others read images or sounds for it; None where the whole model does."""
        config = self.base.config
        if self.is_encoder_decoder or config.get_text_config() is config:
            return None
        return self.base.get_decoder()

    def named_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the base model, by name."""
        return {**dict(zip(self._positional, args, strict=False)), **kwargs}

    @property
    def shifts_labels(self) -> bool:
        """Whether the base model's loss lets token t predict label t + 1."""
        loss = LOSS_MAPPING.get(getattr(self.base, "loss_type", None) or "")
        return loss is ForCausalLMLoss and not self.is_encoder_decoder

    def prompt_length(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Tokens of the prompt in the arguments of `generate`."""
        given = args[0] if args else None
        for name in ("inputs", "input_ids", "inputs_embeds"):
            given = kwargs.get(name) if given is None else given
        return 0 if given is None else given.shape[1]

    def takes(self, name: str) -> bool:
        """Whether the base model's forward names this argument."""
        return name in self._positional

    def settle_cache(self, arguments: dict[str, Any]) -> None:
        """Decide whether a call of the base model keeps a cache, and make one where it does and has none.

        Where `use_cache` is not given, the base model's config decides, as in transformers; but in training mode, where
        nobody would read the cache and both passes would have to hold it, the answer is no.

        Raises:
            CacheError: the model keeps its state in something else than `past_key_values`.
        """
        if not self.takes("use_cache"):
            return
        wanted = arguments.get("use_cache")
        if wanted is None:
            wanted = self.caches and not self.base.training and self.base.config.get_text_config().use_cache
            # An encoder-decoder with labels is at the end of its text; BART would say that it takes no cache then.
            wanted = wanted and not (self.is_encoder_decoder and arguments.get("labels") is not None)
        arguments["use_cache"] = bool(wanted)
        if not wanted or arguments.get("past_key_values") is not None:
            return
        if not self.caches:
            raise CacheError(
                f"use_cache (True) is not supported with {type(self.base).__name__}, which keeps its state in "
                "something else than past_key_values: pass use_cache=False"
            )
        arguments["past_key_values"] = self.empty_cache()

    def empty_cache(self) -> Cache:
        """A cache of the kind that transformers makes for the base model where it is given none."""
        if self.is_encoder_decoder:
            # The decoder's own config: T5's may have another number of layers than the encoder. Cross-attention has no
            # sliding window, which a config may ask for.
            return EncoderDecoderCache(DynamicCache(config=self.base.get_decoder().config), DynamicCache())
        return DynamicCache(config=self.base.config.get_text_config(decoder=True))

    @property
    def caches(self) -> bool:
        """Whether the base model can keep keys and values."""
        return self.takes("past_key_values") and self.takes("use_cache")

    def last_hidden_state(self, arguments: dict[str, Any], cache: Cache | None = None) -> Tensor:
        """Run the backbone on the arguments of a call of the base model: `[batch, seq, hidden]`.

        With a cache, the arguments are those of the tokens that it lacks, and it is filled.

        A vision model's last feature map `[batch, hidden, height, width]` becomes a sequence of its cells.
        """
        hidden = getattr(self._call(self.module, arguments, cache), "last_hidden_state", None)
        if hidden is None:
            raise ValueError(
                f"the base model ({type(self.base).__name__}) gives no last_hidden_state that a gate could read: "
                "expected a model of one text or image, such as a causal language model"
            )
        return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden

    def _call(self, module: nn.Module, arguments: dict[str, Any], cache: Cache | None) -> Any:
        # The backbone is called by itself, so nothing else brings the tokens to where it starts.
        arguments = where_it_starts(self.base, arguments)
        call = {name: value for name, value in arguments.items() if self._is_backbones(name)}
        if "use_cache" in self._accepted:
            call["use_cache"] = cache is not None
        if cache is not None:
            call["past_key_values"] = cache
        return module(**call, return_dict=True)

    def residual_stream(self, arguments: dict[str, Any], cache: Cache | None, layers: int) -> Tensor:
        """What leaves the first `layers` decoder layers, which alone are run: `[batch, seq, hidden]`."""
        if self._short is None or self._short.number != layers:
            self._short = ShortBackbone(self.module, self._path_of_layers(), layers)
        return self._short.run(lambda module: self._call(module, arguments, cache))

    def decoder_layers(self) -> nn.ModuleList:
        """The decoder layers.

        Raises:
            ConfigError: the model does not keep them in one list.
        """
        layers = self.module.get_submodule(self._path_of_layers())
        assert isinstance(layers, nn.ModuleList)
        return layers

    def _path_of_layers(self) -> str:
        number = getattr(self.base.config.get_text_config(), "num_hidden_layers", None)
        text = self.text_model
        inside = set((self.module if text is None else text).modules())
        for path, module in self.module.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == number and module in inside:
                return path
        raise ConfigError(
            f"gate_layer and scaling_pass_layers need a base model with its {number} decoder layers in one list, which "
            f"{type(self.base).__name__} has not: leave them out"
        )

    def _is_backbones(self, name: str) -> bool:
        if name in _OUTPUT_OPTIONS:
            return False
        return name in self._accepted or (self._open and name not in self._heads_own | _LOSS_OPTIONS)

    def hidden_size(self, given: int | None = None, *, inside: bool = False) -> int:
        """The width of the last hidden state (of the text model, where there are several).

        Args:
            given: what the user says it is.
            inside: of the residual stream between the decoder layers instead.

        Raises:
            ConfigError: the base model's config does not tell it, or it is not the given one.
        """
        config = self.base.config.get_text_config()
        # OPT projects its last hidden state to the width of its embeddings.
        for name in ("hidden_size",) if inside else ("word_embed_proj_dim", "hidden_size", "hidden_sizes"):
            found = getattr(config, name, None)
            if found:
                found = int(found[-1] if isinstance(found, (list, tuple)) else found)
                if given not in (None, found):
                    raise ConfigError(
                        f"hidden_size ({given}) must be the base model's ({found}): leave it out to infer it"
                    )
                return found
        if given is None:
            raise ConfigError(
                f"hidden_size (None) must be given: the config of {type(self.base).__name__} does not tell it"
            )
        return given

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_short": None}

    def dtype(self) -> torch.dtype:
        """Of the base model's first floating parameter."""
        return next(p.dtype for p in self.base.parameters() if p.is_floating_point())


def input_gradient_hooks(base: Any) -> list[Any]:
    """The hooks that make the embeddings' output require gradients.

    peft adds one of its own when it wraps a base model that checkpoints its activations.
    """
    return list(getattr(base, "_require_grads_hooks", None) or [])


def restore_input_gradient_hooks(base: Any, before: list[Any]) -> None:
    """Remove the hooks that were added since."""
    added = [hook for hook in input_gradient_hooks(base) if hook not in before]
    for hook in added:
        hook.remove()
    if added:
        base._require_grads_hooks = before
        del base._require_grads_hook
        if before:
            base._require_grads_hook = before[0]


@contextmanager
def in_evaluation_mode(module: nn.Module) -> Iterator[None]:
    """In this block nothing is dropped and nothing learns; afterwards each part has its own mode again."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training
