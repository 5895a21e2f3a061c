"""What each request of a batch has chosen, as tensors by token: the engine's side of `requests.py`.

vLLM tells a logits processor which request sits in which row of the batch, and the attention's metadata which tokens
are a row's. The processor here changes no logits. Where nobody has chosen anything, an eager step on the CPU skips all
of it; elsewhere it is part of the graph, on the device.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import get_forward_context
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from weft.serve.mixture import ServedMixture
from weft.serve.requests import FIELD, SHARES, Choice

_MOST_KEPT = 1024  # texts whose shares wait for somebody
_OF_ENGINE: WeakValueDictionary[int, Choices] = WeakValueDictionary()


class Choices(nn.Module):
    """What tokens follow, where requests have chosen it, and what they followed.

    Attributes:
        static: everything is computed at every step, in the graph; else only where a request has chosen something.
        in_use: a request in the batch has.
        gated: [row, 1]: whether the gate decides; rows are requests, the last one is nobody's.
        fixed: [row, expert]: λ where it does not.
        weight: [row, 1]: g.
        biased: [row, expert]: how much of an expert's `lora_bias` acts.
        kept: [row, 1]: how many experts the gate keeps.
        shares: [token, expert]: mean over the layers of the λ that each token followed in the last step.

    Args:
        mixture: what is served.
        rows: requests that a batch has at most.
        tokens: that a batch has at most.
        static: see there.
    """

    gated: Tensor
    fixed: Tensor
    weight: Tensor
    biased: Tensor
    kept: Tensor
    shares: Tensor
    gate_shares: Tensor
    gate_tokens: Tensor
    _row: Tensor
    _numbers: Tensor

    def __init__(self, mixture: ServedMixture, rows: int, tokens: int, *, static: bool) -> None:
        super().__init__()
        self.experts = mixture.experts
        self.own_weight = float(mixture.options.get("global_scaling_weight", 1.0))
        self.own_top_k = int(mixture.options.get("top_k_lora") or len(mixture.experts))
        self.static = static
        self.in_use = False
        self._ends: Tensor | None = None
        self._positions: Tensor | None = None
        self.waiting: OrderedDict[str, dict[int, list[float]]] = OrderedDict()
        experts = len(self.experts)
        buffers = {
            "gated": torch.empty(rows + 1, 1, dtype=torch.bool),
            "fixed": torch.empty(rows + 1, experts),
            "weight": torch.empty(rows + 1, 1),
            "biased": torch.empty(rows + 1, experts),
            "kept": torch.empty(rows + 1, 1, dtype=torch.int64),
            "shares": torch.zeros(tokens, experts),
            "gate_shares": torch.zeros(experts, dtype=torch.float64),
            "gate_tokens": torch.zeros((), dtype=torch.int64),
            "_row": torch.full((tokens,), rows),
            "_numbers": torch.arange(tokens),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        self._nothing_chosen()

    @property
    def active(self) -> bool:
        """Whether this step follows choices."""
        return self.static or self.in_use

    def of_tokens(self, name: str, num_tokens: int) -> Tensor:
        """One of the tables by token."""
        return getattr(self, name)[self._row[:num_tokens]]

    def before(self, positions: Int[Tensor, " token"]) -> None:
        """Find out whose each token is, before a step."""
        self._positions, self._ends = positions, _ends()
        if self.active and self._ends is not None:
            numbers = self._numbers[: positions.shape[-1]]
            row = torch.searchsorted(self._ends, numbers, right=True)
            self._row[: len(numbers)].copy_(row.clamp_(max=len(self.gated) - 1))

    def after(self) -> None:
        """Count what the gate decided in a step, for the texts that it decides for."""
        if self._ends is None or self._positions is None:
            return  # a trial run of the engine's
        numbers = self._numbers[: self._positions.shape[-1]]
        counted = (numbers < self._ends[-1])[:, None]
        if self.active:
            counted = counted & self.of_tokens("gated", len(numbers))
        self.gate_shares.add_((self.shares[: len(numbers)] * counted).sum(0))
        self.gate_tokens.add_(counted.sum())

    def put(self, chosen: dict[int, InBatch]) -> None:
        """Write down what the requests of the batch have chosen."""
        deciding = {row: each.choice for row, each in chosen.items() if each.choice.decides}
        if not deciding and not self.in_use:
            return
        self.in_use = bool(deciding)
        self._nothing_chosen()
        if not deciding:
            return
        rows, choices = list(deciding), list(deciding.values())
        fixed = [self._fixed(each) for each in choices]
        weight = [self._weight(each) for each in choices]
        # A bias stands outside of λ: all of them act, but for an expert alone.
        biased = [
            [of] * len(self.experts) if each.alone is None else alone
            for each, of, alone in zip(choices, weight, fixed, strict=True)
        ]
        for table, values in (
            (self.gated, [[each.alone is None and each.weights is None] for each in choices]),
            (self.fixed, fixed),
            (self.weight, [[of] for of in weight]),
            (self.biased, biased),
            (self.kept, [[each.top_k or self.own_top_k] for each in choices]),
        ):
            table[rows] = torch.tensor(values, dtype=table.dtype, device=table.device)

    def _nothing_chosen(self) -> None:
        self.gated.fill_(True)
        self.fixed.zero_()
        self.weight.fill_(self.own_weight)
        self.biased.fill_(self.own_weight)
        self.kept.fill_(self.own_top_k)

    def _weight(self, choice: Choice) -> float:
        if choice.alone is not None:
            return 1.0
        return self.own_weight if choice.global_weight is None else choice.global_weight

    def _fixed(self, choice: Choice) -> list[float]:
        if choice.weights is not None:
            if len(choice.weights) != len(self.experts):
                raise ValueError(f"weights ({choice.weights}) must be {len(self.experts)} numbers")
            return list(choice.weights)
        return [float(choice.alone == name) for name in self.experts]

    def keep_shares(self, chosen: dict[int, InBatch]) -> None:
        """Set aside the shares that predicted the tokens to be sampled now, where they were asked for."""
        wanted = {row: each for row, each in chosen.items() if each.shares is not None}
        if not wanted or self._ends is None or self._positions is None:
            return
        last = (self._ends[list(wanted)] - 1).tolist()
        positions, shares = self._positions[last].tolist(), self.shares[last].tolist()
        for each, position, of in zip(wanted.values(), positions, shares, strict=True):
            number = position + 1 - each.prompt_tokens
            if number >= 0:
                assert each.shares is not None
                self.waiting.setdefault(each.shares, {})[number] = of
        while len(self.waiting) > _MOST_KEPT:
            self.waiting.popitem(last=False)


@dataclass(frozen=True)
class InBatch:
    """A request in a row of the batch.

    Attributes:
        choice: what it asks of the mixture.
        shares: by which name its shares are asked for; None where they are not.
        prompt_tokens: of its prompt.
    """

    choice: Choice
    shares: str | None
    prompt_tokens: int


class WhoSitsWhere(LogitsProcessor):
    """Learns the rows of the batch from vLLM, and leaves the logits as they are."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise where a request's choice cannot be read; weft's server writes it, clients do not."""
        line = (sampling_params.extra_args or {}).get(FIELD)
        if line is None:
            return
        try:
            Choice.read(line)
        except (TypeError, ValueError, KeyError, AttributeError) as err:
            raise VLLMValidationError(f"extra_args.{FIELD} ({line!r}) is no line that Choice.written gave") from err

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.engine = id(vllm_config)
        self.chosen: dict[int, InBatch] = {}

    def is_argmax_invariant(self) -> bool:
        """No, or greedy requests would pass it by."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Take over who came, left and moved, before a step."""
        if process_dict_updates(self.chosen, batch_update, _in_batch):
            _OF_ENGINE[self.engine].put(self.chosen)

    def apply(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
        """The step has been computed: keep the shares that are asked for."""
        if self.chosen:
            _OF_ENGINE[self.engine].keep_shares(self.chosen)
        return logits


class WorkerExtension:
    """What weft's server asks of vLLM's workers, by `collective_rpc`."""

    def weft_shares(self, name: str, last: bool) -> list[tuple[int, list[float]]]:
        """The shares of a text that nobody has fetched yet, with their tokens' numbers."""
        waiting = _OF_ENGINE[id(self.vllm_config)].waiting  # type: ignore[attr-defined]
        found = waiting.pop(name, {})
        if not last:
            waiting[name] = {}
        return sorted(found.items())

    def weft_gate(self) -> tuple[list[float], int]:
        """Sums of shares over all tokens that the gate decided for, and the number of these."""
        choices = _OF_ENGINE[id(self.vllm_config)]  # type: ignore[attr-defined]
        return choices.gate_shares.tolist(), int(choices.gate_tokens)


def register(vllm_config: Any, choices: Choices) -> None:
    """Let this engine's processor and worker find the choices of its model."""
    _OF_ENGINE[id(vllm_config)] = choices


def _in_batch(params: SamplingParams, prompt: list[int] | None, _: list[int]) -> InBatch | None:
    values = params.extra_args or {}
    line, shares = values.get(FIELD), values.get(SHARES)
    if line is None and shares is None:
        return None
    return InBatch(Choice() if line is None else Choice.read(line), shares, len(prompt or ()))


def _ends() -> Tensor | None:
    """Behind which token each row of the batch ends; None in a trial run of the engine's.

    Raises:
        RuntimeError: vLLM's attention does not say it: it is new, or reads a batch in two halves.
    """
    metadata = get_forward_context().attn_metadata
    if metadata is None:
        return None
    starts = (
        [getattr(each, "query_start_loc", None) for each in metadata.values()] if isinstance(metadata, dict) else []
    )
    found = next((each for each in starts if each is not None), None)
    if found is None:
        raise RuntimeError("vLLM's attention does not say whose tokens are whose, which requests' choices need")
    return found[1:]
