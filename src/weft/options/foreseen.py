"""All that can be told to be wrong with a command's options before anything is imported or loaded, at once.

Each class of options says what its own mean (`CommandOptions`). What only the Hub, or a look into the files, can tell
comes later.
"""

from __future__ import annotations

from weft.errors import ConfigError
from weft.files.presence import model_doubt, model_problem, source_problem
from weft.options.base import CommandOptions
from weft.options.values import value_problems


def refuse_foreseen(options: CommandOptions) -> None:
    """Raise where these options cannot work, as far as can be told now.

    Raises:
        ConfigError: with all that is wrong.
    """
    refuse(foreseen(options))


def refuse(problems: list[str]) -> None:
    """Raise where there are problems: the sentence of one, a list of several.

    Raises:
        ConfigError: with all of them.
    """
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("the options cannot work:", problems)


def foreseen(options: CommandOptions) -> list[str]:
    """What is wrong with these options, a sentence each: values, combinations, what is not there, what is in the way.

    Example:
        >>> foreseen(GenerateOptions("/nowhere"))
        ['prompt is missing: the text to continue', 'model (/nowhere) is neither a folder here nor a Hub id']
    """
    problems: list[str | None] = [*value_problems(options), *options.missing(), *options.wrong()]
    problems += [model_problem(what, name) for what, name in options.models()]
    problems += [source_problem(what, source) for what, source in options.sources()]
    problems += options.in_the_way()
    found = [problem for problem in problems if problem is not None]
    if found:  # with something to mend anyway, what may be wrong is worth saying
        doubtful = [model_doubt(what, name) for what, name in options.models()]
        found += [doubt for doubt in [*doubtful, *options.doubts()] if doubt is not None]
    return found
