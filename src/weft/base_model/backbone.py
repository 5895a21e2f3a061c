"""The backbone of a base model: how it is called, its last hidden state, its width, its cache.

The scaling pass needs only the last hidden state, so it runs the backbone without the LM head and without a list of
all hidden states. If the call uses a KV cache, the scaling pass has a second one.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, NoReturn, cast, get_args

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import ModelOutput

from weft.base_model.devices import CACHE_NAMES, where_it_starts
from weft.base_model.first_layers import ShortBackbone
from weft.base_model.versions import croppable
from weft.errors import CacheError, CheckpointError, ConfigError

# Options of the call that are not passed to the scaling pass.
_OUTPUT_OPTIONS = {"output_hidden_states", "output_attentions", "return_dict", "use_cache", *CACHE_NAMES}
# Arguments other than the KV cache that hold a state: transformers' continuous batching, RWKV, XLNet.
_STATES = ("cache", "state", "mems")
# Arguments of the loss, which models take in **kwargs; the last one is from TRL.
_LOSS_OPTIONS = {"num_items_in_batch", "shift_labels", "fused_lm_head"}


class Backbone:
    """The base model without its head.

    Args:
        base: a transformers model.

    Attributes:
        module: the module that runs the layers; the base model itself if it has no head.
        module_state: names of activations that modules keep between calls, outside of any cache.

    Raises:
        ValueError: `base` is not a transformers model.
    """

    def __init__(self, base: Any) -> None:
        config = getattr(base, "config", None)
        if config is None or not hasattr(base, "base_model_prefix"):
            raise ValueError(f"the base model ({type(base).__name__}) must be a transformers PreTrainedModel")
        self.base = base
        self.is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self.module = without_head(base)
        self.module_state: tuple[str, ...] = ()
        self._positional = [
            name
            for name, parameter in inspect.signature(base.forward).parameters.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        # Some models, such as LLaVA, pass it to their text model in **kwargs.
        self._takes_use_cache = self.takes("use_cache") or _is_open(base.forward)
        parameters = inspect.signature(self.module.forward).parameters
        self._accepted = set(parameters)
        self._open = _is_open(self.module.forward)
        # Arguments of the head only: labels, logits_to_keep, ...
        self._heads_own = set(self._positional) - self._accepted
        self._short: ShortBackbone | None = None

    @property
    def text_model(self) -> nn.Module | None:
        """The text part of a multimodal model; None for a model of text only."""
        config = self.base.config
        if self.is_encoder_decoder or config.get_text_config() is config:
            return None
        return self.base.get_decoder()

    def named_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the base model as keywords; see also `with_named_cache`."""
        # Not with zip, which torch.compile of torch 2.6 cannot trace.
        named = {name: args[index] for index, name in enumerate(self._positional[: len(args)])}
        return self.with_named_cache({**named, **kwargs})

    def with_named_cache(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments, with the cache under the base model's own name for it (one of `CACHE_NAMES`)."""
        given = next((name for name in CACHE_NAMES if name in arguments), None)
        if self.cache_name != CACHE_NAMES[0] or given in (None, self.cache_name):
            return arguments
        others = {name: value for name, value in arguments.items() if name != given}
        return {**others, self.cache_name: arguments[given]}

    @property
    def shifts_labels(self) -> bool:
        """Whether the base model's loss lets token t predict label t + 1."""
        loss = LOSS_MAPPING.get(getattr(self.base, "loss_type", None) or "")
        return loss is ForCausalLMLoss and not self.is_encoder_decoder

    def prompt_length(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The number of prompt tokens in the arguments of `generate`."""
        given = args[0] if args else None
        for name in ("inputs", "input_ids", "inputs_embeds"):
            given = kwargs.get(name) if given is None else given
        return 0 if given is None else given.shape[1]

    def batch_size(self, arguments: dict[str, Any]) -> int:
        """The batch size of a call, from its arguments; 0 if no argument is a tensor."""
        names = (self.base.main_input_name, "input_ids", "inputs_embeds", "decoder_input_ids")
        tensors = (arguments.get(name) for name in (*names, *arguments))
        return next((len(value) for value in tensors if isinstance(value, Tensor)), 0)

    def takes(self, name: str) -> bool:
        """Whether the base model's forward names this argument."""
        return name in self._positional

    def settle_cache(self, arguments: dict[str, Any], *, two_passes: bool) -> None:
        """Set `use_cache` in the arguments of a call, and add an empty cache if both passes need one.

        If `use_cache` is not given, the base model's config decides, as in transformers. In training mode it is off
        then, as no later call would read the caches of the two passes.

        Raises:
            CacheError: the two passes would share a state, or the model keeps its state outside of the cache.
        """
        if two_passes:
            _refuse_shared_state({name: value for name, value in arguments.items() if name != self.cache_name})
        if not self.takes("use_cache") and not self.caches:
            return
        wanted = arguments.get("use_cache")
        if wanted is None:
            possible = self.caches and not (two_passes and self.module_state)
            wanted = possible and not self.base.training and self.base.config.get_text_config().use_cache
            # With labels an encoder-decoder needs no cache; BART would warn about one.
            wanted = wanted and not (self.is_encoder_decoder and arguments.get("labels") is not None)
        arguments["use_cache"] = bool(wanted)
        if not wanted or not two_passes:
            return
        cache = self.cache_of(arguments)
        if self.module_state or not (self.caches or isinstance(cache, Cache)):
            where = f"its modules ({self.module_state[0]})" if self.module_state else "no cache of transformers' own"
            raise CacheError(
                f"use_cache (True) is not supported with {type(self.base).__name__}, which keeps its state in {where}, "
                "and the two passes would share it: pass use_cache=False, or make the mixture with gate_layer, which "
                "has one pass"
            )
        if cache is None:
            assert self.cache_name is not None
            arguments[self.cache_name] = self.empty_cache()

    def cache_of(self, arguments: dict[str, Any]) -> Any:
        """The cache in the arguments of a call, or None."""
        return None if self.cache_name is None else arguments.get(self.cache_name)

    def empty_cache(self) -> Cache:
        """A new cache of the kind that transformers makes for the base model by default."""
        if self.is_encoder_decoder:
            # The decoder has its own config: T5's decoder can have another number of layers than the encoder. The
            # cache of cross-attention has no config, as it has no sliding window even if the config has one.
            return EncoderDecoderCache(DynamicCache(config=self.base.get_decoder().config), DynamicCache())
        return croppable(DynamicCache(config=self.base.config.get_text_config(decoder=True)))

    @property
    def cache_name(self) -> str | None:
        """The name of the base model's cache argument; None if it has none."""
        return next((name for name in CACHE_NAMES if self.takes(name)), None)

    @property
    def caches(self) -> bool:
        """Whether the base model keeps its state in a cache that transformers makes."""
        makes = getattr(self.base, "_supports_default_dynamic_cache", lambda: True)
        return self.cache_name is not None and self._takes_use_cache and makes()

    def last_hidden_state(self, arguments: dict[str, Any], cache: Cache | None = None) -> Tensor:
        """Run the backbone on the arguments of a call of the base model.

        Args:
            arguments: the arguments; with a cache, for the new tokens only.
            cache: the cache of earlier tokens, to which the new ones are added.

        Returns:
            The last hidden state `[batch, seq, hidden]`. A vision model's feature map `[batch, hidden, height, width]`
            is flattened to a sequence of its cells.
        """
        return self.hidden_of(self._call(self.module, arguments, cache))

    def hidden_of(self, output: Any) -> Tensor:
        """The last hidden state in the backbone's output, `[batch, seq, hidden]`.

        Raises:
            ValueError: the output has none.
        """
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            self._refuse_hidden_states()
        return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden

    def refuse_other_outputs(self) -> None:
        """Raise if the annotation of the backbone's `forward` shows that there is no last hidden state.

        Raises:
            ValueError: there is none.
        """
        if not self.is_encoder_decoder and not _may_give_last_hidden_state(self.module):
            self._refuse_hidden_states()

    def _refuse_hidden_states(self) -> NoReturn:
        raise ValueError(
            f"the base model ({type(self.base).__name__}) gives no last_hidden_state that a gate could read: "
            "expected a model of one text or image, such as a causal language model"
        )

    def _call(self, module: nn.Module, arguments: dict[str, Any], cache: Cache | None) -> Any:
        # accelerate's hook on the base model, which would move the inputs, does not run here.
        arguments = where_it_starts(self.base, arguments)
        call = {name: value for name, value in arguments.items() if self._is_backbones(name)}
        if "use_cache" in self._accepted:
            call["use_cache"] = cache is not None
        if cache is not None and self.cache_name is not None:
            call[self.cache_name] = cache
        return module(**call, return_dict=True)

    def residual_stream(self, arguments: dict[str, Any], cache: Cache | None, layers: int) -> Tensor:
        """Run only the first `layers` decoder layers, and return their output `[batch, seq, hidden]`."""
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

    def hidden_size(self, given: int | None = None, *, inside: bool = False, is_saved: bool = False) -> int:
        """The width of the last hidden state; in a multimodal model, of the text part.

        Args:
            given: the width in the mixture's options, or None.
            inside: return the width of the residual stream between the decoder layers instead.
            is_saved: `given` is that of a saved mixture, not a user's.

        Raises:
            ConfigError: the base model's config does not have it, or it differs from `given`.
            CheckpointError: it differs from that of the saved mixture.
        """
        # OPT projects its last hidden state to the width of its embeddings.
        names = ("hidden_size",) if inside else ("word_embed_proj_dim", "hidden_size", "hidden_sizes")
        found = _width(self.base.config.get_text_config(), names)
        if self.is_encoder_decoder:
            widths = [_width(part.config, names) for part in (self.base.get_encoder(), self.base.get_decoder())]
            if None not in widths and len(set(widths)) > 1:
                raise ConfigError(
                    f"the base model ({type(self.base).__name__}) has an encoder of width {widths[0]} and a decoder of "
                    f"width {widths[1]}: expected one width, as one gate reads the hidden states of both"
                )
            found = widths[1] or found
        if given is None and found is None:
            raise ConfigError(
                f"hidden_size (None) must be given: the config of {type(self.base).__name__} does not tell it"
            )
        if given not in (None, found) and found is not None:
            if is_saved:
                name = getattr(self.base, "name_or_path", None) or type(self.base).__name__
                raise CheckpointError(
                    f"base ({name}) is another model than that of the mixture: its hidden size is {found}, the "
                    f"mixture's {given}: give the base model that the mixture was made for"
                )
            raise ConfigError(f"hidden_size ({given}) must be the base model's ({found}): leave it out to infer it")
        width = found or given
        assert width is not None
        return width

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_short": None}

    def dtype(self) -> torch.dtype:
        """The dtype of the base model's first floating-point parameter."""
        return next(p.dtype for p in self.base.parameters() if p.is_floating_point())


def _is_open(function: Any) -> bool:
    """Whether a function takes **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _refuse_shared_state(arguments: dict[str, Any]) -> None:
    for name in _STATES:
        if arguments.get(name) is not None:
            raise CacheError(
                f"{name} ({type(arguments[name]).__name__}) is a state that the two passes would share: call the model "
                "without it (generate in the place of generate_batch), or make the mixture with gate_layer, which has "
                "one pass"
            )


def without_head(base: Any) -> nn.Module:
    """The part of a transformers model that runs its layers; the model itself if it has no head."""
    try:
        return base.get_submodule(base.base_model_prefix) if base.base_model_prefix else base
    except AttributeError:
        pass  # some classes have a prefix without such an attribute, such as Llama4ForCausalLM
    if base.get_output_embeddings() is None or base.config.get_text_config() is not base.config:
        return base
    embeddings = base.get_input_embeddings()
    parts = [part for part in base.children() if isinstance(part, PreTrainedModel)]
    return next((part for part in parts if embeddings in part.modules()), base)


def vocabulary_size(model: Any) -> int | None:
    """The number of token ids that a model can read; None if that is not known."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    size = getattr(getattr(embeddings, "base_layer", embeddings), "num_embeddings", None)
    return size if isinstance(size, int) else None


def _width(config: Any, names: Sequence[str]) -> int | None:
    """The first of these options that is set in a config."""
    for name in names:
        found = getattr(config, name, None)
        if found:
            return int(found[-1] if isinstance(found, (list, tuple)) else found)
    return None


def _may_give_last_hidden_state(module: nn.Module) -> bool:
    """Whether the return annotation of a module's `forward` has a last hidden state; True without an annotation."""
    annotation = inspect.signature(module.forward).return_annotation
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    outputs = [kind for kind in kinds if issubclass(kind, ModelOutput)]
    return not outputs or any(
        "last_hidden_state" in {field.name for field in dataclasses.fields(cast(Any, kind))} for kind in outputs
    )
