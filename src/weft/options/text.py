"""The options of the commands that read or write texts with a mixture: `generate`, `chat`, `inspect`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from weft.files.presence import file_missing
from weft.files.reading import is_number, is_whole, shown
from weft.options.base import LoadingOptions, MixtureOptions
from weft.options.checks import files_in_the_way, least, length_problems, source_of


@dataclass(kw_only=True)
class SamplingOptions(LoadingOptions):
    """Options of a command that samples tokens.

    Args: Text
        max_new_tokens: Maximum number of new tokens.

    Args: Sampling
        temperature: Sampling temperature; 0 always takes the most likely token.
        seed: Random seed for sampling.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0


@dataclass(kw_only=True)
class DecodingOptions(LoadingOptions):
    """Further options of a command that generates text.

    Args: Sampling
        top_k: Sample from this number of most likely tokens only. Default: all.
        top_p: Sample from the most likely tokens that together have this probability. Default: all.

    Args: Output
        show_experts: Colour each token by the expert with the largest share in it, with a legend.

    Args: Advanced
        speculate: Maximum number of tokens to draft and verify at once; 0 turns speculation off. The text is the same;
            it is generated faster if it repeats itself or the prompt.
    """

    top_k: int | None = None
    top_p: float | None = None
    speculate: int = 0
    show_experts: bool = False

    def wrong(self) -> list[str]:
        """Values out of range."""
        return decoding_problems(**decoding(self))


@dataclass
class GenerateOptions(MixtureOptions, SamplingOptions, DecodingOptions):
    """Continue a text with a trained mixture.

    Args: Text
        prompt (TEXT): The text to continue; required.

    Args: Advanced
        freeze_scalings_after: Number of new tokens after which the scalings are frozen at their mean. After that, each
            token needs only one pass. Excludes `speculate`. Default: never.
    """

    prompt: str = ""
    freeze_scalings_after: int | None = field(default=None, kw_only=True)

    def missing(self) -> list[str]:
        """The prompt, if missing."""
        return [] if self.prompt else ["prompt is missing: the text to continue"]


@dataclass
class ChatOptions(MixtureOptions, SamplingOptions, DecodingOptions):
    """Chat with a trained mixture in the terminal; the base model must have a chat template.

    The conversation is read from the standard input, line by line. Lines that begin with / are commands; /help lists
    them.

    Args: Text
        system (TEXT): Message of the system role at the start of the conversation. Default: none.
        max_new_tokens: Maximum number of new tokens per answer.
    """

    system: str | None = field(default=None, kw_only=True)
    max_new_tokens: int = field(default=512, kw_only=True)


def decoding(options: Any) -> dict[str, Any]:
    """The decoding options of `generate` or `chat`, without the seed, as arguments of `weft.stream`."""
    return {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}


def decoding_problems(
    max_new_tokens: int, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> list[str]:
    """One sentence for each value out of range."""
    problems = []
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        problems.append(f"max_new_tokens ({shown(max_new_tokens)}) must be at least 1")
    if not is_number(temperature) or temperature < 0:
        problems.append(
            f"temperature ({shown(temperature)}) must be a finite number of at least 0, where 0 does not sample"
        )
    if top_k is not None and (not is_whole(top_k) or top_k < 1):
        problems.append(f"top_k ({shown(top_k)}) must be at least 1: leave it out to sample from all tokens")
    if top_p is not None and not (is_number(top_p) and 0 < top_p <= 1):
        problems.append(f"top_p ({shown(top_p)}) must be above 0 and at most 1: leave it out to sample from all tokens")
    return problems


@dataclass
class InspectOptions(MixtureOptions, SamplingOptions):
    """Show which experts the gate uses for each token and layer; and how much better the mixture predicts the text.

    Give one of `text`, `data` and `generate`, or a trace file instead of the model.

    Args:
        model: Folder or Hub id of a trained mixture, or a trace file that `output` wrote.

    Args: Input
        text (TEXT): A text for the gate to read.
        data (NAME=FILE ...): Data sets for the gate to read, in the formats of `weft train`. Without NAME, a data set
            has the file's name.
        generate (TEXT): A prompt for the mixture to continue; the new text is shown too.
        compare (TRACE ...): Trace files to compare with.
        max_tokens: Maximum number of tokens in the trace, divided equally between the data sets.
        max_new_tokens: Maximum number of tokens that `generate` adds.
        sequence_length: Tokens per sequence of `data`; longer texts are cut into several.

    Args: Output
        html (FILE): Write an HTML page with the whole trace, which needs no network.
        output (FILE): Write the trace to a file, which can be given instead of the model.
        figure (FILE): Write a figure (.pdf, .png or .svg) with matplotlib.
        title (TEXT): Title of the trace. Default: the model's name.

    Args: Advanced
        batch_size: Sequences of `data` per forward pass.
    """

    text: str = ""
    data: list[str] = field(default_factory=list)
    generate: str = ""
    compare: list[str] = field(default_factory=list)
    html: str | None = None
    output: str | None = None
    figure: str | None = None
    title: str | None = None
    max_tokens: int = 4096
    sequence_length: int = field(default=512, kw_only=True)
    batch_size: int = field(default=4, kw_only=True)

    def missing(self) -> list[str]:
        """The input, if missing."""
        if self.text or self.data or self.generate or self.is_trace:
            return []
        return ["text, data and generate are missing: give one of them, a text, data files or a prompt to continue"]

    @property
    def is_trace(self) -> bool:
        """Whether a trace file is given instead of the model."""
        return os.path.isfile(self.model)

    def wrong(self) -> list[str]:
        """Inputs that exclude each other, values out of range, and missing trace files."""
        given = [name for name in ("text", "data", "generate") if getattr(self, name)]
        problems = least(self, max_tokens=1, batch_size=1)
        problems += length_problems(self.sequence_length) if self.data else []
        if self.is_trace and given:
            problems.append(f"model ({self.model}) is a trace already: leave {' and '.join(given)} out")
        elif not self.is_trace and len(given) > 1:
            problems.append(
                f"{' and '.join(given)} are both given: give one of them, a text, data files or a prompt to continue"
            )
        if self.generate:
            problems += decoding_problems(self.max_new_tokens, self.temperature)
        missing = [file_missing("compare", file, "weft inspect --output") for file in self.compare]
        return [*problems, *(problem for problem in missing if problem is not None)]

    def models(self) -> list[tuple[str, str]]:
        """The mixture, unless it is a trace."""
        return [] if self.is_trace else super().models()

    def sources(self) -> list[tuple[str, str]]:
        """The data sets."""
        return [("data", source_of(value)) for value in self.data]

    def in_the_way(self) -> list[str]:
        """Files that cannot be written."""
        return files_in_the_way(*((name, getattr(self, name)) for name in ("output", "html", "figure")))
