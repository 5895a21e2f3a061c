"""The YAML of `--config` and of structured options, read with limits: a few lines may stand for gigabytes.

An alias (`*name`) repeats what its anchor (`&name`) has, which may be made of aliases in turn. PyYAML keeps one copy of
it, but whatever walks over the result sees all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weft.errors import ConfigError
from weft.files.reading import read_text

PARSER_MODE = "weft-yaml"
_MOST_BYTES = 2**20
_MOST_VALUES = 100_000
_MOST_LEVELS = 32


def add_loader() -> None:
    """Let jsonargparse's parsers of `PARSER_MODE` read YAML by `load`."""
    import yaml
    from jsonargparse import set_loader

    set_loader(PARSER_MODE, load, (yaml.YAMLError,))


def load(text: str) -> Any:
    """What a YAML text says, as jsonargparse reads it.

    Raises:
        yaml.YAMLError: it is none, or larger than options can be.
    """
    import yaml
    from jsonargparse import get_loader

    if len(text) > _MOST_BYTES:
        raise yaml.YAMLError(f"{len(text):,} characters, expected at most {_MOST_BYTES:,}")
    try:
        refuse_large(text)
        return get_loader("yaml")(text)
    except (ValueError, OverflowError, RecursionError) as err:  # of numbers and dates that are none
        raise yaml.YAMLError(f"a value that cannot be read ({err})") from err


def refuse_large(text: str) -> None:
    """Raise where a YAML text stands for more values, with its aliases written out, than options can have.

    Raises:
        yaml.YAMLError: it does, or it is no YAML.
    """
    import yaml

    sizes: dict[str, int] = {}  # of the values with an anchor, once they are whole
    unfinished: list[tuple[str | None, int]] = []  # anchor and size so far
    total = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"the alias *{event.anchor} stands for nothing that is written before it")
            size = sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            unfinished.append((event.anchor, 1))
            if len(unfinished) > _MOST_LEVELS:
                raise yaml.YAMLError(f"more than {_MOST_LEVELS} levels of lists and tables in each other")
            continue
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = unfinished.pop()
            if anchor is not None:
                sizes[anchor] = size
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if event.anchor is not None:
                sizes[event.anchor] = size
        else:
            continue
        if unfinished:
            anchor, so_far = unfinished[-1]
            unfinished[-1] = anchor, so_far + size
            size = so_far + size
        total = max(total, size)
        if total > _MOST_VALUES:
            raise yaml.YAMLError(f"more than {_MOST_VALUES:,} values with its aliases written out")


def check_files(argv: Sequence[str]) -> None:
    """Raise where a file of `--config` cannot be read as text.

    Raises:
        ConfigError: it is missing, a folder, not readable, too large or no UTF-8.
    """
    for number, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name == "--config":
            following = argv[number + 1 : number + 2]
            for file in [value] if equals else following:
                if not file.lstrip().startswith("{"):  # YAML in the place of a file's name
                    read_text(file, error=lambda message: ConfigError(f"config: {message}"), most=_MOST_BYTES)
