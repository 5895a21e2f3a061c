"""Windows of long texts: each begins with the tokens that the tokenizer puts before a text."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import weft
from models import tiny_llama, tiny_tokenizer
from weft.data.labelled import training_rows
from weft.data.windows import end_of, opening_of, spans, token_sequences, window
from weft.errors import DataError
from weft.evaluate.data_sets import read_data_set, token_windows, windows_of
from weft.evaluate.scoring import Runner, score
from weft.train import gate_fit

TEXT = "the quick brown fox jumps over the lazy dog"


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def tokenizer_with(template):
    """A tokenizer that puts its own tokens around a text; its `bos_token` is <s>, whether it adds it or not."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<mask>"]})
    if template:
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<mask>", "<eos>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "opening"),
    [("", []), ("<s> $A", ["<s>"]), ("<mask> <s> $A <eos>", ["<mask>", "<s>"]), ("$A <eos>", []), ("$A", [])],
)
def test_opening_is_what_the_tokenizer_adds_and_not_what_its_bos_token_is(template, opening):
    tokenizer = tokenizer_with(template)
    assert opening_of(tokenizer) == tokenizer.convert_tokens_to_ids(opening)
    assert opening_of(None) == []


@pytest.mark.parametrize(
    ("letters", "unknown", "opening"),
    [("ACGT", None, [0]), ("ACGT", "<s>", [0]), ("ACGT", "<eos>", [0]), ("xyz", None, []), ("xyz", "<s>", [])],
)
def test_opening_is_found_with_a_letter_that_the_vocabulary_has(letters, unknown, opening):
    model = WordLevel({token: number for number, token in enumerate(["<s>", "<eos>", *letters])}, unk_token=unknown)
    backend = Tokenizer(model)
    backend.pre_tokenizer = Split("", "isolated")
    backend.post_processor = TemplateProcessing(single="<s> $A <eos>", special_tokens=[("<s>", 0), ("<eos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<eos>")
    assert opening_of(tokenizer) == opening


@given(st.integers(0, 40), st.integers(3, 12), st.integers(0, 2))
def test_windows_have_every_token_once_after_the_opening(number, length, opening):
    tokens = list(range(number))
    parts = list(spans(number, length, opening))
    cut = [window(tokens, start, end, opening) for start, end in parts]
    assert all(2 <= len(one) <= length for one in cut)
    assert all(len(one) == length for one in cut[:-1])
    assert all(one[:opening] == tokens[:opening] for one in cut[1:])
    own = [token for start, end in parts for token in tokens[start:end]]
    # A rest of one token can be predicted only if something is read before it.
    alone = number % length == 1 if opening == 0 else number == 1
    assert own == (tokens[:-1] if alone else tokens)


@given(st.integers(0, 40), st.integers(3, 12), st.integers(0, 11), st.integers(0, 2))
def test_every_token_but_the_first_is_scored_once_after_enough_others(number, size, stride, opening):
    stride = min(stride, size - 1)
    windows = token_windows(number, size, stride, opening)
    scored = [token for one in windows for token in range(one.first, one.end)]
    if stride or opening:
        assert scored == list(range(1, number))
    for at, one in enumerate(windows):
        before = opening if at else 0
        assert one.end - one.start + before <= size
        assert one.start >= before
        assert one.first - one.start + before >= max(1, min(one.first, size - stride) if stride else 1)


def test_text_that_begins_otherwise_is_cut_without():
    assert token_sequences([[9, 1, 2, 3, 4], [1, 2, 3, 4]], 3, [9]) == [[9, 1, 2], [9, 3, 4], [1, 2, 3]]


def test_end_of_a_text_keeps_its_opening():
    assert end_of([9, 1, 2, 3, 4], 3, [9]) == ([9, 3, 4], 1, 2)
    assert end_of([1, 2, 3, 4], 3, [9]) == ([2, 3, 4], 0, 1)
    assert end_of([9, 1], 3, [9]) == ([9, 1], 1, 0)


def test_window_of_the_opening_alone_is_refused():
    message = r"sequence_length \(2\) must be at least 3: the tokenizer begins each text with 2 tokens"
    with pytest.raises(DataError, match=message):
        token_sequences([[8, 9, 1]], 2, [8, 9])
    with pytest.raises(DataError, match=message):
        token_windows(9, 2, 1, opening=2)
    with pytest.raises(DataError, match=message):
        end_of([8, 9, 1], 2, [8, 9])


# ---------------------------------------------------------------------- all that reads texts


@pytest.fixture
def file(tmp_path):
    half = len(TEXT) // 2
    rows = [{"text": TEXT, "experts": [[0, "code"], [half, "math"]]}]
    return write_jsonl(tmp_path / "texts.jsonl", rows)


@pytest.fixture
def tokenizer():
    return tokenizer_with("<s> $A")


def expected(tokenizer, length):
    first, *rest = tokenizer(TEXT)["input_ids"]
    starts = range(0, len(rest), length - 1)
    return [[first, *rest[start : start + length - 1]] for start in starts]


@pytest.mark.parametrize("length", [2, 8, 9])
def test_training_evaluation_and_fit_read_the_same_windows(length, file, tokenizer):
    wanted = expected(tokenizer, length)
    rows = training_rows([file], ["code", "math"], tokenizer, length, labelled=True)
    assert [row["input_ids"] for row in rows] == wanted
    assert windows_of(read_data_set("x", file, tokenizer, [], sequence_length=length)) == wanted
    # <s> belongs to the part that it stands before.
    assert all(row["expert_labels"][0] == row["expert_labels"][1] for row in rows)
    labels = [label for row in rows for label in row["expert_labels"][1:]]
    assert labels == sorted(labels)
    assert len(labels) == len(tokenizer(TEXT)["input_ids"]) - 1


def test_opening_of_two_tokens_is_trained_on_once(file):
    tokenizer = tokenizer_with("<mask> <s> $A")
    rows = training_rows([file], [], tokenizer, 9, labelled=False)
    trained = [label for row in rows for label in row["labels"][1:] if label != -100]
    assert trained == tokenizer(TEXT)["input_ids"][1:]


def test_fit_reads_the_same_windows_and_counts_each_token_once():
    tokenizer = tokenizer_with("<mask> <s> $A")
    chosen = gate_fit._draw([TEXT], "losses", tokenizer, ["code"], 9, None, 0, 1000)
    first, second, *tokens = tokenizer(TEXT)["input_ids"]
    assert [example["input_ids"] for example in chosen] == [
        [first, second, *tokens[start : start + 7]] for start in range(0, len(tokens), 7)
    ]
    counted = [token for example in chosen for token, counts in zip(*example.values(), strict=True) if counts]
    assert counted == [first, second, *tokens]


def test_traces_of_long_texts_read_the_same_windows(file, tokenizer, llama_adapters):
    base = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=8)
    model = weft.from_adapters(base, llama_adapters).eval()
    traced = weft.trace(model, TEXT, tokenizer=tokenizer)
    wanted = expected(tokenizer, 8)
    assert traced.token_ids.tolist() == [token for one in wanted for token in one]
    assert [text.num_tokens for text in traced.texts] == [len(one) for one in wanted]
    of_file = weft.trace_data(model, {"a": file}, tokenizer=tokenizer, sequence_length=8)
    assert of_file.token_ids.tolist() == traced.token_ids.tolist()
    assert weft.trace(model, "x", tokenizer=tokenizer).token_ids.tolist() == tokenizer("x")["input_ids"]
    assert weft.trace(model, [5]).token_ids.tolist() == [5]


@pytest.mark.parametrize("stride", [0, 3])
def test_loss_of_each_token_is_that_of_a_plain_loop(stride, file, tokenizer):
    model = tiny_llama(vocab_size=len(tokenizer))
    data = read_data_set("x", file, tokenizer, ["code", "math"], sequence_length=9, stride=stride)
    tokens = tokenizer(TEXT)["input_ids"]
    sums = [0.0, 0.0]
    for position in range(1, len(tokens)):
        one = next(one for one in data.examples[0].windows if one.first <= position < one.end)
        read = tokens[: one.end] if one.start == 0 else [tokens[0], *tokens[one.start : one.end]]
        at = len(read) - (one.end - position)
        with torch.no_grad():
            logits = model(torch.tensor([read[:at]])).logits[0, -1]
        sums[data.examples[0].parts[position]] -= float(logits.log_softmax(-1)[tokens[position]])
    found = score(Runner(model), data)
    assert [total for total, _ in found] == pytest.approx(sums, rel=1e-4)
    assert sum(count for _, count in found) == len(tokens) - 1


def test_long_questions_keep_the_opening(tmp_path, tokenizer):
    choices = [{"question": TEXT, "choices": ["yes", "no"], "answer": 0}]
    file = write_jsonl(tmp_path / "choices.jsonl", choices)
    [choice] = read_data_set("x", file, tokenizer, [], sequence_length=12).examples
    for sequence, first, answer in zip(choice.sequences, choice.firsts, choices[0]["choices"], strict=True):
        whole = tokenizer(f"{TEXT} {answer}")["input_ids"]
        assert sequence == [whole[0], *whole[-11:]]
        assert sequence[first:] == whole[len(tokenizer(TEXT)["input_ids"]) :]
    choices = [{"question": "a", "choices": [TEXT, "no"], "answer": 0}]
    two = tokenizer_with("<mask> <s> $A")
    file = write_jsonl(tmp_path / "long.jsonl", choices)
    [choice] = read_data_set("x", file, two, [], sequence_length=12).examples
    assert choice.firsts[0] == 2  # the opening is no part of the answer
    file = write_jsonl(tmp_path / "questions.jsonl", [{"prompt": TEXT, "answer": "yes"}])
    [question] = read_data_set("x", file, tokenizer, [], sequence_length=12).examples
    tokens = tokenizer(TEXT)["input_ids"]
    assert question.tokens == [tokens[0], *tokens[-11:]]
