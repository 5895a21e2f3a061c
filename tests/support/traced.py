"""Traces made up in memory, and a browser to look at their pages."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager

import torch

from weft.traces.trace import Trace, TracedText

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def made(pieces, experts=("python", "law"), num_layers=6, texts=None, seed=0, **fields):
    """A trace with random scalings, whose first tokens of each text have no probability."""
    generator = torch.Generator().manual_seed(seed)
    size = len(pieces)
    logits = torch.randn(size, num_layers, len(experts), generator=generator)
    logits += 3 * torch.randn(size, 1, len(experts), generator=generator)  # experts differ more than layers
    texts = texts or (TracedText("", size),)
    log_probs = -3 * torch.rand(2, size, generator=generator)
    starts = torch.tensor([text.num_tokens for text in texts]).cumsum(0)[:-1]
    log_probs[:, [0, *starts.tolist()]] = torch.nan
    values = {
        "scalings": logits.softmax(-1).half(),
        "token_ids": torch.arange(size) + 100,
        "log_probs": log_probs[0],
        "base_log_probs": log_probs[1],
        "pieces": tuple(pieces),
        "expert_names": tuple(experts),
        "layer_names": tuple(f"model.layers.{number // 2}.{'qv'[number % 2]}_proj" for number in range(num_layers)),
        "texts": tuple(texts),
        "title": "made up",
    }
    return Trace(**{**values, **fields})


def chromium():
    """The path of a Chromium; None where there is none (`make browser` installs one)."""
    found = os.environ.get("WEFT_CHROMIUM") or next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        with _playwright() as playwright:
            own = playwright.chromium.executable_path
            found = own if os.path.exists(own) else None
    return found


@contextmanager
def _playwright():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright


@contextmanager
def browser(path):
    with _playwright() as playwright:
        # Root, as in containers, has no sandbox.
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()
