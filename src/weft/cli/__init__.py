"""The screen: commands parse options, call what does the work, and print.

Knows how nothing is done.

    entry.py        from what was typed to an exit code
    commands.py     the table of commands
    parser.py       a command line, and the files it names, as options
    values.py       one value of an option
    option_files.py the YAML of --config, read with limits
    help.py         `weft --help`, `weft COMMAND --help`
    errors.py       what went wrong, in a line
    memory.py       out of memory: how much was needed, and what takes less
    terminal.py     generated text in the experts' colours
    environment.py  `weft env`, `weft --version`
    chat.py, evaluate.py, experts.py, fold.py, formats.py, generate.py, inspect.py, train.py: one command or a few
"""

from weft.cli.entry import main

__all__ = ["main"]
