"""The key/value caches of both passes as one object, which is a `transformers` cache.

The adapted pass reads and writes the cache itself; the scaling pass has a second one of the same kind, in `scaling`.
What transformers does to a cache (crop it after rejected guesses, reorder it for beams, repeat it for several
continuations) is done to both. In a causal model a token's scalings depend on earlier tokens only, so the result is
that of reading the whole text again.

A cache is made double in place: the object that the caller holds stays the caller's object and stays an instance of
its class (`DynamicCache`, `StaticCache`, ...), so that `generate` and users go on with it as they know it.
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

# How to make an empty cache.
DYNAMIC_CACHE = "DynamicCache(config=model.config)"
ENCODER_DECODER_CACHE = f"EncoderDecoderCache({DYNAMIC_CACHE}, DynamicCache())"


class XLoraCache(Cache):
    """A cache with a second one for the scaling pass; made by `doubled`.

    Attributes:
        scaling: keys and values of the scaling pass.
        scaling_is_behind: tokens were read without a scaling pass (with the experts off, or at fixed or frozen
            scalings), so the gate cannot go on from here.
        means: the mean scalings of each sequence, where they are to be frozen.
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

        Before transformers 5.16 a number above 0 is that of the tokens that stay.
        """
        before = 0 if self.means is None else tokens_in(self)
        super().crop(tokens_to_remove)
        self.scaling.crop(tokens_to_remove)
        if self.means is not None:
            self.means.length -= before - tokens_in(self)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Let row i of both caches be what row `beam_idx[i]` was."""
        super().reorder_cache(beam_idx)
        self.scaling.reorder_cache(beam_idx)
        self._change_means(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of both caches."""
        super().batch_repeat_interleave(repeats)
        self.scaling.batch_repeat_interleave(repeats)
        self._change_means(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of both caches."""
        super().batch_select_indices(indices)
        self.scaling.batch_select_indices(indices)
        self._change_means(lambda rows: rows[indices])

    def activate_past_recording(self) -> None:
        """Let both caches keep what a later `crop` may need."""
        super().activate_past_recording()
        self.scaling.activate_past_recording()

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Allocate both caches before the first call."""
        super().early_initialization(*args, **kwargs)
        self.scaling.early_initialization(*args, **kwargs)

    def count_in(self, scalings: Float[Tensor, "batch seq layer expert"], attention_mask: Any, freeze_at: int) -> None:
        """Note what the scalings of the coming tokens are, and freeze them when there are enough.

        Args:
            scalings: top-k applied.
            attention_mask: of the call, or None.
            freeze_at: how many tokens are enough.

        Raises:
            ConfigError: it cannot be told which tokens are padding.
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
        # The class was made at run time: a pickle names the class it was made of.
        return _unpickled, (type(self).__mro__[2], self.__dict__)


def doubled(cache: Any, scaling_layers: int | None = None) -> XLoraCache:
    """Make an empty cache hold both passes, in place; one that does already is given back.

    Args:
        cache: of transformers.
        scaling_layers: how many layers the scaling pass runs; None for all of them.

    Raises:
        CacheError: it holds tokens that no scaling pass has read.
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
    """How many tokens a cache has, padding included.

    Raises:
        CacheError: it cannot say, as it keeps recurrent states only.
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
    """What a cache has, in words; nothing where it is empty."""
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
    """Note that the coming tokens get no scaling pass."""
    if isinstance(cache, XLoraCache):
        cache.scaling_is_behind = True


def _twin(cache: Cache) -> Cache:
    # Streams, by which an offloading cache prefetches, can be shared but not copied.
    streams = {id(value): value for value in cache.__dict__.values() if isinstance(value, torch.Stream)}
    return copy.deepcopy(cache, streams)


@functools.cache
def _double_class(cache_class: Any) -> Any:
    return type(f"XLora{cache_class.__name__}", (XLoraCache, cache_class), {"__doc__": XLoraCache.__doc__})


def _unpickled(cache_class: type[Cache], state: dict[str, Any]) -> XLoraCache:
    cache = object.__new__(_double_class(cast(Any, cache_class)))
    cache.__dict__.update(state)
    return cache
