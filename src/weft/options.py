"""The options of the command line, as dataclasses: the one place where each has its meaning, unit and default.

Nothing heavy is imported here, so that `weft --help` answers at once. The options of the mixture itself have the names
of `XLoraConfig`, which checks their ranges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from weft.command_options import CommandOptions

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CacheDtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "int8"]


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


@dataclass
class EvalOptions(CommandOptions):
    """Compare the mixture with the base, every expert, static merges, Arrow and the oracle, on your own data.

    Args:
        model: Folder or Hub id of a trained mixture.
        data: Data sets as name=FILE (or FILE), one or more, separated by spaces; files as for `weft train`: perplexity.
            .jsonl with "question", "choices" and "answer" gives accuracy, with "prompt" (a text, or messages) and
            "answer" exact match. A data set with an expert's name, or rows with "expert", are what the oracle needs.
        rows: What to compare, separated by spaces: base, experts, uniform, merges, arrow, weft, topk, frozen, compare,
            oracle, or the name of a row; all by default.
        compare: More mixtures or LoRA adapters of the same base, as name=FOLDER, separated by spaces: a row for each.
        search_data: Texts by which peft's merges choose their equal weights and density, the ones with the lowest
            perplexity; neither trained on nor in `data`. null takes a mean and a density of 0.5.
        base: Folder or Hub id of the base model; null takes the one the mixture names.
        sequence_length: Tokens that are read at once; longer texts are read in several windows, longer questions lose
            their beginning.
        stride: Tokens by which a window moves on in a long text, each scored once and after at least sequence_length -
            stride others; 0 reads windows side by side, each without the one before.
        batch_size: Sequences per forward pass.
        max_sequences: At most so many windows or questions per data set, the first ones; 0 takes all.
        freeze_after: Tokens after which the row "weft frozen" freezes the scalings.
        max_new_tokens: At most so many tokens per answer.
        seed: For what is drawn: bootstrap samples, what dare drops, Arrow's start vectors.
        dtype: The base model's number format; auto takes what it is saved in.
        quantization: Quantise the base model while it is loaded, with bitsandbytes, to nf4 (4 bits) or int8.
        trust_remote_code: Run the code that the base model brings along; off, a base that needs such code is refused.
        output: Files for the table, one or more, separated by spaces: .json, .md, .csv. Finished cells are kept beside
            the first (.cells.jsonl), and the same command goes on from them. null writes none.
    """

    model: str
    data: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    compare: list[str] | dict[str, str] = field(default_factory=list)
    search_data: str | None = None
    base: str | None = None
    sequence_length: int = 512
    stride: int = 0
    batch_size: int = 4
    max_sequences: int = 0
    freeze_after: int = 32
    max_new_tokens: int = 32
    seed: int = 0
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    trust_remote_code: bool = False
    output: list[str] | str | None = None


@dataclass
class GenerateOptions(CommandOptions):
    """Let a trained mixture continue a text.

    Args:
        model: Folder or Hub id of a trained mixture.
        prompt: The text to continue.
        base: Folder or Hub id of the base model; null takes the one the mixture names.
        max_new_tokens: At most so many tokens.
        temperature: 0 always takes the likeliest token; above 0 samples, the higher the freer.
        top_k: Sample from so many of the likeliest tokens only; null samples from all.
        top_p: Sample from the likeliest tokens that have this probability together; null samples from all.
        seed: For sampling.
        dtype: The base model's number format; auto takes what it is saved in.
        quantization: Quantise the base model while it is loaded, with bitsandbytes, to nf4 (4 bits) or int8.
        trust_remote_code: Run the code that the base model brings along; off, a base that needs such code is refused.
        speculate: Guess up to so many tokens ahead and check them together: the same text, sooner where it repeats
            itself or the prompt; 0 does not.
        freeze_scalings_after: Ask the gate for the prompt and so many new tokens only, then keep their mean scalings:
            one pass per token; null never does. Excludes `speculate`.
        show_experts: Colour each token by the expert with the largest share in it, with a legend.
    """

    model: str
    prompt: str = ""
    base: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    trust_remote_code: bool = False
    speculate: int = 0
    freeze_scalings_after: int | None = None
    show_experts: bool = False


@dataclass
class ChatOptions(CommandOptions):
    """Talk with a trained mixture, line by line; /reset forgets the conversation, /exit ends it.

    Args:
        model: Folder or Hub id of a trained mixture, on a base model with a chat template.
        base: Folder or Hub id of the base model; null takes the one the mixture names.
        system: The message of the system role at the start of the conversation; null has none.
        max_new_tokens: At most so many tokens per answer.
        temperature: 0 always takes the likeliest token; above 0 samples, the higher the freer.
        top_k: Sample from so many of the likeliest tokens only; null samples from all.
        top_p: Sample from the likeliest tokens that have this probability together; null samples from all.
        seed: For sampling.
        dtype: The base model's number format; auto takes what it is saved in.
        quantization: Quantise the base model while it is loaded, with bitsandbytes, to nf4 (4 bits) or int8.
        trust_remote_code: Run the code that the base model brings along; off, a base that needs such code is refused.
        speculate: Guess up to so many tokens ahead and check them together: the same text, sooner where it repeats
            itself or the prompt; 0 does not.
        show_experts: Colour each token by the expert with the largest share in it, with a legend.
    """

    model: str
    base: str | None = None
    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    trust_remote_code: bool = False
    speculate: int = 0
    show_experts: bool = False


def decoding(options: GenerateOptions | ChatOptions) -> dict[str, Any]:
    """The options that say how tokens are chosen, but for the seed, by their names in `weft.stream`."""
    return {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}


@dataclass
class FoldOptions(CommandOptions):
    """Write a constant mix as one ordinary LoRA adapter, which peft, vLLM and LoRAX load.

    Give either `weights` or `data`. Folding a trained gate (`data`) keeps how much of each expert it takes in each
    layer on average, and loses what it decides from token to token.

    Args:
        model: Folder or Hub id of a mixture.
        output: Folder for the adapter: a new or empty one, or an earlier adapter's, which is replaced.
        weights: The experts' weights in all layers, as name=NUMBER, separated by spaces; experts left out have 0.
        data: Texts over which the gate's weights are averaged, layer by layer; files as for `weft train`.
        base: Folder or Hub id of the base model; null takes the one the mixture names.
        sequence_length: Tokens per sequence of the data; longer texts are cut into several.
        batch_size: Sequences per forward pass.
        max_sequences: At most so many sequences per data file, the first ones; 0 takes all.
        dtype: The base model's number format; auto takes what it is saved in.
        quantization: Quantise the base model while it is loaded, with bitsandbytes, to nf4 (4 bits) or int8.
        trust_remote_code: Run the code that the base model brings along; off, a base that needs such code is refused.
    """

    model: str
    output: str | None = None
    weights: list[str] | dict[str, float] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    base: str | None = None
    sequence_length: int = 512
    batch_size: int = 4
    max_sequences: int = 0
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    trust_remote_code: bool = False


@dataclass
class InspectOptions(CommandOptions):
    """Show what the gate does with a text: which expert acts where, and what the mixture gains by it.

    Give one of `text`, `data` and `generate`, or a trace file in the place of the model.

    Args:
        model: Folder or Hub id of a trained mixture, or a trace file, written with `output`.
        text: A text for the gate to read.
        data: Data sets as name=FILE (or FILE), one or more, separated by spaces; files as for `weft train`.
        generate: A text for the mixture to continue; what it writes is shown too.
        compare: Trace files to show beside this one, separated by spaces.
        html: File for a page that shows all of it and opens without a network; null writes none.
        output: File for the trace; null writes none.
        figure: File for a figure, .pdf, .png or .svg, drawn with matplotlib; null writes none.
        title: What the trace is called; null takes the model's name.
        max_tokens: The trace has at most so many tokens, the first ones; data sets have equal parts of it.
        max_new_tokens: At most so many generated tokens.
        temperature: Of `generate`: 0 always takes the likeliest token; above 0 samples, the higher the freer.
        seed: For sampling.
        base: Folder or Hub id of the base model; null takes the one the mixture names.
        sequence_length: Tokens per sequence of the data; longer texts are cut into several.
        batch_size: Sequences of the data per forward pass.
        dtype: The base model's number format; auto takes what it is saved in.
        quantization: Quantise the base model while it is loaded, with bitsandbytes, to nf4 (4 bits) or int8.
        trust_remote_code: Run the code that the base model brings along; off, a base that needs such code is refused.
    """

    model: str
    text: str = ""
    data: list[str] = field(default_factory=list)
    generate: str = ""
    compare: list[str] = field(default_factory=list)
    html: str | None = None
    output: str | None = None
    figure: str | None = None
    title: str | None = None
    max_tokens: int = 4096
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    base: str | None = None
    sequence_length: int = 512
    batch_size: int = 4
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    trust_remote_code: bool = False


@dataclass
class AddExpertOptions(CommandOptions):
    """Add an expert to a trained mixture. What the gate has learned of the others stays; the new one starts neutral.

    Train the gate further afterwards: `weft train --start-from` (docs/experts.md).

    Args:
        model: Folder or Hub id of a trained mixture.
        expert: The new expert, as name=FOLDER (or name=HUB_ID): a LoRA adapter of the same base model.
        output: Folder for the new mixture, or the model's own, which is then replaced; null takes MODEL-with-NAME.
        base: Folder or Hub id of the base model; null takes the one the mixture names.
        trust_remote_code: Run the code that the base model brings along; off, a base that needs such code is refused.
    """

    model: str
    expert: str
    output: str | None = None
    base: str | None = None
    trust_remote_code: bool = False


@dataclass
class DropExpertOptions(CommandOptions):
    """Drop an expert from a trained mixture. The others keep the ratios that the gate gives them.

    Args:
        model: Folder or Hub id of a trained mixture.
        expert: The name of the expert.
        output: Folder for the new mixture, or the model's own, which is then replaced; null takes MODEL-without-NAME.
    """

    model: str
    expert: str
    output: str | None = None
