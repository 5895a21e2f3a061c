"""Output for people, in a terminal or in a browser.

Models and files are not used here, only texts and numbers.

    wrapping.py     breaks messages into lines that fit a terminal
    visible.py      prints messages in which control characters have no effect
    loudness.py     how much is printed: --quiet, --verbose
    libraries.py    hides messages of other libraries on which a user cannot act
    console.py      rich's console for untrusted texts
    tables.py       tables, split into blocks of columns that fit the screen
    countdown.py    progress and the time left
    waiting.py      a message during a long operation of unknown length
    palette.py      the experts' colours: the same in the terminal, on pages and in figures
    web/            template, styles and scripts of the pages in a browser
"""
