"""Checks of the mixture's options in `XLoraConfig` and `weft train`. Each returns one sentence per problem."""

from __future__ import annotations

from typing import Any

from weft.files.reading import is_finite_in_float32, is_list_of_strings, is_number, is_whole, shown

# The gate's losses (`weft.losses`). The option NAME_weight is the weight of the loss NAME.
GATE_LOSSES = ("balance_loss", "entropy_loss", "expert_label_loss")
_FINITE = ", in float32 too"  # the dtype in which they are used


def range_problems(config: Any) -> list[str]:
    """Numbers out of range."""
    problems = []
    smallest = {"xlora_depth": 1, "xlora_size": 1, "scalings_log_size": 1}
    smallest_if_given = {"hidden_size": 1, "scaling_pass_layers": 1, "scaling_pass_rank": 1, "gate_layer": 0}
    for name, least in {**smallest, **smallest_if_given}.items():
        value = getattr(config, name)
        if value is None and name in smallest_if_given:
            continue
        if not is_whole(value) or value < least:
            problems.append(f"{name} ({shown(value)}) must be a whole number of at least {least}")
    if config.scaling_pass_layers is not None and config.gate_layer is not None:
        problems.append(
            f"scaling_pass_layers ({config.scaling_pass_layers}) and gate_layer ({config.gate_layer}) exclude each "
            "other: with gate_layer there is no scaling pass"
        )
    if config.scaling_pass_rank is not None and config.scaling_pass_layers is None:
        problems.append(
            f"scaling_pass_rank ({shown(config.scaling_pass_rank)}) needs scaling_pass_layers (None): the number of "
            "decoder layers in which the gate's own LoRA acts, such as 4"
        )
    if not is_number(config.xlora_dropout_p) or not 0 <= config.xlora_dropout_p < 1:
        problems.append(f"xlora_dropout_p ({shown(config.xlora_dropout_p)}) must be in [0, 1)")
    temperature = config.softmax_temperature
    if not is_finite_in_float32(temperature) or temperature <= 0:
        problems.append(f"softmax_temperature ({shown(temperature)}) must be a finite number above 0{_FINITE}")
    for name in ("balance_loss_weight", "expert_label_loss_weight"):
        value = getattr(config, name)
        if not is_finite_in_float32(value) or value < 0:
            problems.append(f"{name} ({shown(value)}) must be a finite number of at least 0{_FINITE}")
    for name in ("scaling_pass_value", "global_scaling_weight", "entropy_loss_weight"):
        value = getattr(config, name)
        # Without a table of adapters, which is refused, `scaling_pass_value` was not inferred.
        is_open = value is None and not (isinstance(config.adapters, dict) and config.adapters)
        if not is_finite_in_float32(value) and not is_open:
            problems.append(f"{name} ({shown(value)}) must be a finite number{_FINITE}")
    return problems


def type_problems(config: Any) -> list[str]:
    """Values of a wrong type."""
    switches = ("enable_softmax", "enable_softmax_topk", "layerwise_scalings", "use_trainable_adapters", "allow_dora")
    problems = [
        f"{name} ({shown(value)}) must be True or False"
        for name in switches
        if not isinstance(value := getattr(config, name), bool)
    ]
    for name, what in {"heads": "module", "layer_names": "layer"}.items():
        names = getattr(config, name)
        if names is not None and not (is_list_of_strings(names) and names and all(names)):
            problems.append(f"{name} ({shown(names)}) must be a list of {what} names, or None")
    return problems


def routing_problems(config: Any) -> list[str]:
    """Options of routing that do not fit together."""
    problems = []
    num_adapters = len(config.adapters) if isinstance(config.adapters, dict) else 0
    if config.top_k_lora is not None:
        problems += top_k_problems(config.top_k_lora, num_adapters)
    elif config.enable_softmax_topk is True:
        problems.append("enable_softmax_topk (True) needs top_k_lora (None): set how many experts a token keeps")
    if config.enable_softmax is False and config.enable_softmax_topk is False:
        for name in GATE_LOSSES:
            value = getattr(config, f"{name}_weight")
            if value:
                problems.append(
                    f"{name}_weight ({shown(value)}) needs shares that sum to one: set enable_softmax or "
                    "enable_softmax_topk"
                )
    if config.enable_softmax is True and config.enable_softmax_topk is True:
        problems.append("enable_softmax (True) and enable_softmax_topk (True) exclude each other: switch one off")
    return problems


def top_k_problems(top_k: Any, num_adapters: int) -> list[str]:
    """The problem with `top_k` for this number of adapters, if any; 0 if the number is not known."""
    if not is_whole(top_k) or top_k < 1 or (num_adapters and top_k > num_adapters):
        upper = f"the number of adapters ({num_adapters})" if num_adapters else "the number of adapters"
        return [f"top_k_lora ({shown(top_k)}) must be between 1 and {upper}"]
    return []
