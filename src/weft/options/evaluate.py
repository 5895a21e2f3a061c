"""The options of `weft eval`."""

from __future__ import annotations

from dataclasses import dataclass, field

from weft.options.base import LoadingOptions, MixtureOptions
from weft.options.checks import files_in_the_way, least, length_problems, naming_problems, pairs, source_of


@dataclass
class EvalOptions(MixtureOptions, LoadingOptions):
    """Compare a mixture with its base model, experts and static merges; with Arrow and the oracle too, on your data.

    Args: Data
        data (NAME=FILE ...): Data sets in the formats of `weft train`; required. Metrics: perplexity
            for texts; accuracy for .jsonl with "question", "choices" and "answer"; exact match for .jsonl with "prompt"
            (a text, or messages) and "answer". The oracle needs data sets with an expert's name, or rows with "expert".
        max_sequences: Maximum number of windows or questions per data set, from its beginning; 0 takes all.
        sequence_length: Tokens that the model reads at once. Longer texts are read in several windows, longer questions
            lose their beginning.
        stride: Tokens between the starts of two windows of a long text; 0 means windows without overlap. Each token is
            scored once, with at least sequence_length - stride tokens of context. Without overlap, a window's first
            token has none but `<bos>`, with which each window begins if the tokenizer adds it to a text.

    Args: Comparison
        rows (ROW ...): Rows of the table: base, experts, uniform, merges, arrow, weft, topk, frozen, compare, oracle,
            folded, without. The name of one row works too. Default: all but the last two.
        advise: Say below the table which experts to drop, whether a static adapter would do, and what else the numbers
            suggest. Measures the rows folded and without too.
        compare (NAME=FOLDER ...): More mixtures or LoRA adapters of the same base model, a row for each.
        search_data (FILE): Texts on which weight and density of peft's merges are chosen by perplexity. The row folded
            takes the gate's mean on them. They should be neither in the training data nor in `data`. Default: none;
            equal weights, density 0.5, and the texts of `data` for the row folded.
        freeze_after: Number of tokens after which the row "weft frozen" freezes the scalings.

    Args: Output
        output (FILE ...): Write the table (.json, .md, .csv). Finished cells are kept beside the first file
            (.cells.jsonl), and the same command continues from them.

    Args: Advanced
        batch_size: Sequences per forward pass.
        max_new_tokens: Maximum number of new tokens per answer.
        seed: Random seed for bootstrap samples, dare and Arrow.
    """

    data: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    compare: list[str] | dict[str, str] = field(default_factory=list)
    search_data: str | None = None
    advise: bool = field(default=False, kw_only=True)
    sequence_length: int = field(default=512, kw_only=True)
    stride: int = field(default=0, kw_only=True)
    batch_size: int = field(default=4, kw_only=True)
    max_sequences: int = field(default=0, kw_only=True)
    freeze_after: int = field(default=32, kw_only=True)
    max_new_tokens: int = field(default=32, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    output: list[str] | str | None = field(default=None, kw_only=True)

    def missing(self) -> list[str]:
        """The data, if missing."""
        return [] if self.data else ["data is missing: one or more name=FILE"]

    def wrong(self) -> list[str]:
        """Names without a folder, and values out of range."""
        problems = naming_problems(self.compare, "compare", "name=FOLDER")
        problems += least(self, batch_size=1, max_sequences=0, freeze_after=1, max_new_tokens=1)
        problems += length_problems(self.sequence_length)
        if self.sequence_length >= 2 and not 0 <= self.stride < self.sequence_length:
            problems.append(
                f"stride ({self.stride}) must be at least 0 and below sequence_length ({self.sequence_length})"
            )
        return problems

    def models(self) -> list[tuple[str, str]]:
        """The mixture, its base model, and the models to compare with."""
        return [*super().models(), *((f"compare {name}", path) for name, path in pairs(self.compare) if name and path)]

    def sources(self) -> list[tuple[str, str]]:
        """The data sets."""
        searched = [("search_data", self.search_data)] if self.search_data else []
        return [*(("data", source_of(value)) for value in self.data), *searched]

    def in_the_way(self) -> list[str]:
        """Files that cannot be written."""
        files = [self.output] if isinstance(self.output, str) else self.output or []
        return files_in_the_way(*(("output", file) for file in files))
