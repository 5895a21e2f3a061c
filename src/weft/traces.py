"""What a gate did with a text, token by token: the numbers, their file, and what follows from them.

A trace knows nothing of models: `tracing.py` records it, `page`, `figures.py` and the terminal show it.

The file is a safetensors file. Its header's metadata say that it is a trace and of which version, and hold all that is
no tensor as JSON: names, the tokens' text, the texts' lengths.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weft.errors import CheckpointError, first_line
from weft.files import has_surrogate, is_whole, parse_json, path_shown, reason, shown
from weft.losses import normalised_entropy
from weft.ownership import refuse_strangers_file
from weft.whole import replace_file

FORMAT, VERSION = "weft-trace", 1
_TENSORS = ("scalings", "token_ids", "log_probs", "base_log_probs")
_TEXTS = ("pieces", "expert_names", "layer_names")
# Tokens that a notebook's cell shows: a page of a long trace has megabytes.
_NOTEBOOK_TOKENS = 512


@dataclass(frozen=True)
class TracedText:
    """One text in a trace, read without the ones before it.

    Attributes:
        name: of its data set; "" where there is none.
        num_tokens: how many of the trace's tokens it has.
        prompt_length: tokens before the generated ones; None where nothing was generated.
    """

    name: str
    num_tokens: int
    prompt_length: int | None = None


@dataclass(frozen=True, eq=False)
class Trace:
    """The scalings of texts, with the tokens and how well they were predicted.

    Token t has the scalings λ_{t,l,e} with which the model *read* it, top-k applied; the model predicted it one token
    earlier. The axis `layer` is 1 where one value holds for all layers. Padding is not in it.

    Args:
        scalings: λ, as the layers followed them.
        token_ids: of all texts, one after the other.
        log_probs: ln p(token | the text before it), under the mixture; NaN for each text's first token, and for all
            where the model predicts none.
        base_log_probs: the same under the base model, the experts off.
        pieces: the text of each token; "" where a character ends in a later one.
        expert_names: in the order of the axis `expert`.
        layer_names: in the order of the axis `layer`.
        texts: how the tokens fall into texts.
        title: what was traced, for people.
        num_left_out: tokens of the texts that the limit kept out of the trace.

    Example:
        >>> trace = weft.trace(model, "The contract says", tokenizer=tokenizer)
        >>> trace.shares()  # [token, expert]
        >>> trace.save("contract.trace")
    """

    scalings: Float[Tensor, "token layer expert"]
    token_ids: Int[Tensor, " token"]
    log_probs: Float[Tensor, " token"]
    base_log_probs: Float[Tensor, " token"]
    pieces: tuple[str, ...]
    expert_names: tuple[str, ...]
    layer_names: tuple[str, ...]
    texts: tuple[TracedText, ...]
    title: str = ""
    num_left_out: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        sizes = {
            "tokens": len(self),
            "texts": len(self.texts),
            "layers": len(self.layer_names),
            "experts": len(self.expert_names),
        }
        return f"<weft.Trace {self.title!r}: {', '.join(f'{name} {size}' for name, size in sizes.items())}>"

    def _repr_html_(self) -> str:
        from weft.page import notebook_cell

        return notebook_cell(self.head(_NOTEBOOK_TOKENS))

    # ------------------------------------------------------------------ what follows from the numbers

    def weights(self) -> Float[Tensor, "token expert"]:
        """Each token's scalings, as the mean over the layers."""
        # Not scalings.float(): that is the whole trace a second time.
        return self.scalings.mean(1, dtype=torch.float32)

    def shares(self) -> Float[Tensor, "token expert"]:
        """What part of a token's weight is each expert's: max(0, w_e) / Σ max(0, w_i), w the mean over the layers.

        They sum to 1, whatever the gate's last function; they are 0 where no expert acts.
        """
        positive = self.weights().clamp(min=0)
        return positive / positive.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    def leading(self) -> Int[Tensor, " token"]:
        """The number of the expert with the largest share."""
        return self.shares().argmax(-1)

    def entropy(self) -> Float[Tensor, "token layer"]:
        """How undecided the gate was: 0 for one expert alone, 1 for equal shares."""
        positive = self.scalings.float().clamp(min=0)
        return normalised_entropy(positive / positive.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))

    def by_name(self) -> dict[str, Float[Tensor, " expert"]]:
        """The mean shares of each data set: the expert-by-domain matrix, a row per name."""
        shares = self.shares()
        rows: dict[str, list[Tensor]] = {}
        for text, start in self.starts():
            rows.setdefault(text.name, []).append(shares[start : start + text.num_tokens])
        return {name: torch.cat(parts).mean(0) for name, parts in rows.items()}

    def starts(self) -> Iterator[tuple[TracedText, int]]:
        """Each text, and the place of its first token."""
        start = 0
        for text in self.texts:
            yield text, start
            start += text.num_tokens

    def perplexities(self) -> tuple[float, float] | None:
        """exp of the mean -ln p per predicted token, under the mixture and the base; None where none is predicted."""
        predicted = ~self.log_probs.isnan()
        if not predicted.any():
            return None
        mixture, base = (
            values[predicted].double().mean().neg().exp().item() for values in (self.log_probs, self.base_log_probs)
        )
        return mixture, base

    def head(self, num_tokens: int) -> Trace:
        """The first so many tokens."""
        if num_tokens >= len(self):
            return self
        texts = [
            TracedText(text.name, min(text.num_tokens, num_tokens - start), text.prompt_length)
            for text, start in self.starts()
            if start < num_tokens
        ]
        left_out = self.num_left_out + len(self) - num_tokens
        return self._part(torch.arange(len(self)) < num_tokens, texts, left_out)

    def only(self, name: str) -> Trace:
        """The texts of one data set."""
        texts = [text for text in self.texts if text.name == name]
        return self._part(
            torch.cat([torch.full((text.num_tokens,), text.name == name) for text in self.texts]), texts, 0
        )

    def _part(self, kept: Bool[Tensor, " token"], texts: list[TracedText], num_left_out: int) -> Trace:
        tensors: dict[str, Any] = {name: getattr(self, name)[kept] for name in _TENSORS}
        pieces = tuple(compress(self.pieces, kept.tolist()))
        return replace(self, **tensors, pieces=pieces, texts=tuple(texts), num_left_out=num_left_out)

    # ------------------------------------------------------------------ the file

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the trace, all of it or nothing.

        Raises:
            ConfigError: a file is there that is no trace.
            CheckpointError: the file cannot be written; what was there before is unchanged.
        """
        self.check_file(file)
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        header: dict[str, Any] = {name: list(getattr(self, name)) for name in _TEXTS}
        header |= {"texts": [asdict(text) for text in self.texts], "title": self.title, "left_out": self.num_left_out}
        metadata = {"format": FORMAT, "version": str(VERSION), "trace": json.dumps(header, ensure_ascii=False)}
        replace_file(Path(file), lambda path: save_file(tensors, path, metadata=metadata))

    @staticmethod
    def check_file(file: str | os.PathLike[str], what: str = "file") -> None:
        """Raise where a file is there that is no trace.

        Raises:
            ConfigError: it is.
        """
        refuse_strangers_file(Path(file), _is_trace, what, "trace")

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Trace:
        """Read a trace.

        Raises:
            CheckpointError: there is no such file, or it is broken, no trace, or one of a newer weft.
        """
        path = Path(file)
        if not os.path.isfile(path):
            raise CheckpointError(
                f"{path_shown(path)} is no file: give one that Trace.save or weft inspect --output has written"
            )
        try:
            with safe_open(path, framework="pt") as opened:
                metadata = opened.metadata() or {}
                header = _header(path, metadata)
                tensors = {name: opened.get_tensor(name) for name in _TENSORS}
        except PermissionError as err:
            raise CheckpointError(f"{path} cannot be read: {reason(err)}") from err
        except (SafetensorError, OSError, ValueError, RuntimeError, LookupError, AttributeError) as err:
            if isinstance(err, CheckpointError):
                raise
            raise CheckpointError(f"{path} is no whole trace ({first_line(err)}): record it again") from err
        return _assembled(path, tensors, header)

    # ------------------------------------------------------------------ for those who want the numbers

    def to_arrow(self, *, layers: bool = False) -> Any:
        """A pyarrow table with a row per token, or per token and layer.

        Columns: text (its number), name, position (in the text), token_id, piece, generated, log_prob, base_log_prob,
        leading; then a column per expert. A row per token has the experts' shares, a row per token and layer the
        scalings of the column layer.

        Args:
            layers: a row per token and layer, layer by layer for each token.
        """
        import pyarrow as pa

        columns = self._token_columns()
        values = self.shares()
        if layers:
            num_layers = len(self.layer_names)
            columns = {name: [value for value in column for _ in range(num_layers)] for name, column in columns.items()}
            columns["layer"] = list(self.layer_names) * len(self)
            values = self.scalings.flatten(0, 1).float()
        taken = [name for name in self.expert_names if name in columns]
        columns |= {
            f"expert_{name}" if name in taken else name: column.numpy()
            for name, column in zip(self.expert_names, values.T.contiguous(), strict=True)
        }
        return pa.table(columns)

    def to_pandas(self, *, layers: bool = False) -> Any:
        """The table of `to_arrow` as a pandas data frame."""
        return self.to_arrow(layers=layers).to_pandas()

    def _token_columns(self) -> dict[str, Any]:
        columns: dict[str, Any] = {"text": [], "name": [], "position": [], "generated": []}
        for number, text in enumerate(self.texts):
            columns["text"] += [number] * text.num_tokens
            columns["name"] += [text.name] * text.num_tokens
            columns["position"] += range(text.num_tokens)
            begin = text.num_tokens if text.prompt_length is None else text.prompt_length
            columns["generated"] += [position >= begin for position in range(text.num_tokens)]
        return columns | {
            "token_id": self.token_ids.tolist(),
            "piece": list(self.pieces),
            "log_prob": self.log_probs.tolist(),
            "base_log_prob": self.base_log_probs.tolist(),
            "leading": [self.expert_names[number] for number in self.leading().tolist()],
        }


def _is_trace(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as opened:
            return (opened.metadata() or {}).get("format") == FORMAT
    except SafetensorError:
        return False


def _header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The JSON of a trace's header, if it is one that this version reads."""
    found, version = metadata.get("format"), metadata.get("version", "")
    if found != FORMAT:
        raise CheckpointError(
            f"{path} is no trace (format {found!r}, expected {FORMAT!r}): give a file that Trace.save or weft inspect "
            "--output has written"
        )
    if version not in map(str, range(1, VERSION + 1)):
        raise CheckpointError(
            f"{path} is a trace of version {version[:20]!r}, newer than this weft reads ({VERSION}): update weft, or "
            "record it again"
        )
    try:
        header = parse_json(metadata.get("trace", ""))
    except ValueError as err:
        raise CheckpointError(f"{path} is no whole trace (its header is no JSON: {err}): record it again") from err
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no whole trace (its header is no JSON object): record it again")
    return header


def _text(name: Any, num_tokens: Any, prompt_length: Any = None) -> TracedText:
    """A text of a header; TypeError, ValueError where it is none."""
    return TracedText(str(name), _count(num_tokens), None if prompt_length is None else _count(prompt_length))


def _count(value: Any) -> int:
    if not is_whole(value) or value < 0:
        raise ValueError(f"{shown(value)} is no number of tokens")
    return value


def _assembled(path: Path, tensors: dict[str, Any], header: dict[str, Any]) -> Trace:
    """The trace of these parts, which must fit together."""
    try:
        names: dict[str, Any] = {name: tuple(map(str, header[name])) for name in _TEXTS}
        texts = tuple(_text(**text) for text in header["texts"])
        title, num_left_out = str(header["title"]), _count(header["left_out"])
        if any(map(has_surrogate, [title, *(text.name for text in texts), *itertools.chain(*names.values())])):
            raise ValueError("half of a character in a text")
        num_tokens = sum(text.num_tokens for text in texts)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise CheckpointError(
            f"{path} is no whole trace (its header lacks or garbles something: {err!r}): record it again"
        ) from err
    expected = {name: [num_tokens] for name in _TENSORS}
    expected["scalings"] = [num_tokens, len(names["layer_names"]), len(names["expert_names"])]
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != expected or len(names["pieces"]) != num_tokens:
        raise CheckpointError(
            f"{path} is no whole trace: tensors of shapes {found} with {len(names['pieces'])} pieces of text, expected "
            f"{expected}: record it again"
        )
    floating = {name: tensor.is_floating_point() for name, tensor in tensors.items()}
    if floating != {name: name != "token_ids" for name in _TENSORS} or tensors["token_ids"].is_complex():
        dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise CheckpointError(
            f"{path} is no whole trace: it holds {dtypes}, expected whole numbers for token_ids and "
            "floating-point ones for the others: record it again"
        )
    return Trace(**tensors, **names, texts=texts, title=title, num_left_out=num_left_out)
