"""`weft generate`: continue a text in the terminal."""

from __future__ import annotations

from weft.base_model.loading import loading_options
from weft.cli.terminal import StepPrinter
from weft.generation.stream import stream
from weft.model.build import load_mixture
from weft.options import GenerateOptions, decoding


def generate(options: GenerateOptions) -> None:
    """Print the prompt and its continuation, token by token.

    Raises:
        WeftError: the model or the options are not valid.
    """
    model, tokenizer = load_mixture(options.model, options.base, **loading_options(options))
    steps = stream(
        model,
        options.prompt,
        tokenizer=tokenizer,
        seed=options.seed,
        speculate=options.speculate,
        freeze_scalings_after=options.freeze_scalings_after,
        **decoding(options),
    )
    printer = StepPrinter(model.xlora_config.expert_names, options.show_experts)
    printer.legend()
    printer.write(options.prompt)
    for step in steps:
        printer.add(step)
    printer.end()
