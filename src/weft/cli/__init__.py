"""The screen: commands parse options, call what does the work, and print.

Knows how nothing is done.

    entry.py        the commands, what they share, and their errors
    option_files.py the YAML of --config, read with limits
    terminal.py     generated text in the experts' colours
    chat.py, experts.py, fold.py, formats.py, generate.py, inspect.py: one command or a few
"""

from weft.cli.entry import main

__all__ = ["main"]
