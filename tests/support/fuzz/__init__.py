"""Hostile files, options and data against weft: all of it is right, or refused by name, and nothing is lost.

    python -m fuzz --seconds 3600 --seed 7        # hours of it; prints each failure with its case
    python -m fuzz --seed 7 --case 1234           # one case again, alone, with its traceback

A case is a number: with the seed it says what is mutated and what is tried (`cases.py`, `mutations.py`, `hostile.py`).
Each is tried on a copy of what `world.py` makes, and judged by `judge.py`.
"""
