"""The options of an X-LoRA model: meaning and range of each, and one error that lists all problems.

`XLoraConfig` has the names and meanings of peft's fields, so that scripts and checkpoints of peft work. weft's own
fields are below them.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, TaskType
from torch import nn

from weft.checkpoint.adapters import table_problems
from weft.checkpoint.base_place import lasting_name
from weft.checkpoint.folder import SavedMixture, open_mixture, write_options
from weft.checkpoint.gate_sizes import refuse_other_sizes
from weft.errors import ConfigError
from weft.files.failures import errors_of_writing
from weft.files.reading import kind_shown, shown
from weft.options.ranges import GATE_LOSSES, range_problems, routing_problems, type_problems

# Arguments of peft's `from_pretrained` for the download; they are not options.
_FETCHING = {"revision", "cache_dir", "token", "use_auth_token", "ephemeral_gpu_offload", "torch_device"}
_TITLE = "XLoraConfig cannot work:"
_WRITTEN_BY_SAVE = {"expert_names", "layer_names", "format_version"}
# peft's XLoraConfig sets a missing hidden_size to this, for any model.
PEFT_PLACEHOLDER_HIDDEN_SIZE = 4096


@dataclasses.dataclass
class XLoraConfig(PeftConfig):
    """Options of an X-LoRA model (arXiv 2402.07148).

    In an encoder-decoder, the gate reads the encoder's output for source tokens, and the decoder's for target tokens.
    LoRA layers in the encoder, and of the keys and values of cross-attention, use the scalings of the source tokens;
    all others those of the target tokens. There, `scaling_pass_layers` and `gate_layer` must be None.

    Args:
        hidden_size: width of the hidden states that the gate reads; None takes it from the base model.
        adapters: the experts, name -> folder or Hub id of a LoRA adapter. Their order is the order of the gate's
            outputs.
        enable_softmax: softmax over the experts, so that a token's scalings sum to one.
        enable_softmax_topk: softmax over the kept experts only; needs `top_k_lora`, excludes `enable_softmax`.
        layerwise_scalings: separate scalings for each LoRA layer. If False, all layers share one set, which is peft's
            default, and the default for configs and folders of peft.
        xlora_depth: number of linear layers of the gate, 1 or more.
        xlora_size: width of the gate's hidden layers, 1 or more; no effect at depth 1.
        xlora_dropout_p: dropout between the gate's layers, in [0, 1); no effect at depth 1.
        use_trainable_adapters: train (and save) the experts together with the gate.
        softmax_temperature: divisor of the gate's logits, above 0; a lower value gives sharper scalings.
        top_k_lora: number of experts that each token keeps, 1 to the number of adapters; None keeps all.
        scaling_pass_value: weight of each expert in the scaling pass, which computes the gate's input; 0 runs the base
            model alone. None means 0, or with `gate_layer` 1 / number of experts.
        global_scaling_weight: factor of all scalings.
        scaling_pass_layers: number of decoder layers in the scaling pass, 1 or more. The gate reads the output of the
            last of them. None runs all layers.
        scaling_pass_rank: rank of a LoRA of the gate's own, which acts in the linear layers of the scaling pass only, 1
            or more; None for none. `fit_gate` trains it. It needs `scaling_pass_layers`.
        gate_layer: index (from 0) of the decoder layer whose input the gate reads in the only pass, without a scaling
            pass. The layers from there on use its scalings. None: with a scaling pass. Excludes `scaling_pass_layers`.
        allow_dora: accept experts with DoRA. Their weight norms are computed once if the experts are frozen, and in
            each call if they are trained.
        heads: names of modules of the base model that are trained and saved with the gate, such as `classifier`; None
            for none. They must be outside of the backbone. An expert's own copy of such a module is not used.
        scalings_log_size: maximum number of passes in the scalings log, 1 or more; older ones are dropped.
        balance_loss_weight: weight of `weft.losses.balance_loss` in training, 0 or more; it makes the use of the
            experts more even. This and the next two need `enable_softmax` or `enable_softmax_topk`.
        entropy_loss_weight: weight of `weft.losses.entropy_loss`; above 0 the gate becomes sharper, below 0 softer.
        expert_label_loss_weight: weight of `weft.losses.expert_label_loss`, 0 or more, in calls with `expert_labels`:
            the index of the expert to which each example (or token) belongs.
        expert_names: written by `save_pretrained`: the experts in the order of the gate's outputs.
        layer_names: written by `save_pretrained`: the LoRA layers in the order of the gate's outputs.
        format_version: version of the saved folder's format; None if weft did not write it.

    Raises:
        ConfigError: a value is out of range, options exclude each other, or an option is unknown; all at once.

    Example:
        >>> config = XLoraConfig(adapters={"math": "adapters/math", "code": "adapters/code"}, layerwise_scalings=True)
        >>> config.xlora_depth
        1
    """

    hidden_size: int | None = None
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = True
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float | None = None
    global_scaling_weight: float = 1.0
    # weft's own
    scaling_pass_layers: int | None = None
    scaling_pass_rank: int | None = None
    gate_layer: int | None = None
    allow_dora: bool = False
    heads: list[str] | None = None
    scalings_log_size: int = 256
    balance_loss_weight: float = 0.0
    entropy_loss_weight: float = 0.0
    expert_label_loss_weight: float = 0.0
    expert_names: list[str] | None = None
    layer_names: list[str] | None = None
    format_version: int | None = None

    def __post_init__(self) -> None:
        problems = _inherited_problems(self)
        if problems:
            raise ConfigError(_TITLE, [*problems, *self.problems()])
        super().__post_init__()
        self.peft_type = PeftType.XLORA
        self.base_model_name_or_path = self.base_model_name_or_path or None  # peft before 0.21 writes "" for none
        if self.scaling_pass_value is None and isinstance(self.adapters, dict):
            self.scaling_pass_value = 0.0 if self.gate_layer is None else 1 / max(1, len(self.adapters))
        problems = self.problems()
        if problems:
            raise ConfigError(_TITLE, problems)
        assert self.adapters is not None
        # peft writes the adapters sorted by name; `expert_names` keeps their order.
        names = self.adapters if self.expert_names is None else self.expert_names
        self.adapters = {name: os.fspath(self.adapters[name]) for name in names}

    def problems(self) -> list[str]:
        """The problems of the present values, one sentence each."""
        return [
            *table_problems(self.adapters, self.expert_names),
            *range_problems(self),
            *type_problems(self),
            *routing_problems(self),
        ]

    @property
    def reads_inside(self) -> bool:
        """Whether the gate reads hidden states between two decoder layers, not the last hidden state."""
        return self.gate_layer is not None or self.scaling_pass_layers is not None

    @property
    def constant_weight(self) -> float:
        """The weight of each expert before the gate has run: `scaling_pass_value`."""
        return float(self.scaling_pass_value or 0)

    @property
    def gate_loss_weights(self) -> dict[str, float]:
        """The non-zero weights of the gate's losses, by the losses' names in `weft.losses`."""
        weights = {name: float(getattr(self, f"{name}_weight")) for name in GATE_LOSSES}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def num_experts(self) -> int:
        """The number of experts."""
        assert self.adapters is not None
        return len(self.adapters)

    @classmethod
    def from_peft(cls, config: PeftConfig, adapters: dict[str, str] | None = None) -> XLoraConfig:
        """Convert peft's `XLoraConfig`; weft's own is returned unchanged."""
        if isinstance(config, cls):
            return config
        values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
        if values.get("hidden_size") == PEFT_PLACEHOLDER_HIDDEN_SIZE:
            values["hidden_size"] = None
        if adapters is not None:
            values["adapters"] = adapters
        return cls(**values)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> XLoraConfig:
        """Read the config of a saved X-LoRA folder or Hub id, and verify the folder's files.

        Relative adapter paths become paths in that folder. `adapters={name: path}` replaces the saved paths (for a
        checkpoint of peft, which holds only paths). After `weft.register_with_peft`, the config keeps the opened folder
        for the next model that is built with it.

        Raises:
            CheckpointError: a file is missing or was changed after it was saved.
            ConfigError: the saved options are not valid.
        """
        carries, adapters = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.XLORA] is cls, kwargs.pop("adapters", None)
        fetching = {name: kwargs.get(name) for name in ("revision", "token")}
        saved = open_mixture(pretrained_model_name_or_path, subfolder, adapters, keep_experts=carries, **fetching)
        config = cls.of_saved(saved, **kwargs)
        return config.carry(saved) if carries else config

    @classmethod
    def of_saved(cls, saved: SavedMixture, **replaced: Any) -> XLoraConfig:
        """The options of an opened folder; raises the errors of `from_pretrained`."""
        own = {name: value for name, value in replaced.items() if name not in _FETCHING and name in saved.values}
        try:
            config = cls(**{**saved.values, **own})
        except ConfigError as err:
            raise ConfigError(f"{saved.file} cannot be read:", err.problems) from err
        refuse_other_sizes(config, saved)
        return config.read_from(saved.folder)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json`, and also the experts if the config belongs to a model.

        peft calls this when it saves a model, after it has written the gate.
        """
        self.base_model_name_or_path = self.base_model_name_or_path or None  # peft before 0.21 has just put "" there
        folder, auto_mapping = Path(save_directory), kwargs.get("auto_mapping_dict")
        if self.model is not None:
            model: Any = self.model
            model.save_beside_gate(self, folder, auto_mapping)
            return
        replaced = {} if auto_mapping is None else {"auto_mapping": auto_mapping}
        with errors_of_writing(folder, "what is there may not be whole", "save to another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            write_options(folder, config_json(self, **replaced))

    def bind_model(self, model: nn.Module | None) -> None:
        """Set the model to which the config belongs, so that saving the config saves its experts."""
        # Not a field, so that equality, repr and JSON ignore it.
        self._model = model

    @property
    def model(self) -> nn.Module | None:
        """The X-LoRA model to which the config belongs; None for a config without a model."""
        return getattr(self, "_model", None)

    @property
    def folder(self) -> Path | None:
        """The saved mixture's folder from which the options were read; None if they were not."""
        return getattr(self, "_folder", None)

    def read_from(self, folder: Path) -> XLoraConfig:
        """Set `folder`; returns the config."""
        self._folder = folder
        return self

    def carry(self, saved: SavedMixture) -> XLoraConfig:
        """Keep the opened folder for the next model that is built with this config; returns the config."""
        self._saved = saved
        return self

    def take_carried(self) -> SavedMixture | None:
        """Return the opened folder from `carry`, and remove it from the config."""
        return self.__dict__.pop("_saved", None)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_model", "_saved")}

    def __deepcopy__(self, memo: dict[int, Any]) -> XLoraConfig:
        # Copying a config must not copy its model. The copy belongs to the model's copy if that is made at the same
        # time, else to no model.
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        twin.bind_model(memo.get(id(self.model)))
        return twin


def _accept_known_options_only(config_class: type[XLoraConfig]) -> None:
    """Let the constructor report all unknown options in one ConfigError, with the nearest valid names."""
    plain_init = config_class.__init__

    @functools.wraps(plain_init)
    def checked_init(self: XLoraConfig, *args: Any, **kwargs: Any) -> None:
        problems = unknown_option_problems(kwargs)
        try:
            plain_init(self, *args, **{name: value for name, value in kwargs.items() if name in _OPTIONS})
        except ConfigError as err:
            problems += err.problems
        if problems:
            raise ConfigError(_TITLE, problems)

    config_class.__init__ = checked_init  # type: ignore[method-assign]


def unknown_option_problems(names: Iterable[str]) -> list[str]:
    """One sentence for each name that is not an option, with the nearest valid name."""
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    users = [name for name in _OPTIONS if name not in inherited | _WRITTEN_BY_SAVE]
    problems = []
    for name in names:
        if name not in _OPTIONS:
            nearest = ["heads"] if name == "modules_to_save" else difflib.get_close_matches(name[:80], users, 1, 0.4)
            hint = f"did you mean {nearest[0]}?" if nearest else f"the options are {', '.join(users)}"
            problems.append(f"{kind_shown(name)} is not an option: {hint}")
    return problems


def _inherited_problems(config: XLoraConfig) -> list[str]:
    """The problems of the options that are inherited from peft, which does not check them or raises its own errors."""
    problems = []
    if config.task_type is not None and config.task_type not in list(TaskType):
        problems.append(f"task_type ({shown(config.task_type)}) must be one of {', '.join(TaskType)}, or None")
    if not isinstance(config.base_model_name_or_path, str | os.PathLike | None):
        problems.append(f"base_model_name_or_path ({shown(config.base_model_name_or_path)}) must be a folder or Hub id")
    if not isinstance(config.revision, str | None):
        problems.append(f"revision ({shown(config.revision)}) must be a branch, tag or commit, or None")
    if not isinstance(config.auto_mapping, dict | None):
        problems.append(f"auto_mapping ({shown(config.auto_mapping)}) must be a table, or None")
    if not isinstance(config.inference_mode, bool):
        problems.append(f"inference_mode ({shown(config.inference_mode)}) must be True or False")
    return problems


def config_json(config: XLoraConfig, **replaced: Any) -> str:
    """The config as JSON text in the form that peft and weft read."""
    values = {**config.to_dict(), **replaced, "base_model_name_or_path": lasting_name(config.base_model_name_or_path)}
    values["peft_type"] = PeftType.XLORA.value
    return json.dumps(values, indent=2, sort_keys=True)


_OPTIONS = [field.name for field in dataclasses.fields(XLoraConfig) if field.init]
_accept_known_options_only(XLoraConfig)
