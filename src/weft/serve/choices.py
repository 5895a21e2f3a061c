"""The options of the requests in a batch (`requests.py`), as tensors for each token.

vLLM tells a logits processor the batch row of each request; the attention metadata have the tokens of each row. The
logits processor here does not change the logits. In eager mode on the CPU, a step without such options skips all of
this; otherwise it is part of the graph and runs on the device.
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

_MOST_KEPT = 1024  # maximum number of texts whose shares are kept until they are fetched
_OF_ENGINE: WeakValueDictionary[int, Choices] = WeakValueDictionary()


class Choices(nn.Module):
    """The options of the requests in the batch, and the shares of the last step.

    Args:
        mixture: the served mixture.
        rows: maximum number of requests in a batch.
        tokens: maximum number of tokens in a batch.
        static: see the attribute.

    Attributes:
        static: compute everything in each step, in the graph; else only if a request in the batch has options.
        in_use: whether a request in the batch has options.
        gated: [row, 1]: whether the row uses the gate. The rows are requests; the last row is for padding tokens.
        fixed: [row, expert]: λ of rows that do not use the gate.
        weight: [row, 1]: the global weight g.
        biased: [row, expert]: the factor of each expert's `lora_bias`.
        kept: [row, 1]: number of experts that the gate keeps for each token.
        shares: [token, expert]: mean over the layers of λ of each token in the last step.
        gate_shares: [expert]: sums of the shares of all tokens that used the gate.
        gate_tokens: number of these tokens.
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
        """Whether this step uses the tables."""
        return self.static or self.in_use

    def of_tokens(self, name: str, num_tokens: int) -> Tensor:
        """One of the tables, [token, ...] instead of [row, ...]."""
        return getattr(self, name)[self._row[:num_tokens]]

    def before(self, positions: Int[Tensor, " token"]) -> None:
        """Before a step: find the row of each token."""
        self._positions, self._ends = positions, _ends()
        if self.active and self._ends is not None:
            numbers = self._numbers[: positions.shape[-1]]
            row = torch.searchsorted(self._ends, numbers, right=True)
            self._row[: len(numbers)].copy_(row.clamp_(max=len(self.gated) - 1))

    def after(self) -> None:
        """After a step: add the shares of the tokens that used the gate to the sums."""
        if self._ends is None or self._positions is None:
            return  # a dummy run of the engine
        numbers = self._numbers[: self._positions.shape[-1]]
        counted = (numbers < self._ends[-1])[:, None]
        if self.active:
            counted = counted & self.of_tokens("gated", len(numbers))
        self.gate_shares.add_((self.shares[: len(numbers)] * counted).sum(0))
        self.gate_tokens.add_(counted.sum())

    def put(self, chosen: dict[int, InBatch]) -> None:
        """Write the options of the requests in the batch to the tables."""
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
        # λ does not apply to biases: all of them are added, except for a single expert.
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
        """Keep the requested shares at the positions whose next tokens are sampled now."""
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
        choice: its options.
        shares: the key for its shares; None if they are not requested.
        prompt_tokens: number of tokens of its prompt.
    """

    choice: Choice
    shares: str | None
    prompt_tokens: int


class RequestRows(LogitsProcessor):
    """Gets the batch rows of the requests from vLLM; the logits are not changed."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise if a request's options cannot be read. weft's server writes them, not clients.

        Raises:
            VLLMValidationError: they cannot be read.
        """
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
        """False, as vLLM skips the other processors for greedy requests."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Before a step: update the rows of requests that were added, removed or moved."""
        if process_dict_updates(self.chosen, batch_update, _in_batch):
            _OF_ENGINE[self.engine].put(self.chosen)

    def apply(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
        """After a step: keep the requested shares."""
        if self.chosen:
            _OF_ENGINE[self.engine].keep_shares(self.chosen)
        return logits


class WorkerExtension:
    """The methods that weft's server calls in vLLM's workers, by `collective_rpc`."""

    def weft_shares(self, name: str, last: bool) -> list[tuple[int, list[float]]]:
        """(token number, shares) of a text's tokens that were not fetched yet."""
        waiting = _OF_ENGINE[id(self.vllm_config)].waiting  # type: ignore[attr-defined]
        found = waiting.pop(name, {})
        if not last:
            waiting[name] = {}
        return sorted(found.items())

    def weft_gate(self) -> tuple[list[float], int]:
        """(sums of each expert's shares over all tokens that used the gate, number of these tokens)."""
        choices = _OF_ENGINE[id(self.vllm_config)]  # type: ignore[attr-defined]
        return choices.gate_shares.tolist(), int(choices.gate_tokens)


def register(vllm_config: Any, choices: Choices) -> None:
    """Register the choices of an engine's model, so that its logits processor and worker can find them."""
    _OF_ENGINE[id(vllm_config)] = choices


def _in_batch(params: SamplingParams, prompt: list[int] | None, _: list[int]) -> InBatch | None:
    values = params.extra_args or {}
    line, shares = values.get(FIELD), values.get(SHARES)
    if line is None and shares is None:
        return None
    return InBatch(Choice() if line is None else Choice.read(line), shares, len(prompt or ()))


def _ends() -> Tensor | None:
    """The end of each row of the batch, as an index of tokens; None in a dummy run of the engine.

    Raises:
        RuntimeError: the attention metadata do not have it: an unknown attention backend, or a batch in two halves.
    """
    metadata = get_forward_context().attn_metadata
    if metadata is None:
        return None
    starts = (
        [getattr(each, "query_start_loc", None) for each in metadata.values()] if isinstance(metadata, dict) else []
    )
    found = next((each for each in starts if each is not None), None)
    if found is None:
        raise RuntimeError(
            "vLLM's attention metadata have no query_start_loc, with which weft finds a request's tokens"
        )
    return found[1:]
