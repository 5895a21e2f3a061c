"""Reads the options of a command from their dataclass, for `--help` and the reference.

The docstring has a section `Args: GROUP` for each group of options, with entries such as

    top_k (N): First sentence. More sentences. Default: all.

`N` is the placeholder of the value; without it, the type gives one. `--help` shows the first sentence, the reference
all of them. `Default:` describes the default None. Entries of base classes come after those of the class itself.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_SECTION = re.compile(r"Args:(?: (.*))?")
_ENTRY = re.compile(r"    (\w+)(?: \((.*?)\))?: (.*)")
_SENTENCE_END = re.compile(r"(?<=\.) (?=[A-Z`])")
# Groups after all others, in this order.
_LAST = {"Output": 1, "Experts that are trained first": 2, "Advanced": 3}
_METAVARS = {"whole": "N", "number": "NUMBER"}

Kind = Literal["switch", "choice", "whole", "number", "text", "list"]


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: name of the field.
        kind: kind of its values.
        optional: whether None is a value.
        choices: the values of a choice.
        table: the type of the values if a list can also be given as a table {name: value}; else None.
        positional: whether it is given by position.
        default: default value; None if positional.
        metavar: placeholder of its value in `--help`.
        group: title of its group; "" if positional.
        sentence: the first sentence of its description.
        more: the other sentences.
        default_words: its default, in words.
    """

    name: str
    kind: Kind
    optional: bool
    choices: tuple[str, ...]
    table: type | None
    positional: bool
    default: Any
    metavar: str
    group: str
    sentence: str
    more: str
    default_words: str

    @property
    def flag(self) -> str:
        """The option as it is typed; the placeholder if positional."""
        return self.metavar if self.positional else f"--{self.name.replace('_', '-')}"


def options_of(options_class: Any) -> list[Option]:
    """The options of a command in the order of `--help`: positional ones first, then group by group."""
    hints = get_type_hints(options_class)
    fields = {field.name: field for field in dataclasses.fields(options_class)}
    found: dict[str, Option] = {}
    for described in reversed(options_class.__mro__):
        if dataclasses.is_dataclass(described):
            own = {}
            for group, name, metavar, words in _entries(inspect.cleandoc(described.__doc__ or "")):
                own[name] = _option(fields[name], hints[name], metavar, group, words)
            found = {**own, **{name: option for name, option in found.items() if name not in own}}
    groups = list(dict.fromkeys(option.group for option in found.values()))
    groups.sort(key=lambda group: _LAST.get(group, 0))
    positional = [found[name] for name in fields if found[name].positional]
    named = [option for group in groups for option in found.values() if option.group == group]
    return [*positional, *(option for option in named if not option.positional)]


def description(options_class: Any) -> list[str]:
    """The paragraphs that describe the command; the first one is a single sentence."""
    about = inspect.cleandoc(options_class.__doc__ or "").partition("\nArgs:")[0]
    return [" ".join(paragraph.split()) for paragraph in about.strip().split("\n\n")]


def _entries(text: str) -> Iterator[tuple[str, str, str, str]]:
    """(group, name, metavar, description) of each entry in a docstring."""
    group: str | None = None
    entry: list[str] = []
    for line in [*text.splitlines(), ""]:
        section, start = _SECTION.fullmatch(line), _ENTRY.fullmatch(line)
        if entry and line.startswith(" " * 8):
            entry[-1] += f" {line.strip()}"
            continue
        if entry and group is not None:
            yield group, entry[0], entry[1], entry[2]
        entry = []
        if section:
            group = section[1] or ""
        elif start and group is not None:
            entry = [start[1], start[2] or "", start[3]]


def _option(field: dataclasses.Field[Any], hint: Any, metavar: str, group: str, words: str) -> Option:
    types = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
    origins = {get_origin(one) or one: one for one in types - {NoneType}}
    choices: tuple[str, ...] = ()
    kind: Kind = "text"
    if list in origins:
        kind = "list"
    elif Literal in origins:
        kind, choices = "choice", get_args(origins[Literal])
    else:
        kinds: dict[type, Kind] = {bool: "switch", float: "number", int: "whole"}
        kind = next((kinds[one] for one in kinds if one in origins), "text")
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    sentence, *rest = _SENTENCE_END.split(words)
    default_words = rest.pop().removeprefix("Default: ").removesuffix(".") if "Default: " in " ".join(rest[-1:]) else ""
    positional = default is dataclasses.MISSING
    return Option(
        name=field.name,
        kind=kind,
        optional=NoneType in types,
        choices=choices,
        table=get_args(origins[dict])[1] if dict in origins else None,
        positional=positional,
        default=None if positional else default,
        metavar=metavar or (f"{{{','.join(choices)}}}" if choices else _METAVARS.get(kind, field.name.upper())),
        group=group,
        sentence=sentence,
        more=" ".join(rest),
        default_words=default_words or _shown(default),
    )


def _shown(default: Any) -> str:
    """A default value as it is typed."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list):
        return " ".join(default)
    if isinstance(default, float):
        return f"{default:g}"
    return "" if default in (None, dataclasses.MISSING) else str(default)
