"""The X-LoRA model: a base model with its experts and a gate, as a tuner of peft.

It creates and removes the parts: experts, layers, gate and passes. The passes of a call are in `passes/base.py`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from weft.base_model.backbone import Backbone
from weft.base_model.loading import uncompiled
from weft.base_model.state import Flags, input_gradient_hooks, keep_unpacked, let_repack, restore_input_gradient_hooks
from weft.checkpoint.adapters import read_adapters
from weft.checkpoint.base_place import lasting_name
from weft.checkpoint.folder import open_mixture
from weft.checkpoint.licenses import licensed_card
from weft.config import XLoraConfig
from weft.distributed import parameters_may_be_wrapped
from weft.errors import AdapterError, CheckpointError, ConfigError
from weft.gate.classifier import XLoraClassifier
from weft.gate.routing import ConstantWeights, constant_scalings
from weft.layers.carrier import ScalingsCarrier
from weft.layers.convert import convert_layers_to_xlora, linear_experts, mixture_of, restack
from weft.layers.decode_weights import DecodeWeights
from weft.layers.inputs import find_layer_inputs
from weft.model.frozen_copies import refuse_loading_into_copy
from weft.model.heads import add_heads, find_heads, refuse_task_of_peft
from weft.model.inject import adapter_parameters, inject_adapters, remove_adapters, warn_of_different_bases
from weft.model.inside_transformers import attach_to_base, detach_from_base
from weft.model.peft_methods import PeftMethods
from weft.model.peft_state import PeftStateMethods
from weft.model.retrained import Retrained
from weft.model.saving import layer_mismatch
from weft.passes.base import Passes
from weft.passes.gate_position import first_following_layer, refuse_layers_beside_text
from weft.passes.scaling_lora import widths
from weft.passes.seq2seq import Seq2SeqPasses


class XLoraModel(PeftMethods, PeftStateMethods, BaseTuner):
    """A base model with several LoRA experts and a gate that mixes them per token and layer (arXiv 2402.07148).

        y_t = W x_t + Σ_e  λ_{t,e} · s_e · g · B_e A_e x_t        λ = gate(hidden states of a pass without the experts)

    for token t in each LoRA layer (equation 3). To make a model, use `weft.from_adapters`, or `get_peft_model` of peft
    after `weft.register_with_peft()`. Both return a `PeftModel` of peft, which forwards the methods below.

    Args:
        model: the base model. LoRA layers are added in place; `unload()` removes them.
        config: the options, or {adapter_name: options}; peft's `XLoraConfig` is accepted too.
        adapter_name: peft's name for the whole mixture; the experts have other names.

    Attributes:
        xlora_config: the present options.
        lora_model: peft's `LoraModel` with the experts.
        internal_xlora_classifier: the gate.
        expert_heads: expert -> tensors of its own heads, which are not used but are saved with it.
        expert_cards: expert -> its model card if it declares a licence, which is saved with it; else None.

    Raises:
        AdapterError, ConfigError: the experts, the options and the base model do not fit together. The base model is
            unchanged then.

    Example:
        >>> model = weft.from_adapters(base, {"math": "adapters/math", "code": "adapters/code"})
        >>> model(input_ids).logits
        >>> model.get_latest_scalings().shape  # [batch, seq, layer, expert]
    """

    prefix = "xlora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, PeftConfig] | PeftConfig,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        model = uncompiled(model)
        # A copy, as a config can be used for several models, and each one writes its layers and options into it.
        given = config[adapter_name] if isinstance(config, dict) else config
        refuse_task_of_peft(given)
        given = XLoraConfig.from_peft(given)
        saved, options = given.take_carried(), copy.deepcopy(given)
        options.peft_type = PeftType.XLORA
        # Now, as a relative path has another meaning after a change of the current directory.
        options.base_model_name_or_path = lasting_name(options.base_model_name_or_path)
        _take_out_earlier(model)
        _refuse_to_mix(model, options, adapter_name)
        self.backbone = Backbone(model)
        is_saved = saved is not None or options.folder is not None
        options.hidden_size = self.backbone.hidden_size(
            options.hidden_size, inside=options.reads_inside, is_saved=is_saved
        )
        heads = find_heads(model, self.backbone.module, options.heads)
        adapters = read_adapters(
            options.adapters or {},
            allow_dora=options.allow_dora,
            heads=heads,
            base_is_known=True,
            opened=saved.tensors if saved else None,
        )
        self.retrained = Retrained(model, adapters, self.backbone.module)
        self.expert_heads = {adapter.name: adapter.heads for adapter in adapters}
        self.expert_cards = {adapter.name: licensed_card(adapter.folder) for adapter in adapters}

        self.xlora_config = options
        self.peft_config = {adapter_name: options}
        self.mixture_name = self.active_adapter = adapter_name
        self.carrier = ScalingsCarrier()
        self.frozen_copies = nn.ModuleDict()
        self.register_load_state_dict_pre_hook(refuse_loading_into_copy)
        self.given_experts: dict[str, Tensor] = {}
        # peft freezes the base model when it adds adapters; `unload` restores `requires_grad`.
        self._base_flags = Flags(model)
        self._input_gradient_hooks = input_gradient_hooks(model)
        self._kept_unpacked = keep_unpacked(model)
        base_peft_config = getattr(model, "peft_config", None)
        try:
            self.retrained.use(True)
            self.lora_model = inject_adapters(model, adapters)
            if options.layer_names is None:  # only for a new mixture
                warn_of_different_bases(model, adapters)
            for adapter in adapters:
                adapter.config.base_model_name_or_path = lasting_name(adapter.config.base_model_name_or_path)
            self._finish(options, model)
            add_heads(model, heads, adapters, adapter_name, inference_mode=options.inference_mode)
            if not isinstance(config, dict) and options.folder is not None:
                attach_to_base(model, self, saved or open_mixture(options.folder))
        except BaseException:
            Passes.detach(model)
            remove_adapters(model)
            detach_from_base(model)
            if base_peft_config is not None:
                model.peft_config = base_peft_config
            self.retrained.use(False)
            self._base_flags.restore_requires_grad(model)
            let_repack(self._kept_unpacked)
            raise

    def _finish(self, options: XLoraConfig, model: Any) -> None:
        """Make everything that needs the LoRA layers."""
        names = list(options.adapters or {})
        frozen = options.inference_mode or not options.use_trainable_adapters
        self.lora_model.set_adapter(names, inference_mode=frozen)
        refuse_layers_beside_text(self.backbone)
        num_layers = convert_layers_to_xlora(model, self, options)
        if num_layers == 0:
            raise AdapterError("no LoRA layer was found in the base model: the adapters have no targets in it")
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        layer_names = list(layers)
        if options.layer_names is not None and options.layer_names != layer_names:
            raise CheckpointError(layer_mismatch(options.layer_names, layer_names))
        options.layer_names, options.expert_names = layer_names, names
        with self.carrier.scaling_pass(None):
            inputs = find_layer_inputs(self.backbone)
        self.backbone.module_state = inputs.module_state

        device = next(adapter_parameters(model, names[0]))[1].device
        first_layer = first_following_layer(self.backbone, options)
        self.internal_xlora_classifier = XLoraClassifier(
            options,
            num_experts=len(names),
            num_layers=num_layers - first_layer,
            device=device,
            dtype=torch.promote_types(self.backbone.dtype(), torch.float32),
            scaling_pass_widths=widths(self.backbone, options),
        )
        self.internal_xlora_classifier.requires_grad_(not options.inference_mode)
        self.internal_xlora_classifier.train(model.training)
        options.bind_model(self)
        self.passes = (Seq2SeqPasses if self.backbone.is_encoder_decoder else Passes)(
            self.backbone,
            self.carrier,
            self.internal_xlora_classifier,
            options,
            first_layer=first_layer,
            kinds=inputs.kinds,
            decode_weights=DecodeWeights([linear_experts(layer) for layer in layers.values()]),
        )
        self.passes.attach(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model with its own arguments. Hooks on it run the scaling pass first; see `passes/base.py`.

        Raises:
            ConfigError: `adapter_names` does not have one name for each row of the batch.
            ThreadError: another thread is using the model.
        """
        self.passes.thread.enter()
        try:
            self.passes.check_rows(self.backbone.named_arguments(args, kwargs))
            return self.lora_model.model(*args, **kwargs)
        finally:  # the forward hook does not run after a KeyboardInterrupt
            self.carrier.clear()
            self.passes.thread.leave()

    def generate(self, *args: Any, freeze_scalings_after: int | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`, with all its options. Both passes have a KV cache unless `use_cache=False`.

        Args:
            *args: arguments of transformers' `generate`.
            freeze_scalings_after: run the gate only for the prompt and this number of new tokens. From then on each
                sequence uses the mean of its scalings, and a token needs one pass. None never freezes.
            **kwargs: arguments of transformers' `generate`.

        Returns:
            The result of transformers' `generate`: token ids `[batch, seq]` by default.

        Raises:
            ConfigError: `freeze_scalings_after` cannot be used with the other options.
            ThreadError: another thread is using the model.
        """
        with self.passes.thread.held():
            self._restack(own=not parameters_may_be_wrapped())  # a compiled decoding step cannot do it
            frozen: AbstractContextManager[None] = nullcontext()
            if freeze_scalings_after is not None:
                self.passes.check_frozen_scalings(freeze_scalings_after, kwargs)
                frozen = self.passes.freeze_scalings_at(
                    self.backbone.prompt_length(args, kwargs) + freeze_scalings_after
                )
            try:
                with frozen:
                    return self.lora_model.model.generate(*args, **self.backbone.with_named_cache(kwargs))
            finally:
                self.carrier.clear()

    def fixed_scalings(self, weights: ConstantWeights) -> AbstractContextManager[None]:
        """In this block, use the same weights for all tokens, without the gate and without a scaling pass.

        Args:
            weights: expert name -> weight in all layers, 0 for experts that are not named; or a table [layer, expert]
                with a row for each of `xlora_config.layer_names`. {name: 1} is that adapter alone. The weights are
                multiplied by `global_scaling_weight`, as the gate's scalings are.

        Raises:
            ConfigError: a name is unknown, the table has another shape, or a weight is not finite.

        Example:
            >>> with model.fixed_scalings({"math": 0.5, "code": 0.5}):
            ...     model(input_ids)
        """
        names, layers = self.xlora_config.expert_names or [], self.xlora_config.layer_names or []
        return self.passes.fixed_scalings(constant_scalings(weights, names, len(layers)))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the model, and stack the experts again."""
        super()._apply(fn, recurse)
        self._restack()
        return self

    def _restack(self, *, own: bool = True) -> None:
        for module in self.lora_model.model.modules():
            if isinstance(module, LoraLayer):
                restack(module, own=own)

    # ------------------------------------------------------------------ on, off and out

    @property
    def disabled(self) -> bool:
        """Whether the experts are off, as in `disable_adapter()`."""
        return self.passes.disabled

    def enable_adapter_layers(self) -> None:
        """Switch the experts on again."""
        self._switch_layers(enabled=True)

    def disable_adapter_layers(self) -> None:
        """Switch the experts off: the output is exactly the base model's."""
        self._switch_layers(enabled=False)

    def _switch_layers(self, *, enabled: bool) -> None:
        self.passes.disabled = not enabled
        self.retrained.use(enabled)
        for module in self.lora_model.model.modules():
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                # Only the flag, as peft's `enable_adapters` also changes `requires_grad`.
                module._disable_adapters = not enabled

    def unload(self) -> nn.Module:
        """Remove the experts, the gate and the hooks, and return the unchanged base model."""
        model = self.lora_model.model
        self.carrier.clear()
        Passes.detach(model)
        remove_adapters(model)
        detach_from_base(model)
        self.retrained.use(False)
        self._base_flags.restore_requires_grad(model)
        restore_input_gradient_hooks(model, self._input_gradient_hooks)
        let_repack(self._kept_unpacked)
        self.xlora_config.bind_model(None)
        return model

    def _cannot_merge(self, *args: Any, **kwargs: Any) -> Any:
        """Raise a ValueError: a mixture cannot be merged into the base weights."""
        raise ValueError(
            "an X-LoRA model cannot be merged, as its weights depend on the token: weft.fold(model, folder, weights) "
            "writes a constant mixture as one ordinary LoRA adapter, which peft merges; unload() gives the base model "
            "back"
        )

    merge_and_unload = merge_adapter = _cannot_merge

    # ------------------------------------------------------------------ methods of peft's BaseTuner

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the experts are injected by their own LoraModel")

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name in ("lora_model", "xlora_config"):  # not set yet
                raise
            return getattr(self.lora_model, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.xlora_config.bind_model(self)


def _refuse_to_mix(model: nn.Module, options: XLoraConfig, adapter_name: str) -> None:
    """Raise if the model has other adapters, or an expert the name of the mixture."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdapterError(
            "the base model already has peft adapters: pass the model itself, not an adapter's folder, or unload() it "
            "first"
        )
    if adapter_name in (options.adapters or {}):
        raise ConfigError(
            f"adapters has the name {adapter_name!r}, which is the name of the mixture itself: choose another one"
        )


def _take_out_earlier(base: nn.Module) -> None:
    """Remove an earlier mixture of weft from a base model.

    Warns:
        UserWarning: there was one; it cannot be used any more.
    """
    layers = (module for module in base.modules() if isinstance(module, LoraLayer))
    earlier = next((tuner for layer in layers if (tuner := mixture_of(layer)) is not None), None)
    if isinstance(earlier, XLoraModel):
        warnings.warn(
            f"the base model ({type(base).__name__}) carried an earlier mixture, of "
            f"{earlier.xlora_config.expert_names}, which is removed and cannot be used any more: call its unload() "
            "first if this is intended",
            stacklevel=2,
        )
        earlier.unload()


@contextmanager
def at_own_weight(model: Any, weights: Mapping[str, float]) -> Iterator[None]:
    """In this block, a mixture uses these weights in all layers, with a `global_scaling_weight` of 1.

    In contrast to `fixed_scalings`, the weights are not multiplied by the mixture's global weight.

    Args:
        model: a mixture.
        weights: expert name -> weight; one expert at 1 is that adapter alone.
    """
    before = model.get_global_scaling_weight()
    model.set_global_scaling_weight(1.0)
    try:
        with model.fixed_scalings(weights):
            yield
    finally:
        model.set_global_scaling_weight(before)
