"""The data sets of an evaluation: texts, multiple choice, and questions with an answer to generate.

The keys of the rows determine the kind. Each example has one or more *parts*, each of one expert's domain. Scores are
kept for each part, so that the oracle can take each part from its own expert. Intervals are resampled by example.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from weft.data.labelled import tokens_and_parts
from weft.data.texts import at_place, prompt_tokens, read_rows, row_prompt_tokens
from weft.data.windows import check_sequence_length, end_of, opening_length, opening_of, spans, window
from weft.errors import DataError
from weft.files.reading import shown

Metric = Literal["perplexity", "accuracy", "exact_match"]
_TEXT = {"text", "messages"}
_CHOICE = {"question", "choices", "answer"}
_GENERATION = {"prompt", "answer"}


class Window(NamedTuple):
    """The part of a text for one forward pass: tokens `start` to `end`; those from `first` on are scored.

    What is read before them (`Text.opening`) is not counted here.
    """

    start: int
    end: int
    first: int


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        tokens: its tokens.
        parts: the index of each token's part.
        windows: its windows.
        opening: number of tokens at its start that are read before each later window, too (`weft.data.windows`).
    """

    tokens: list[int]
    parts: list[int]
    windows: list[Window]
    opening: int = 0


@dataclass(frozen=True)
class Choice:
    """One multiple-choice question.

    Attributes:
        sequences: for each choice, the tokens of the question and the choice.
        firsts: for each choice, the index of its first token in the sequence.
        lengths: for each choice, its length in characters.
        answer: index of the right choice.
    """

    sequences: list[list[int]]
    firsts: list[int]
    lengths: list[int]
    answer: int


@dataclass(frozen=True)
class Question:
    """A prompt and its right answers."""

    tokens: list[int]
    answers: list[str]


@dataclass(frozen=True)
class DataSet:
    """The data set of one column of the table.

    Attributes:
        name: the user's name for it.
        metric: the metric of its kind.
        examples: `Text`s, `Choice`s or `Question`s.
        example_of_part: for each part, the index of its example.
        labels: for each part, the expert of its domain, or None.
        max_new_tokens: maximum length of generated answers.
    """

    name: str
    metric: Metric
    examples: list[Any]
    example_of_part: list[int]
    labels: list[str | None]
    max_new_tokens: int = 0
    digest: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        # Without labels: they change the oracle, which is computed from scores, but no score.
        # An opening of no tokens is left out, so that cells of earlier versions are found.
        examples = [
            {name: value for name, value in vars(example).items() if (name, value) != ("opening", 0)}
            for example in self.examples
        ]
        content = [self.metric, examples, self.example_of_part, self.max_new_tokens]
        object.__setattr__(self, "digest", hashlib.sha256(json.dumps(content).encode()).hexdigest())

    @property
    def steps(self) -> int:
        """The number of windows or examples, for the progress display."""
        if self.metric == "perplexity":
            return sum(len(text.windows) for text in self.examples)
        return len(self.examples)


def windows_of(data: DataSet) -> list[list[int]]:
    """The tokens of each window of a data set of texts."""
    return [window(text.tokens, part.start, part.end, text.opening) for text in data.examples for part in text.windows]


def token_windows(length: int, size: int, stride: int = 0, opening: int = 0) -> list[Window]:
    """The windows of a text of `length` tokens.

    Without a stride, the windows do not overlap. With a stride, each window after the first begins `stride` tokens
    later (at most size - opening), and only its new tokens are scored. So each token except the text's first is scored
    once, with at least size - stride tokens of context (except at the start of the text). The last window is as long as
    the others, as in the rolling windows of lm-evaluation-harness.

    With an `opening`, the text's first tokens are read before each later window, too, and are a part of its size.
    Without a stride and an opening, the first token of a window is not scored, as it has no context.

    Example:
        >>> token_windows(10, 4, stride=3)
        [Window(0, 4, 1), Window(3, 7, 4), Window(6, 10, 7)]
        >>> token_windows(10, 4, opening=1)
        [Window(0, 4, 1), Window(4, 7, 4), Window(7, 10, 7)]
    """
    if stride == 0:
        parts = spans(length, size, opening)
        return [Window(start, end, max(start, 1) if opening else start + 1) for start, end in parts]
    check_sequence_length(size, opening)
    stride = min(stride, size - opening)  # no token may be left out between two windows
    windows: list[Window] = []
    end = 0
    while end < length and length > 1:
        first = max(1, end)
        end = min(end + stride, length) if windows else min(size, length)
        windows.append(Window(max(0, end - size + opening) if windows else 0, end, first))
    return windows


def read_data_set(
    name: str,
    source: str,
    tokenizer: Any,
    expert_names: Sequence[str],
    *,
    sequence_length: int,
    stride: int = 0,
    max_sequences: int = 0,
    max_new_tokens: int = 32,
) -> DataSet:
    """Read one data set. The keys of its rows determine the metric.

    Args:
        name: name of the data set. If it is an expert's name, all examples are of that expert's domain.
        source: as for `read_tokens`. Rows with text or messages are texts; rows with question, choices and answer are
            multiple choice; rows with prompt (a text, or messages) and answer are questions. "expert" is the domain of
            a row, and "experts" ([[start, name], ...], with character positions) are the domains of a text's parts.
        tokenizer: the base model's tokenizer.
        expert_names: the experts; other labels are ignored.
        sequence_length: number of tokens in a window.
        stride: see `token_windows`.
        max_sequences: maximum number of windows or examples, from the start; 0 takes all.
        max_new_tokens: maximum length of generated answers.

    Raises:
        DataError: the source cannot be read, or has no usable rows.
    """
    rows, opening = list(read_rows(source)), opening_of(tokenizer)
    keys = set(rows[0][1]) if rows and isinstance(rows[0][1], dict) else set()
    keys = set() if keys & _TEXT else keys
    default = name if name in expert_names else None
    if keys >= _CHOICE or keys >= _GENERATION:
        rows = rows[: max_sequences or None]
        make: Any = _choice if keys >= _CHOICE else _question
        examples = [make(_object(row, place, keys), place, tokenizer, sequence_length, opening) for place, row in rows]
        labels = [_label(row.get("expert", default), expert_names) for _, row in rows]
        metric: Metric = "accuracy" if keys >= _CHOICE else "exact_match"
        new_tokens = 0 if metric == "accuracy" else max_new_tokens
        return DataSet(name, metric, examples, list(range(len(rows))), labels, new_tokens)

    texts: list[Text] = []
    example_of_part: list[int] = []
    labels = []
    left = max_sequences or None
    for place, row in rows:
        tokens, parts, names = tokens_and_parts(row, place, tokenizer, default)
        if left == 0:
            continue
        before = opening_length(tokens, opening)
        windows = token_windows(len(tokens), sequence_length, stride, before)[:left]
        if windows:
            left = None if left is None else left - len(windows)
            example_of_part += [len(texts)] * len(names)
            labels += [_label(label, expert_names) for label in names]
            texts.append(Text(tokens, parts, windows, before))
    if not texts:
        raise DataError(f"data ({source}) holds no text of two tokens or more")
    return DataSet(name, "perplexity", texts, example_of_part, labels)


def _label(name: Any, expert_names: Sequence[str]) -> str | None:
    return name if name in expert_names else None


def _object(row: Any, place: str, keys: set[str]) -> dict[str, Any]:
    wanted = sorted(_CHOICE if keys >= _CHOICE else _GENERATION)
    if not isinstance(row, dict) or not set(wanted) <= set(row):
        found = f"the keys {shown(sorted(row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f"{place}: found {found}, expected {wanted} as in the first row")
    return row


def _choice(row: dict[str, Any], place: str, tokenizer: Any, length: int, opening: list[int]) -> Choice:
    question, choices = row["question"], row["choices"]
    choices = list(choices) if isinstance(choices, Sequence) and not isinstance(choices, str) else []
    if not isinstance(question, str) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise DataError(f"{place}: expected a question (a string) and two or more choices (strings)")
    context = at_place(place, prompt_tokens, question.rstrip(), tokenizer)
    sequences, firsts = [], []
    for choice in choices:
        # Encoded together, as a token can contain the space between them.
        whole = at_place(place, prompt_tokens, f"{question.rstrip()} {choice}", tokenizer)
        sequence, before, cut = end_of(whole, length, opening)
        sequences.append(sequence)
        firsts.append(max(1, before, min(len(context), len(whole) - 1) - cut))
    return Choice(sequences, firsts, [len(choice) for choice in choices], _answer(row["answer"], choices, place))


def _answer(answer: Any, choices: list[str], place: str) -> int:
    """The index of the right choice, which is given as its text, its index from 0, or its letter."""
    if answer in choices:
        return choices.index(answer)
    letters = [chr(ord("A") + number) for number in range(len(choices))]
    if isinstance(answer, str) and answer.strip().upper() in letters:
        return letters.index(answer.strip().upper())
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    last = len(choices) - 1
    raise DataError(
        f"{place}: answer ({shown(answer)}) must be one of the choices, its number from 0 to {last}, or its letter"
    )


def _question(row: dict[str, Any], place: str, tokenizer: Any, length: int, opening: list[int]) -> Question:
    answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    if not isinstance(row["prompt"], str | list) or not isinstance(answers, list) or not answers:
        raise DataError(
            f"{place}: expected a prompt (a string, or messages) and an answer (a string, or a list of them)"
        )
    tokens, *_ = end_of(row_prompt_tokens(row, place, tokenizer), length, opening)
    if not tokens:
        raise DataError(f"{place}: the prompt is empty")
    return Question(tokens, [str(answer) for answer in answers])
