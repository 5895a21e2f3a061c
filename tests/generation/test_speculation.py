"""Guessing ahead changes the time, never the text."""

import pytest
import torch
import transformers
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

import weft
from models import VOCAB, tiny_llama, weft_model
from weft.errors import ConfigError
from weft.generation.speculation import LONGEST_PAUSE, DraftLength, DraftTimer, NGramDrafts, Speculation


@pytest.fixture
def model(llama_adapters):
    return weft.from_adapters(tiny_llama(), llama_adapters, layerwise_scalings=True).eval()


def prompt(seed=0, length=12):
    """A text that repeats itself."""
    part = torch.randint(1, VOCAB, (1, length // 2), generator=torch.Generator().manual_seed(seed))
    return torch.cat([part, part], 1)


def always(monkeypatch):
    """Guess with the scaling pass whenever the n-grams do not."""
    monkeypatch.setattr(DraftTimer, "draft_now", lambda self: True)


# -------------------------------------------------------------------------------------- the same text


@pytest.mark.parametrize("base_guesses", [False, True], ids=["n-grams", "and the scaling pass"])
@pytest.mark.parametrize("options", [{}, {"scaling_pass_value": 0.3}, {"gate_layer": 1}, {"scaling_pass_layers": 1}])
def test_greedy_text_is_that_of_plain_decoding(decoder, options, base_guesses, monkeypatch):
    if base_guesses:
        always(monkeypatch)
    model = weft_model(decoder, **options)
    expected = weft.generate(model, prompt(), max_new_tokens=24)
    found = weft.generate(model, prompt(), max_new_tokens=24, speculate=6)
    assert found.tokens == expected.tokens
    assert found.finish_reason == expected.finish_reason
    assert expected.num_calls == 24


def test_right_guesses_save_calls(model):
    # A tiny greedy model soon repeats itself.
    found = weft.generate(model, prompt(), max_new_tokens=40, speculate=8)
    assert found.num_calls < 30


def test_guesses_of_the_scaling_pass_save_calls_where_the_mixture_is_the_base(model, monkeypatch):
    always(monkeypatch)
    monkeypatch.setattr(NGramDrafts, "__call__", lambda self, limit: [])
    model.base_model.set_global_scaling_weight(0.0)  # then the base is always right
    found = weft.generate(model, prompt(), max_new_tokens=25, speculate=4)
    assert found.num_calls <= 9
    assert found.tokens == weft.generate(model, prompt(), max_new_tokens=25).tokens


@pytest.mark.parametrize("seed", range(4))
def test_the_same_seed_samples_the_same_text(model, seed, monkeypatch):
    always(monkeypatch)
    options = {"max_new_tokens": 24, "temperature": 0.7, "top_k": 8, "seed": seed}
    expected = weft.generate(model, prompt(), **options)
    assert weft.generate(model, prompt(), **options, speculate=4).tokens == expected.tokens


def test_sampled_tokens_have_the_models_probabilities(model, monkeypatch):
    """Chi-squared over the second token of many samples, each from random numbers of its own."""
    always(monkeypatch)
    ids, samples = prompt(), 600
    with torch.no_grad():
        first = model(input_ids=ids).logits[:, -1].div(0.6).topk(3)
        probabilities = torch.zeros(VOCAB)
        for token, share in zip(first.indices[0], first.values[0].softmax(-1), strict=True):
            second = model(input_ids=torch.cat([ids, token.view(1, 1)], 1)).logits[0, -1].div(0.6).topk(3)
            probabilities[second.indices] += share * second.values.softmax(-1)
    options = {"max_new_tokens": 2, "temperature": 0.6, "top_k": 3, "speculate": 2}
    counts = torch.zeros(VOCAB)
    for seed in range(samples):
        counts[weft.generate(model, ids, **options, seed=seed).tokens[1]] += 1
    likely = probabilities > 0
    assert counts[~likely].sum() == 0
    expected = probabilities[likely] * samples
    statistic = ((counts[likely] - expected) ** 2 / expected).sum()
    assert statistic < 3 * int(likely.sum()) + 10  # about five standard deviations above its mean


def test_end_of_text_among_the_guesses_ends_it(model):
    plain = weft.generate(model, prompt(), max_new_tokens=20)
    end = plain.tokens[12]
    expected = weft.generate(model, prompt(), max_new_tokens=20, eos_token_id=end)
    found = weft.generate(model, prompt(), max_new_tokens=20, eos_token_id=end, speculate=8)
    assert (found.tokens, found.finish_reason) == (expected.tokens, "stop")


def test_shares_are_those_of_each_tokens_own_position(model):
    expected = list(weft.stream(model, prompt(), max_new_tokens=20))
    found = list(weft.stream(model, prompt(), max_new_tokens=20, speculate=8))
    assert any(step.guessed for step in found)
    for one, other in zip(found, expected, strict=True):
        assert one.shares == pytest.approx(other.shares, abs=1e-5)


# -------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("number", [1, 2, 5, 13])
def test_a_stream_closed_early_leaves_a_cache_to_go_on_from(decoder, number):
    model = weft_model(decoder)
    cache = model.base_model.backbone.empty_cache()
    steps = weft.stream(model, prompt(), max_new_tokens=30, past_key_values=cache, speculate=8)
    tokens = [next(steps).token for _ in range(number)]
    steps.close()
    assert cache.get_seq_length() == cache.scaling.get_seq_length() == 12 + number - 1
    text = torch.cat([prompt(), torch.tensor([tokens])], 1)
    found = weft.generate(model, text, max_new_tokens=5, past_key_values=cache)
    assert found.tokens == weft.generate(model, text, max_new_tokens=5).tokens


def test_an_error_in_the_middle_empties_the_cache(model, monkeypatch):
    always(monkeypatch)
    cache = model.base_model.backbone.empty_cache()
    steps = weft.stream(model, prompt(), max_new_tokens=30, past_key_values=cache, speculate=4)
    next(steps)
    monkeypatch.setattr(NGramDrafts, "__call__", lambda self, limit: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(steps)
    assert cache.get_seq_length() == 0


@pytest.mark.skipif(not hasattr(StaticLayer, "crop"), reason="transformers before 5.24 cannot crop a static cache")
def test_a_static_cache_can_forget(model):
    cache = StaticCache(config=model.config, max_cache_len=60)
    expected = weft.generate(model, prompt(), max_new_tokens=40)
    found = weft.generate(model, prompt(), max_new_tokens=40, speculate=8, past_key_values=cache)
    assert found.tokens == expected.tokens
    assert found.num_calls < 30


def test_the_cache_must_be_able_to_forget(model):
    # Since transformers 5.24 a static cache can, but not one of sliding windows.
    cache = StaticCache(config=transformers.MistralConfig(num_hidden_layers=2, sliding_window=4), max_cache_len=40)
    with pytest.raises(ConfigError, match=r"speculate \(4\) needs a cache that can forget wrong guesses"):
        weft.stream(model, prompt(), speculate=4, past_key_values=cache)


@pytest.mark.parametrize("value", [-1, 1.5, True])
@pytest.mark.usefixtures("without_type_checks")
def test_a_wrong_number_is_refused(model, value):
    with pytest.raises(ConfigError, match=rf"speculate \({value}\) must be a whole number of at least 0"):
        weft.stream(model, prompt(), speculate=value)


def test_freezing_and_guessing_exclude_each_other(model):
    with pytest.raises(ConfigError, match=r"freeze_scalings_after \(3\) and speculate exclude each other"):
        weft.stream(model, prompt(), speculate=4, freeze_scalings_after=3)


def test_a_stream_freezes_as_generate_does(model):
    options = {"max_new_tokens": 9, "freeze_scalings_after": 3}
    expected = model.generate(input_ids=prompt(), attention_mask=torch.ones(1, 12).long(), do_sample=False, **options)
    assert weft.generate(model, prompt(), **options).tokens == expected[0, 12:].tolist()
    assert weft.generate(model, prompt(), **options).tokens != weft.generate(model, prompt(), max_new_tokens=9).tokens


# -------------------------------------------------------------------------------------- the guesses


def test_ngrams_find_the_latest_of_the_longest_endings():
    guesses = NGramDrafts([1, 2, 3, 9, 1, 2, 3, 7, 8, 5, 2, 3, 6, 1, 2, 3])
    assert guesses(2) == [7, 8]
    assert guesses(100) == [7, 8, 5, 2, 3, 6, 1, 2, 3]
    assert guesses(0) == []
    guesses.extend([4])
    assert guesses(3) == []
    guesses.extend([1, 2, 3])
    assert guesses(1) == [4]


def test_short_texts_have_no_ngrams():
    assert NGramDrafts([])(3) == []
    assert NGramDrafts([1, 1])(3) == []
    assert NGramDrafts([1, 1, 1])(3) == [1]


def test_draft_length_grows_with_hits_and_rests_after_misses():
    length = DraftLength(8)
    seen = [length.now()]
    for _ in range(3):
        length.note(seen[-1], seen[-1])
        seen.append(length.now())
    assert seen == [2, 4, 8, 8]
    length.note(3, 8)
    assert length.now() == 4
    length.note(0, 4)
    assert [length.now() for _ in range(2)] == [0, 2]
    for _ in range(10):
        length.note(0, 1)
    assert [length.now() for _ in range(LONGEST_PAUSE + 1)] == [0] * LONGEST_PAUSE + [1]
    length.note(1, 1)
    assert length.now() == 2


def test_timer_drafts_where_that_is_faster_and_tries_now_and_then():
    timer = DraftTimer()
    assert not timer.draft_now()
    timer.note(False, 1.0, 1)
    tried = [timer.draft_now() for _ in range(5)]
    assert tried == [False] * 4 + [True]
    timer.note(True, 3.0, 2)  # slower
    assert [timer.draft_now() for _ in range(LONGEST_PAUSE + 1)] == [False] * LONGEST_PAUSE + [True]
    for _ in range(10):
        timer.note(True, 1.0, 3)
    assert timer.draft_now()


def test_only_a_whole_scaling_pass_guesses(llama_adapters):
    for options, expected in (({}, True), ({"gate_layer": 1}, False), ({"scaling_pass_layers": 1}, False)):
        model = weft.from_adapters(tiny_llama(), llama_adapters, **options).eval()
        cache = model.base_model.backbone.empty_cache()
        assert Speculation(model.base_model, cache, [1, 2], 4)._with_base is expected
