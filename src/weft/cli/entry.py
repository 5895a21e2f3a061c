"""Entry point of the `weft` command line: runs a command and returns its exit code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from weft.cli.commands import COMMANDS
from weft.cli.errors import UsageError, is_first_process, report, report_unforeseen
from weft.cli.help import command_help, overview
from weft.cli.option_files import as_yaml
from weft.cli.parser import Given, command_named, parse
from weft.errors import WeftError
from weft.options.foreseen import refuse_foreseen
from weft.screen.libraries import libraries_hushed
from weft.screen.loudness import NORMAL, QUIET, VERBOSE, loudness
from weft.screen.visible import notice, say
from weft.screen.waiting import waiting


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of the process, and return the exit code.

    Raises:
        SystemExit: the usage is wrong; its code is 2.
    """
    before, given = _command_first(sys.argv[1:] if argv is None else argv)
    command = next(iter(given), "")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # so that a file name in another encoding raises no error
    try:
        return _run(command, [*given[1:], *before])
    except UsageError as err:
        report(command if command in COMMANDS else "", err)
        raise SystemExit(2) from None
    except WeftError as err:
        report(command, err)
    except KeyboardInterrupt:
        if is_first_process():
            say(f"weft {command}: interrupted", file=sys.stderr)
        return 130
    except (OSError, UnicodeError, MemoryError, RecursionError, RuntimeError) as err:
        report_unforeseen(command, err)
    return 1


def _command_first(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into --quiet and --verbose before the command, and the command with the rest."""
    number = next((number for number, word in enumerate(argv) if word not in ("--quiet", "--verbose")), len(argv))
    return list(argv[:number]), list(argv[number:])


def _run(name: str, arguments: list[str]) -> int:
    """Run a command and return the exit code."""
    if name in ("", "-h", "--help"):
        print(overview())
        return 0 if name else 2
    if name == "--version":
        from weft.cli.environment import versions

        print(versions())
        return 0
    command = command_named(name)
    given = parse(name, arguments)
    if "help" in given.asked:
        print(command_help(name))
        return 0
    if "print-config" in given.asked:
        print(as_yaml(command.options, given.values, given.asked["print-config"]), end="")
        return 0
    with loudness(_asked_loudness(given)):
        for renamed in given.renamed:
            notice(f"weft {name}: {renamed}", file=sys.stderr)
        options = command.options(**given.values)
        refuse_foreseen(options)
        from weft.cli.memory import memory_error  # now, while there is memory for its modules

        run = None
        try:
            with ExitStack() as meanwhile:
                with waiting(
                    "loading torch, transformers, peft", hidden=not command.imports_libraries or not is_first_process()
                ):
                    if command.imports_libraries:
                        meanwhile.enter_context(libraries_hushed(f"weft {name}"))
                    module, _, function = command.runner.partition(":")
                    run = getattr(importlib.import_module(module), function)
                run(options, *([given.handed_on] if command.hands_on else []))
        except Exception as err:
            if (lack := memory_error(err, options, importing=run is None)) is not None:
                raise lack from err
            raise
    sys.stdout.flush()
    return 0


def _asked_loudness(given: Given) -> int:
    if {"quiet", "verbose"} <= set(given.asked):
        raise UsageError(["--quiet and --verbose exclude each other"])
    return QUIET if "quiet" in given.asked else VERBOSE if "verbose" in given.asked else NORMAL
