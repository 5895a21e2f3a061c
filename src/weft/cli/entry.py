"""The `weft` command: `train`, `eval`, `inspect`, `generate`, `chat`, `fold`, `add-expert`, `drop-expert`, `convert`,
`card`, `push`, `pull`, `serve`.

Exit codes: 0 done, 1 something the user can mend (printed without a traceback), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from weft.cli.option_files import PARSER_MODE, add_loader, check_files
from weft.errors import CheckpointError, ConfigError, WeftError, first_line
from weft.files.reading import reason
from weft.options import (
    AddExpertOptions,
    CardOptions,
    ChatOptions,
    ConvertOptions,
    DropExpertOptions,
    EvalOptions,
    FoldOptions,
    GenerateOptions,
    InspectOptions,
    PullOptions,
    PushOptions,
    ServeOptions,
    TrainOptions,
)
from weft.options.values import value_problems
from weft.screen.visible import say

# How torch says that there is none left, for which it has no error of its own on the CPU.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
# Seconds in which the first process has said what all fail with.
_WAIT_FOR_THE_FIRST = 15
# Options that take several values separated by spaces, as users of argparse expect.
_LISTS = (
    "--adapters",
    "--data",
    "--eval_data",
    "--experts_from",
    "--expert_targets",
    "--weights",
    "--rows",
    "--compare",
    "--rename",
)
# The same, where another command has an option of this name with one value.
_LISTS_OF = {"eval": ("--output",)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given, of_engine = _without_engines_own(sys.argv[1:] if argv is None else list(argv))
    given = _normalised(given)
    command = next(iter(given), "")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names of other encodings end no command half-way
    try:
        return _run(given, of_engine)
    except WeftError as err:
        _report(command, err)
    except KeyboardInterrupt:
        if _speaks():
            say(f"weft {command}: interrupted", file=sys.stderr)
        return 130
    except (OSError, UnicodeError, MemoryError, RecursionError, RuntimeError) as err:
        _report_unforeseen(command, err)
    return 1


def _run(given: list[str], of_engine: list[str]) -> int:
    """Run the command that the arguments say; returns the exit code."""
    check_files(given)
    parser = _parser()
    arguments = _parsed(parser, given)
    command = arguments.subcommand
    if command is None:
        parser.print_help()
        return 2
    run, options_class = _COMMANDS[command]
    options = options_class(**{name: value for name, value in vars(arguments[command]).items() if name != "config"})
    problems = value_problems(options)
    if problems:
        raise ConfigError("the options cannot work:", problems)
    if command == "serve":
        _serve(options, of_engine)
    else:
        run(options)
    sys.stdout.flush()
    return 0


def _report_unforeseen(command: str, err: Exception) -> None:
    """Say in a line what was not foreseen where it happened; what is no more than a fault of the program is raised."""
    if isinstance(err, RuntimeError) and not isinstance(err, RecursionError):
        if not any(words in str(err) for words in _NO_MEMORY):
            raise err
        _report(command, WeftError(f"there is not enough memory: {first_line(err)}"))
    elif isinstance(err, OSError) and err.filename is None and err.errno in (errno.ENOSPC, errno.EPIPE):
        # Of what the output goes to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again when it ends
        if err.errno == errno.ENOSPC:  # who closes a pipe has seen enough
            _report(command, CheckpointError(f"what it prints cannot be written: {err.strerror}; free some space"))
    else:
        _report(command, WeftError(_in_a_line(err)))


def _parsed(parser: Any, given: list[str]) -> Any:
    """The arguments; what is no usage that argparse names is an error all the same."""
    try:
        return parser.parse_args(given)
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as err:
        raise ConfigError(f"the options cannot be read: {first_line(err)}") from err


def _in_a_line(err: Exception) -> str:
    """What the system says, and of which file."""
    files = [str(file) for file in (getattr(err, "filename", None), getattr(err, "filename2", None)) if file]
    return f"{', '.join(files)}: {reason(err)}" if files else f"{type(err).__name__}: {first_line(err)}"


def _train(options: TrainOptions) -> None:
    _quiet()
    from weft.train.checkpoints import last_checkpoint
    from weft.train.experts import experts_folder, train_in_stages

    try:
        output = train_in_stages(options)
    except KeyboardInterrupt:
        if not _speaks():
            raise
        if last_checkpoint(Path(options.output) / "checkpoints") is not None:
            say(f"stopped; what was learned is in {options.output}, continue with --resume true", file=sys.stderr)
        elif (Path(options.output) / "adapter_config.json").exists():
            say(
                f"stopped before the first checkpoint; what was learned is in {options.output}: --start-from "
                f"{options.output} goes on from it, into another folder",
                file=sys.stderr,
            )
        elif options.experts_from:
            say(
                f"stopped; complete experts are in {experts_folder(options)}, the same command goes on", file=sys.stderr
            )
        raise
    if _speaks():
        say(f"saved to {output}: try  weft generate {output} --prompt '...'")


def _speaks() -> bool:
    """Whether this is the one of several processes that says what they did."""
    return os.environ.get("RANK", "0") == "0"


def _report(command: str, err: WeftError) -> None:
    """Say what went wrong, once: where the first process fails too, the launcher ends this one while it waits."""
    which = ""
    if not _speaks():
        time.sleep(_WAIT_FOR_THE_FIRST)
        if err.in_all_processes:
            return
        which = f" in process {os.environ['RANK']}"
    say(f"weft {command}: error{which}: {err}", file=sys.stderr)


def _evaluate(options: EvalOptions) -> None:
    _quiet()
    from weft.evaluate import evaluate

    try:
        evaluate(options)
    except KeyboardInterrupt:
        if options.output:
            say("stopped; finished cells are kept, the same command goes on", file=sys.stderr)
        raise


def _generate(options: GenerateOptions) -> None:
    _quiet()
    from weft.cli.generate import generate

    generate(options)


def _fold(options: FoldOptions) -> None:
    _quiet()
    from weft.cli.fold import fold_mixture

    fold_mixture(options)


def _inspect(options: InspectOptions) -> None:
    _quiet()
    from weft.cli.inspect import inspect

    inspect(options)


def _chat(options: ChatOptions) -> None:
    _quiet()
    from weft.cli.chat import chat

    chat(options)


def _add_expert(options: AddExpertOptions) -> None:
    _quiet()
    from weft.cli.experts import add

    add(options)


def _drop_expert(options: DropExpertOptions) -> None:
    _quiet()
    from weft.cli.experts import drop

    drop(options)


def _convert(options: ConvertOptions) -> None:
    _quiet()
    from weft.cli.formats import convert

    convert(options)


def _card(options: CardOptions) -> None:
    _quiet()
    from weft.cli.formats import card

    card(options)


def _push(options: PushOptions) -> None:
    _quiet()
    from weft.cli.formats import push_mixture

    push_mixture(options)


def _pull(options: PullOptions) -> None:
    _quiet()
    from weft.cli.formats import pull_mixture

    pull_mixture(options)


def _serve(options: ServeOptions, of_engine: Sequence[str] = ()) -> None:
    _quiet()
    from weft.serve.command import serve

    serve(options, of_engine)


_COMMANDS: dict[str, tuple[Callable[[Any], None], type]] = {
    "train": (_train, TrainOptions),
    "eval": (_evaluate, EvalOptions),
    "generate": (_generate, GenerateOptions),
    "chat": (_chat, ChatOptions),
    "fold": (_fold, FoldOptions),
    "inspect": (_inspect, InspectOptions),
    "add-expert": (_add_expert, AddExpertOptions),
    "drop-expert": (_drop_expert, DropExpertOptions),
    "convert": (_convert, ConvertOptions),
    "card": (_card, CardOptions),
    "push": (_push, PushOptions),
    "pull": (_pull, PullOptions),
    "serve": (_serve, ServeOptions),
}

# What may follow an option that is on or off.
_VALUES = ("true", "false", "yes", "no", "on", "off")

# Options that are on or off, and on where no value follows.
_SWITCHES = {
    f"--{field.name}"
    for _, options_class in _COMMANDS.values()
    for field in dataclasses.fields(options_class)
    if field.type == "bool"
}


def _parser() -> Any:
    from jsonargparse import ActionConfigFile, ArgumentParser

    add_loader()
    parser = ArgumentParser(
        prog="weft",
        parser_mode=PARSER_MODE,
        description="Several LoRA adapters as one model that mixes them token by token (X-LoRA).",
    )
    commands = parser.add_subcommands(required=False)
    for name, (_, options_class) in _COMMANDS.items():
        description = (options_class.__doc__ or "").split("\n")[0]
        command = ArgumentParser(prog=f"weft {name}", description=description, parser_mode=PARSER_MODE)
        command.add_argument("--config", action=ActionConfigFile, help="A YAML file with these options.")
        command.add_class_arguments(options_class, as_group=False, as_positional=True)
        commands.add_subcommand(name, command, help=description)
    return parser


def _without_engines_own(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without the flags of `weft serve` that are vLLM's, and these."""
    if argv[:1] != ["serve"]:
        return argv, []
    known = {f"--{field.name}".replace("_", "-") for field in dataclasses.fields(ServeOptions)} | {"--help", "--config"}
    own, index = argv[:1], 1
    engines: list[str] = []
    while index < len(argv):
        name, equals, _ = argv[index].partition("=")
        taker = own if not name.startswith("-") or name in known or name == "-h" else engines
        taker.append(argv[index])
        index += 1
        while name.startswith("-") and not equals and index < len(argv) and not argv[index].startswith("-"):
            taker.append(argv[index])
            index += 1
    return own, engines


def _normalised(argv: list[str]) -> list[str]:
    """`--data a b` as `--data ["a", "b"]`, `--resume` as `--resume true`, and `--max-steps` as `--max_steps`."""
    joined: list[str] = []
    index = 0
    while index < len(argv):
        name, equals, value = argv[index].partition("=")
        index += 1
        if not name.startswith("--"):
            joined.append(name + equals + value)
            continue
        name = name.replace("-", "_").replace("__", "--", 1)
        following = argv[index] if index < len(argv) else ""
        if name in _SWITCHES and not equals and following.lower() not in _VALUES:
            joined += [name, "true"]
            continue
        if name not in (*_LISTS, *_LISTS_OF.get(argv[0], ())):
            joined.append(name + equals + value)
            continue
        values = [value] if equals else []
        while not equals and index < len(argv) and not argv[index].startswith("--"):
            values.append(argv[index])
            index += 1
        structured = len(values) == 1 and values[0].lstrip().startswith(("[", "{"))
        joined += [name, values[0] if structured else json.dumps(values)]
    return joined


def _quiet() -> None:
    """Keep what libraries say to developers off a user's screen."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch)\b")
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # at their import, by peft, if they are there
        logging.getLogger(library).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading weights; training has its own
