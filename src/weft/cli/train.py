"""`weft train`: trains a gate, or experts and then a gate; prints how to continue after an interrupt."""

from __future__ import annotations

import sys
from pathlib import Path

from weft.cli.errors import is_first_process
from weft.distributed import leave_group_at_exit
from weft.errors import WeftError
from weft.options import TrainOptions
from weft.screen.visible import say
from weft.train.checkpoints import last_checkpoint
from weft.train.experts import experts_folder, train_in_stages


def train(options: TrainOptions) -> None:
    """Train, and print where the mixture is saved; with `dry_run`, print what the training needs.

    Raises:
        WeftError: the options, adapters or data are not valid.
        KeyboardInterrupt: the user interrupted; how to continue was printed.
    """
    try:
        output = train_in_stages(options)
    except KeyboardInterrupt:
        if is_first_process() and not options.dry_run:
            _say_how_to_continue(options)
        raise
    except WeftError as err:
        if err.in_all_processes:
            leave_group_at_exit()
        raise
    leave_group_at_exit()
    if is_first_process() and not options.dry_run:
        say(f"saved to {output}: try  weft generate {output} --prompt '...'")


def _say_how_to_continue(options: TrainOptions) -> None:
    if last_checkpoint(Path(options.output) / "checkpoints") is not None:
        say(f"stopped; what was learned is in {options.output}, continue with --resume true", file=sys.stderr)
    elif (Path(options.output) / "adapter_config.json").exists():
        say(
            f"stopped before the first checkpoint; what was learned is in {options.output}: --start-from "
            f"{options.output} continues from it, in another folder",
            file=sys.stderr,
        )
    elif options.experts_from:
        say(f"stopped; complete experts are in {experts_folder(options)}, the same command continues", file=sys.stderr)
