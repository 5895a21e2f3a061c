"""What a mixture answers to because peft and transformers ask for it: setters, the log, names of rows, batches."""

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
    """The methods of `XLoraModel` that peft and transformers call, or that peft's own X-LoRA has."""

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
        """Keep `value` experts per token, 1 to the number of experts; None keeps all. Written to the config.

        Raises:
            ConfigError: out of that range.
        """
        self._set_option("top_k_lora", value)

    def get_global_scaling_weight(self) -> float:
        """The weight of the whole mixture."""
        return self.xlora_config.global_scaling_weight

    def set_global_scaling_weight(self, weight: float) -> None:
        """Set the weight of the whole mixture; written to the config."""
        self._set_option("global_scaling_weight", weight)

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Set every expert's weight in the scaling pass; None means 1/N. Written to the config."""
        self._set_option("scaling_pass_value", 1 / self.xlora_config.num_experts if value is None else value)

    def _set_option(self, name: str, value: Any) -> None:
        before = getattr(self.xlora_config, name)
        setattr(self.xlora_config, name, value)
        problems = self.xlora_config.problems()
        if problems:
            setattr(self.xlora_config, name, before)
            raise ConfigError(problems[0])

    def get_latest_scalings(self) -> Float[Tensor, "batch seq layer expert"] | None:
        """The scalings of the last pass that used the gate, gradients included; None before the first.

        Of an encoder-decoder, those of the target tokens; `passes.latest_source_scalings` has the source tokens'.
        """
        return self.passes.latest_scalings

    def enable_scalings_logging(self) -> None:
        """Record the scalings of each pass: detached, on the CPU, the last `scalings_log_size` of them."""
        self.passes.log.enabled = True

    def disable_scalings_logging(self) -> None:
        """Stop recording; what is recorded stays."""
        self.passes.log.enabled = False

    def get_scalings_log(self) -> list[Tensor]:
        """The recorded scalings, oldest first, each `[batch, seq, layer, expert]`."""
        return self.passes.log.entries()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """Sequence length -> (indices in the log, scalings)."""
        return self.passes.log.by_sequence_length()

    def clear_scalings_log(self) -> None:
        """Forget the recorded scalings."""
        self.passes.log.clear()

    @property
    def gate_metrics(self) -> GateMetrics:
        """What the gate does in training calls: set `enabled`, and `read()` the means when you log."""
        return self.passes.losses.metrics

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching, for a mixture of one pass (`gate_layer`).

        Raises:
            CacheError: there are two passes, which would share its paged cache.
        """
        return self._continuous("generate_batch")(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """The manager of transformers' continuous batching; as `generate_batch`."""
        return self._continuous("init_continuous_batching")(*args, **kwargs)

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """The manager of transformers' continuous batching, for a block; as `generate_batch`."""
        return self._continuous("continuous_batching_context_manager")(*args, **kwargs)

    def _continuous(self, name: str) -> Any:
        if self.passes.gate_decides and self.xlora_config.gate_layer is None:
            # Here, because the threads of transformers would keep an error to themselves.
            raise CacheError(
                f"{name} cannot be used with a scaling pass (gate_layer is None): both passes would share the paged "
                "cache of continuous batching. Use generate, or make the mixture with gate_layer, which has one pass"
            )
        return getattr(self.lora_model.model, name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """peft's `adapter_names` in a block: a row of the batch follows one expert, none (`__base__`), or the gate.

        Raises:
            ConfigError: the names do not fit the mixture or the batch, or the model is not in evaluation mode.
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
        """peft's switch between adapters: the mixture, or a frozen copy of it.

        Raises:
            ValueError: another name.
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
        """peft's `add_adapter` with the mixture's own options: a frozen copy of it as it is now (see `frozen_copies`).

        Raises:
            ValueError: other options, as the experts of a mixture are fixed when it is made.
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
        # Options of its own, by which saving knows it.
        self.peft_config[adapter_name] = options = copy.copy(self.xlora_config)
        options.bind_model(self)  # type: ignore[arg-type]

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove a frozen copy.

        Raises:
            ValueError: it is the mixture itself, which `unload()` takes out.
        """
        if adapter_name not in self.frozen_copies:
            raise ValueError(f"adapter {adapter_name!r} cannot be deleted: use unload() to get the base model back")
        if self.active_adapter == adapter_name:
            self.set_adapter(self.mixture_name)
        frozen: Any = self.frozen_copies[adapter_name]
        remove_experts(self.lora_model.model, set(frozen.experts) - set(self.xlora_config.expert_names or []))
        remove_heads(self.lora_model.model, adapter_name)
        del self.frozen_copies[adapter_name], self.peft_config[adapter_name]
