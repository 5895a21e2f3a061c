"""Hides messages of other libraries on which a user cannot act. Other messages are shown.

With `--verbose` none are hidden.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from weft.screen.loudness import is_quiet, is_verbose
from weft.screen.visible import say

# Logger -> beginnings of messages to hide: missing optional kernels, and notices to developers of other libraries.
# peft imports these libraries if they are installed.
_NOTICES = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward from kernels-community",),
    "torch.utils._pytree": ("%s is an Enum subclass and is now natively supported",),
}


class _Notices(logging.Filter):
    """Removes messages with these beginnings."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show the message."""
        return is_verbose() or not str(record.msg).startswith(self._beginnings)


def hide_notices() -> None:
    """Hide the messages in `_NOTICES`. Call this before peft is imported."""
    for logger, beginnings in _NOTICES.items():
        logging.getLogger(logger).addFilter(_Notices(beginnings))


@contextmanager
def import_warnings_hidden() -> Iterator[None]:
    """Hide deprecation and syntax warnings of modules while they are imported; filters that they set stay."""
    filters: Any = warnings.filters  # catch_warnings would remove the modules' filters
    own = [("ignore", re.compile("(?s)"), kind, None, 0) for kind in (DeprecationWarning, SyntaxWarning)]
    filters[:0] = own
    try:
        yield
    finally:
        for one in own:
            if one in filters:  # a module may have reset them
                filters.remove(one)


@contextmanager
def deprecations_of_peft_hidden() -> Iterator[None]:
    """Hide the warning for an attribute that peft reads and transformers has deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextmanager
def libraries_hushed(speaker: str) -> Iterator[None]:
    """Show only weft's warnings, one line each, and the progress bars of downloads.

    Args:
        speaker: the command, printed before each warning.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if is_verbose():
        yield
        return

    def show(
        message: Warning | str, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        say(f"{speaker}: warning: {message}", file=file or sys.stderr)

    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    downloads = not is_quiet() and not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of loading and saving weights; training has its own
    if downloads:
        enable_progress_bars()  # transformers has disabled those of the Hub too
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(accelerate|peft|torch|transformers)\b")
            if is_quiet():
                warnings.simplefilter("ignore")
            warnings.showwarning = show
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
