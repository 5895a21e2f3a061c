"""What a mixture answers to because peft's models and transformers' generation do: setters, names of rows, batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor

from weft.backbone import Backbone
from weft.config import XLoraConfig
from weft.errors import CacheError, ConfigError
from weft.passes import Passes
from weft.placement import resident_device
from weft.row_scalings import rows_of_names
from weft.scalings_log import ScalingsLogMethods


class PeftMethods(ScalingsLogMethods):
    """The methods of `XLoraModel` that peft and transformers call, or that peft's own X-LoRA has."""

    xlora_config: XLoraConfig
    passes: Passes
    backbone: Backbone
    internal_xlora_classifier: Any
    lora_model: Any
    active_adapter: Any
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
            self.active_adapter,
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
