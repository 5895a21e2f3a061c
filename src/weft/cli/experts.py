"""`weft add-expert`, `weft drop-expert`: add or remove an expert of a trained mixture."""

from __future__ import annotations

from weft.files.names import split_name
from weft.formats.experts import add_expert, drop_expert
from weft.options import AddExpertOptions, DropExpertOptions
from weft.screen.visible import say


def add(options: AddExpertOptions) -> None:
    """Write the mixture with the new expert, and print the next step.

    Raises:
        WeftError: the mixture, the adapter or the output is not valid.
    """
    name, path = split_name(options.expert)
    assert name is not None
    output = add_expert(
        options.model, name, path, options.output, base=options.base, trust_remote_code=options.trust_remote_code
    )
    say(f"saved to {output}: {name!r} starts as an average expert, so train the gate further with")
    say(f"  weft train --start-from {output} --data ... --output ...")


def drop(options: DropExpertOptions) -> None:
    """Write the mixture without the expert.

    Raises:
        WeftError: the mixture or the output is not valid.
    """
    output = drop_expert(options.model, options.expert, options.output)
    say(f"saved to {output}: the other experts keep their ratios")
