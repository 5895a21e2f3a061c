"""`weft eval`: the table, and what an interrupt leaves."""

from __future__ import annotations

import sys

from weft.evaluate.run import evaluate as compare
from weft.options import EvalOptions
from weft.screen.visible import say


def evaluate(options: EvalOptions) -> None:
    """Compare, and print the table.

    Raises:
        WeftError: the model, the options or the data cannot work.
        KeyboardInterrupt: after an interrupt; how to go on has been said.
    """
    try:
        compare(options)
    except KeyboardInterrupt:
        if options.output:
            say("stopped; finished cells are kept, the same command goes on", file=sys.stderr)
        raise
