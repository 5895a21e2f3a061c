"""The options of `weft train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from weft.files.names import split_name
from weft.files.presence import file_is_missing
from weft.options.base import CacheDtype, LoadingOptions
from weft.options.checks import pairs
from weft.options.training import (
    expert_problems,
    gate_problems,
    mixture_problems,
    output_problems,
    own_training_problems,
    unknown_expert_problems,
)


@dataclass
class TrainOptions(LoadingOptions):
    """Train the gate that mixes several LoRA adapters of a base model.

    The base model and the adapters are not changed.

    Args: Model and experts
        base (MODEL): Folder or Hub id of the base model, a causal language model.
        adapters (NAME=FOLDER ...): The experts: LoRA adapters of the base model, two or more, as folders or Hub ids.
        experts_from (NAME=DATA ...): Experts to train first, each on its own data, given like `data`. They are saved in
            OUTPUT-experts/NAME; complete ones are not trained again. Without `data`, the gate is trained on the data of
            all experts.
        start_from (MIXTURE): A trained mixture to train further, as a folder or Hub id. Its experts, gate and options
            are used instead of `adapters` and a new gate. Default: a new gate.

    Args: Data
        data (FILE ...): Training texts: files (.jsonl, .csv, .parquet, text) or names of data sets. Lines of .jsonl and
            rows of .parquet have "text" or "messages", .csv and .tsv a column "text"; the names are those of the
            `datasets` library. EXPERT=FILE, or a row's "expert" or "experts" ([[start, name], ...]), labels texts for
            `expert_label_loss_weight`.
        eval_data (FILE ...): Held-out texts; the mixture with the lowest loss on them is saved.
        sequence_length: Tokens per sequence; longer texts are cut into several. If the tokenizer begins a text with
            `<bos>`, each of them begins with it.
        assistant_only_loss: Train on the assistant's turns only; all rows must have "messages". As in TRL. It applies
            also to the experts and to the loss on `eval_data`.
        packing: Put several short texts into one sequence instead of padding; they do not see each other.
        group_by_length: Put texts of similar length into a batch, to save padding; excludes `packing`.

    Args: Training
        max_steps: Number of optimizer steps; 0 trains for `epochs` instead.
        epochs: Number of passes over the data, if `max_steps` and `max_tokens` are 0. The Trainer's num_train_epochs.
            If all three are 0, training lasts until the loss on held-out texts stops falling: those of `eval_data`, or
            a tenth of `data`.
        max_tokens: Stop after this number of trained tokens, without padding; 0 sets no limit. The data is repeated if
            necessary. With `max_steps`, training stops at the limit that is reached first.
        batch_size: Sequences per device and forward pass. The Trainer's per_device_train_batch_size.
        gradient_accumulation_steps: Forward passes per optimizer step.
        learning_rate: Peak learning rate of AdamW. Default: 1e-3; without a number of steps 5e-3, which falls when the
            loss on held-out texts does not.
        warmup_ratio: Fraction of the steps, 0 to 1, in which the learning rate rises. After them it falls to 0
            (cosine). Without a number of steps it is a fraction of the first eight evaluation intervals, and the rate
            then stays.
        seed: Random seed for the gate's start values, the order of the data and dropout.
        eval_steps: Steps between two evaluations on `eval_data`; 0 takes `save_steps`, or without a number of steps
            chooses them. Each one saves a checkpoint.
        early_stopping: Stop after this number of evaluations without a lower loss; 0 never stops early. The Trainer's
            early_stopping_patience.

    Args: Gate
        gate_start: Fit the gate, before training, to the data's labels or to each expert's loss per token. With
            random it is not fitted. Labels are those of `data`. Default: labels if each token has one and each expert
            is one, or else losses if they can be computed.
        layerwise_scalings: Predict weights for each LoRA layer, instead of one set for all layers.
        xlora_depth: Number of linear layers of the gate, 1 or more; 1 is the paper's and peft's default.
        xlora_size: Width of the gate's hidden layers, if `xlora_depth` is 2 or more.
        xlora_dropout_p: Dropout between the gate's layers, if `xlora_depth` is 2 or more.
        top_k_lora: Number of experts that each token keeps. Default: all.
        softmax_temperature: Divisor of the gate's logits; lower values give sharper weights.
        global_scaling_weight: Factor on the whole mixture, in addition to the gate's weights. If the experts are
            undertrained, a value above 1 helps: try 2. Default: 1; without a number of steps, chosen on held-out texts.
        gate_layer: Run one pass only, in which the gate reads the input of this decoder layer. Only this layer and
            those after it follow the gate. Default: none, a scaling pass comes first.
        scaling_pass_layers: Number of decoder layers that the scaling pass runs. Default: all.
        scaling_pass_rank: Rank of a LoRA of the gate's own in these layers, for the scaling pass only; try 16. The
            fit of the gate trains it. Default: none.
        scaling_pass_value: Weight of the experts in the scaling pass; 0 leaves them out. Default: 0, or 1 / number
            of experts with `gate_layer`.
        balance_loss_weight: Weight of a loss that is lowest if all experts are used equally; try 0.01.
        entropy_loss_weight: Weight of the entropy of the gate's shares; above 0 makes the gate sharper, below 0 softer.
        expert_label_loss_weight: Weight of the gate's cross entropy against the labels of `data`; try 0.1.

    Args: Experts that are trained first
        expert_rank: Rank of the experts.
        expert_alpha: The experts' lora_alpha: an expert's output is multiplied by lora_alpha / rank.
        expert_targets (MODULE ...): Modules that the experts adapt; all-linear means all linear layers except the
            output layer.
        expert_steps: Optimizer steps per expert; 0 trains for `expert_epochs` instead.
        expert_epochs: Number of passes over an expert's data, if `expert_steps` is 0.
        expert_learning_rate: Peak learning rate of the experts.

    Args: Output
        output (FOLDER): Folder for the trained mixture; checkpoints are in its subfolder "checkpoints".
        save_steps: Steps between two checkpoints.
        logging_steps: Steps between two lines of the log.
        resume: Continue from the last checkpoint in the output folder.
        report_to (TOOL ...): Send the log to these tools too: tensorboard, wandb, mlflow, or others that the Trainer
            supports. TensorBoard's files are in the folder of the checkpoints.
        dry_run: Load everything, take two steps, write nothing, and print how much memory and time the training needs.

    Args: Advanced
        bf16: Train in mixed precision with bfloat16.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        cache_scaling_pass: Compute the scaling pass of each text once and read it from disk in every epoch. For a
            frozen base model without dropout.
        cache_dtype: Number format of that cache; float32 is exact, the others need half the space.
        cache_folder (FOLDER): Folder for caches; runs on the same base model and data can share it. Default: the
            folder "scaling-cache" in the output folder.
        use_trainable_adapters: Train the experts together with the gate.
        allow_dora: Accept adapters with DoRA.
    """

    base: str | None = None
    adapters: list[str] | dict[str, str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    experts_from: list[str] | dict[str, str] = field(default_factory=list)
    expert_rank: int = 8
    expert_alpha: int = 16
    expert_targets: list[str] = field(default_factory=lambda: ["all-linear"])
    expert_steps: int = 0
    expert_epochs: float = 1.0
    expert_learning_rate: float = 2e-4
    start_from: str | None = None
    gate_start: Literal["random", "labels", "losses"] | None = None
    output: str = "weft-model"
    max_steps: int = 0
    epochs: float = 0.0
    max_tokens: int = 0
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    sequence_length: int = 512
    assistant_only_loss: bool = False
    packing: bool = False
    group_by_length: bool = False
    cache_scaling_pass: bool = False
    cache_dtype: CacheDtype = "float32"
    cache_folder: str | None = None
    learning_rate: float | None = None
    warmup_ratio: float = 0.1
    seed: int = 0
    save_steps: int = 100
    logging_steps: int = 5
    resume: bool = False
    eval_data: list[str] = field(default_factory=list)
    eval_steps: int = 0
    early_stopping: int = 0
    report_to: list[str] | str = field(default_factory=lambda: ["none"])
    gradient_checkpointing: bool = False
    bf16: bool = False
    layerwise_scalings: bool = True
    xlora_depth: int = 2
    xlora_size: int = 256
    xlora_dropout_p: float = 0.2
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    global_scaling_weight: float | None = None
    scaling_pass_value: float | None = None
    scaling_pass_layers: int | None = None
    scaling_pass_rank: int | None = None
    gate_layer: int | None = None
    use_trainable_adapters: bool = False
    allow_dora: bool = False
    balance_loss_weight: float = 0.0
    entropy_loss_weight: float = 0.0
    expert_label_loss_weight: float = 0.0
    dry_run: bool = False

    def missing(self) -> list[str]:
        """Base model, experts and data, if no option gives them."""
        needed = {
            "base is missing: the folder or Hub id of the base model": self.base or self.start_from,
            "adapters is missing: the experts, as name=FOLDER (or experts_from, as name=DATA)": self.adapters
            or self.experts_from
            or self.start_from,
            "data is missing: one or more files of training text": self.data or self.experts_from,
        }
        return [sentence for sentence, given in needed.items() if not given]

    def wrong(self) -> list[str]:
        """Invalid experts, values out of range, and options that exclude each other."""
        problems = [*expert_problems(self), *gate_problems(self), *mixture_problems(self, self._expert_names())]
        problems += unknown_expert_problems(
            [*self.data, *self.eval_data], [] if self.start_from else self._expert_names()
        )
        return [*problems, *(own_training_problems(self) if self.experts_from else [])]

    def models(self) -> list[tuple[str, str]]:
        """The base model, the adapters, and the mixture to start from."""
        adapters = [(f"adapter {name!r}", path) for name, path in pairs(self.adapters) if name and path]
        start = [("start_from", self.start_from)] if self.start_from else []
        return [*super().models(), *adapters, *start]

    def sources(self) -> list[tuple[str, str]]:
        """The texts, without names of experts."""
        named = [("data", self._source(value)) for value in self.data]
        named += [("eval_data", self._source(value)) for value in self.eval_data]
        return [*named, *(("experts_from", source) for name, source in pairs(self.experts_from) if name and source)]

    def in_the_way(self) -> list[str]:
        """An output folder that cannot be written."""
        return output_problems(self)

    @property
    def ends_at_a_plateau(self) -> bool:
        """Whether held-out texts end the training, as there is no number of steps."""
        return self.max_steps == self.max_tokens == self.epochs == 0

    def _expert_names(self) -> list[str]:
        return [name for name, _ in [*pairs(self.adapters), *pairs(self.experts_from)] if name]

    def _source(self, value: str) -> str:
        """A source without the name of an expert. The expert names of `start_from` are not known yet."""
        name, source = split_name(value)
        is_named = name in self._expert_names() or (self.start_from is not None and file_is_missing(value))
        is_named = is_named or bool(unknown_expert_problems([value], self._expert_names()))
        return source if is_named else value
