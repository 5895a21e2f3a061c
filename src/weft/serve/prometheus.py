"""Numbers as Prometheus reads them, and those that both engines tell of the gate."""

from __future__ import annotations

from collections.abc import Sequence

# (name, kind, what it is, [(labels in braces or "", value)])
Family = tuple[str, str, str, Sequence[tuple[str, int | float]]]


def written(families: Sequence[Family]) -> str:
    """Prometheus' text format.

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
    """What the gate did since the start.

    Args:
        experts: their names, in order.
        sums: of each expert's shares, over all tokens.
        tokens: how many the gate decided for.
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
