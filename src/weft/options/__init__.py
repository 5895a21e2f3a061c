"""The options of every command, as dataclasses: each has its meaning, unit and default here and nowhere else.

Knows no command: what an option does is said where it is used. Options of the mixture itself have the names and ranges
of `XLoraConfig`, those that transformers' Trainer has too have the Trainer's. Nothing heavy is imported, so that
`weft --help` answers at once.

    base.py         what several commands share: `~` in paths, number formats, the base model
    spellings.py    other names of options: the Trainer's, and those of earlier versions
    described.py    what each option is, read from the dataclasses and their docstrings
    foreseen.py     all problems that can be found before anything is imported or loaded
    values.py       what no option can be, whatever it means
    checks.py       checks that the options of several commands share
    ranges.py       the ranges of a mixture's own options
    training.py     checks of the options of `weft train`
    train.py        `weft train`
    evaluate.py     `weft eval`
    text.py         `weft generate`, `chat`, `inspect`
    mixtures.py     `weft fold`, `add-expert`, `drop-expert`, `convert`, `card`, `push`, `pull`
    serve.py        `weft serve`
    environment.py  `weft env`
"""

from weft.options.environment import EnvOptions
from weft.options.evaluate import EvalOptions
from weft.options.mixtures import (
    AddExpertOptions,
    CardOptions,
    ConvertOptions,
    DropExpertOptions,
    FoldOptions,
    PullOptions,
    PushOptions,
)
from weft.options.serve import ServeOptions
from weft.options.text import ChatOptions, GenerateOptions, InspectOptions, decoding
from weft.options.train import TrainOptions

__all__ = [
    "AddExpertOptions",
    "CardOptions",
    "ChatOptions",
    "ConvertOptions",
    "DropExpertOptions",
    "EnvOptions",
    "EvalOptions",
    "FoldOptions",
    "GenerateOptions",
    "InspectOptions",
    "PullOptions",
    "PushOptions",
    "ServeOptions",
    "TrainOptions",
    "decoding",
]
