"""The options of `weft train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from weft.options.base import CacheDtype, CommandOptions, Dtype, Quantization


@dataclass
class TrainOptions(CommandOptions):
    """Train the gate that mixes several LoRA adapters of one base model. Base and adapters stay as they are.

    Args:
        base: Folder or Hub id of the base model (a causal language model).
        adapters: The experts, as name=FOLDER (or name=HUB_ID), two or more, separated by spaces.
        data: Training texts: .jsonl with "text" or "messages", .parquet with such a column, plain text files, or the
            name of a data set of the `datasets` library; one or more, separated by spaces. EXPERT=FILE, or a row's
            "expert" or "experts" ([[start, name], ...]), labels texts for expert_label_loss_weight.
        experts_from: Experts to train first, as name=DATA (files as for `data`), each on its data; they go to
            OUTPUT-experts/NAME, and those that are complete there are not trained again. Without `data` the gate learns
            on the data of all of them.
        expert_rank: Rank of the experts that are trained.
        expert_alpha: Their lora_alpha; what an expert adds is multiplied by lora_alpha / rank.
        expert_targets: Names of the modules that they adapt, separated by spaces; all-linear adapts all linear layers
            but the output layer.
        expert_steps: Optimizer steps of each expert; 0 trains for `expert_epochs` instead.
        expert_epochs: Passes over an expert's data when expert_steps is 0.
        expert_learning_rate: Peak learning rate of the experts.
        start_from: A trained mixture, folder or Hub id, to go on from: its experts, its gate and its options, in the
            place of `adapters` and a new gate; null starts anew.
        gate_start: Fit the gate, before it is trained, to say whose each token is: by the "losses" that each expert has
            on it, or by the "labels" of the data (see `data`); "random" trains it from nothing. null takes losses where
            that can be done.
        output: Folder for the trained mixture; checkpoints go into its folder "checkpoints".
        max_steps: Number of optimizer steps; 0 trains for `epochs` instead.
        epochs: Passes over the data when max_steps and max_tokens are 0.
        max_tokens: Stop with the step that reaches so many trained tokens, padding not counted, going over the data as
            often as that takes; 0 is no budget. With max_steps, whichever comes first.
        batch_size: Sequences per device and forward pass.
        gradient_accumulation: Forward passes per optimizer step.
        sequence_length: Tokens per sequence; longer texts are cut into several sequences.
        assistant_only_loss: Count only the assistant's turns in the loss, the experts' and the one on eval_data too, as
            TRL's option of this name; all rows must have "messages".
        packing: Several short texts in one sequence, none of which sees another, in the place of padding.
        group_by_length: Batches of texts of about the same length, so that little is padding. Excludes packing.
        cache_scaling_pass: Compute the scaling pass of each text once, keep it on disk and read it in every epoch; for
            a frozen base model without dropout.
        cache_dtype: The cache's number format: float32 is exact, bfloat16 and float16 take half the space.
        cache_folder: Folder for such caches, which training runs on the same base and data share; null takes the folder
            "scaling-cache" in the output folder.
        learning_rate: Peak learning rate of AdamW.
        warmup: Share of the steps in which the learning rate rises, 0 to 1; after them it falls to 0 (cosine).
        seed: For the gate's start values, the order of the data and dropout.
        save_steps: Steps between two checkpoints.
        log_steps: Steps between two lines of loss.
        resume: Continue from the last checkpoint in the output folder.
        eval_data: Held-out texts, files as for data; the mixture with the lowest loss on them is the one that is saved.
        eval_steps: Steps between two evaluations, each with a checkpoint; 0 evaluates every save_steps.
        early_stopping: Stop after so many evaluations in a row without a lower loss; 0 never does.
        report_to: Where the log goes beside the screen; tensorboard writes into the folder of the checkpoints.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        dtype: The base model's number format; auto takes what it is saved in.
        quantization: Quantise the base model while it is loaded, with bitsandbytes, to nf4 (4 bits) or int8.
        trust_remote_code: Run the code that the base model brings along; off, a base that needs such code is refused.
        bf16: Mixed precision training in bfloat16.
        layerwise_scalings: Weights per LoRA layer rather than one set for all layers.
        xlora_depth: Linear layers of the gate, 1 or more.
        xlora_size: Width of the gate's hidden layers (from depth 2 on).
        xlora_dropout_p: Dropout between the gate's layers (from depth 2 on).
        softmax_temperature: Divides the gate's logits; lower is sharper.
        top_k_lora: How many experts each token keeps; null keeps all.
        global_scaling_weight: Weight of the whole mixture, beside the gate's; above 1 where the experts are trained
            too little: try 2.
        scaling_pass_value: Weight of the experts while the gate's input is computed; 0 leaves them out; null means 0,
            or 1 / number of experts with gate_layer.
        scaling_pass_layers: End the scaling pass after so many decoder layers; null runs all of them.
        gate_layer: No scaling pass: the gate reads what enters this decoder layer in the only pass, and the layers from
            there on follow it; null for a scaling pass.
        use_trainable_adapters: Train the experts too.
        allow_dora: Take adapters with DoRA too.
        balance_loss_weight: Adds so much of a loss that is lowest where all experts are used alike; try 0.01.
        entropy_loss_weight: Adds so much of the shares' entropy: above 0 the gate becomes sharper, below 0 softer.
        expert_label_loss_weight: Adds so much of the cross entropy of the gate against the experts that files
            (EXPERT=FILE) or rows ("expert", "experts") of the data are labelled with; try 0.1.
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
    epochs: float = 1.0
    max_tokens: int = 0
    batch_size: int = 4
    gradient_accumulation: int = 1
    sequence_length: int = 512
    assistant_only_loss: bool = False
    packing: bool = False
    group_by_length: bool = False
    cache_scaling_pass: bool = False
    cache_dtype: CacheDtype = "float32"
    cache_folder: str | None = None
    learning_rate: float = 1e-3
    warmup: float = 0.1
    seed: int = 0
    save_steps: int = 100
    log_steps: int = 5
    resume: bool = False
    eval_data: list[str] = field(default_factory=list)
    eval_steps: int = 0
    early_stopping: int = 0
    report_to: Literal["none", "tensorboard"] = "none"
    gradient_checkpointing: bool = False
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    trust_remote_code: bool = False
    bf16: bool = False
    layerwise_scalings: bool = True
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    global_scaling_weight: float = 1.0
    scaling_pass_value: float | None = None
    scaling_pass_layers: int | None = None
    gate_layer: int | None = None
    use_trainable_adapters: bool = False
    allow_dora: bool = False
    balance_loss_weight: float = 0.0
    entropy_loss_weight: float = 0.0
    expert_label_loss_weight: float = 0.0
