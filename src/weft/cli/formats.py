"""`weft convert`, `weft card`, `weft push`, `weft pull`: mixtures in other layouts and on the Hub."""

from __future__ import annotations

from pathlib import Path

from weft.checkpoint.licenses import is_own
from weft.errors import ConfigError
from weft.files.names import by_name
from weft.files.writing import settle
from weft.formats.card import write_card
from weft.formats.convert import convert_mixture, left_out
from weft.formats.hub import pull, push
from weft.options import CardOptions, ConvertOptions, PullOptions, PushOptions
from weft.screen.visible import say

_NEXT = {
    "weft": "try  weft generate {0} --prompt '...'",
    "peft": "load it with  peft.PeftModel.from_pretrained(base, '{0}'),  base.config.use_cache being False",
    "xlora": "the original library's from_pretrained reads it",
    "mistralrs": "mistral.rs reads it with  Which.XLora(xlora_model_id='{0}', order='{0}/ordering.json', ...)",
}


def convert(options: ConvertOptions) -> None:
    """Write the mixture in another layout; print how to load it and what was left out.

    Raises:
        WeftError: the source cannot be read, or the layout cannot represent it.
    """
    adapters = by_name(options.adapters, "adapters") or None
    rename = by_name(options.rename, "rename", "OLD=NEW")
    folder = convert_mixture(
        options.source,
        options.to,
        options.target,
        base=options.base,
        adapters=adapters,
        rename=rename,
        trust_remote_code=options.trust_remote_code,
    )
    say(f"saved to {folder}: {_NEXT[options.to].format(folder)}")
    lost = left_out(options.source, options.to)
    if lost:
        say(f"left out, as {options.to} has no place for it (the logits are the same): {', '.join(lost)}")


def card(options: CardOptions) -> None:
    """Write the model card.

    Raises:
        WeftError: the mixture cannot be read, or its card was written by a user.
    """
    settle(Path(options.model))
    if is_own(Path(options.model)) and not options.overwrite:
        raise ConfigError(
            f"model ({options.model}) has a README.md that somebody wrote: --overwrite replaces it, or move it away"
        )
    file = write_card(options.model, base=options.base, license=options.license, evaluation=options.evaluation)
    say(f"saved to {file}")


def push_mixture(options: PushOptions) -> None:
    """Upload the mixture to the Hub.

    Raises:
        WeftError: the mixture cannot be read, or the Hub refuses it.
    """
    given = {name: getattr(options, name) for name in ("private", "base", "license", "evaluation", "dry_run")}
    done = push(options.model, options.repo_id, **given)
    say(f"would be sent to {options.repo_id}:\n{done}" if options.dry_run else f"pushed: {done}")


def pull_mixture(options: PullOptions) -> None:
    """Download a mixture from the Hub.

    Raises:
        WeftError: the repository does not exist or is not a mixture.
    """
    folder = pull(options.repo_id, options.output, revision=options.revision)
    say(f"saved to {folder}: try  weft generate {folder} --prompt '...'")
