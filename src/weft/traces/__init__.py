"""Traces: the scalings of a gate for texts, recorded, saved and displayed.

Only record.py runs a model.

    record.py       runs a mixture on texts and records the scalings of its layers
    numbers.py      the data of a trace, and quantities computed from it: shares, entropy, perplexities
    trace.py        Trace: the data with its file, its tables and its display in a notebook
    summary.py      a summary of a trace in a few sentences
    figures.py      figures for papers
    page/           one HTML file that shows traces
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.lazy import lazily

if TYPE_CHECKING:
    from weft.traces.trace import Trace as Trace

__all__ = ["Trace"]

__getattr__, __dir__ = lazily(__name__, {"Trace": "weft.traces.trace"})
