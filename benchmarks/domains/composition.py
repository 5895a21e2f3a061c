"""Texts that need two experts at once: one knows the form, the other the words, and neither saw them together.

An item is something given (the codes of a country, a line of Python), a text about it in English, and that text in
other languages, as translators wrote it. There are three tasks:

    form, English      the given and the English text, in a form (a JSON record, a comment behind the line)
    words, German      the German text, and nothing around it
    form, German       the German text in the form: the test

The form's expert learns the first, of half of the items. A language's expert learns the second, of all items, since it
has to know each translation. Of the items of the test, the form's expert saw none, and nobody saw the form with another
language than English. Answers are compared letter by letter.
"""

from __future__ import annotations

import gettext
import io
import json
import random
import re
from dataclasses import dataclass

LANGUAGES = {"german": "de", "french": "fr"}
MOST_LETTERS = 80  # of a text

Row = dict[str, str]


@dataclass(frozen=True)
class Item:
    """Something given and what is said about it.

    Attributes:
        given: What the prompt shows, in one line.
        english: The text in English.
        others: The text in each other language.
        form: The answer around the text, which stands for `{}`.
    """

    given: str
    english: str
    others: dict[str, str]
    form: str


@dataclass(frozen=True)
class Tasks:
    """What a set's tasks are called in its prompts: with the form, and without."""

    form: str
    words: str


SETS = {"records": Tasks("record", "name"), "comments": Tasks("with a comment", "message")}


def catalogue(files: dict[str, bytes], ending: str) -> dict[str, str]:
    """English -> another language, of all compiled catalogues (.mo) whose names end so."""
    found: dict[str, str] = {}
    for name in sorted(files):
        if name.endswith(ending):
            messages = gettext.GNUTranslations(io.BytesIO(files[name]))._catalog  # type: ignore[attr-defined]
            found |= {key: text for key, text in messages.items() if isinstance(key, str) and key}
    return found


def translated(english: str, catalogues: dict[str, dict[str, str]]) -> dict[str, str] | None:
    """The text in each language; none where one lacks it, or where it is the English one."""
    others = {language: texts.get(english, english) for language, texts in catalogues.items()}
    wrong = any(text == english or re.search(r"[\n\"\\{}]", text) for text in others.values())
    too_long = max(map(len, (english, *others.values()))) > MOST_LETTERS
    return None if wrong or too_long else others


def records(files: dict[str, bytes]) -> list[Item]:
    """Countries, languages, currencies and scripts by their codes, of the package iso-codes."""
    items = []
    for standard, kind in [("3166-1", "country"), ("639-2", "language"), ("4217", "currency"), ("15924", "script")]:
        catalogues = {
            language: catalogue(files, f"/{code}/LC_MESSAGES/iso_{standard}.mo") for language, code in LANGUAGES.items()
        }
        (file,) = (data for name, data in files.items() if name.endswith(f"/json/iso_{standard}.json"))
        for entry in json.loads(file)[standard]:
            codes = {key: entry[key] for key in ("alpha_2", "alpha_3", "alpha_4", "numeric") if key in entry}
            others = translated(entry["name"], catalogues)
            if others is not None:
                given = " | ".join([entry["name"], kind, *codes.values()])
                form = json.dumps({"type": kind, **codes, "name": "TEXT"})
                items.append(Item(given, entry["name"], others, form.replace("TEXT", "{}")))
    return items


def comments(files: dict[str, bytes]) -> list[Item]:
    """Lines of Django that name a message to users, and the message."""
    catalogues = {
        language: catalogue(files, f"/locale/{code}/LC_MESSAGES/django.mo") for language, code in LANGUAGES.items()
    }
    items: dict[str, Item] = {}
    for name in sorted(files):
        if not name.endswith(".py"):
            continue
        for line in files[name].decode().split("\n"):
            for message in re.findall(r'\b_\("([^"]+)"\)', line):
                others = translated(message, catalogues)
                if others is not None and message not in items and len(line.strip()) <= 2 * MOST_LETTERS:
                    # One line: what follows an answer of several lines would belong to it.
                    items[message] = Item(line.strip(), message, others, line.strip() + "  # {}")
    return list(items.values())


def row(item: Item, task: str, language: str, *, with_form: bool) -> Row:
    """A prompt and its answer. "text", for training, is both and an end of line: so the answer's end is learned."""
    text = item.english if language == "english" else item.others[language]
    prompt = f"{item.given}\n{task}, {language.capitalize()}:\n"
    answer = text.join(item.form.rsplit("{}", 1)) if with_form else text
    return {"text": prompt + answer + "\n", "prompt": prompt, "answer": answer}


def rows_of(items: list[Item], tasks: Tasks, rng: random.Random) -> dict[str, list[Row]]:
    """The files of a set.

    Args:
        items: The items.
        tasks: What the tasks are called.
        rng: The source of the order.

    Returns:
        Name of a file -> rows. `train-form` and `train-LANGUAGE` are the experts'. `test-LANGUAGE` is the form in that
        language, of items that the form's expert has not seen, and `select-LANGUAGE` is like it, of yet other items.
        `gate-LANGUAGE` is the form in that language too, of the form's items: for a gate that may see compositions.
    """
    items = rng.sample(items, len(items))
    half, rest = len(items) // 2, len(items) * 6 // 10
    parts = {"gate": items[:half], "select": items[half:rest], "test": items[rest:]}
    rows = {"train-form": [row(item, tasks.form, "english", with_form=True) for item in parts["gate"]]}
    for language in LANGUAGES:
        rows[f"train-{language}"] = [row(item, tasks.words, language, with_form=False) for item in items]
        for part, chosen in parts.items():
            rows[f"{part}-{language}"] = [row(item, tasks.form, language, with_form=True) for item in chosen]
    return rows
