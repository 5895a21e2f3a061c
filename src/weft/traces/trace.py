"""Trace: the data (`numbers.py`) with its file, its tables and its display in a notebook.

`record.py` makes traces; `page`, `figures.py` and the terminal display them.

The file is a safetensors file. Its metadata have the format and its version, and everything that is not a tensor as
JSON: names, the text of the tokens, the lengths of the texts.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from weft.errors import CheckpointError, first_line
from weft.files.ownership import refuse_strangers_file
from weft.files.reading import has_surrogate, is_whole, parse_json, path_shown, reason, shown
from weft.files.writing import replace_file
from weft.traces.numbers import TENSORS, TracedText, TraceNumbers
from weft.traces.page import notebook_cell

FORMAT, VERSION = "weft-trace", 1
_TEXTS = ("pieces", "expert_names", "layer_names")
# Maximum number of tokens in a notebook cell, as the page of a long trace has megabytes.
_NOTEBOOK_TOKENS = 512


@dataclass(frozen=True, eq=False, repr=False)
class Trace(TraceNumbers):
    """The scalings of a gate for texts. The fields and methods for the data are those of `TraceNumbers`.

    Example:
        >>> trace = weft.trace(model, "The contract says", tokenizer=tokenizer)
        >>> trace.shares()  # [token, expert]
        >>> trace.save("contract.trace")
    """

    def _repr_html_(self) -> str:
        return notebook_cell(self.head(_NOTEBOOK_TOKENS))

    # ------------------------------------------------------------------ the file

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the trace to a file, which is replaced only if the new one is complete.

        Raises:
            ConfigError: an existing file is not a trace.
            CheckpointError: the file cannot be written; an existing one is unchanged.
        """
        self.check_file(file)
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}
        header: dict[str, Any] = {name: list(getattr(self, name)) for name in _TEXTS}
        header |= {"texts": [asdict(text) for text in self.texts], "title": self.title, "left_out": self.num_left_out}
        metadata = {"format": FORMAT, "version": str(VERSION), "trace": json.dumps(header, ensure_ascii=False)}
        replace_file(Path(file), lambda path: save_file(tensors, path, metadata=metadata))

    @staticmethod
    def check_file(file: str | os.PathLike[str], what: str = "file") -> None:
        """Raise if an existing file is not a trace.

        Raises:
            ConfigError: it is not a trace.
        """
        refuse_strangers_file(Path(file), _is_trace, what, "trace")

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Trace:
        """Read a trace from a file.

        Raises:
            CheckpointError: the file is missing, broken or not a trace, or comes from a newer version of weft.
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
                tensors = {name: opened.get_tensor(name) for name in TENSORS}
        except PermissionError as err:
            raise CheckpointError(f"{path} cannot be read: {reason(err)}") from err
        except (SafetensorError, OSError, ValueError, RuntimeError, LookupError, AttributeError) as err:
            if isinstance(err, CheckpointError):
                raise
            raise CheckpointError(f"{path} is no whole trace ({first_line(err)}): record it again") from err
        return _assembled(path, tensors, header)

    # ------------------------------------------------------------------ tables

    def to_arrow(self, *, layers: bool = False) -> Any:
        """A pyarrow table with one row for each token, or for each token and layer.

        The columns are text (its index), name (of the data set), position (in the text), token_id, piece, generated,
        log_prob, base_log_prob, leading (an expert), and one column for each expert with its share. With `layers` there
        is also a column layer, and the columns of the experts have the scalings of this layer.

        Args:
            layers: one row for each token and layer.
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
    """The JSON in the metadata of a trace.

    Raises:
        CheckpointError: the file is not a trace, is broken, or has a newer version.
    """
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
    """A text from the header; TypeError or ValueError if the values are not valid."""
    return TracedText(str(name), _count(num_tokens), None if prompt_length is None else _count(prompt_length))


def _count(value: Any) -> int:
    if not is_whole(value) or value < 0:
        raise ValueError(f"{shown(value)} is no number of tokens")
    return value


def _assembled(path: Path, tensors: dict[str, Any], header: dict[str, Any]) -> Trace:
    """Make the trace from its parts.

    Raises:
        CheckpointError: the parts do not fit together.
    """
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
    expected = {name: [num_tokens] for name in TENSORS}
    expected["scalings"] = [num_tokens, len(names["layer_names"]), len(names["expert_names"])]
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != expected or len(names["pieces"]) != num_tokens:
        raise CheckpointError(
            f"{path} is no whole trace: tensors of shapes {found} with {len(names['pieces'])} pieces of text, expected "
            f"{expected}: record it again"
        )
    floating = {name: tensor.is_floating_point() for name, tensor in tensors.items()}
    if floating != {name: name != "token_ids" for name in TENSORS} or tensors["token_ids"].is_complex():
        dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise CheckpointError(
            f"{path} is no whole trace: it holds {dtypes}, expected whole numbers for token_ids and "
            "floating-point ones for the others: record it again"
        )
    return Trace(**tensors, **names, texts=texts, title=title, num_left_out=num_left_out)
