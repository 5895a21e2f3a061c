"""The YAML of `--config` and of structured options, read with limits on its size.

A few lines can expand to gigabytes: an alias (`*name`) repeats the value of its anchor (`&name`), which can contain
aliases. PyYAML keeps one copy, but code that iterates over the result visits every repetition.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from weft.cli.errors import UsageError
from weft.errors import ConfigError, first_line
from weft.files.reading import read_text
from weft.options.described import options_of

_MOST_BYTES = 2**20
_MOST_VALUES = 100_000
_MOST_LEVELS = 32
# The numbers of YAML 1.2. PyYAML's own pattern reads 1e-3 as a string.
_NUMBER = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9_]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


def read_options(file: str) -> dict[Any, Any]:
    """Read the options from a file of `--config`, or from YAML text that is given instead of a file name.

    Raises:
        ConfigError: the file is missing, a folder, not readable, too large or not UTF-8.
        UsageError: it is not a table in YAML.
    """
    if file.lstrip().startswith("{"):
        text, name = file, "config"
    else:
        text = read_text(file, error=lambda message: ConfigError(f"config: {message}"), most=_MOST_BYTES)
        name = f"config ({file})"
    values = structured(name, text)
    if not isinstance(values, dict | None):
        raise UsageError([f"{name} must be a table of options, a line `name: value` each"])
    return values or {}


def structured(name: str, text: str) -> Any:
    """Parse the YAML value of an option.

    Args:
        name: the option, for the error.
        text: its value.

    Raises:
        UsageError: it is not valid YAML, or too large.
    """
    import yaml

    try:
        return load(text)
    except yaml.YAMLError as err:
        where = getattr(err, "problem_mark", None)
        line = f", line {min(where.line, text.count(chr(10))) + 1}" if where is not None else ""
        raise UsageError(
            [f"{name} is no YAML that can be read{line}: {getattr(err, 'problem', None) or first_line(err)}"]
        ) from err


def load(text: str) -> Any:
    """Parse a YAML text.

    Raises:
        yaml.YAMLError: it is not valid YAML, or too large.
    """
    import yaml

    if len(text) > _MOST_BYTES:
        raise yaml.YAMLError(f"{len(text):,} characters, expected at most {_MOST_BYTES:,}")
    try:
        refuse_large(text)
        return yaml.load(text, _loader())
    except (ValueError, OverflowError, RecursionError) as err:  # from invalid numbers and dates
        raise yaml.YAMLError(f"a value that cannot be read ({err})") from err


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader, changed to read dates as strings and 1e-3 as a number."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """A subclass, so that PyYAML's own resolvers stay unchanged."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """A table, in which PyYAML would take the last value of a name that is there twice."""
            seen: set[str] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    left_out = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in left_out]
        for first, resolvers in Loader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))
    return Loader


def refuse_large(text: str) -> None:
    """Raise if a YAML text has too many values when its aliases are expanded.

    Raises:
        yaml.YAMLError: it has, or it is not valid YAML.
    """
    import yaml

    sizes: dict[str, int] = {}  # of the complete values with an anchor
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


def as_yaml(options_class: Any, values: Mapping[str, Any], how: str = "") -> str:
    """Return all options of a command as the text of a file for `--config`.

    Args:
        options_class: the dataclass of the command's options.
        values: the options that are given.
        how: some of comments, skip_default and skip_null, separated by commas.

    Raises:
        UsageError: `how` has another word.
    """
    import yaml

    ways = set(how.split(",")) - {""}
    unknown = ways - {"comments", "skip_default", "skip_null"}
    if unknown:
        raise UsageError([f"--print-config ({how!r}) must be comments, skip_default or skip_null, or some of them"])
    text = ""
    for option in options_of(options_class):
        value = values.get(option.name, option.default)
        missing = option.positional and value is None
        is_default = "skip_default" in ways and value == option.default
        if missing or is_default or ("skip_null" in ways and value is None):
            continue
        text += f"# {option.sentence}\n" * ("comments" in ways)
        text += yaml.safe_dump({option.name: value}, allow_unicode=True, sort_keys=False, default_flow_style=False)
    return text
