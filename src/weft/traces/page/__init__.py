"""One HTML file that shows traces; it needs no other files and no network.

The data are encoded as compact text here. The scripts decode and display them: codec.js (decodes), text.js, charts.js,
panels.js and app.js (selection, mouse and keyboard), and before them those that all pages share (`screen/web`).
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.errors import ConfigError
from weft.files.ownership import refuse_strangers_file
from weft.files.writing import replace_file
from weft.screen.palette import PALETTE
from weft.screen.visible import shortened, visible
from weft.screen.web import one_file
from weft.traces.numbers import TraceNumbers
from weft.traces.summary import summarise

_SCRIPTS = ("codec.js", "text.js", "charts.js", "panels.js", "app.js")
_CELL_HEIGHT = 900
_MARK = b'<meta name="generator" content="weft inspect">'


def write_page(traces: Sequence[TraceNumbers], file: str | os.PathLike[str]) -> None:
    """Write a page with one or more traces, between which the reader can switch.

    Args:
        traces: one or more traces; traces of the same texts are compared token by token.
        file: an .html file, which is replaced only if the new one is complete.

    Raises:
        ConfigError: there are no traces, or an existing file is not such a page.
        CheckpointError: the file cannot be written.

    Example:
        >>> write_page([weft.trace(model, text, tokenizer=tokenizer)], "gates.html")
    """
    check_page(file)
    text = page(traces)
    replace_file(Path(file), lambda path: path.write_text(text, encoding="utf-8"))


def check_page(file: str | os.PathLike[str]) -> None:
    """Raise if an existing file is not a page of weft.

    Raises:
        ConfigError: it is not such a page.
    """
    refuse_strangers_file(Path(file), lambda path: _MARK in path.read_bytes(), "html", "page")


def page(traces: Sequence[TraceNumbers]) -> str:
    """The page as a string."""
    if not traces:
        raise ConfigError("traces is empty: the page needs at least one")
    # An expert has the same colour in all traces.
    names = list(dict.fromkeys(name for trace in traces for name in trace.expert_names))
    data = {"palette": PALETTE, "traces": [_encoded(trace, names) for trace in traces]}
    return one_file(__package__, _SCRIPTS, data, visible(shortened(traces[0].title)) or "trace")


def notebook_cell(trace: TraceNumbers) -> str:
    """The page in a sandboxed frame, so that its scripts cannot change the notebook."""
    frame = f'<iframe sandbox="allow-scripts" style="width:100%;height:{_CELL_HEIGHT}px;border:0" srcdoc="'
    return f'{frame}{html.escape(page([trace]))}" title="weft trace"></iframe>'


def _encoded(trace: TraceNumbers, names: list[str]) -> dict[str, Any]:
    scalings = trace.scalings.float()
    # Usually 0 and 1; without a softmax the scalings can have other values.
    low, high = min(0.0, float(scalings.min())), max(1.0, float(scalings.max()))
    return {
        "title": shortened(trace.title),
        "summary": summarise(trace),
        "experts": list(map(shortened, trace.expert_names)),
        "colours": [names.index(name) for name in trace.expert_names],
        "layers": list(map(shortened, trace.layer_names)),
        "pieces": trace.pieces,
        "ids": trace.token_ids.tolist(),
        "texts": [
            {"name": shortened(text.name), "start": start, "end": start + text.num_tokens, "prompt": text.prompt_length}
            for text, start in trace.starts()
        ],
        "low": low,
        "high": high,
        "scalings": _bytes((scalings - low) * (255 / (high - low))),  # [token, layer, expert]
        "entropy": _bytes(trace.entropy() * 255),  # [token, layer]
        "shares": _floats(trace.shares()),  # [token, expert]
        "logProbs": _floats(trace.log_probs),
        "baseLogProbs": _floats(trace.base_log_probs),
    }


def _bytes(values: Tensor) -> str:
    return _base64(values.round().clamp(0, 255).to(torch.uint8))


def _floats(values: Tensor) -> str:
    return _base64(values.float())


def _base64(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()
