"""`weft eval`: the mixture beside the base, its experts, static merges, Arrow and the oracle, on the user's own data.

Knows no way to train, and no way to save a mixture.

    data_sets.py    what a column is measured on: texts in windows, multiple choice, questions
    scoring.py      one model on one data set: a score for every part of every example
    intervals.py    intervals by resampling examples
    usage.py        seconds and memory
    contestants.py  what is compared, loaded onto one base model in turn
    merges.py       static merges of the experts, and the search for the best weights of one
    rows.py         the rows: what is carried, and how it is run
    cell_store.py   finished cells, found again by a digest
    report.py       the table on screen, as JSON, Markdown and CSV
    run.py          all of it
"""

from weft.data.padded import padded_batches
from weft.evaluate.run import evaluate
from weft.evaluate.scoring import perplexity

__all__ = ["evaluate", "padded_batches", "perplexity"]
