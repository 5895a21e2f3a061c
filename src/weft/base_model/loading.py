"""Base models as transformers loads them: whole, or refused in one sentence.

transformers fills weights that a file lacks with random numbers, and only warns. A mixture on such a base would be
another one at each load, without a word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from weft.errors import CheckpointError, WeftError, first_line

_SHOWN = 5


@contextlib.contextmanager
def base_errors(name: Any, otherwise: str = "Give its folder or Hub id") -> Iterator[None]:
    """Whatever is raised inside, as one error that names the base model and says what to do.

    Args:
        name: its folder or Hub id.
        otherwise: what to do where the cause is none that is known here.

    Raises:
        CheckpointError: something was raised: by the libraries that read its files, each of which has its own errors.
    """
    try:
        yield
    except WeftError:
        raise
    except Exception as err:
        if "trust_remote_code" in str(err):
            raise CheckpointError(
                f"base ({name}) needs code that it brings along, which was not run: read it, and if you trust it, give "
                "--trust-remote-code (in Python trust_remote_code=True)"
            ) from err
        raise CheckpointError(f"base ({name}) cannot be loaded: {first_line(err).rstrip('.')}. {otherwise}") from err


def load_whole(
    model_class: Any, name: str, *, may_lack: Callable[[Any, str], bool] | None = None, **loading: Any
) -> Any:
    """A model by transformers' `from_pretrained`, all of whose weights come from its files.

    Args:
        model_class: transformers' class.
        name: folder or Hub id.
        may_lack: says of (model, key) whether that weight may be new; None lets none be.
        **loading: handed on.

    Raises:
        CheckpointError: weights are missing, or have other shapes than the config says.
        Exception: any, of transformers.
    """
    model, info = model_class.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **loading)
    mismatched = sorted(info.get("mismatched_keys") or (), key=lambda one: one[0])
    if mismatched:
        shown = [f"{key} has shape {list(there)}, expected {list(here)}" for key, there, here in mismatched[:_SHOWN]]
        raise CheckpointError(
            f"base ({name}) cannot be loaded: {', '.join(shown)}{_more(mismatched)}: its config.json and its weights "
            "do not belong together"
        )
    missing = sorted(key for key in info.get("missing_keys") or () if may_lack is None or not may_lack(model, key))
    if missing:
        raise CheckpointError(
            f"base ({name}) cannot be loaded: its files lack {', '.join(missing[:_SHOWN])}{_more(missing)}, which "
            "would be random numbers: copy it again, or give the model that has these weights"
        )
    return model


def _more(things: list[Any]) -> str:
    return f" and {len(things) - _SHOWN} more" if len(things) > _SHOWN else ""
