"""Windows, scores and intervals: what stands in a cell of `weft eval`."""

import json
import math

import numpy as np
import pytest
import torch

import weft
from models import VOCAB, tiny_llama, tiny_tokenizer
from weft.errors import DataError
from weft.evaluate import perplexity
from weft.evaluate.data_sets import DataSet, Text, read_data_set, token_windows
from weft.evaluate.intervals import interval, resampled_means
from weft.evaluate.run import by_example
from weft.evaluate.scoring import Runner, is_answer, score, token_losses, value_of


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 20])
@pytest.mark.parametrize("stride", [1, 3, 6])
def test_with_a_stride_every_token_but_the_first_is_scored_once_after_enough_others(length, stride):
    windows = token_windows(length, 7, stride)
    scored = [token for window in windows for token in range(window.first, window.end)]
    assert scored == list(range(1, length))
    for window in windows:
        assert window.end - window.start == min(7, length)
        assert window.first - window.start >= min(window.first, 7 - stride)


def test_without_a_stride_windows_stand_side_by_side():
    assert token_windows(9, 4) == [(0, 4, 1), (4, 8, 5)]  # a rest of one token predicts nothing


def texts_of(tokens, window, stride):
    texts = [Text(one, [0] * len(one), token_windows(len(one), window, stride)) for one in tokens]
    return DataSet("x", "perplexity", texts, list(range(len(texts))), [None] * len(texts))


def value(model, data, **options):
    scores = score(Runner(model, **options), data)
    return value_of(data, *(sum(column) for column in zip(*scores, strict=True)))


@pytest.fixture
def tokens():
    return [torch.randint(1, VOCAB, (length,)).tolist() for length in (3, 19, 2, 11)]


def test_windows_as_long_as_the_texts_give_the_plain_perplexity(tokens):
    model = tiny_llama()
    for stride in (0, 5):
        assert value(model, texts_of(tokens, 19, stride)) == pytest.approx(perplexity(model, tokens, 4), rel=1e-6)


def test_a_strides_perplexity_is_the_one_of_a_plain_loop(tokens):
    model, total, count = tiny_llama(), 0.0, 0
    for text in tokens:
        for position in range(1, len(text)):
            window = next(w for w in token_windows(len(text), 6, 2) if w.first <= position < w.end)
            with torch.no_grad():
                logits = model(torch.tensor([text[window.start : position]])).logits[0, -1]
            total -= float(logits.log_softmax(-1)[text[position]])
            count += 1
    for batch_size in (1, 3):
        found = value(model, texts_of(tokens, 6, 2), batch_size=batch_size)
        assert found == pytest.approx(math.exp(total / count), rel=1e-5)


def test_frozen_scores_are_the_same_alone_and_in_a_padded_batch(llama_adapters, tokens):
    model = weft.from_adapters(tiny_llama(), llama_adapters, layerwise_scalings=True).eval()
    frozen, whole = texts_of(tokens, 19, 0), perplexity(model, tokens, 4)
    alone = value(model, frozen, batch_size=1, freeze_after=4)
    assert alone == pytest.approx(value(model, frozen, batch_size=4, freeze_after=4), rel=1e-5)
    assert alone != pytest.approx(whole, rel=1e-5)
    assert value(model, frozen, batch_size=4, freeze_after=19) == pytest.approx(whole, rel=1e-5)


def written(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def read(file, name="x", experts=("math", "code"), **options):
    return read_data_set(name, file, tiny_tokenizer(), experts, **{"sequence_length": 64, **options})


def test_parts_of_a_text_are_scored_apart_and_sum_up_to_it(base_folder, tmp_path):
    spans = [[0, "math"], [4, "code"], [9, "math"]]
    marked = read(written(tmp_path, {"text": "one two three", "experts": spans}, {"text": "abc", "expert": "code"}))
    assert marked.labels == ["math", "code", "math", "code"]
    assert marked.example_of_part == [0, 0, 0, 1]
    plain = read(written(tmp_path, {"text": "one two three"}, {"text": "abc"}))
    assert plain.labels == [None, None]
    assert read(written(tmp_path, {"text": "abc"}), name="math").labels == ["math"]
    model = tiny_llama(vocab_size=300)
    scores = score(Runner(model), marked)
    assert [weight for _, weight in scores] == [3, 5, 4, 2]  # the text's first token is not predicted
    assert np.allclose(by_example(marked, scores), by_example(plain, score(Runner(model), plain)))


def test_a_choice_is_right_by_its_log_likelihood_per_character(tmp_path):
    rows = [
        {"question": "one two", "choices": ["a", "bcd", "some words"], "answer": answer} for answer in (0, "bcd", "C")
    ]
    data, model, tokenizer = read(written(tmp_path, *rows)), tiny_llama(vocab_size=300), tiny_tokenizer()
    assert [example.answer for example in data.examples] == [0, 1, 2]
    per_character = []
    for choice in rows[0]["choices"]:
        ids = torch.tensor([tokenizer(f"one two {choice}")["input_ids"]])
        with torch.no_grad():
            log = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        per_character.append(float(log[len("one two") - 1 :].sum()) / len(choice))
    right = per_character.index(max(per_character))
    assert [correct for correct, _ in score(Runner(model, batch_size=2), data)] == [float(i == right) for i in range(3)]
    short = read(written(tmp_path, *rows), sequence_length=6)
    assert len(score(Runner(model), short)) == 3  # a long question loses its beginning


def test_an_answer_is_compared_with_the_generated_text(tmp_path):
    model, tokenizer = tiny_llama(vocab_size=300), tiny_tokenizer()
    prompts = ["one", "two three"]
    written_by = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        output = model.generate(ids, max_new_tokens=5, do_sample=False)
        written_by.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    right = [
        {"prompt": p, "answer": ["no", a.strip().partition("\n")[0]]} for p, a in zip(prompts, written_by, strict=True)
    ]
    data = read(written(tmp_path, *right, {"prompt": "one", "answer": "no"}), max_new_tokens=5)
    assert score(Runner(model, tokenizer), data) == [(1.0, 1.0), (1.0, 1.0), (0.0, 1.0)]


def test_after_a_one_line_answer_other_lines_may_follow():
    assert is_answer(" 42 \nQuestion: ", ["41", "42"])
    assert not is_answer("42 apples", ["42"])
    assert is_answer("a\nb\n", ["a\nb"])
    assert not is_answer("a\nb\nc", ["a\nb"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "choices": ["a", "b"], "answer": "c"}, r"answer \('c'\) must be one of the choices, its n"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, r"answer \(2\) must be one of the choices.*0 to 1"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "two or more choices"),
        ({"prompt": "", "answer": "a"}, "the prompt is empty"),
        ({"prompt": "a", "answer": 4}, r"an answer \(a string, or a list of them\)"),
        ({"text": "abc", "experts": [[2, "math"]]}, r'"experts" .* must be \[\[start, name\], ...\] in order'),
        ({"text": "a"}, "holds no text of two tokens or more"),
    ],
)
def test_rows_that_cannot_be_measured_are_named(row, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read(written(tmp_path, row))


def test_rows_of_another_kind_are_named(tmp_path):
    file = written(tmp_path, {"prompt": "a", "answer": "b"}, {"text": "c"})
    with pytest.raises(
        DataError, match=r"rows.jsonl, line 2: found the keys \['text'\], expected \['answer', 'prompt'\]"
    ):
        read(file)


def test_the_intervals_of_a_mean_are_those_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    low, high = interval(resampled_means(values, np.ones(400), seed=0, resamples=4000))
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_resampling_weighs_pairs_and_repeats_itself():
    values, weights = np.array([4.0, 1.0, 10.0]), np.array([2.0, 1.0, 5.0])
    means = resampled_means(values, weights, seed=3)
    assert (means == resampled_means(values, weights, seed=3)).all()
    assert means.min() >= 1.0
    assert means.max() <= 2.0
    assert np.allclose(resampled_means(values + weights, weights, seed=3) - means, 1.0)  # the same examples were drawn
    assert interval(resampled_means(weights * 3, weights, seed=0)) == pytest.approx((3.0, 3.0))


def test_token_losses_leave_padding_out(tokens):
    model = tiny_llama()
    together, alone = (
        token_losses(Runner(model, batch_size=4), tokens),
        token_losses(Runner(model, batch_size=1), tokens),
    )
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_perplexity_is_the_same_for_every_batch_size():
    sequences = [torch.randint(1, VOCAB, (length,)).tolist() for length in (3, 9, 2, 6)]
    model = tiny_llama()
    total, count = 0.0, 0
    with torch.no_grad():
        for sequence in sequences:
            ids = torch.tensor([sequence])
            total += float(model(input_ids=ids, labels=ids).loss) * (len(sequence) - 1)
            count += len(sequence) - 1
    for batch_size in (1, 2, 4):
        assert perplexity(model, sequences, batch_size) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_perplexity_needs_a_token_to_predict():
    for sequences in ([], [[5]]):
        with pytest.raises(DataError, match=r"sequences hold no text of two tokens or more: there is no token"):
            perplexity(tiny_llama(), sequences, 1)
