"""What other libraries say that nobody can act on, hidden where each of them says it; all else is let through.

None of it is hidden where `--verbose` asks for it.
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

# Logger and beginnings of its messages: optional kernels that are not there, and notices from one library to another.
# peft imports these libraries wherever they are installed.
_NOTICES = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward from kernels-community",),
    "torch.utils._pytree": ("%s is an Enum subclass and is now natively supported",),
}


class _Notices(logging.Filter):
    """Leaves out messages that begin so."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show it."""
        return is_verbose() or not str(record.msg).startswith(self._beginnings)


def hide_notices() -> None:
    """Hide the notices above, before peft is imported."""
    for logger, beginnings in _NOTICES.items():
        logging.getLogger(logger).addFilter(_Notices(beginnings))


@contextmanager
def import_warnings_hidden() -> Iterator[None]:
    """Hide what modules warn of in their own sources while they are imported; filters that they set stay."""
    filters: Any = warnings.filters  # catch_warnings would take theirs away
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
    """Hide what peft asks of a model under a name that transformers has given up."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextmanager
def libraries_hushed(speaker: str) -> Iterator[None]:
    """Leave to a command's screen what weft says: no warnings of other libraries, and no bars but those of downloads.

    Args:
        speaker: the command, which weft's own warnings are said by, a line each.
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
    from transformers import logging as theirs

    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    downloads = not is_quiet() and not are_progress_bars_disabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()  # of loading and saving weights; training has its own
    if downloads:
        enable_progress_bars()  # which transformers takes away with its own
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(accelerate|peft|torch|transformers)\b")
            if is_quiet():
                warnings.simplefilter("ignore")
            warnings.showwarning = show
            yield
    finally:
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()
