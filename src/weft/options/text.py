"""The options of the commands that read or write texts with a mixture: `generate`, `chat`, `inspect`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from weft.options.base import CommandOptions, Dtype, Quantization


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
