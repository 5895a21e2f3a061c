"""What a trained mixture is worth: its loss on held-out sequences beside those of the base model and of each expert."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from weft.base_model.devices import execution_device
from weft.base_model.likelihoods import negative_log_likelihoods
from weft.data.padded import padded
from weft.data.texts import NO_LABEL
from weft.train.gate_targets import losses_of_experts
from weft.train.held_out import some_of

_PASSES, _LEAST, _MOST = 320, 8, 32  # forward passes of all models together; sequences


@torch.no_grad()
def comparison(model: Any, held_out: list[dict[str, Any]], batch_size: int, *, bf16: bool = False) -> str:
    """A sentence that compares the mixture with the base model and with each expert alone.

    Args:
        model: the mixture. Each expert alone has the weight 1.
        held_out: rows with `input_ids` and `labels`; 8 to 32 are used, fewer with many experts.
        batch_size: sequences per forward pass.
        bf16: run under autocast, as the training did.
    """
    names = list(model.xlora_config.expert_names)
    rows = some_of(held_out, max(_LEAST, min(_MOST, _PASSES // (len(names) + 2))))
    training = model.training
    model.eval()
    try:
        with torch.autocast(execution_device(model).type, torch.bfloat16, enabled=bf16):
            batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
            losses = torch.cat([_losses(model, batch, names) for batch in batches])
    finally:
        model.train(training)
    own, base, alone = losses[:, 0], losses[:, 1], losses[:, 2:]
    best = int(alone.sum(0).argmin())
    better = int((own <= alone.min(1).values).sum())
    tokens = sum(label != NO_LABEL for row in rows for label in row["labels"][1:])
    means = [float(of_model.sum() / tokens) for of_model in (own, base, alone[:, best])]
    return (
        f"on {len(rows)} held-out sequences: loss {means[0]:.3f}, base model {means[1]:.3f}, best expert alone "
        f"({names[best]}) {means[2]:.3f}. At least as good as each sequence's best expert on {better} of {len(rows)}"
    )


def _losses(model: Any, rows: list[dict[str, Any]], names: list[str]) -> Float[Tensor, "row model"]:
    """The sum of each row's losses, over tokens with a label: of the mixture, the base model and each expert alone."""
    ids, mask = padded([row["input_ids"] for row in rows])
    device = execution_device(model)
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    counts = pad_sequence([torch.tensor(row["labels"][1:]) != NO_LABEL for row in rows], batch_first=True)
    own = negative_log_likelihoods(model(**inputs).logits, ids).cpu()
    with model.disable_adapter():
        base = negative_log_likelihoods(model(**inputs).logits, ids).cpu()
    two = torch.stack([own, base], -1).double().masked_fill(~counts[..., None], 0.0)
    return torch.cat([two, losses_of_experts(model, inputs, counts, names)], -1).sum(1)
