"""Fits the gate, before training, as a classifier that predicts the expert of each token.

The language model's loss is a noisy signal for the gate, and reaches it through all layers of the mixture. Here a
function f of a token's hidden state h, with the gate's architecture and the same for all layers, is fitted directly to
target shares q of the experts,

    minimise  mean_t -Σ_e q_{t,e} ln softmax(f(h_t))_e

and becomes the gate's start in every layer. Training then starts with a mixture that follows the text, and learns the
differences between layers. For the targets, from labels or from losses, see `gate_targets.py`. If the gate has a LoRA
of its own in the scaling pass, that is trained first (`scaling_fit.py`).

Hidden states have a large mean, and some channels are far larger than others. So f is fitted on (h - mean) / deviation
for each channel. This is then folded into its first linear layer: W / deviation, and b - W mean / deviation. The
weights of f decay (decoupled, as in AdamW).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.base_model.backbone import vocabulary_size
from weft.base_model.state import in_evaluation_mode
from weft.data.given import check_tokenizer, check_vocabulary, given_tokens, is_text, several, several_problem
from weft.data.labelled import labelled_tokens, labelled_windows
from weft.data.texts import NO_LABEL, num_positions
from weft.data.windows import opening_of
from weft.distributed import process_number
from weft.errors import ConfigError, DataError
from weft.files.reading import shown
from weft.gate.losses import NO_EXPERT
from weft.screen.countdown import Countdown
from weft.train.gate_targets import TOKENS_AT_A_TIME, Target, moments, states_of, targets_of
from weft.train.scaling_fit import cross_entropy, fit_length, fit_scaling_lora, rate_at

# Maximum number of tokens to read: 64 sequences of 512. With "labels" more are cheap, as no expert reads them, and make
# a better gate: 262,144 for four experts (benchmarks/results/2026-11-27-domains-fit.md), and more for many
# (2026-11-28-domains-labels.md). Hidden states of so many are kept in host memory.
LEAST_TOKENS, LEAST_LABELS, LABELS_OF_EACH = 32_768, 262_144, 32_768
_MOST_BYTES = 2**31
_LENGTH = 512  # maximum length of the sequences into which a text is split, as in `weft train`
_LEAST_STEPS, _EPOCHS, _BATCH, _RATE, _WARMUP = 400, 3, 512, 5e-3, 5
# Without it the gate is too sure on other documents (benchmarks/results/2026-11-28-domains-decay.md).
_DECAY = 1.0
_HELD_OUT = 8  # one of this number of sequences is held out


def fit_gate(
    model: Any,
    examples: Any,
    by: str = "losses",
    *,
    tokenizer: Any = None,
    batch_size: int = 4,
    seed: int = 0,
    announce: Callable[[str], None] = lambda line: None,
) -> float:
    """Fit a mixture's gate to predict the expert of each token, as a start for training instead of random weights.

    At most 32,768 tokens are read. With "labels" so many for each expert, at least 262,144, and not more than those
    whose hidden states take 2 GiB of host memory. Only the gate changes, in place; with `scaling_pass_rank` its LoRA in
    the scaling pass, too.

    Args:
        model: a mixture from `weft.from_adapters`, on the device where it will run; "losses" needs a causal language
            model.
        examples: a list (or a data set, or an iterable) of texts, or of rows with "text" or "messages" as in data
            files, which need a tokenizer and are split into sequences of at most 512 tokens; or of token ids, or rows
            with `input_ids`. They should have all domains, if possible several in one text. With "labels", rows have
            `expert_labels` (an index for each token, -100 for none) or, with a text, "expert" or "experts" as in data
            files; examples without labels are left out. With "losses", optional `labels` are -100 for tokens to
            ignore.
        by: "labels" or "losses", see above.
        tokenizer: the base model's tokenizer, for texts.
        batch_size: sequences per forward pass.
        seed: random seed for the choice of sequences and the start of the fit.
        announce: called with a line about the data before it is read.

    Returns:
        The fraction of held-out tokens for which the gate's first choice is that of the labels or losses, 0 to 1; nan
        with one example, as then nothing is held out.

    Raises:
        ConfigError: this gate cannot be fitted in this way, or an example has another type.
        DataError: there are no labels, or they are not valid.
        TrainingError: the model returns NaN for these texts. The gate is unchanged.

    Example:
        >>> weft.fit_gate(model, ["def f(x):", "The contract says"], tokenizer=tokenizer)  # 0.87
    """
    check_tokenizer(tokenizer)
    problems = [*fit_problems(model, by), *_by_problems(by)]
    if batch_size < 1:
        problems.append(f"batch_size ({batch_size}) must be at least 1")
    if (problem := several_problem(examples, "examples")) is not None:
        problems.append(problem)
    if problems:
        raise ConfigError("the gate cannot be fitted:", problems)
    experts = list(model.xlora_config.expert_names)
    length = min(_LENGTH, num_positions(model.passes.backbone.base.config) or _LENGTH)
    vocabulary = vocabulary_size(model.passes.backbone.base)
    state_bytes = model.xlora_config.hidden_size * model.passes.backbone.dtype().itemsize
    most = most_tokens(by, len(experts), state_bytes)
    chosen = _draw(several(examples, "examples"), by, tokenizer, experts, length, vocabulary, seed, most)
    tokens = sum(len(example["input_ids"]) for example in chosen)
    passes = f", with each of {len(experts)} experts" if by == "losses" else ""
    own = " and its own LoRA" if model.xlora_config.scaling_pass_rank is not None else ""
    announce(f"fitting the gate{own} to the {by} of {tokens:,} tokens of {len(chosen)} sequences{passes}")

    kept = max(1, len(chosen) // _HELD_OUT) if len(chosen) > 1 else 0
    with in_evaluation_mode(model):
        hidden, targets = _read(model, chosen, kept, by, batch_size, seed)
    held_out, shares = sum(map(len, targets[:kept])), torch.cat(targets)
    gate = model.internal_xlora_classifier
    # The gate runs in full precision. Gradients are needed also if the caller has switched them off.
    with torch.autocast(shares.device.type, enabled=False), torch.enable_grad():
        network = _fitted(gate, hidden[held_out:], shares[held_out:], seed)
        _write(network, gate)
        if not held_out:
            return math.nan
        with torch.no_grad():
            parts = hidden[:held_out].split(TOKENS_AT_A_TIME)
            first_choice = torch.cat([network(part.to(shares.device, torch.float32)).argmax(-1) for part in parts])
    return float((first_choice == shares[:held_out].argmax(-1)).float().mean())


def _by_problems(by: Any) -> list[str]:
    if by in ("labels", "losses"):
        return []
    if isinstance(by, str):
        return [f"by ({shown(by)}) must be 'labels' or 'losses'"]
    hint = ": give the tokenizer with tokenizer=" if hasattr(by, "decode") else ""
    return [f"by ({type(by).__name__}) must be 'labels' or 'losses'{hint}"]


def fit_problems(model: Any, by: str) -> list[str]:
    """One sentence for each reason why this mixture's gate cannot be fitted to labels or losses."""
    if getattr(model, "passes", None) is None:
        return [f"model ({type(model).__name__}) must be a mixture of weft's, from weft.from_adapters"]
    config, backbone = model.xlora_config, model.passes.backbone
    problems = []
    if not model.passes.gate_decides:
        problems.append("the gate is not asked inside disable_adapter() or fixed_scalings(): fit it outside of them")
    if not (config.enable_softmax or config.enable_softmax_topk):
        problems.append("enable_softmax (False) must be true: the gate's outputs are no shares of the experts")
    if backbone.is_encoder_decoder:
        problems.append(f"{type(backbone.base).__name__} is an encoder-decoder: its gate reads two texts")
    elif by == "losses" and not backbone.base.can_generate():
        problems.append(
            f"by ('losses') needs a causal language model, whose loss on a token says whose it is, and "
            f"{type(backbone.base).__name__} is none: take 'labels'"
        )
    return problems


def _rows_of(
    example: Any,
    index: int,
    by: str,
    tokenizer: Any,
    expert_names: Sequence[str],
    length: int,
    opening: Sequence[int],
) -> list[dict[str, Any]]:
    """Convert an example to rows of token ids; a text is split into sequences of at most `length`."""
    place = f"example {index}"
    if not is_text(example) or (isinstance(example, Mapping) and "input_ids" in example):
        row = dict(example) if isinstance(example, Mapping) else {}
        return [{**row, "input_ids": given_tokens(example, place)}]
    columns = {"input_ids": given_tokens(example, place, tokenizer)}
    if by == "labels" and isinstance(example, Mapping):
        columns["input_ids"], columns["expert_labels"] = labelled_tokens(dict(example), place, tokenizer, expert_names)
    elif by == "losses":
        columns["labels"] = columns["input_ids"]
    return list(labelled_windows(columns, length, opening))


def most_tokens(by: str, num_experts: int, state_bytes: int) -> int:
    """The maximum number of tokens of a fit, each of which has a hidden state of so many bytes."""
    if by == "losses":
        return LEAST_TOKENS
    return max(LEAST_TOKENS, min(max(LEAST_LABELS, LABELS_OF_EACH * num_experts), _MOST_BYTES // state_bytes))


def _draw(
    examples: Any,
    by: str,
    tokenizer: Any,
    expert_names: Sequence[str],
    length: int,
    vocabulary: int | None,
    seed: int,
    most: int,
) -> list[dict[str, Any]]:
    """Choose examples at random, up to `most` tokens. Examples without a token for the fit are left out."""
    chosen: list[dict[str, Any]] = []
    left, unlabelled = most, False
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    opening = opening_of(tokenizer)
    rows = (
        (index, row)
        for index in order
        for row in _rows_of(examples[index], index, by, tokenizer, expert_names, length, opening)
    )
    for index, given in rows:
        if left < 2:
            break
        check_vocabulary(given["input_ids"], f"example {index}", vocabulary)
        example = {"input_ids": given["input_ids"][:left]}
        if len(example["input_ids"]) < 2:
            continue
        if by == "labels":
            example["expert_labels"] = _labels(given, index, len(expert_names))[:left]
            has_one = bool((example["expert_labels"] != NO_EXPERT).any())
        else:
            example["counts"] = _per_token(given, "labels", index, 0)[:left] != NO_LABEL
            has_one = bool(example["counts"][1:].any())
        if not has_one:
            unlabelled = True
            continue
        chosen.append(example)
        left -= len(example["input_ids"])
    if not chosen and unlabelled:
        what = "labels: none of the examples has one (expert_labels)"
        if by == "losses":
            what = "losses: in none of the examples is there a token after the first that counts (labels)"
        raise DataError(f"the gate cannot be fitted by {what}")
    if not chosen:
        raise DataError("the gate cannot be fitted: the examples hold no text of two tokens or more")
    return chosen


def _labels(example: Mapping[str, Any], index: int, num_experts: int) -> Tensor:
    """The labels of an example's tokens, -100 for none."""
    labels = _per_token(example, "expert_labels", index, NO_EXPERT)
    wrong = labels[((labels < 0) | (labels >= num_experts)) & (labels != NO_EXPERT)]
    if len(wrong):
        raise DataError(
            f"expert_labels of example {index} have {wrong[0].item()}, expected the number of an expert, 0 to "
            f"{num_experts - 1}, or {NO_EXPERT} for none"
        )
    return labels


def _per_token(example: Mapping[str, Any], name: str, index: int, otherwise: int) -> Tensor:
    """The value of each token in an example's column; `otherwise` for all if the column is missing."""
    length = len(example["input_ids"])
    found = torch.as_tensor(example.get(name, [otherwise] * length))
    if tuple(found.shape) != (length,):
        raise DataError(
            f"{name} of example {index} have shape {list(found.shape)}, expected [{length}]: one for each token"
        )
    return found


@torch.no_grad()
def _read(
    model: Any, chosen: list[dict[str, Any]], kept: int, by: str, batch_size: int, seed: int
) -> tuple[Tensor, list[Tensor]]:
    """The gate's input for the tokens with a target, [token, hidden] in host memory, and the target shares of each
    example. The gate's own LoRA is trained in between.
    """
    batches = [slice(start, start + batch_size) for start in range(0, len(chosen), batch_size)]
    targets: list[Target] = []
    own_lora = model.xlora_config.scaling_pass_rank is not None
    by_losses = by == "losses"
    # A step through the scaling pass takes about three times as long as a pass.
    total = (1 + by_losses) * len(chosen) + 3 * own_lora * math.prod(fit_length(chosen[kept:]))
    with Countdown(total, "reading", hidden=process_number() > 0) as countdown:
        for batch in batches:
            targets += targets_of(model, chosen[batch], by)
            countdown.advance(by_losses * len(chosen[batch]))
        if own_lora:
            fit_scaling_lora(model, chosen[kept:], targets[kept:], seed, countdown)
        hidden, place = torch.empty(0), 0
        for batch in batches:
            for states in states_of(model, chosen[batch], targets[batch]):
                if not place:
                    hidden = states.new_empty(sum(len(one.shares) for one in targets), states.shape[-1], device="cpu")
                hidden[place : place + len(states)] = states
                place += len(states)
            countdown.advance(len(chosen[batch]), "reading")
    return hidden, [target.shares for target in targets]


def _fitted(gate: Any, hidden: Tensor, targets: Tensor, seed: int) -> Any:
    """Fit a network like the gate's with one output per expert; its input is h. Returned in evaluation mode.

    Args:
        gate: the gate.
        hidden: h, [token, hidden], in host memory.
        targets: target shares, [token, expert], on the gate's device.
        seed: random seed of the start and the order.
    """
    device = targets.device
    mean, deviation = (moment.to(device) for moment in moments(hidden))
    last = gate.layers[-1]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        layers = [copy.deepcopy(layer).float() for layer in gate.layers[:-1]]
        for layer in layers:
            if isinstance(layer, nn.Linear):
                layer.to("cpu").reset_parameters()
        network = nn.Sequential(*layers, nn.Linear(last.in_features, targets.shape[-1])).to(device).train()
        network.requires_grad_(True)
        optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_DECAY)
        steps = max(_LEAST_STEPS, math.ceil(_EPOCHS * len(hidden) / _BATCH))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _RATE * rate_at(step, steps, _WARMUP)
            batch = torch.randint(len(hidden), (_BATCH,))
            states = hidden[batch].to(device, torch.float32)
            loss = cross_entropy(network((states - mean) / deviation), targets[batch.to(device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    first: Any = network[0]
    with torch.no_grad():
        first.weight.div_(deviation)
        first.bias.sub_(first.weight @ mean)
    return network.eval()


@torch.no_grad()
def _write(network: Any, gate: Any) -> None:
    """Copy the network into the gate, its outputs to every layer, multiplied by the temperature of the softmax."""
    config = gate.config
    temperature = config.softmax_temperature if config.enable_softmax else 1.0
    for own, fitted in zip(gate.layers[:-1], network[:-1], strict=True):
        if isinstance(own, nn.Linear):
            own.weight.copy_(fitted.weight)
            own.bias.copy_(fitted.bias)
    repeats = gate.layers[-1].out_features // network[-1].out_features
    gate.layers[-1].weight.copy_(network[-1].weight.repeat(repeats, 1) * temperature)
    gate.layers[-1].bias.copy_(network[-1].bias.repeat(repeats) * temperature)
