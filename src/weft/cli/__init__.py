"""The command line: parse the options, call the room that does the work, and print the result.

Only parsing and printing are done here.

    entry.py        runs a command line and returns its exit code
    commands.py     the table of commands
    parser.py       command lines and files of --config -> options
    values.py       parses one value of an option
    option_files.py the YAML of --config, read with limits
    help.py         `weft --help`, `weft COMMAND --help`
    errors.py       prints errors
    memory.py       the message for out of memory
    terminal.py     generated text in the experts' colours
    environment.py  `weft env`, `weft --version`
    chat.py, evaluate.py, experts.py, fold.py, formats.py, generate.py, inspect.py, train.py: one or more commands each
"""

from weft.cli.entry import main

__all__ = ["main"]
