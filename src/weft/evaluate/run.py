"""`weft eval`: measures each row of the table on the user's data, and prints and saves the table."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from typing import Any

import numpy as np

from weft.base_model.devices import execution_device
from weft.base_model.loading import load_placed_base, load_tokenizer, loading_options
from weft.base_model.usage import measured
from weft.checkpoint.folder import open_mixture
from weft.config import XLoraConfig
from weft.data.texts import check_length, named_sources, read_each
from weft.errors import ConfigError, WeftError, first_line, lack_of_memory
from weft.evaluate.advice import advice
from weft.evaluate.cell_store import Cell, CellStore, base_digest, digest_of, folder_digest
from weft.evaluate.contestants import SharedBase
from weft.evaluate.data_sets import DataSet, read_data_set, windows_of
from weft.evaluate.intervals import interval, resampled_means
from weft.evaluate.merges import best_merge
from weft.evaluate.report import MIXTURE, Measurement, Report, check_outputs, notes, render, write
from weft.evaluate.rows import ORACLE, Row, all_rows, chosen, only
from weft.evaluate.scoring import Runner, Scores, score, value_of
from weft.files.failures import NotWrittenError
from weft.files.names import by_name
from weft.model.build import base_name
from weft.options import EvalOptions
from weft.options.foreseen import refuse_foreseen
from weft.screen.countdown import Countdown
from weft.screen.tables import print_table, results_console
from weft.screen.wrapping import wrapped

FORMAT = 2  # version of the cells; stored cells of other versions are ignored


def evaluate(options: EvalOptions) -> dict[str, dict[str, float]]:
    """Measure, print and (with `output`) save the table.

    Args:
        options: the options of `weft eval`.

    Returns:
        Row name -> data set -> perplexity, accuracy or fraction of exact matches, depending on the data set.

    Raises:
        WeftError: the model, an option or a data set is not valid.

    Example:
        >>> options = EvalOptions(model="my-mixture", data=["code=code.jsonl", "law=law.jsonl"])
        >>> evaluate(options)["weft"]["code"]
    """
    refuse_foreseen(options)
    outputs = check_outputs([options.output] if isinstance(options.output, str) else list(options.output or []))
    kept = outputs[0].with_suffix(".cells.jsonl") if outputs else None
    if kept is not None:
        CellStore.check(kept)
    name = base_name(options.model, options.base)
    config = XLoraConfig.of_saved(open_mixture(options.model, keep_experts=False))
    compared = by_name(options.compare, "compare", "name=FOLDER")
    everything = all_rows(options.model, config, compared, freeze_after=options.freeze_after, seed=options.seed)
    rows, with_oracle = chosen(everything, options.rows, advise=options.advise)
    reader = _Reader(
        load_tokenizer(name, trust_remote_code=options.trust_remote_code), list(config.adapters or {}), options
    )
    sources = list(named_sources(options.data).items())
    searched = [("search_data", options.search_data)] if options.search_data else []
    data_sets = read_each([*sources, *searched], lambda named: reader.read(*named))
    search = data_sets.pop() if searched else None
    if search is not None and search.metric != "perplexity":
        raise ConfigError(f"search_data ({options.search_data}) must be texts: merges are chosen by perplexity")
    base = load_placed_base(name, **loading_options(options))
    check_length(options.sequence_length, base.config)

    cells = CellStore(kept)
    table = _Measuring(base, reader.tokenizer, config, options, cells, search, data_sets)
    table.measure(_wanted(rows, data_sets, {row.name: row for row in everything} if with_oracle else None))
    report = _report(table, rows, data_sets, with_oracle, options)
    if options.advise:
        report.advice = advice(report, rows, config, shlex.quote(str(options.model)))
    console = results_console()
    print_table(render(report), console)
    for line in [*notes(report), *(["", "Advice:"] if options.advise else []), *report.advice]:
        line = wrapped(line, console.width, together=[*report.cells, *report.impossible])
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for output in outputs:
        write(report, output)
    return report.values()


class _Reader:
    """Reads data sets according to the options."""

    def __init__(self, tokenizer: Any, expert_names: list[str], options: EvalOptions) -> None:
        self.tokenizer, self.expert_names, self.options = tokenizer, expert_names, options

    def read(self, name: str, source: str) -> DataSet:
        """Read one data set."""
        options = self.options
        return read_data_set(
            name,
            source,
            self.tokenizer,
            self.expert_names,
            sequence_length=options.sequence_length,
            stride=options.stride,
            max_sequences=options.max_sequences,
            max_new_tokens=options.max_new_tokens,
        )


class _Measuring:
    """Measures the cells that are not stored yet, on one base model.

    Attributes:
        impossible: row -> why it could not be measured.
    """

    def __init__(
        self,
        base: Any,
        tokenizer: Any,
        config: Any,
        options: EvalOptions,
        cells: CellStore,
        search: DataSet | None,
        data_sets: list[DataSet],
    ) -> None:
        self.shared, self.tokenizer, self.config, self.options = SharedBase(base), tokenizer, config, options
        self.cells, self.search = cells, search
        self._fold_on = [search] if search else [data for data in data_sets if data.metric == "perplexity"]
        self.impossible: dict[str, str] = {}
        self._base_digest = base_digest(base)
        self._folder_digests: dict[str, str] = {}

    def digest(self, row: Row, data: DataSet) -> str:
        """The digest of everything that a cell depends on."""
        depends: list[Any] = []
        if row.depends_on == "experts":
            folders = (self.config.adapters or {}).items()
            depends = [[name, self._folder(path)] for name, path in folders]
        elif row.depends_on is not None:
            depends = [self._folder(self.options.model if row.depends_on == "mixture" else row.depends_on)]
        if row.may_fail:
            depends.append(self.options.seed)
        if row.merge is not None:
            depends.append(self.search.digest if self.search else str(row.merge))
        if row.folded:
            depends += [data.digest for data in self._fold_on]
        return digest_of(FORMAT, row.group, row.name, data.digest, self._base_digest, depends, self.options.batch_size)

    def _folder(self, path: str) -> str:
        if path not in self._folder_digests:
            self._folder_digests[path] = folder_digest(path)
        return self._folder_digests[path]

    def _is_known(self, row: Row, data: DataSet) -> bool:
        digest = self.digest(row, data)
        return digest in self.cells and len(self.cells[digest].scores) == len(data.example_of_part)

    def measure(self, wanted: list[tuple[Row, DataSet]]) -> None:
        """Measure the missing cells, then restore the base model."""
        missing = [(row, data) for row, data in wanted if not self._is_known(row, data)]
        by_row: dict[str, tuple[Row, list[DataSet]]] = {}
        for row, data in missing:
            by_row.setdefault(row.name, (row, []))[1].append(data)
        order = list(dict.fromkeys(row.contestant.key for row, _ in missing))
        with Countdown(sum(data.steps for _, data in missing)) as countdown:
            try:
                for row, data_sets in sorted(by_row.values(), key=lambda one: order.index(one[0].contestant.key)):
                    self._row(row, data_sets, countdown)
            finally:
                self.shared.clear()

    def _row(self, row: Row, data_sets: list[DataSet], countdown: Countdown) -> None:
        before = countdown.done
        try:
            countdown.advance(0, row.name)
            loaded = self.shared.load(row.contestant)
            note = ""
            if row.merge is not None:
                merge = row.merge
                if self.search is not None:
                    merge = best_merge(loaded, merge, self.search, self.tokenizer, self.options)
                    row = row.with_merge(merge, self.options.seed)
                note = str(merge)
            if row.folded:
                texts = [text for data in self._fold_on for text in windows_of(data)]
                row = row.with_texts(texts, self.options.batch_size)
            with row.setting(loaded) as model:
                runner = Runner(model, self.tokenizer, self.options.batch_size, row.freeze_after)
                for data in data_sets:
                    countdown.advance(0, f"{row.name}: {data.name}")
                    with measured(execution_device(model)) as usage:
                        scores = score(runner, data, countdown.advance)
                    cell = Cell(scores, usage.seconds, usage.peak_mb, note)
                    self.cells.keep(self.digest(row, data), row.name, data.name, cell)
        except row.may_fail as err:
            if isinstance(err, NotWrittenError) or lack_of_memory(err) is not None:
                raise
            self.impossible[row.name] = _reason(err)
            countdown.advance(before + sum(data.steps for data in data_sets) - countdown.done)


def _reason(err: Exception) -> str:
    if isinstance(err, ConfigError) and err.problems:
        return "; ".join(err.problems)
    if isinstance(err, (WeftError, ValueError)):
        return first_line(err)
    return f"{type(err).__name__}: {first_line(err)}"


def _wanted(rows: list[Row], data_sets: list[DataSet], of_oracle: dict[str, Row] | None) -> list[tuple[Row, DataSet]]:
    """All cells to measure: those of the rows, and those from which the oracle is computed, if it is wanted."""
    wanted = [(row, data) for row in rows for data in data_sets]
    if of_oracle is not None:
        shown = {row.name for row in rows}
        for data in data_sets:
            for label in dict.fromkeys(data.labels) if is_labelled(data) else ():
                assert label is not None
                if only(label) not in shown:
                    wanted.append((of_oracle[only(label)], data))
    return wanted


def is_labelled(data: DataSet) -> bool:
    """Whether each part has an expert's label, which the oracle needs."""
    return None not in data.labels


def _report(
    table: _Measuring, rows: list[Row], data_sets: list[DataSet], with_oracle: bool, options: EvalOptions
) -> Report:
    settings = {
        "sequences": {data.name: data.steps for data in data_sets},
        "sequence_length": options.sequence_length,
        "stride": options.stride,
        "dtype": str(table.shared.base.dtype),
        "seed": options.seed,
    }
    same_gate = frozenset(row.name for row in rows if row.group in ("weft", "topk", "frozen"))
    metrics = {data.name: data.metric for data in data_sets}
    report = Report(metrics, {}, table.impossible, settings, same_gate)
    found: dict[str, dict[str, Cell]] = {}
    for row in rows:
        if row.name not in table.impossible:
            found[row.name] = {data.name: table.cells[table.digest(row, data)] for data in data_sets}
    if with_oracle:
        oracle = {data.name: _oracle(table, data, options) for data in data_sets if is_labelled(data)}
        if oracle:
            found[ORACLE] = oracle
    for name, cells in found.items():
        report.cells[name] = {
            data.name: measurement(data, cells[data.name], found.get(MIXTURE, {}).get(data.name), options.seed)
            for data in data_sets
            if data.name in cells
        }
    return report


def _oracle(table: _Measuring, data: DataSet, options: EvalOptions) -> Cell:
    """The scores of the oracle: for each part, those of its domain's expert."""
    everything = all_rows(options.model, table.config, {}, freeze_after=options.freeze_after, seed=options.seed)
    rows = {row.name: row for row in everything}
    of_label = {label: table.cells[table.digest(rows[only(str(label))], data)].scores for label in set(data.labels)}
    return Cell([of_label[label][part] for part, label in enumerate(data.labels)], math.nan, None)


@np.errstate(over="ignore", invalid="ignore")  # values that are not finite are reported in the notes
def measurement(data: DataSet, cell: Cell, weft: Cell | None, seed: int) -> Measurement:
    """A cell's value, its interval, and the interval of its difference to the mixture's cell."""
    values, weights = by_example(data, cell.scores)
    value = value_of(data, float(values.sum()), float(weights.sum()))
    low = high = math.nan
    minus_weft = None
    if len(values) > 1:
        samples = _samples(data, cell.scores, seed)
        low, high = interval(samples)
        if weft is not None and weft is not cell:
            minus_weft = interval(samples - _samples(data, weft.scores, seed))
    return Measurement(
        value, low, high, len(values), float(weights.sum()), cell.seconds, cell.peak_mb, minus_weft, cell.note
    )


def _samples(data: DataSet, scores: Scores, seed: int) -> np.ndarray:
    means = resampled_means(*by_example(data, scores), seed)
    return np.exp(means) if data.metric == "perplexity" else means


def by_example(data: DataSet, scores: Iterable[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """(sums, weights) of each example, [example]: the scores of its parts, added."""
    sums = np.zeros((2, len(data.examples)))
    for example, pair in zip(data.example_of_part, scores, strict=True):
        sums[:, example] += pair
    return sums[0], sums[1]
