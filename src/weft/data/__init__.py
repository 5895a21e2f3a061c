"""From files to rows, from rows to tokens, from tokens to batches.

Knows no model, only its tokenizer.

    texts.py            rows from files, tokens from rows
    tables.py           rows from .csv and .tsv
    given.py            what a caller in Python gives to be read, as tokens
    chat_template.py    conversations as a tokenizer's template renders them
    labelled.py         texts labelled by the expert that they belong to
    padded.py           sequences as padded batches
    packing.py          several texts in one row, none of which sees another
    batches.py          rows -> batches: which stand together, and how they become tensors
"""
