"""A summary of a trace in a few sentences: leading experts, perplexities, layers with low and high entropy."""

from __future__ import annotations

import math

import torch

from weft.screen.visible import shortened
from weft.traces.numbers import TraceNumbers

# A relative difference of perplexities below this is reported as no difference.
_SAME = 0.005
# Number of experts that are named; the others are counted.
_NAMED = 3


def summarise(trace: TraceNumbers) -> str:
    """The summary of a trace as text.

    Example:
        >>> summarise(trace)
        '412 tokens. law leads 71% of them (mean share 0.58), code 29% (0.42). The mixture gives ...'
    """
    sentences = [_experts(trace), _probabilities(trace), _layers(trace), _left_out(trace)]
    return " ".join(sentence for sentence in sentences if sentence)


def _experts(trace: TraceNumbers) -> str:
    means = trace.shares().mean(0)
    leads = torch.bincount(trace.leading(), minlength=len(means)) / len(trace)
    order = sorted(range(len(means)), key=lambda number: (-float(leads[number]), -float(means[number])))
    named = [
        f"{shortened(trace.expert_names[number])} {'leads ' if index == 0 else ''}{leads[number]:.0%}"
        f"{' of them' if index == 0 else ''} ({'mean share ' if index == 0 else ''}{means[number]:.2f})"
        for index, number in enumerate(order[:_NAMED])
    ]
    rest = len(order) - len(named)
    if rest:
        others = sum(float(leads[number]) for number in order[_NAMED:])
        named.append(f"{rest} more {others:.0%}")
    count = f"{len(trace):,} tokens" + (f" in {len(trace.texts):,} texts" if len(trace.texts) > 1 else "")
    return f"{count}. {', '.join(named)}."


def _probabilities(trace: TraceNumbers) -> str:
    perplexities = trace.perplexities()
    if perplexities is None:
        return ""
    mixture, base = perplexities
    if not (math.isfinite(mixture) and math.isfinite(base)):
        whose = " and ".join(
            name for name, found in (("the mixture", mixture), ("the base model", base)) if not math.isfinite(found)
        )
        return f"Here {whose} gave no finite log-probabilities, so that perplexities cannot be compared."
    change = mixture / base - 1
    told = f"the mixture's perplexity is {mixture:.2f}, the base model's {base:.2f}"
    if abs(change) < _SAME:
        verdict = "no difference"
    else:
        verdict = f"{abs(change):.0%} {'lower, which is better' if change < 0 else 'higher, which is worse'}"
    return f"Here {told}: {verdict}."


def _layers(trace: TraceNumbers) -> str:
    if len(trace.layer_names) < 2 or len(trace.expert_names) < 2:
        return ""
    entropy = trace.entropy().mean(0)
    low, high = int(entropy.argmin()), int(entropy.argmax())
    names = list(map(shortened, trace.layer_names))
    return (
        f"The gate is surest in {names[low]} (entropy {entropy[low]:.2f} of 1) and least sure in {names[high]} "
        f"({entropy[high]:.2f})."
    )


def _left_out(trace: TraceNumbers) -> str:
    return f"{trace.num_left_out:,} further tokens are left out of this trace." if trace.num_left_out else ""
