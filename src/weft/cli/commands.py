"""The table of commands: name, options, function and example of each."""

from __future__ import annotations

from dataclasses import dataclass

from weft.options import (
    AddExpertOptions,
    CardOptions,
    ChatOptions,
    ConvertOptions,
    DropExpertOptions,
    EnvOptions,
    EvalOptions,
    FoldOptions,
    GenerateOptions,
    InspectOptions,
    PullOptions,
    PushOptions,
    ServeOptions,
    TrainOptions,
)
from weft.options.base import CommandOptions


@dataclass(frozen=True)
class Command:
    """A command of `weft`.

    Attributes:
        options: the dataclass of its options, whose docstring is the command's help.
        runner: module:function that is called with the options; imported when the command runs.
        example: a command line.
        imports_libraries: whether the runner's module imports torch, transformers and peft.
        hands_on: whether options that weft does not know are passed to the runner, as its second argument.
    """

    options: type[CommandOptions]
    runner: str
    example: str
    imports_libraries: bool = True
    hands_on: bool = False


COMMANDS = {
    "train": Command(
        TrainOptions,
        "weft.cli.train:train",
        "weft train --base my-model --adapters code=adapters/code law=adapters/law --data mixed.jsonl "
        "--output my-mixture",
    ),
    "add-expert": Command(AddExpertOptions, "weft.cli.experts:add", "weft add-expert my-mixture poems=adapters/poems"),
    "drop-expert": Command(DropExpertOptions, "weft.cli.experts:drop", "weft drop-expert my-mixture law"),
    "generate": Command(
        GenerateOptions,
        "weft.cli.generate:generate",
        'weft generate my-mixture --prompt "The contract says" --show-experts',
    ),
    "chat": Command(ChatOptions, "weft.cli.chat:chat", 'weft chat my-mixture --system "Answer in one sentence."'),
    "serve": Command(ServeOptions, "weft.serve.command:serve", "weft serve my-mixture --port 8000", hands_on=True),
    "eval": Command(
        EvalOptions,
        "weft.cli.evaluate:evaluate",
        "weft eval my-mixture --data code=heldout/code.jsonl law=heldout/law.jsonl --output table.md",
    ),
    "inspect": Command(
        InspectOptions,
        "weft.cli.inspect:inspect",
        'weft inspect my-mixture --text "The contract says" --html page.html',
    ),
    "fold": Command(
        FoldOptions,
        "weft.cli.fold:fold_mixture",
        "weft fold my-mixture --weights code=0.5 law=0.5 --output folded",
    ),
    "convert": Command(
        ConvertOptions, "weft.cli.formats:convert", "weft convert my-mixture --to peft --output for-peft"
    ),
    "card": Command(CardOptions, "weft.cli.formats:card", "weft card my-mixture --license apache-2.0"),
    "push": Command(
        PushOptions,
        "weft.cli.formats:push_mixture",
        "weft push my-mixture me/my-mixture --base org/base-model --private",
    ),
    "pull": Command(PullOptions, "weft.cli.formats:pull_mixture", "weft pull me/my-mixture --output my-mixture"),
    "env": Command(EnvOptions, "weft.cli.environment:show", "weft env", imports_libraries=False),
}

# The order of `weft --help`.
GROUPS = {
    "Make a mixture": ("train", "add-expert", "drop-expert"),
    "Use it": ("generate", "chat", "serve"),
    "Look at it": ("eval", "inspect"),
    "Share it": ("fold", "convert", "card", "push", "pull"),
    "Help": ("env",),
}
