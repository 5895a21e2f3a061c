"""The options of the command line, as dataclasses: the one place where each has its meaning, unit and default.

Nothing heavy is imported here, so that `weft --help` answers at once. The options of the mixture itself have the names
of `XLoraConfig`, which checks their ranges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "int8"]


@dataclass
class TrainOptions:
    """Train the gate that mixes several LoRA adapters of one base model. Base and adapters stay as they are.

    Args:
        base: Folder or Hub id of the base model (a causal language model).
        adapters: The experts, as name=FOLDER (or name=HUB_ID), two or more, separated by spaces.
        data: Training texts: .jsonl with "text" or "messages", .parquet with such a column, plain text files, or the
            name of a data set of the `datasets` library; one or more, separated by spaces.
        output: Folder for the trained mixture; checkpoints go into its folder "checkpoints".
        max_steps: Number of optimizer steps; 0 trains for `epochs` instead.
        epochs: Passes over the data when max_steps is 0.
        batch_size: Sequences per device and forward pass.
        gradient_accumulation: Forward passes per optimizer step.
        sequence_length: Tokens per sequence; longer texts are cut into several sequences.
        learning_rate: Peak learning rate of AdamW.
        warmup: Share of the steps in which the learning rate rises, 0 to 1; after them it falls to 0 (cosine).
        seed: For the gate's start values, the order of the data and dropout.
        save_steps: Steps between two checkpoints.
        log_steps: Steps between two lines of loss.
        resume: Continue from the last checkpoint in the output folder.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        dtype: The base model's number format; auto takes what it is saved in.
        quantization: Quantise the base model while it is loaded, to nf4 (4 bits) or int8, with bitsandbytes; null takes
            it as it is saved.
        bf16: Mixed precision training in bfloat16.
        layerwise_scalings: Weights per LoRA layer rather than one set for all layers.
        xlora_depth: Linear layers of the gate, 1 or more.
        xlora_size: Width of the gate's hidden layers (from depth 2 on).
        xlora_dropout_p: Dropout between the gate's layers (from depth 2 on).
        softmax_temperature: Divides the gate's logits; lower is sharper.
        top_k_lora: How many experts each token keeps; null keeps all.
        scaling_pass_value: Weight of the experts while the gate's input is computed; 0 leaves them out; null means 0,
            or 1 / number of experts with gate_layer.
        scaling_pass_layers: End the scaling pass after so many decoder layers; null runs all of them.
        gate_layer: No scaling pass: the gate reads what enters this decoder layer in the only pass, and the layers from
            there on follow it; null for a scaling pass.
        use_trainable_adapters: Train the experts too.
    """

    base: str | None = None
    adapters: list[str] | dict[str, str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    output: str = "weft-model"
    max_steps: int = 0
    epochs: float = 1.0
    batch_size: int = 4
    gradient_accumulation: int = 1
    sequence_length: int = 512
    learning_rate: float = 1e-3
    warmup: float = 0.1
    seed: int = 0
    save_steps: int = 100
    log_steps: int = 5
    resume: bool = False
    gradient_checkpointing: bool = False
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    bf16: bool = False
    layerwise_scalings: bool = True
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float | None = None
    scaling_pass_layers: int | None = None
    gate_layer: int | None = None
    use_trainable_adapters: bool = False


@dataclass
class EvalOptions:
    """Compare the mixture with the base model, every expert alone and their uniform mix: perplexity per data set.

    Args:
        model: Folder or Hub id of a trained mixture.
        data: Data sets as name=FILE (or FILE), one or more, separated by spaces; files as for `weft train`.
        base: Folder or Hub id of the base model; null takes the one the mixture names.
        sequence_length: Tokens per sequence; longer texts are cut into several, each read without the one before.
        batch_size: Sequences per forward pass.
        max_sequences: At most so many sequences per data set, the first ones; 0 takes all.
        dtype: The base model's number format; auto takes what it is saved in.
        quantization: Quantise the base model while it is loaded, to nf4 (4 bits) or int8, with bitsandbytes; null takes
            it as it is saved.
        output: File for the table as JSON; null writes none.
    """

    model: str
    data: list[str] = field(default_factory=list)
    base: str | None = None
    sequence_length: int = 512
    batch_size: int = 4
    max_sequences: int = 0
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    output: str | None = None


@dataclass
class GenerateOptions:
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
        quantization: Quantise the base model while it is loaded, to nf4 (4 bits) or int8, with bitsandbytes; null takes
            it as it is saved.
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
    speculate: int = 0
    freeze_scalings_after: int | None = None
    show_experts: bool = False


@dataclass
class ChatOptions:
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
        quantization: Quantise the base model while it is loaded, to nf4 (4 bits) or int8, with bitsandbytes; null takes
            it as it is saved.
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
    speculate: int = 0
    show_experts: bool = False


def decoding(options: GenerateOptions | ChatOptions) -> dict[str, Any]:
    """The options that say how tokens are chosen, but for the seed, by their names in `weft.stream`."""
    return {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}


@dataclass
class FoldOptions:
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
        quantization: Quantise the base model while it is loaded, to nf4 (4 bits) or int8, with bitsandbytes; null takes
            it as it is saved.
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
