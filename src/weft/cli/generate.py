"""`weft generate`: continue a text in the terminal."""

from __future__ import annotations

import torch
from transformers import TextStreamer, set_seed

from weft.errors import ConfigError
from weft.loading import load_mixture
from weft.options import GenerateOptions


def generate(options: GenerateOptions) -> None:
    """Print the prompt and its continuation as it comes.

    Raises:
        WeftError: the model or the options cannot work.
    """
    if not options.prompt:
        raise ConfigError("prompt is missing: the text to continue")
    if options.max_new_tokens < 1 or options.temperature < 0:
        raise ConfigError(
            f"max_new_tokens ({options.max_new_tokens}) must be at least 1 and temperature ({options.temperature}) at "
            "least 0"
        )
    model, tokenizer = load_mixture(options.model, options.base, options.dtype)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    sampling = (
        {"do_sample": True, "temperature": options.temperature} if options.temperature > 0 else {"do_sample": False}
    )
    set_seed(options.seed)
    with torch.no_grad():
        model.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling,
        )
