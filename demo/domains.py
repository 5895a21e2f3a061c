"""Text files for training and evaluation: four domains, and texts which switch between them.

Each source text (a module, a topic, a licence file, a batch of records) goes as a whole to one of
three parts: `experts` trains the experts, `gate` supplies the mixed training texts, which the experts
have thus never seen, and `heldout` is only ever evaluated.
"""

import json
import random
from bisect import bisect_left
from pathlib import Path

from rich.progress import track
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sources import domain_texts
from stage import building

SEED = 2
SHARES = {"experts": 0.5, "gate": 0.2, "heldout": 0.3}
# A long module or licence collection shall not crowd out the others.
MAX_CHARACTERS = 40_000
ROW_TOKENS = 256
# Cutting and joining change tokens at the seams; a text must still have enough of them to be clipped.
SPARE_TOKENS = 8
PASSAGE_TOKENS = (56, 100)
TRAIN_ROWS = 160
HELDOUT_ROWS = 48
BETWEEN = "\n\n"  # the passages of a mixed text

Parts = dict[str, list[str]]
Row = dict[str, object]


def split(texts: dict[str, str], rng: random.Random) -> Parts:
    """Deal whole texts to the parts, so that each receives about its share of the characters.

    Args:
        texts: The texts of one domain by name.
        rng: The source of the dealing order.

    Returns:
        The texts of each part.
    """
    parts: Parts = {part: [] for part in SHARES}
    filled = dict.fromkeys(SHARES, 0.0)
    for name in rng.sample(sorted(texts), len(texts)):
        text = texts[name][:MAX_CHARACTERS]
        part = min(SHARES, key=lambda part: filled[part] / SHARES[part])
        parts[part].append(text)
        filled[part] += len(text)
    return parts


def token_starts(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the character position at which each token of a text starts.

    Args:
        text: The text.
        tokenizer: The tokenizer.

    Returns:
        The positions in ascending order.
    """
    return [start for start, _ in tokenizer(text, return_offsets_mapping=True).offset_mapping]


def clip(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Cut a text off after `ROW_TOKENS` tokens, so that every row fills exactly one sequence.

    Args:
        text: A text of at least that length.
        tokenizer: The tokenizer with which to count.

    Returns:
        The beginning of the text.
    """
    return text[: token_starts(text, tokenizer)[ROW_TOKENS]]


def cut(text: str, lengths: tuple[int, int], tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> list[str]:
    """Cut a text at line ends into pieces.

    Args:
        text: The text; its remainder at the end, too short for a piece, is left out.
        lengths: The least and greatest length of a piece in tokens, before its last line is completed.
        tokenizer: The tokenizer with which to count.
        rng: The source of the lengths.

    Returns:
        The pieces in order.
    """
    starts = token_starts(text, tokenizer)
    pieces: list[str] = []
    begin = 0
    while True:
        last_token = bisect_left(starts, begin) + rng.randint(*lengths)
        if last_token >= len(starts):
            return pieces
        end = text.find("\n", starts[last_token])
        if end < 0:
            return pieces
        pieces.append(text[begin:end].strip("\n"))
        begin = end + 1


def single_rows(texts: list[str], tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> list[Row]:
    """Cut texts of one domain into rows of `ROW_TOKENS` tokens, in random order.

    Args:
        texts: The texts.
        tokenizer: The tokenizer with which to count.
        rng: The source of the order.

    Returns:
        The rows.
    """
    wanted = ROW_TOKENS + SPARE_TOKENS
    pieces = [piece for text in texts for piece in cut(text, (wanted, wanted), tokenizer, rng)]
    rows: list[Row] = [{"text": clip(piece, tokenizer)} for piece in pieces]
    rng.shuffle(rows)
    return rows


def mixed_rows(
    texts: dict[str, list[str]], count: int, tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> list[Row]:
    """Join short passages of different domains into rows of `ROW_TOKENS` tokens.

    Args:
        texts: For each domain its texts.
        count: The number of rows.
        tokenizer: The tokenizer with which to count.
        rng: The source of the passages and of the order of the domains.

    Returns:
        The rows, each with "experts": where which domain begins, in characters. In each row, every domain comes once
        before one comes again.
    """
    passages = {}
    for domain, sources in texts.items():
        passages[domain] = [p for text in sources for p in cut(text, PASSAGE_TOKENS, tokenizer, rng)]
    rows = []
    for _ in range(count):
        order = rng.sample(sorted(passages), len(passages))
        row: list[str] = []
        spans: list[list[int | str]] = []
        length = 0
        while length < ROW_TOKENS + SPARE_TOKENS:
            domain = order[len(row) % len(order)]
            passage = rng.choice(passages[domain])
            spans.append([sum(len(before) + len(BETWEEN) for before in row), domain])
            row.append(passage)
            length += len(tokenizer(passage).input_ids)
        text = clip(BETWEEN.join(row), tokenizer)
        rows.append({"text": text, "experts": [span for span in spans if span[0] < len(text)]})
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows as one JSON object per line, the format that `weft` reads.

    Args:
        path: The file to create.
        rows: The rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def ensure_domains(folder: Path, model: Path) -> None:
    """Write the text files of all domains, unless already there.

    The folder receives `train/NAME.jsonl` and `heldout/NAME.jsonl` for each domain and for `mixed`.

    Args:
        folder: The folder to create.
        model: The folder of the base model, whose tokenizer measures the texts.
    """
    if folder.exists():
        return
    rng = random.Random(SEED)
    tokenizer = AutoTokenizer.from_pretrained(model)
    gate, heldout = {}, {}
    with building(folder) as partial:
        for domain, texts in track(domain_texts().items(), "Cutting texts"):
            parts = split(texts, rng)
            gate[domain], heldout[domain] = parts["gate"], parts["heldout"]
            rows = single_rows(parts["experts"], tokenizer, rng)
            write_rows(partial / "train" / f"{domain}.jsonl", rows[:TRAIN_ROWS])
            rows = single_rows(parts["heldout"], tokenizer, rng)
            write_rows(partial / "heldout" / f"{domain}.jsonl", rows[:HELDOUT_ROWS])
        write_rows(partial / "train" / "mixed.jsonl", mixed_rows(gate, TRAIN_ROWS, tokenizer, rng))
        write_rows(partial / "heldout" / "mixed.jsonl", mixed_rows(heldout, HELDOUT_ROWS, tokenizer, rng))
