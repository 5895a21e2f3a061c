"""The methods with which peft casts, saves and loads a tuner's adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from weft.base_model.devices import execution_device, is_offloaded
from weft.base_model.versions import cast_like_base_layer, let_peft_ask
from weft.checkpoint.adapter_keys import without_wrappers
from weft.checkpoint.folder import GATE_KEY
from weft.errors import AdapterError, CheckpointError, bullet_list
from weft.model.frozen_copies import refuse_frozen_copy
from weft.model.inject import refuse_not_finite
from weft.model.saving import gate_problems, given_experts, write_beside_gate

let_peft_ask()


class PeftStateMethods:
    """The part of `XLoraModel` with the methods for casting, saving and loading."""

    lora_model: Any
    xlora_config: Any
    unload: Any

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast the adapters to each layer's dtype if `autocast_adapter_dtype` is off; else they stay in float32."""
        if autocast_adapter_dtype:
            return
        for module in self.lora_model.model.modules():
            if isinstance(module, LoraLayer):
                base_layer = module.get_base_layer()
                device = execution_device(base_layer) if is_offloaded(base_layer) else None
                for name in self.xlora_config.expert_names or ():
                    cast_like_base_layer(module, name, device)
        try:
            for name in self.xlora_config.expert_names or ():
                refuse_not_finite(self.lora_model.model, name)
        except AdapterError:
            self.unload()
            raise

    def save_beside_gate(self, config: PeftConfig, folder: Path, auto_mapping: dict[str, str] | None) -> None:
        """Write experts and options beside the gate that peft has written; for `XLoraConfig.save_pretrained`."""
        write_beside_gate(self, config, folder, auto_mapping)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        tuner: Any = model.base_model
        if adapter_name in tuner.frozen_copies:
            return {}
        state_dict = {without_wrappers(key): value for key, value in state_dict.items()}
        tuner.given_experts = given_experts(tuner, state_dict)  # for the experts' files, which are written later
        return {key: value for key, value in state_dict.items() if GATE_KEY in key}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a gate's tensors before peft loads them, as peft only warns about missing ones."""
        refuse_frozen_copy(model, adapter_name)
        # peft has already added its own names for the heads to the keys.
        saved = {key.replace(f".modules_to_save.{adapter_name}.", "."): value for key, value in state_dict.items()}
        problems = gate_problems(model, saved)
        if problems:
            raise CheckpointError(f"the gate's tensors do not fit this model:{bullet_list(problems)}")
        return state_dict
