"""From the bytes of a package's file to documents of plain text. Knows nothing about packages or splits."""

from __future__ import annotations

import json
import re
import textwrap
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser

Extract = Callable[[bytes], list[str]]

RECORDS = 18  # of a long JSON list, in a document
CHAPTERS = 6000  # characters of a Bible's document, after which no chapter follows
# Elements after which a paragraph ends, and those without text for a reader.
BLOCKS = {"p", "div", "li", "td", "th", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "dt", "dd", "tr", "table", "title"}
UNREAD = {"script", "style", "head", "header", "nav", "aside", "footer", "button"}


def decoded(data: bytes) -> str:
    """The text, or nothing where it is not UTF-8, but for a character in a thousand."""
    text = data.decode("utf-8-sig", errors="replace")
    if "\0" in text or 1000 * text.count("\ufffd") > len(text):
        return ""
    return text.replace("\ufffd", "").replace("\r\n", "\n").replace("\f", "\n")


def whole(data: bytes) -> list[str]:
    """One document, as it is."""
    return [decoded(data)]


def grouped(pattern: str, size: int = 6000, skip: str = r"(?!)") -> Extract:
    """Documents of consecutive pieces.

    Args:
        pattern: A regular expression that matches between two pieces.
        size: Characters after which a document is complete; at 0, each piece is a document.
        skip: What is removed before.
    """

    def extract(data: bytes) -> list[str]:
        documents: list[str] = []
        complete = True
        for piece in re.split(pattern, re.sub(skip, "", decoded(data))):
            if complete:
                documents.append(piece)
            else:
                documents[-1] += "\n\n" + piece if "\n" in piece else "\n" + piece
            complete = len(documents[-1]) >= size
        return documents

    return extract


class Reader(HTMLParser):
    """Collects what a reader sees of a page: paragraphs with blank lines between."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.unread: list[str] = []
        self.verbatim = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a block, or something that is not read."""
        if tag in UNREAD:
            self.unread.append(tag)
        if tag in BLOCKS:
            self.parts.append("\n\n")
        if tag == "br":
            self.parts.append("\n")
        self.verbatim = self.verbatim or tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        """End it."""
        if tag in self.unread:
            while self.unread.pop() != tag:
                pass
        if tag in BLOCKS:
            self.parts.append("\n\n")
        self.verbatim = self.verbatim and tag != "pre"

    def handle_data(self, data: str) -> None:
        """Text between tags: outside of <pre>, its line ends are spaces."""
        if not self.unread:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def page(data: bytes) -> list[str]:
    """What a reader sees of an HTML page."""
    reader = Reader()
    reader.feed(decoded(data))
    lines = "".join(reader.parts).split("\n")
    return [re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip()]


ESCAPES = {
    **{r"\-": "-", r"\e": "\\", r"\ ": " ", r"\~": " ", r"\.": ".", r"\(aq": "'", r"\(dq": '"', r"\(em": "—"},
    **{r"\(en": "–", r"\(bu": "•", r"\(lq": "“", r"\(rq": "”", r"\(oq": "‘", r"\(cq": "’", r"\(co": "©", r"\(ti": "~"},
    **{r"\(ha": "^", r"\(rs": "\\", r"\(Fo": "«", r"\(Fc": "»", r"\(ga": "`"},
}
ESCAPE = re.compile(r"\\(?:f(?:\[\w*\]|\(..|.)|s[-+]?\d+|\*(?:\[\w+\]|\(..|.)|\[[^]]*\]|\(..|.)")
HEADINGS = {"SH", "SS", "Sh", "Ss"}
BREAKS = {"PP", "P", "LP", "IP", "TP", "HP", "TQ", "sp", "Pp", "It", "RS", "RE"}
FONTS = {"B", "I", "BR", "RB", "BI", "IB", "IR", "RI", "SM", "SB"}


def unescaped(text: str) -> str:
    """A line of roff without its escapes."""
    return ESCAPE.sub(lambda match: ESCAPES.get(match[0], ""), text)


def manual(data: bytes) -> list[str]:
    """A man page's words, without roff's requests: prose with blank lines between paragraphs."""
    lines: list[str] = []
    inside = ""  # a table or a macro's definition: until the request that ends it
    for line in decoded(data).split("\n"):
        if not line.startswith((".", "'")):
            lines += [] if inside else [unescaped(line)]
            continue
        name, _, rest = line[1:].strip().partition(" ")
        if inside:
            inside = "" if name == inside else inside
        elif name in ("TS", "de"):
            inside = {"TS": "TE", "de": "."}[name]
        elif name in HEADINGS:
            lines += ["", unescaped(rest.strip('"'))]
        elif name in BREAKS:
            lines.append("")
        elif name in FONTS:
            words = re.findall(r'"((?:[^"])*)"|(\S+)', rest)
            joint = "" if len(name) == 2 and name != "SM" else " "
            lines.append(unescaped(joint.join(quoted or plain for quoted, plain in words)))
    return [re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()]


def records(data: bytes) -> list[str]:
    """JSON in its usual layout; of a long list, some records a document."""
    try:
        value = json.loads(decoded(data))
    except ValueError:
        return []
    (single,) = value.values() if isinstance(value, dict) and len(value) == 1 else (value,)
    if not isinstance(single, list):
        return [json.dumps(value, indent=2, ensure_ascii=False)]
    parts = [single[start : start + RECORDS] for start in range(0, len(single), RECORDS)]
    return [json.dumps(part, indent=2, ensure_ascii=False) for part in parts]


def licence(data: bytes) -> list[str]:
    """A licence without the description that precedes it."""
    return [re.sub(r"\A---\n.*?\n---\n", "", decoded(data), flags=re.DOTALL)]


def zlib_streams(data: bytes) -> Iterator[str]:
    """The texts of zlib streams, one after the other, whatever lies between."""
    while data:
        stream = zlib.decompressobj()
        try:
            text = stream.decompress(data)
        except zlib.error:
            start = data.find(b"x", 1)
            data = data[start:] if start > 0 else b""
            continue
        yield decoded(text)
        data = stream.unused_data


def sword(data: bytes) -> list[str]:
    """Chapters of a Bible as the Sword library keeps it: zText, one zlib stream a book, with OSIS markup."""
    documents = []
    for book in zlib_streams(data):
        text = re.sub(r"<(note|title)\b.*?</\1>", "", book, flags=re.DOTALL)
        text = re.sub(r'<chapter n="(\d+)"[^>]*>', r"\n\nChapter \1\n\n", text)
        text = re.sub(r'<div [^>]*type="x-p"[^>]*>', "\n\n", text)
        paragraphs = re.sub(r"<[^>]*>", "", text).split("\n\n")
        plain = "\n\n".join(textwrap.fill(part.strip(), 80) for part in paragraphs if part.strip())
        documents += grouped(r"\n\n(?=Chapter \d)", CHAPTERS)(plain.encode())
    return documents


def english(paragraph: str, own_letters: bool) -> bool:
    """Whether a paragraph of a translation is English: it has English words, or none of the language's own letters."""
    words = re.findall(r"\w+", paragraph.lower())
    common = sum(word in {"the", "of", "and", "to", "that", "with", "this", "for", "are", "is"} for word in words)
    return len(words) >= 6 and (common > 0.12 * len(words) or (own_letters and paragraph.isascii()))


def without_english(text: str) -> str:
    """A translated text without the paragraphs that were left in English."""
    letters = [letter for letter in text if letter.isalpha()]
    own_letters = sum(not letter.isascii() for letter in letters) > len(letters) / 2
    return "\n\n".join(part for part in re.split(r"\n\s*\n", text) if not english(part, own_letters))
