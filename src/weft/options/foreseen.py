"""Finds all problems of a command's options that need no import of torch and no loading, and reports them together.

Each class of options lists its problems (see `CommandOptions`). Problems on the Hub or inside of files are found later.
"""

from __future__ import annotations

from weft.errors import ConfigError
from weft.files.presence import model_doubt, model_problem, source_problem
from weft.options.base import CommandOptions
from weft.options.values import value_problems, words_with_commas


def refuse_foreseen(options: CommandOptions) -> None:
    """Raise if these options have problems that `foreseen` finds.

    Raises:
        ConfigError: with all problems.
    """
    refuse(foreseen(options))


def refuse(problems: list[str]) -> None:
    """Raise if there are problems: one as a sentence, several as a list.

    Raises:
        ConfigError: with all problems.
    """
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("the options cannot work:", problems)


def foreseen(options: CommandOptions) -> list[str]:
    """One sentence for each problem: values, combinations, missing models and files, outputs that cannot be written.

    Example:
        >>> foreseen(GenerateOptions("/nowhere"))
        ['prompt is missing: the text to continue', 'model (/nowhere) is neither a folder here nor a Hub id']
    """
    found = [*value_problems(options), *options.missing(), *options.wrong(), *not_there(options)]
    if found:  # the user must correct something anyway, so possible problems are listed too
        models = [(what, name) for what, name in options.models() if model_problem(what, name) is None]
        found += [doubt for what, name in models if (doubt := model_doubt(what, name)) is not None]
    return found


def not_there(options: CommandOptions) -> list[str]:
    """One sentence for each model or source of texts that is missing, and each output that cannot be written."""
    several = words_with_commas(options)  # are no names, and are another problem
    models, sources = (
        [(what, name) for what, name in given if not any(word.endswith(name) for word in several)]
        for given in (options.models(), options.sources())
    )
    problems = [model_problem(what, name) for what, name in models]
    problems += [source_problem(what, source) for what, source in sources]
    return [*(problem for problem in problems if problem is not None), *options.in_the_way()]
