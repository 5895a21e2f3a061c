"""Parses a command line, and the YAML files that it names, into the options of a command.

Names are written with dashes or underscores. A list has all values up to the next option. A switch is set by its name,
by --no-NAME or by a value.

weft does not use argparse, which stops at the first problem, and reads the text in `--prompt -so` as an option. This
parser reports all problems at once.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from weft.cli.commands import COMMANDS, Command
from weft.cli.errors import UsageError
from weft.cli.option_files import read_options, structured
from weft.cli.values import SWITCH, from_words, from_yaml
from weft.options.described import Option, options_of
from weft.options.foreseen import not_there
from weft.options.spellings import EARLIER, TRAINERS, current_name

# Options of every command.
COMMON = {
    "config": "Read options from a YAML file; later options on the command line override it.",
    "print-config": "Print the options as a file for --config, and exit.",
    "quiet": "Print results and errors only.",
    "verbose": "Print the messages of the libraries too.",
    "help": "Show this help.",
}


@dataclass
class Given:
    """The parsed command line.

    Attributes:
        values: field -> value of the options.
        asked: the options of `COMMON` that are given: help, quiet, verbose, print-config (with the text after its =).
        handed_on: arguments for the program that the command starts.
        renamed: a message for each old name of an option.
        problems: one sentence for each problem.
    """

    values: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    handed_on: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def command_named(name: str) -> Command:
    """The command with this name.

    Raises:
        UsageError: the name is unknown.
    """
    if name in COMMANDS:
        return COMMANDS[name]
    kind = "option" if name.startswith("-") else "command"
    names = ["--help", "--version", "--quiet", "--verbose"] if kind == "option" else list(COMMANDS)
    raise UsageError([f"{name!r} is no {kind}{did_you_mean(name, names)} (weft --help lists them)"])


def parse(name: str, arguments: Sequence[str]) -> Given:
    """Parse the arguments after a command's name.

    Raises:
        ConfigError: a file of --config cannot be read.
        UsageError: with all problems; not raised with --help.
    """
    reader = _Reader(name)
    reader.read(arguments)
    given = reader.given
    if not reader.skipped_words and not {"help", "print-config"} & set(given.asked):
        given.problems += [
            f"{option.metavar} is missing: {_lower(option.sentence)}"
            for option in reader.options.values()
            if option.positional and option.name not in given.values
        ]
    if given.problems and "help" not in given.asked:
        with suppress(TypeError):  # a positional option is missing, or may be one of the words that were skipped
            given.problems += [] if reader.skipped_words else not_there(COMMANDS[name].options(**given.values))
        raise UsageError(given.problems)
    return given


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ': did you mean NAME?' for up to three names that this one abbreviates, or the most similar one; or ""."""
    plain = {one.lstrip("-"): one for one in names}
    word = name.lstrip("-")[:80].lower().replace("_", "-")
    begun = [one for one in plain if one.startswith(word)]
    short = begun or [one for one in plain if _abbreviates(word, one)]
    near = short if word and 0 < len(short) <= 3 else difflib.get_close_matches(word, plain, 1)
    return f": did you mean {' or '.join(plain[one] for one in near)}?" if near else ""


def _abbreviates(short: str, name: str) -> bool:
    """Whether these are the initials of the words of a name (lr), or beginnings of some in order (grad-accum)."""
    words = name.split("-")
    if short == "".join(word[:1] for word in words) and len(words) > 1:
        return True
    left = iter(words)
    return "-" in short and all(part and any(word.startswith(part) for word in left) for part in short.split("-"))


class _Reader:
    """Reads the arguments from left to right."""

    def __init__(self, command: str) -> None:
        self.given = Given()
        self._command = command
        self.options = {option.name: option for option in options_of(COMMANDS[command].options)}
        self._positional = [option for option in self.options.values() if option.positional]
        self._rest: list[str] = []
        self._switch_before: str | None = None  # the switch to which the next word may belong
        self.skipped_words = False

    def read(self, arguments: Sequence[str]) -> None:
        """Read all arguments."""
        self._rest = list(arguments)
        while self._rest:
            word = self._rest.pop(0)
            if word == "--":
                for rest in self._rest:
                    self._add_positional(rest)
                return
            if not _is_flag(word):
                self._add_positional(word)
                continue
            name, equals, value = ("--help" if word == "-h" else word).partition("=")
            self._flag(name, value if equals else None)

    def _add_positional(self, word: str) -> None:
        """Use an argument without a name for the next positional option."""
        if self._positional:
            self._set(self._positional.pop(0), word, from_words)
        else:
            self.given.problems.append(f"{word!r} belongs to no option{self._hint(word)}")

    def _hint(self, word: str) -> str:
        """What to do with a word that belongs to no option."""
        if word.lower().endswith((".yaml", ".yml")):
            return f": give a file of options with --config {word}"
        if self._switch_before is not None:
            return f": {self._switch_before} must be true or false"
        prompt = next((option for option in self.options.values() if option.name in ("prompt", "text")), None)
        if prompt is not None and prompt.name not in self.given.values and " " in word:
            return f": give a text with {prompt.flag} {shlex.quote(word)}"
        return ": put a value that has spaces into quotes"

    def _flag(self, name: str, value: str | None) -> None:
        """Read an option and its values."""
        self._switch_before = None
        plain = name.lstrip("-").replace("_", "-")
        option = self._option(plain)
        if name.startswith("--") and plain in COMMON:
            self._common(plain, value)
        elif name.startswith("--") and option is not None and not option.positional:
            if option.kind == "switch":
                self._switch(option, plain, value)
            elif option.kind == "list":
                self._list(option, value)
            elif (text := self._value(option.flag, value)) is not None:
                self._set(option, text, from_words)
        elif COMMANDS[self._command].hands_on:
            self.given.handed_on.append(name if value is None else f"{name}={value}")
            while value is None and self._rest and not self._rest[0].startswith("-"):
                self.given.handed_on.append(self._rest.pop(0))
        elif option is not None and option.positional:
            self._unknown(name, f": give {option.metavar} without a name")
        else:
            self._unknown(name, self._near(plain))

    def _option(self, plain: str) -> Option | None:
        """The option with this name, written with dashes; for a switch also with no-."""
        name = plain.replace("-", "_")
        today = current_name(name, self.options)
        self._note_earlier(name, today)
        option = self.options.get(today)
        if option is None and plain.startswith("no-"):
            option = self.options.get(name.removeprefix("no_"))
            return option if option is not None and option.kind == "switch" else None
        return option

    def _note_earlier(self, name: str, today: str) -> None:
        if name in EARLIER and today in self.options:
            self.given.renamed.append(f"{name} is called {today} now")

    def _common(self, plain: str, value: str | None) -> None:
        if plain == "config":
            file = self._value("--config", value)
            if file is not None:
                self._config(file)
        elif value is not None and plain != "print-config":
            self.given.problems.append(f"--{plain} takes no value ({value!r})")
        else:
            self.given.asked[plain] = value or ""

    def _config(self, file: str) -> None:
        """Read the options in a YAML file; names are written with dashes or underscores."""
        here: set[str] = set()
        where = "config" if file.lstrip().startswith("{") else f"config ({file})"
        for name, value in read_options(file).items():
            name = str(name).replace("-", "_")
            today = current_name(name, self.options)
            if today in here:
                self.given.problems.append(f"{where} has {today!r} twice, under two spellings")
            elif today in self.options:
                here.add(today)
                self._note_earlier(name, today)
                self._set(self.options[today], value, from_yaml)
                self._positional = [option for option in self._positional if option.name != today]
            else:
                names = [*self.options, *TRAINERS]
                self.given.problems.append(f"{where} has {name!r}, which is no option{did_you_mean(name, names)}")

    def _switch(self, option: Option, plain: str, value: str | None) -> None:
        if plain.startswith("no-") and option.flag != f"--{plain}":
            if value is not None:
                self.given.problems.append(f"--{plain} takes no value ({value!r})")
            self.given.values[option.name] = False
        elif value is None and not (self._rest and self._rest[0].lower() in SWITCH):
            self.given.values[option.name], self._switch_before = True, option.flag
        else:
            self._set(option, self._rest.pop(0) if value is None else value, from_words)

    def _list(self, option: Option, value: str | None) -> None:
        values = [] if value is None else [value]
        while value is None and self._rest and not _ends_values(self._rest[0]):
            values.append(self._rest.pop(0))
        if not values:
            self.given.problems.append(f"{option.flag} needs a value: {option.metavar}")
        elif len(values) == 1 and values[0].lstrip().startswith(("[", "{")):
            self._set(option, structured(option.name, values[0]), from_yaml)
        else:
            self._set(option, values, from_words)

    def _value(self, flag: str, value: str | None) -> str | None:
        """The value of an option that needs one; None after noting the problem if it is missing."""
        if value is not None:
            return value
        if self._rest and not _ends_values(self._rest[0]):
            return self._rest.pop(0)
        self.given.problems.append(f"{flag} needs a value")
        return None

    def _set(self, option: Option, value: Any, read: Callable[[Option, Any], Any]) -> None:
        try:
            self.given.values[option.name] = read(option, value)
        except ValueError as err:
            self.given.problems.append(str(err))

    def _near(self, plain: str) -> str:
        flags = [option.flag for option in self.options.values() if not option.positional]
        flags += [f"--no-{option.flag[2:]}" for option in self.options.values() if option.kind == "switch"]
        flags += [f"--{name.replace('_', '-')}" for name, today in TRAINERS.items() if today in self.options]
        near = did_you_mean(f"--{plain}", [*flags, *(f"--{name}" for name in COMMON)])
        return near or f" (weft {self._command} --help lists them)"

    def _unknown(self, name: str, near: str) -> None:
        self.given.problems.append(f"{name} is no option{near}")
        while self._rest and not _is_flag(self._rest[0]):
            self._rest.pop(0)  # its values, perhaps also positional options
            self.skipped_words = True


def _is_flag(word: str) -> bool:
    """Whether an argument is the name of an option; -2 is a number."""
    return re.fullmatch(r"--?[^\W\d]\S*", word.partition("=")[0]) is not None


def _ends_values(word: str) -> bool:
    """Whether an argument ends the values of the option before it. A text with a space, as `-- so`, does not."""
    return word in ("--", "-h") or re.fullmatch(r"--\S+", word.partition("=")[0]) is not None


def _lower(sentence: str) -> str:
    first = sentence.partition(" ")[0]
    return (sentence if first.isupper() else sentence[:1].lower() + sentence[1:]).removesuffix(".")
