"""The best equal weights and density of a static merge, by its perplexity on texts that are given for it."""

from __future__ import annotations

import math
from typing import Any

from weft.evaluate.contestants import Merge, merged
from weft.evaluate.data_sets import DataSet
from weft.evaluate.scoring import Runner, score
from weft.options import EvalOptions


def best_merge(lora_model: Any, merge: Merge, data: DataSet, tokenizer: Any, options: EvalOptions) -> Merge:
    """The variation with the lowest perplexity; the merge itself where all are alike.

    Args:
        lora_model: peft's, with the experts.
        merge: where the search starts.
        data: texts that are neither trained on nor in the table.
        tokenizer: the base model's.
        options: batch size and seed.

    Raises:
        ValueError: peft cannot merge these adapters so.
    """
    found = {}
    for variation in merge.variations():
        with merged(lora_model, variation, options.seed) as model:
            runner = Runner(model, tokenizer, options.batch_size)
            loss = sum(loss for loss, _ in score(runner, data))
            found[variation] = math.inf if math.isnan(loss) else loss
    return min(found, key=lambda variation: found[variation])
