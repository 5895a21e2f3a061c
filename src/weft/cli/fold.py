"""`weft fold`: a constant mixture as one ordinary adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from weft.base_model.loading import loading_options
from weft.data.texts import check_length, read_tokens
from weft.data.windows import opening_of, token_sequences
from weft.files.names import by_name
from weft.formats.folding import check_output, fold, mean_scalings
from weft.model.build import load_mixture
from weft.options import FoldOptions
from weft.screen.countdown import Countdown
from weft.screen.visible import say


def fold_mixture(options: FoldOptions) -> None:
    """Write the adapter, and print how to load it.

    Raises:
        WeftError: the model, the options or the data are not valid.
    """
    weights = by_name(options.weights, "weights", "name=NUMBER", float)
    assert options.output is not None
    model, tokenizer = load_mixture(options.model, options.base, **loading_options(options))
    check_output(Path(options.output), model.xlora_config)  # before the data is read, which takes long
    config = fold(model, options.output, weights or _mean_over_data(model, tokenizer, options))
    say(f"saved to {options.output}: an ordinary LoRA adapter of rank {config.r}, load it with")
    say(f"  peft.PeftModel.from_pretrained(base, {options.output!r})")


def _mean_over_data(model: Any, tokenizer: Any, options: FoldOptions) -> Tensor:
    """The gate's mean scalings [layer, expert] over the options' data."""
    check_length(options.sequence_length, model.config)
    sequences = []
    for source in options.data:
        found = token_sequences(read_tokens(source, tokenizer), options.sequence_length, opening_of(tokenizer))
        sequences += found[: options.max_sequences or None]
    with Countdown(len(sequences), "the gate reads") as countdown:
        return mean_scalings(model, sequences, options.batch_size, countdown.advance)
