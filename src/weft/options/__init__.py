"""The options of every command, as dataclasses: meaning, unit and default of each option.

Options of the mixture have the names and ranges of `XLoraConfig`. Options that transformers' Trainer has too have the
Trainer's names. Nothing heavy is imported, so that `weft --help` is fast.

    base.py         base classes and options that several commands share: the base model, dtype
    spellings.py    other names of options: the Trainer's, and those of earlier versions
    described.py    descriptions of options, read from the dataclasses and their docstrings
    foreseen.py     finds all problems that need no import of torch and no loading
    values.py       checks of values that are the same for all options
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
