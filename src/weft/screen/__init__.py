"""What a person sees, in a terminal or in a browser: escaped, coloured, and on time.

Knows no model and no file of weft's: texts and numbers in, texts out.

    visible.py      names and messages that cannot steer a terminal
    loudness.py     how much a person wants to see
    libraries.py    what other libraries say that nobody can act on, hidden
    console.py      rich's console, for texts that others wrote
    tables.py       tables, in blocks of columns that fit
    countdown.py    what is done and how long the rest takes
    waiting.py      a sign of life where nobody knows that
    palette.py      the experts' colours: the same in the terminal, on pages and in figures
    web/            what the pages in a browser share: template, styles, scripts
"""
