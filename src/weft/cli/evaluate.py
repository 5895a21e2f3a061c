"""`weft eval`: prints the table, or how to continue after an interrupt."""

from __future__ import annotations

import sys

from weft.evaluate.run import evaluate as compare
from weft.options import EvalOptions
from weft.screen.visible import say


def evaluate(options: EvalOptions) -> None:
    """Compare the mixture with its alternatives and print the table.

    Raises:
        WeftError: the model, the options or the data are not valid.
        KeyboardInterrupt: the user interrupted; how to continue was printed.
    """
    try:
        compare(options)
    except KeyboardInterrupt:
        if options.output:
            say("stopped; finished cells are kept, the same command continues", file=sys.stderr)
        raise
