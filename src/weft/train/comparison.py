"""What a trained mixture is worth: its loss on held-out sequences beside those of the base model and of each expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.base_model.devices import execution_device
from weft.base_model.likelihoods import negative_log_likelihoods
from weft.data.padded import padded_batches
from weft.data.texts import NO_LABEL
from weft.model.model import at_own_weight

_PASSES, _LEAST, _MOST = 320, 8, 32  # forward passes of all models together; sequences


@torch.no_grad()
def comparison(model: Any, held_out: list[dict[str, Any]], batch_size: int, *, bf16: bool = False) -> str:
    """A sentence that compares the mixture with the base model and with each expert alone.

    Args:
        model: the mixture. Each expert alone has the weight 1.
        held_out: rows with `input_ids` and `labels`; the first 8 to 32 are used, fewer with many experts.
        batch_size: sequences per forward pass.
        bf16: run under autocast, as the training did.
    """
    names = model.xlora_config.expert_names
    rows = held_out[: max(_LEAST, min(_MOST, _PASSES // (len(names) + 2)))]
    training = model.training
    model.eval()
    try:
        with torch.autocast(execution_device(model).type, torch.bfloat16, enabled=bf16):
            own = _losses(model, rows, batch_size)
            alone = {}
            for name in names:
                with at_own_weight(model, {name: 1.0}):
                    alone[name] = _losses(model, rows, batch_size)
            with model.disable_adapter():
                base = _losses(model, rows, batch_size)
    finally:
        model.train(training)
    tokens = own[:, 1].sum()
    best = min(alone, key=lambda name: float(alone[name][:, 0].sum()))
    of_own_best = torch.stack([losses[:, 0] for losses in alone.values()]).min(0).values
    better = int((own[:, 0] <= of_own_best).sum())
    means = [float(losses[:, 0].sum() / tokens) for losses in (own, base, alone[best])]
    return (
        f"on {len(rows)} held-out sequences: loss {means[0]:.3f}, base model {means[1]:.3f}, best expert alone "
        f"({best}) {means[2]:.3f}. At least as good as each sequence's best expert on {better} of {len(rows)}"
    )


def _losses(model: Any, rows: list[dict[str, Any]], batch_size: int) -> Tensor:
    """The sum of the losses of each row's tokens with a label, and their number, [row, 2]; in float64."""
    device = execution_device(model)
    found: list[Tensor] = []
    for input_ids, attention_mask in padded_batches([row["input_ids"] for row in rows], batch_size):
        logits = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False).logits
        for losses in negative_log_likelihoods(logits, input_ids).cpu().double():
            labels = torch.tensor(rows[len(found)]["labels"][1:])
            counted = labels != NO_LABEL
            found.append(torch.stack([losses[: len(labels)][counted].sum(), counted.sum().double()]))
    return torch.stack(found)
