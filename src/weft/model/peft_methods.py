"""The methods that peft and transformers call, or that peft's X-LoRA has: setters, log, `adapter_names`, batching."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from weft.base_model.backbone import Backbone
from weft.base_model.devices import resident_device
from weft.config import XLoraConfig
from weft.errors import CacheError, ConfigError
from weft.gate.metrics import GateMetrics
from weft.model.frozen_copies import (
    FrozenCopy,
    activate_experts,
    activate_heads,
    copy_experts,
    copy_heads,
    remove_experts,
    remove_heads,
)
from weft.model.heads import switch_heads
from weft.passes.base import Passes
from weft.passes.rows import rows_of_names


class PeftMethods:
    """The part of `XLoraModel` with the methods that peft and transformers call, or that peft's X-LoRA has."""

    xlora_config: XLoraConfig
    passes: Passes
    backbone: Backbone
    internal_xlora_classifier: Any
    lora_model: Any
    mixture_name: str
    active_adapter: Any
    peft_config: dict[str, Any]
    frozen_copies: nn.ModuleDict
    training: bool

    def set_topk_lora(self, value: int | None) -> None:
        """Set `top_k_lora` in the config: the number of experts that each token keeps; None keeps all.

        Raises:
            ConfigError: the value is not between 1 and the number of experts.
        """
        self._set_option("top_k_lora", value)

    def get_global_scaling_weight(self) -> float:
        """`global_scaling_weight` of the config: the factor of all scalings."""
        return self.xlora_config.global_scaling_weight

    def set_global_scaling_weight(self, weight: float) -> None:
        """Set `global_scaling_weight` in the config: the factor of all scalings.

        Raises:
            ConfigError: the weight is not finite.
        """
        self._set_option("global_scaling_weight", weight)

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Set `scaling_pass_value` in the config: the weight of each expert in the scaling pass; None means 1/N.

        Raises:
            ConfigError: the value is not finite.
        """
        self._set_option("scaling_pass_value", 1 / self.xlora_config.num_experts if value is None else value)

    def _set_option(self, name: str, value: Any) -> None:
        before = getattr(self.xlora_config, name)
        setattr(self.xlora_config, name, value)
        problems = self.xlora_config.problems()
        if problems:
            setattr(self.xlora_config, name, before)
            raise ConfigError(problems[0])

    def get_latest_scalings(self) -> Float[Tensor, "batch seq layer expert"] | None:
        """The gate's output in the last call, before top-k and with gradients; None before the first call.

        For an encoder-decoder these are the scalings of the target tokens. Those of the source tokens are in
        `passes.latest_source_scalings`.
        """
        return self.passes.latest_scalings

    def enable_scalings_logging(self) -> None:
        """Log the scalings of each pass, detached and on the CPU; the last `scalings_log_size` passes are kept."""
        self.passes.log.enabled = True

    def disable_scalings_logging(self) -> None:
        """Stop logging; the entries are kept."""
        self.passes.log.enabled = False

    def get_scalings_log(self) -> list[Tensor]:
        """The logged scalings, oldest first, each `[batch, seq, layer, expert]`."""
        return self.passes.log.entries()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """Sequence length -> (indices in the log, scalings `[batch, seq, layer, expert]`)."""
        return self.passes.log.by_sequence_length()

    def clear_scalings_log(self) -> None:
        """Remove all entries of the log."""
        self.passes.log.clear()

    @property
    def gate_metrics(self) -> GateMetrics:
        """The metrics of the gate in training calls: set `enabled`, and call `read()` to get the means."""
        return self.passes.losses.metrics

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching, for a mixture with one pass (`gate_layer`).

        Raises:
            CacheError: the mixture has two passes, which would share the paged cache.
        """
        return self._continuous("generate_batch")(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """The manager of transformers' continuous batching; for mixtures as in `generate_batch`."""
        return self._continuous("init_continuous_batching")(*args, **kwargs)

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """The manager of transformers' continuous batching, for a block; for mixtures as in `generate_batch`."""
        return self._continuous("continuous_batching_context_manager")(*args, **kwargs)

    def _continuous(self, name: str) -> Any:
        if self.passes.gate_decides and self.xlora_config.gate_layer is None:
            # Raised here, because an error in a thread of transformers would not reach the caller.
            raise CacheError(
                f"{name} cannot be used with a scaling pass (gate_layer is None): both passes would share the paged "
                "cache of continuous batching. Use generate, or make the mixture with gate_layer, which has one pass"
            )
        return getattr(self.lora_model.model, name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """peft's `adapter_names` in a block: each row of the batch uses one expert, none (`__base__`), or the gate.

        Raises:
            ConfigError: the names do not fit the mixture or the batch, or the model is in training mode.
        """
        if kwargs.get("alora_offsets") is not None:
            raise ConfigError("alora_offsets cannot be used: no expert of a mixture acts on a part of the text only")
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        options = self.xlora_config
        if self.training:
            raise ConfigError("adapter_names cannot be used in training mode: call model.eval() first")
        rows = rows_of_names(
            names,
            options.expert_names or (),
            self.mixture_name,
            options.global_scaling_weight,
            resident_device(self.internal_xlora_classifier),
        )
        if options.heads and not bool(rows.gated.all()):
            raise ConfigError(
                f"adapter_names cannot be used with heads ({options.heads}): the mixture has one head, whatever "
                "adapter a row is named for"
            )
        with self.passes.scalings_of_rows(rows):
            self.passes.check_rows(self.backbone.named_arguments(args, kwargs))
            yield

    # ------------------------------------------------------------------ frozen copies

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate the mixture or a frozen copy of it, as peft's `set_adapter`.

        Raises:
            ValueError: the name is another one.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1 or names[0] not in (self.mixture_name, *self.frozen_copies):
            raise ValueError(
                f"adapter_name ({adapter_name!r}) must be {self.mixture_name!r}, the mixture, or a frozen copy of it "
                f"({list(self.frozen_copies)}): its experts {self.xlora_config.expert_names} act together"
            )
        base = self.lora_model.model
        self.active_adapter = names[0]
        if names[0] in self.frozen_copies:
            frozen: Any = self.frozen_copies[names[0]]
            self.passes.gate = frozen.gate
            activate_experts(base, frozen.experts)
            activate_heads(base, names[0])
            return
        self.passes.gate = self.internal_xlora_classifier
        activate_experts(base, self.xlora_config.expert_names or [])
        activate_heads(base, self.mixture_name)
        self.internal_xlora_classifier.requires_grad_(not inference_mode)
        if self.xlora_config.use_trainable_adapters:
            self.lora_model.set_adapter(self.xlora_config.expert_names or [], inference_mode=inference_mode)
        switch_heads(base, self.mixture_name, inference_mode=inference_mode)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add a frozen copy of the mixture (see `frozen_copies.py`): peft's `add_adapter` with the mixture's options.

        Raises:
            ValueError: the options are other ones; experts cannot be added to a live mixture.
        """
        given = self.peft_config.get(adapter_name)
        if given is None or XLoraConfig.from_peft(given).to_dict() != self.xlora_config.to_dict():
            raise ValueError(
                f"adapter {adapter_name!r} cannot be added to an X-LoRA model: name all experts in `adapters` at the "
                "start (weft.add_expert adds one to a saved mixture). For a frozen copy of the mixture, give its own "
                f"options, model.peft_config[{self.mixture_name!r}]"
            )
        base, names = self.lora_model.model, self.xlora_config.expert_names or []
        if self.xlora_config.use_trainable_adapters:
            names = copy_experts(base, names, adapter_name)
        copy_heads(base, self.mixture_name, adapter_name)
        self.frozen_copies[adapter_name] = FrozenCopy(self.internal_xlora_classifier, names)
        # A separate config object, by which `write_beside_gate` recognises the copy.
        self.peft_config[adapter_name] = options = copy.copy(self.xlora_config)
        options.bind_model(self)  # type: ignore[arg-type]

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove a frozen copy.

        Raises:
            ValueError: it is not a frozen copy; `unload()` removes the mixture itself.
        """
        if adapter_name not in self.frozen_copies:
            raise ValueError(f"adapter {adapter_name!r} cannot be deleted: use unload() to get the base model back")
        if self.active_adapter == adapter_name:
            self.set_adapter(self.mixture_name)
        frozen: Any = self.frozen_copies[adapter_name]
        remove_experts(self.lora_model.model, set(frozen.experts) - set(self.xlora_config.expert_names or []))
        remove_heads(self.lora_model.model, adapter_name)
        del self.frozen_copies[adapter_name], self.peft_config[adapter_name]
