"""Data: files -> rows -> tokens -> batches.

Only the tokenizer of a model is used here.

    texts.py            rows from files, tokens from rows
    tables.py           rows from .csv and .tsv
    given.py            texts or token ids of a caller in Python, as token ids
    chat_template.py    conversations rendered by a tokenizer's chat template
    labelled.py         texts labelled with their experts
    windows.py          texts cut into windows, each with what the tokenizer puts before a text
    padded.py           sequences as padded batches
    packing.py          packs several texts into one row, in which they do not see each other
    batches.py          orders rows and collates them into batches
"""
