"""Prometheus' text format, and the metrics of the gate for both engines."""

from __future__ import annotations

from collections.abc import Sequence

# (name, kind, help text, [(labels in braces or "", value)])
Family = tuple[str, str, str, Sequence[tuple[str, int | float]]]


def written(families: Sequence[Family]) -> str:
    """Metrics in Prometheus' text format.

    Example:
        >>> print(written([("weft_gate_tokens_total", "counter", "Tokens.", [("", 12)])]), end="")
        # HELP weft_gate_tokens_total Tokens.
        # TYPE weft_gate_tokens_total counter
        weft_gate_tokens_total 12
    """
    lines = []
    for name, kind, help_text, values in families:
        lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{labels} {value!r}" for labels, value in values]
    return "\n".join(lines) + "\n"


def of_the_gate(experts: Sequence[str], sums: Sequence[float], tokens: int) -> list[Family]:
    """The metrics of the gate since the start.

    Args:
        experts: the experts' names, in order.
        sums: sum of each expert's shares over all tokens.
        tokens: number of tokens for which the gate was used.
    """
    means = [
        (f'{{expert="{_escaped(name)}"}}', total / max(1, tokens)) for name, total in zip(experts, sums, strict=True)
    ]
    return [
        ("weft_gate_tokens_total", "counter", "Tokens that the gate decided for.", [("", tokens)]),
        ("weft_gate_share", "gauge", "Mean share of an expert over these tokens.", means),
    ]


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
