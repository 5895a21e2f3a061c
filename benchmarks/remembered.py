"""What each expert loses on each text, computed once for all gates that start from these losses."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from weft.train import gate_targets


def remember_losses(folder: Path) -> None:
    """Let `weft.fit_gate` take what it knows from files in this folder, which is for one base.

    The losses are what they would be: which gate asks, and with which seed, makes no difference to them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compute = gate_targets.losses_of_experts

    def losses(
        model: Any, inputs: dict[str, torch.Tensor], counts: torch.Tensor, experts: Sequence[str]
    ) -> torch.Tensor:
        lengths = inputs["attention_mask"].sum(-1).tolist()
        texts = [row[:length].tolist() for row, length in zip(inputs["input_ids"], lengths, strict=True)]
        counted = [row[: length - 1].tolist() for row, length in zip(counts, lengths, strict=True)]
        sums = [float(value.double().sum()) for name, value in model.named_parameters() if "lora_" in name]
        keys = [repr((*text, experts, sums)).encode() for text in zip(texts, counted, strict=True)]
        files = [folder / f"{hashlib.sha256(key).hexdigest()}.pt" for key in keys]
        if not all(file.exists() for file in files):
            for row, file, length in zip(compute(model, inputs, counts, experts), files, lengths, strict=True):
                torch.save(row[: length - 1].clone(), file)
        table = torch.zeros(len(texts), max(lengths) - 1, len(experts), dtype=torch.float64)
        for row, file, length in zip(table, files, lengths, strict=True):
            row[: length - 1] = torch.load(file)
        return table

    gate_targets.losses_of_experts = losses
