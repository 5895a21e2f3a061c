"""Runs a model on a text with a KV cache; returns the logits and each expert's share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from weft.base_model.versions import forget, is_recurrent
from weft.errors import CacheError, ConfigError, ThreadError
from weft.generation.speculation import Speculation
from weft.model.model import XLoraModel
from weft.passes.cache import tokens_in


class Reader:
    """Runs a model on the tokens that its KV cache does not have yet.

    Args:
        model: a mixture.
        cache: the KV cache.
        freeze_at: number of tokens from which the scalings are frozen; None never freezes.
    """

    def __init__(self, model: Any, cache: Cache, freeze_at: int | None = None) -> None:
        self.model = model
        self.tuner = tuner_of(model)
        self.cache = cache
        self.freeze_at = freeze_at
        self._number_read = tokens_in(cache)
        self._shares: list[dict[str, float]] = []

    def read(
        self,
        input_ids: Int[Tensor, "1 seq"],
        speculation: Speculation | None = None,
        limit: int = 0,
        *,
        every_position: bool = False,
    ) -> tuple[Float[Tensor, "1 position vocab"], list[int]]:
        """Run the model on the tokens that are not in the cache, and on drafted tokens after them.

        An exception during the call empties the cache, as only some layers may have the new tokens.

        Args:
            input_ids: the whole text.
            speculation: drafts tokens; None for no drafts.
            limit: maximum number of drafted tokens.
            every_position: return the logits of all tokens that were read, not only of the text's last token.

        Returns:
            The logits after the text and after each drafted token, and the drafted tokens.
        """
        # A cache of recurrent states does not have its number of tokens.
        unread = input_ids[:, self._number_read if is_recurrent(self.cache) else tokens_in(self.cache) :]
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.tuner.passes.thread.held())
                drafted, hidden = ([], None) if speculation is None else speculation(unread, limit)
                positions = len(drafted) + 1
                # Not inference mode: its tensors in the cache could not be used later with gradients.
                stack.enter_context(torch.no_grad())
                if hidden is not None:
                    stack.enter_context(self.tuner.passes.after_scaling_steps(hidden))
                if self.freeze_at is not None:
                    stack.enter_context(self.tuner.passes.freeze_scalings_at(self.freeze_at))
                keep = self.tuner.backbone.takes("logits_to_keep") and not every_position
                output = self.model(
                    input_ids=torch.cat([unread, unread.new_tensor([drafted])], 1) if drafted else unread,
                    **{str(self.tuner.backbone.cache_name): self.cache},
                    use_cache=True,
                    **({"logits_to_keep": positions} if keep else {}),
                )
                self._note_shares(positions)
        except (CacheError, ThreadError):
            raise  # refused before anything was read
        except BaseException:
            self.cache.reset()
            self._number_read = 0
            raise
        self._number_read += unread.shape[1] + len(drafted)
        return output.logits if every_position else output.logits[:, -positions:], drafted

    def forget(self, number: int) -> None:
        """Remove the last `number` tokens from the cache."""
        forget(self.cache, number)

    def shares(self, index: int) -> dict[str, float]:
        """Each expert's share, as the mean over the layers: after the text (0) or after drafted token 1, 2, ..."""
        return self._shares[min(index, len(self._shares) - 1)]

    def _note_shares(self, positions: int) -> None:
        names, scalings = self.tuner.xlora_config.expert_names or (), self.tuner.passes.followed()
        rows = [] if scalings is None else scalings[0, -positions:].mean(1).tolist()
        self._shares = [dict(zip(names, row, strict=True)) for row in rows] or [{}]


def tuner_of(model: Any) -> XLoraModel:
    """The `XLoraModel` of a mixture, which users have as a `PeftModel`.

    Raises:
        ConfigError: `model` is not a mixture.
    """
    tuner = model if isinstance(model, XLoraModel) else getattr(model, "base_model", None)
    if not isinstance(tuner, XLoraModel):
        raise ConfigError(
            f"model ({type(model).__name__}) must be a mixture: make one with weft.from_adapters, or load one with "
            "weft.from_pretrained"
        )
    return tuner
