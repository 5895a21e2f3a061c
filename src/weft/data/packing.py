"""Several texts in one row of a batch, none of which sees another.

The texts of a row are told apart by `position_ids` that start again at 0. There is no attention mask: without one
transformers makes a mask of the position ids, for full and for sliding attention. Whether a model really keeps the
texts apart depends on its architecture and its attention implementation (a recurrent one goes on with its state), so
`check_packing` tries it.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.base_model.state import in_evaluation_mode
from weft.errors import ConfigError

# Texts of so many tokens are tried: two different ones before the same one.
_BEFORE, _BEHIND = 6, 9


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of texts, row by row: the longest first, each into the fullest row that has room for it.

    Args:
        lengths: tokens of each text, none above `capacity`.
        capacity: tokens of a row.
    """
    rows: list[list[int]] = []
    by_room: list[tuple[int, int]] = []  # (tokens that still fit, row), sorted
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        best = bisect.bisect_left(by_room, (lengths[place], -1))
        if best < len(by_room):
            room, row = by_room.pop(best)
            rows[row].append(place)
        else:
            room, row = capacity, len(rows)
            rows.append([place])
        bisect.insort(by_room, (room - lengths[place], row))
    return rows


def packed_rows(examples: Sequence[dict[str, Any]], capacity: int) -> list[dict[str, list[int]]]:
    """Examples with several texts each; the first token of a text has the label -100, as nothing precedes it.

    Args:
        examples: `input_ids` of one text each, `labels` where they are others, and, in all or none, `expert_labels`,
            one for each token.
        capacity: tokens of a row.
    """
    rows = []
    for places in pack([len(example["input_ids"]) for example in examples], capacity):
        texts = [list(examples[place]["input_ids"]) for place in places]
        row = {
            "input_ids": [token for text in texts for token in text],
            "labels": [label for place in places for label in [-100, *_labels(examples[place])[1:]]],
            "position_ids": [position for text in texts for position in range(len(text))],
        }
        if "expert_labels" in examples[0]:
            row["expert_labels"] = [label for place in places for label in examples[place]["expert_labels"]]
        rows.append(row)
    return rows


def _labels(example: dict[str, Any]) -> list[int]:
    return list(example.get("labels", example["input_ids"]))


class PackedCollator:
    """Pads packed rows to the longest one; other examples go to another collator.

    Each token of padding is a text of its own: it has position 0 and the label -100.

    Args:
        pad_token_id: fills rows up.
        collator: for examples without `position_ids`, such as those of evaluation data.
    """

    def __init__(self, pad_token_id: int, collator: Callable[[list[Any]], Any]) -> None:
        self.fill = {"input_ids": pad_token_id, "labels": -100, "position_ids": 0, "expert_labels": -100}
        self.collator = collator

    def __call__(self, examples: list[Any]) -> Any:
        """The batch, `[row, longest]` each."""
        if "position_ids" not in examples[0]:
            return self.collator(examples)
        longest = max(len(example["input_ids"]) for example in examples)
        return {
            name: torch.tensor([[*example[name], *[value] * (longest - len(example[name]))] for example in examples])
            for name, value in self.fill.items()
            if name in examples[0]
        }


def check_packing(model: Any, batch_size: int) -> None:
    """Raise where the texts of a row would see each other.

    Reads one text behind two different ones, and alone, with the base model as it is.

    Args:
        model: of `weft.from_adapters` or `weft.from_pretrained`.
        batch_size: rows per batch; attention implementations may do differently with one.

    Raises:
        ConfigError: this model cannot be trained on packed texts.
    """
    passes = model.passes
    backbone = passes.backbone
    name, attention = type(backbone.base).__name__, backbone.base.config._attn_implementation
    if backbone.is_encoder_decoder or not backbone.takes("position_ids"):
        raise ConfigError(
            f"packing (True) needs a base model that takes position_ids, by which it tells texts apart; {name} does "
            "not: leave packing out, group_by_length saves padding too"
        )
    vocabulary = backbone.base.get_input_embeddings().weight
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(len(vocabulary), (2, _BEFORE + _BEHIND), generator=draws).to(vocabulary.device)
    ids[:, _BEFORE:] = ids[0, _BEFORE:]
    positions = torch.cat([torch.arange(_BEFORE), torch.arange(_BEHIND)]).to(ids.device)
    with in_evaluation_mode(backbone.base):
        rows = [ids] if batch_size > 1 else [ids[:1], ids[1:]]
        read = [_read(passes, row, positions.expand(len(row), -1)) for row in rows]
        one, other = torch.cat(read)[:, _BEFORE:]
        alone = _read(passes, ids[:1, _BEFORE:], positions[None, _BEFORE:])[0]
    # Another text before changes nothing but, at most, the order of sums; the place in the row changes the kernels.
    exact = vocabulary.dtype.itemsize >= 4 and not torch.is_autocast_enabled(ids.device.type)
    leaked, moved = _difference(one, other), _difference(one, alone)
    if leaked > (1e-5 if exact else 0.02) or moved > (1e-3 if exact else 0.2):
        raise ConfigError(
            f"packing (True) does not keep texts apart in {name} with {attention} attention (a text's hidden state "
            f"changes by {max(leaked, moved):.1%} behind another one): leave packing out, group_by_length saves "
            "padding too"
        )


def _read(passes: Any, ids: Tensor, positions: Tensor) -> Tensor:
    with passes.as_scaling_pass():
        return passes.backbone.last_hidden_state({"input_ids": ids, "position_ids": positions}).double()


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())
