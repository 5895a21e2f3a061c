"""The KV caches of both passes in one object, which is a cache of transformers.

The adapted pass uses the cache itself; the scaling pass uses a second one of the same kind, `scaling`. Operations of
transformers on the cache (crop after rejected draft tokens, reorder for beams, repeat for several continuations) are
applied to both. In a causal model a token's scalings depend only on earlier tokens, so the results are the same as
without a cache.

A cache is doubled in place. The caller's object stays the same object and an instance of its class (`DynamicCache`,
`StaticCache`, ...), so that `generate` and users can go on with it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from weft.base_model.versions import drop_grown_layers, is_recurrent
from weft.errors import CacheError, ConfigError
from weft.passes.frozen import SequenceMeans

# Code for an empty cache, for messages.
DYNAMIC_CACHE = "DynamicCache(config=model.config)"
ENCODER_DECODER_CACHE = f"EncoderDecoderCache({DYNAMIC_CACHE}, DynamicCache())"


class XLoraCache(Cache):
    """A cache with a second one for the scaling pass; made by `doubled`.

    Attributes:
        scaling: the KV cache of the scaling pass.
        scaling_is_behind: whether tokens were read without a scaling pass (with the experts off, or with fixed or
            frozen scalings), so that the gate cannot continue.
        means: the mean scalings of each sequence, if they will be frozen; else None.
    """

    scaling: Cache
    scaling_is_behind: bool
    means: SequenceMeans | None

    def reset(self) -> None:
        """Empty both caches."""
        super().reset()
        drop_grown_layers(self)
        self.scaling.reset()
        drop_grown_layers(self.scaling)
        self.scaling_is_behind = False
        self.means = None

    def crop(self, tokens_to_remove: Any) -> None:
        """Remove the last `-tokens_to_remove` tokens from both caches.

        Before transformers 5.16, a number above 0 is the number of tokens to keep.
        """
        before = 0 if self.means is None else tokens_in(self)
        super().crop(tokens_to_remove)
        self.scaling.crop(tokens_to_remove)
        if self.means is not None:
            self.means.length -= before - tokens_in(self)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Replace row i of both caches by row `beam_idx[i]`."""
        super().reorder_cache(beam_idx)
        self.scaling.reorder_cache(beam_idx)
        self._change_means(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of both caches."""
        super().batch_repeat_interleave(repeats)
        self.scaling.batch_repeat_interleave(repeats)
        self._change_means(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of both caches."""
        super().batch_select_indices(indices)
        self.scaling.batch_select_indices(indices)
        self._change_means(lambda rows: rows[indices])

    def activate_past_recording(self) -> None:
        """Let both caches keep what a later `crop` needs."""
        super().activate_past_recording()
        self.scaling.activate_past_recording()

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Allocate both caches before the first call."""
        super().early_initialization(*args, **kwargs)
        self.scaling.early_initialization(*args, **kwargs)

    def count_in(self, scalings: Float[Tensor, "batch seq layer expert"], attention_mask: Any, freeze_at: int) -> None:
        """Add the scalings of new tokens to the means, and freeze these when there are enough tokens.

        Args:
            scalings: the scalings after top-k.
            attention_mask: the call's attention mask, or None.
            freeze_at: number of tokens from which the scalings are frozen.

        Raises:
            ConfigError: a mask of this form does not show which tokens are padding.
        """
        padding = attention_mask
        if padding is not None and (not isinstance(padding, Tensor) or padding.dim() != 2):
            if len(scalings) > 1:
                raise ConfigError(
                    "freeze_scalings_after cannot tell padding in a batch with a static cache: generate for one text "
                    "at a time, or leave cache_implementation out"
                )
            padding = None
        if self.means is None:
            self.means = SequenceMeans(length=tokens_in(self))
        self.means.add(scalings, None if padding is None else padding.to(scalings.device))
        self.means.frozen = self.means.length >= freeze_at

    def _change_means(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.means is not None:
            self.means.change_rows(change)

    def __reduce__(self) -> Any:
        # The class is made at run time, so a pickle has the class of the original cache.
        return _unpickled, (type(self).__mro__[2], self.__dict__)


def doubled(cache: Any, scaling_layers: int | None = None) -> XLoraCache:
    """Convert an empty cache to an `XLoraCache`, in place. An `XLoraCache` is returned unchanged.

    Args:
        cache: a cache of transformers.
        scaling_layers: number of layers in the scaling pass; None for all.

    Raises:
        CacheError: it is not a cache of transformers, or has tokens without a scaling pass.
    """
    if isinstance(cache, XLoraCache):
        if cache.scaling_is_behind:
            raise CacheError(
                f"past_key_values ({type(cache).__name__}) lacks the scaling pass of some tokens, which were read with "
                "the experts off, or at fixed or frozen scalings: start again with an empty cache"
            )
        return cache
    if not isinstance(cache, Cache):
        raise CacheError(
            f"past_key_values ({type(cache).__name__}) must be a cache of transformers: {_how_to_go_on(cache)}"
        )
    contents = _contents(cache)
    if contents:
        raise CacheError(
            f"past_key_values ({type(cache).__name__} with {contents}) was not filled by this model, whose scaling "
            f"pass needs keys and values of its own: {_how_to_go_on(cache)}"
        )
    scaling = _twin(cache)
    if scaling_layers is not None:
        scaling.layers = scaling.layers[:scaling_layers]
    double, kind = cast(Any, cache), cast(Any, type(cache))
    double.__class__ = _double_class(kind)
    double.scaling = scaling
    double.scaling_is_behind = False
    double.means = None
    return double


def tokens_in(cache: Cache) -> int:
    """The number of tokens in a cache, with padding.

    Raises:
        CacheError: the cache has only recurrent states, which do not have this number.
    """
    if not is_recurrent(cache):
        return int(cache.get_seq_length())
    if cache.has_previous_state():
        raise CacheError(
            f"past_key_values ({type(cache).__name__}) keeps recurrent states, which do not tell how many tokens they "
            "are of: start again with an empty cache"
        )
    return 0


def _contents(cache: Cache) -> str:
    """The contents of a cache, as text for a message; "" if it is empty."""
    if is_recurrent(cache):
        return "recurrent states" if cache.has_previous_state() else ""
    length = tokens_in(cache)
    if isinstance(cache, EncoderDecoderCache):
        length = length or tokens_in(cache.cross_attention_cache)
    return f"{length} tokens" if length else ""


def _how_to_go_on(cache: Any) -> str:
    empty = ENCODER_DECODER_CACHE if isinstance(cache, EncoderDecoderCache) else DYNAMIC_CACHE
    return f"pass an empty cache ({empty}), or the past_key_values that this model returned"


def leave_scaling_behind(cache: Any) -> None:
    """Mark a cache: its next tokens are read without a scaling pass."""
    if isinstance(cache, XLoraCache):
        cache.scaling_is_behind = True


def _twin(cache: Cache) -> Cache:
    # CUDA streams, with which an offloading cache prefetches, cannot be copied, so they are shared.
    streams = {id(value): value for value in cache.__dict__.values() if isinstance(value, torch.Stream)}
    return copy.deepcopy(cache, streams)


@functools.cache
def _double_class(cache_class: Any) -> Any:
    return type(f"XLora{cache_class.__name__}", (XLoraCache, cache_class), {"__doc__": XLoraCache.__doc__})


def _unpickled(cache_class: type[Cache], state: dict[str, Any]) -> XLoraCache:
    cache = object.__new__(_double_class(cast(Any, cache_class)))
    cache.__dict__.update(state)
    return cache
