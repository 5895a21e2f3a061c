"""The rows of the table: each is a model with its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from peft.utils import CONFIG_NAME

from weft.checkpoint.adapters import is_base_model, local_folder
from weft.config import XLoraConfig
from weft.errors import ConfigError, WeftError
from weft.evaluate.contestants import Contestant, adapters, arrow, base_alone, dropped, mixture
from weft.evaluate.merges import MERGES, Merge, merged
from weft.files.reading import kind_shown, read_json
from weft.formats.folding import mean_scalings
from weft.model.model import at_own_weight

# The default rows, and those that are measured only if they are named or with `--advise`.
USUAL = ("base", "experts", "uniform", "merges", "arrow", "weft", "topk", "frozen", "compare", "oracle")
GROUPS = (*USUAL, "folded", "without")
ORACLE = "oracle"
# A context manager: the loaded model -> the model with the settings of a row.
Setting = Callable[[Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: the name in the table.
        group: the group, by which `--rows` can select it.
        contestant: the model that is loaded onto the base model.
        setting: context manager that applies the row's settings to the model.
        depends_on: the files on which its results depend, besides the base model: "experts", "mixture" or a folder.
        freeze_after: see `Runner`.
        merge: the merge, for a static merge; else None.
        folded: its weights are the gate's mean scalings on texts.
        may_fail: errors after which the row is skipped and the others are measured. Methods of other libraries, which
            do not work with all base models and experts, may raise any error.
    """

    name: str
    group: str
    contestant: Contestant
    setting: Setting = nullcontext
    depends_on: str | None = None
    freeze_after: int | None = None
    merge: Merge | None = None
    folded: bool = False
    may_fail: tuple[type[Exception], ...] = ()

    def with_merge(self, merge: Merge, seed: int) -> Row:
        """The row with another merge. The digest of its cells still has the merge from which the search started."""
        return replace(self, setting=partial(_merged, merge, seed))

    def with_texts(self, sequences: list[list[int]], batch_size: int) -> Row:
        """The row, folded with the mean scalings on these texts."""
        return replace(self, setting=partial(_folded, sequences, batch_size))


def only(name: str) -> str:
    """The name of the row of one expert."""
    return f"only {name}"


def without(name: str) -> str:
    """The name of the row of the mixture without one expert."""
    return f"without {name}"


def all_rows(folder: str, config: XLoraConfig, compare: dict[str, str], *, freeze_after: int, seed: int) -> list[Row]:
    """All rows for a mixture, except the oracle, which is computed from other rows.

    Raises:
        ConfigError: `compare` has the name of another row, or something that is neither a mixture nor an adapter.
    """
    paths = dict(config.adapters or {})
    own = mixture(folder)
    rows = [Row("base", "base", base_alone())]
    rows += [Row(only(name), "experts", own, partial(_fixed, {name: 1.0}), "experts") for name in paths]
    equal = dict.fromkeys(paths, 1 / len(paths))
    rows.append(Row("uniform mix", "uniform", own, partial(_fixed, equal), "experts"))
    side_by_side = adapters(paths)
    anything = (Exception,)
    for kind in MERGES:
        merge = Merge.default(kind, len(paths))
        setting = partial(_merged, merge, seed)
        rows.append(Row(f"merge {kind}", "merges", side_by_side, setting, "experts", merge=merge, may_fail=anything))
    rows.append(Row("arrow", "arrow", arrow(paths, seed), depends_on="experts", may_fail=anything))
    rows.append(Row("weft", "weft", own, depends_on="mixture"))
    ways = {1: "top-1", 2: "top-2", len(paths): "dense"}
    for number, name in ways.items():
        if number <= len(paths) and number != (config.top_k_lora or len(paths)):  # else the same as the row "weft"
            top = None if name == "dense" else number
            rows.append(Row(f"weft {name}", "topk", own, partial(_top_k, top), "mixture"))
    name, setting = f"weft frozen after {freeze_after}", partial(_freezable, freeze_after)
    rows.append(Row(name, "frozen", own, setting, "mixture", freeze_after=freeze_after, may_fail=(ConfigError,)))
    rows.append(Row("folded", "folded", own, depends_on="mixture", folded=True, may_fail=(WeftError,)))
    for name in paths if len(paths) > 1 else ():
        rows.append(Row(without(name), "without", dropped(folder, name), depends_on="mixture", may_fail=(ConfigError,)))
    taken = sorted({ORACLE, *(row.name for row in rows)} & compare.keys())
    if taken:
        raise ConfigError(f"compare names a row ({', '.join(taken)}) that is there already: choose another name")
    rows += [_compared(name, path) for name, path in compare.items()]
    return rows


def chosen(rows: list[Row], wanted: list[str], *, advise: bool = False) -> tuple[list[Row], bool]:
    """The rows with these names or groups, and whether the oracle is wanted; the usual ones if nothing is named.

    Args:
        rows: all rows.
        wanted: names of rows and groups.
        advise: also take the rows that advice needs.

    Raises:
        ConfigError: a name is not that of a row or a group.
    """
    wanted = [*(wanted or USUAL), *(("weft", "folded", "without") if advise else ())]
    names = {row.name for row in rows}
    unknown = sorted(set(wanted) - names - set(GROUPS))
    if unknown:
        raise ConfigError(
            f"rows ({', '.join(unknown)}) must be of {', '.join(GROUPS)}, or rows: {', '.join(sorted(names))}"
        )
    return [row for row in rows if row.name in wanted or row.group in wanted], ORACLE in wanted


def _compared(name: str, path: str) -> Row:
    folder = local_folder(path, "model")
    if is_base_model(folder):
        raise ConfigError(f"compare ({name}={path}) is a base model, expected a mixture or an adapter of this one")
    kind = read_json(folder / CONFIG_NAME).get("peft_type")
    if kind == "XLORA":
        return Row(name, "compare", mixture(path), depends_on=path)
    if kind == "LORA":
        return Row(name, "compare", adapters({"compared": path}), _base_of, path)
    raise ConfigError(
        f"compare ({name}={path}) is of type {kind_shown(kind)}, expected XLORA (a mixture) or LORA (an adapter)"
    )


@contextmanager
def _fixed(weights: dict[str, float], model: Any) -> Iterator[Any]:
    with at_own_weight(model, weights):
        yield model


@contextmanager
def _merged(merge: Merge, seed: int, lora_model: Any) -> Iterator[Any]:
    with merged(lora_model, merge, seed) as model:
        yield model


@contextmanager
def _folded(sequences: list[list[int]], batch_size: int, model: Any) -> Iterator[Any]:
    with model.fixed_scalings(mean_scalings(model, sequences, batch_size)):
        yield model


@contextmanager
def _top_k(number: int | None, model: Any) -> Iterator[Any]:
    before = model.xlora_config.top_k_lora
    model.set_topk_lora(number)
    try:
        yield model
    finally:
        model.set_topk_lora(before)


@contextmanager
def _freezable(after: int, model: Any) -> Iterator[Any]:
    model.base_model.passes.check_frozen_scalings(after, {})
    yield model


@contextmanager
def _base_of(lora_model: Any) -> Iterator[Any]:
    yield lora_model.model
