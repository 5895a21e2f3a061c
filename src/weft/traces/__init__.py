"""What a gate did with texts: recorded, kept in a file, and shown.

Knows no training; only record.py knows models.

    record.py       a mixture reads texts, and what its layers followed is kept
    numbers.py      the numbers, and what follows from them: shares, entropy, perplexities
    trace.py        a trace: these numbers, their file, their table, their cell in a notebook
    summary.py      what a trace says, in a few sentences
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
