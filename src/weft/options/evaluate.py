"""The options of `weft eval`."""

from __future__ import annotations

from dataclasses import dataclass, field

from weft.options.base import CommandOptions, Dtype, Quantization


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
