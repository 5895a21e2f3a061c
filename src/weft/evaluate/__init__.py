"""`weft eval`: compares the mixture with the base model, its experts, static merges, Arrow and the oracle.

Nothing is trained, and no mixture is saved here.

    data_sets.py    the data set of a column: texts in windows, multiple choice, questions
    scoring.py      the scores of one model on one data set
    intervals.py    bootstrap intervals
    contestants.py  the models to compare, loaded one after the other onto one base model
    merges.py       static merges of the experts, and the search for their best weights
    rows.py         the rows of the table: a model and its settings
    cell_store.py   finished cells, stored by a digest
    advice.py       what the numbers of a table suggest
    report.py       the table on screen, and as JSON, Markdown and CSV
    run.py          the whole evaluation
"""

from weft.data.padded import padded_batches
from weft.evaluate.run import evaluate
from weft.evaluate.scoring import perplexity

__all__ = ["evaluate", "padded_batches", "perplexity"]
