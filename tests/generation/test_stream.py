"""`weft.stream`: the tokens of `generate` one by one, their text, and the experts' shares in them."""

import json
import random

import pytest
import tokenizers
import torch
import transformers
from transformers import DynamicCache

import weft
from models import VOCAB, tiny_llama, tiny_tokenizer, weft_model
from weft.errors import CacheError, ConfigError, WeftError
from weft.generation.detokenizer import Detokenizer
from weft.generation.sampling import Sampler
from weft.passes.cache import XLoraCache

PROMPT = torch.randint(1, VOCAB, (1, 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model(llama_adapters):
    model = weft.from_adapters(tiny_llama(), llama_adapters, layerwise_scalings=True).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def reads(model):
    """How many tokens each call of the base model reads."""
    lengths = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


def tokens(steps):
    return [step.token for step in steps]


def generated(model, prompt=PROMPT, **options):
    found = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    return found[0, prompt.shape[1] :].tolist()


# -------------------------------------------------------------------------------------- the tokens of generate


def test_greedy_tokens_are_those_of_generate(decoder):
    model = weft_model(decoder)
    steps = list(weft.stream(model, PROMPT, max_new_tokens=8))
    assert tokens(steps) == generated(model, max_new_tokens=8, do_sample=False)
    assert [step.finish_reason for step in steps] == [None] * 7 + ["length"]
    assert {step.text for step in steps} == {""}
    assert list(weft.stream(model.base_model, PROMPT, max_new_tokens=8)) == steps  # without peft's wrapper


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.9}], ids=str)
def test_sampled_tokens_are_those_of_generate_at_the_same_seed(model, options):
    torch.manual_seed(7)
    expected = generated(model, max_new_tokens=12, do_sample=True, temperature=1.5, **{"top_k": 0, **options})
    before = torch.random.get_rng_state()
    found = tokens(weft.stream(model, PROMPT, max_new_tokens=12, temperature=1.5, seed=7, **options))
    assert found == expected
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found != tokens(weft.stream(model, PROMPT, max_new_tokens=12, temperature=1.5, seed=8, **options))


def test_without_a_seed_sampling_starts_anywhere(model):
    runs = [tokens(weft.stream(model, PROMPT, max_new_tokens=12, temperature=3.0)) for _ in range(2)]
    assert runs[0] != runs[1]


@pytest.mark.parametrize("where", ["generation config", "argument"])
def test_the_repetition_penalty_is_generates(model, where):
    plain = generated(model, max_new_tokens=20, do_sample=False)
    expected = generated(model, max_new_tokens=20, do_sample=False, repetition_penalty=1.8)
    assert expected != plain
    options = {}
    if where == "argument":
        options["repetition_penalty"] = 1.8
    else:
        model.generation_config.repetition_penalty = 1.8
    assert tokens(weft.stream(model, PROMPT, max_new_tokens=20, **options)) == expected


@pytest.mark.parametrize("several", [False, True])
def test_an_end_token_stops(model, several):
    whole = tokens(weft.stream(model, PROMPT, max_new_tokens=10))
    end = whole[4]
    model.generation_config.eos_token_id = [end, VOCAB - 1] if several else end
    steps = list(weft.stream(model, PROMPT, max_new_tokens=10))
    assert tokens(steps) == whole[: whole.index(end) + 1]
    assert steps[-1].finish_reason == "stop"
    assert tokens(weft.stream(model, PROMPT, max_new_tokens=10, eos_token_id=[])) == whole
    given = list(weft.stream(model, PROMPT, max_new_tokens=10, eos_token_id=whole[0]))
    assert (tokens(given), given[0].finish_reason) == (whole[:1], "stop")


def test_the_end_of_the_models_positions_is_the_end(model):
    positions = model.config.max_position_embeddings
    prompt = torch.ones(1, positions - 2).long()
    steps = list(weft.stream(model, prompt, max_new_tokens=10))
    assert [step.finish_reason for step in steps] == [None, None, "length"]


# -------------------------------------------------------------------------------------- shares


def test_shares_are_the_mean_over_layers_at_the_position_that_predicts(model):
    steps = list(weft.stream(model, PROMPT, max_new_tokens=5))
    text = torch.cat([PROMPT, torch.tensor([tokens(steps)])], 1)
    with torch.no_grad():
        model(input_ids=text, use_cache=False)
    expected = model.get_latest_scalings()[0, 5:-1].mean(1)
    found = torch.tensor([[step.shares[name] for name in ("math", "code", "adapter_3")] for step in steps])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.sum(1), torch.ones(5))


def test_shares_follow_top_k(llama_adapters):
    shared = weft.from_adapters(tiny_llama(), llama_adapters, top_k_lora=1, layerwise_scalings=False).eval()
    for step in weft.stream(shared, PROMPT, max_new_tokens=4):
        assert sorted(step.shares.values())[:2] == [0, 0]
        assert max(step.shares.values()) > 0
    options = {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True, "layerwise_scalings": True}
    renormalised = weft.from_adapters(tiny_llama(), llama_adapters, **options).eval()
    for step in weft.stream(renormalised, PROMPT, max_new_tokens=4):
        assert sum(step.shares.values()) == pytest.approx(1)


def test_shares_of_a_fixed_mix_are_its_weights_and_without_experts_there_are_none(model):
    with model.fixed_scalings({"code": 0.5, "math": 0.25}):
        steps = list(weft.stream(model, PROMPT, max_new_tokens=3))
        assert tokens(steps) == generated(model, max_new_tokens=3, do_sample=False)
    assert [step.shares for step in steps] == [{"math": 0.25, "code": 0.5, "adapter_3": 0}] * 3
    with model.disable_adapter():
        steps = list(weft.stream(model, PROMPT, max_new_tokens=3))
        assert tokens(steps) == generated(model, max_new_tokens=3, do_sample=False)
    assert [step.shares for step in steps] == [{}] * 3


# -------------------------------------------------------------------------------------- caches and ends


def test_each_token_is_read_once(model, reads):
    list(weft.stream(model, PROMPT, max_new_tokens=5))
    assert reads == [6, 1, 1, 1, 1]


def test_going_on_from_a_cache_reads_only_the_rest(model, reads):
    cache = DynamicCache(config=model.config)
    first = tokens(weft.stream(model, PROMPT, max_new_tokens=4, past_key_values=cache))
    assert isinstance(cache, XLoraCache)
    assert cache.get_seq_length() == cache.scaling.get_seq_length() == 9
    turn = torch.cat([PROMPT, torch.tensor([[*first, 5, 6]])], 1)
    reads.clear()
    second = tokens(weft.stream(model, turn, max_new_tokens=4, past_key_values=cache))
    assert reads == [3, 1, 1, 1]
    assert second == tokens(weft.stream(model, turn, max_new_tokens=4))


def test_a_stream_that_is_closed_early_leaves_model_and_cache_in_order(decoder):
    model = weft_model(decoder)
    cache = model.base_model.backbone.empty_cache()
    whole = tokens(weft.stream(model, PROMPT, max_new_tokens=6))
    steps = weft.stream(model, PROMPT, max_new_tokens=6, past_key_values=cache)
    begun = [next(steps).token, next(steps).token]
    assert torch.is_grad_enabled()
    steps.close()
    assert list(steps) == []
    assert model.base_model.carrier.routing is None
    so_far = torch.cat([PROMPT, torch.tensor([begun])], 1)
    assert begun + tokens(weft.stream(model, so_far, max_new_tokens=4, past_key_values=cache)) == whole


def test_the_model_can_be_used_between_two_steps(model):
    expected = tokens(weft.stream(model, PROMPT, max_new_tokens=6))
    one, other = (weft.stream(model, PROMPT, max_new_tokens=6) for _ in range(2))
    found = []
    for step in one:
        found.append(step.token)
        next(other)
        model(input_ids=PROMPT.flip(1)).logits.sum().backward()
    assert found == expected


@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupted_step_empties_the_cache(model, reads, layer):
    cache = DynamicCache(config=model.config)
    steps = weft.stream(model, PROMPT, max_new_tokens=6, past_key_values=cache)
    begun = next(steps).token

    def interrupt(*args):
        handle.remove()
        raise KeyboardInterrupt

    handle = model.get_base_model().model.layers[layer].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    assert cache.get_seq_length() == cache.scaling.get_seq_length() == 0
    reads.clear()
    so_far = torch.cat([PROMPT, torch.tensor([[begun]])], 1)
    found = tokens(weft.stream(model, so_far, max_new_tokens=5, past_key_values=cache))
    assert reads[0] == 7
    assert [begun, *found] == tokens(weft.stream(model, PROMPT, max_new_tokens=6))


# -------------------------------------------------------------------------------------- text


def pieces(tokenizer, ids, context=()):
    detokenizer = Detokenizer(tokenizer, context)
    return [*(detokenizer.add(token) for token in ids), detokenizer.flush()]


def metaspace_tokenizer():
    """A tokenizer like Llama's: "▁" before words, which vanishes at the start of a text, and bytes for the rest."""
    from tokenizers import decoders

    words = ["<unk>", "<eos>", "▁the", "▁quick", "ly", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = tokenizers.models.BPE({word: place for place, word in enumerate(words)}, [], unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    replaced = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(replaced)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def test_characters_of_several_tokens_come_whole():
    tokenizer = tiny_tokenizer()
    text = "naïve 漢字 👍🏽 \ufffd."
    found = pieces(tokenizer, tokenizer(text).input_ids)
    assert "".join(found) == text
    assert set(found) == {*text, ""} - {"\ufffd", "."} | {"\ufffd."}


def test_pieces_together_are_the_text_of_all_tokens():
    tokenizer = tiny_tokenizer()
    generator = random.Random(0)
    for length in (1, 10, 300):
        ids = [generator.randrange(len(tokenizer)) for _ in range(length)]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)
    text = "a漢👍 " * 100  # longer than the window that is decoded again
    assert "".join(pieces(tokenizer, tokenizer(text).input_ids)) == text


def test_a_word_keeps_its_space_after_the_prompt():
    tokenizer = metaspace_tokenizer()
    the, quick, ly = tokenizer.convert_tokens_to_ids(["▁the", "▁quick", "ly"])
    assert tokenizer.decode([the, quick]) == "the quick"
    assert pieces(tokenizer, [quick, ly, the], context=[the]) == [" quick", "ly", " the", ""]
    assert pieces(tokenizer, [quick, the]) == ["quick", " the", ""]
    assert "".join(pieces(tokenizer, [quick, the] * 100, context=[the] * 100)) == " quick the" * 100


def test_a_character_begun_in_the_prompt_is_ended():
    tokenizer = metaspace_tokenizer()
    first, second = tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xAF>"])
    assert pieces(tokenizer, [second], context=[first]) == ["ï", ""]
    assert pieces(tokenizer, [first]) == ["", "\ufffd"]


def test_bytes_that_never_become_a_character_take_nothing_back():
    tokenizer = metaspace_tokenizer()
    a, broken, the = tokenizer.convert_tokens_to_ids(["<0x41>", "<0xC3>", "▁the"])
    assert tokenizer.decode([a, broken]) == "\ufffd\ufffd"
    assert pieces(tokenizer, [a, broken, the])[0] == "A"


def test_texts_of_the_steps_are_the_text_of_the_tokens(base_folder, base_adapters):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder)
    model = weft.from_adapters(str(base_folder), base_adapters)
    for seed in range(3):
        options = {"temperature": 2.0, "seed": seed, "max_new_tokens": 40}
        steps = list(weft.stream(model, "the quick", tokenizer=tokenizer, **options))
        text = "".join(step.text for step in steps)
        assert text == tokenizer.decode(tokens(steps), skip_special_tokens=True)
        assert tokens(steps) == tokens(
            weft.stream(model, tokenizer("the quick", return_tensors="pt").input_ids, **options)
        )


def test_steps_are_plain_data(model):
    step = next(weft.stream(model, PROMPT))
    assert json.loads(json.dumps(vars(step)))["token"] == step.token
    with pytest.raises(AttributeError):
        step.token = 3


def test_the_sampler_leaves_the_logits_alone():
    logits = torch.randn(1, 9)
    before = logits.clone()
    assert Sampler(repetition_penalty=2.0)(PROMPT % 9, logits).shape == (1,)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-20])
def test_the_lowest_temperatures_take_the_most_likely_token(model, temperature):
    options = {"max_new_tokens": 6, "repetition_penalty": 1.3}
    assert tokens(weft.stream(model, PROMPT, temperature=temperature, **options)) == tokens(
        weft.stream(model, PROMPT, **options)
    )


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens \(0\) must be at least 1"),
        ({"temperature": -1.0}, r"temperature \(-1.0\) must be a finite number of at least 0"),
        ({"temperature": float("nan")}, r"temperature \(nan\) must be a finite number"),
        (
            {"top_k": 0, "top_p": 1.5},
            r"top_k \(0\) must be at least 1(.|\n)*top_p \(1.5\) must be above 0 and at most 1",
        ),
        ({"prompt": "text"}, r"tokenizer \(None\) must be given with a text \('text'\)"),
        ({"prompt": "", "tokenizer": tiny_tokenizer()}, r"prompt \(''\) has no tokens, expected at least one"),
        (
            {"prompt": torch.ones(2, 3).long()},
            r"prompt \(torch.int64 of shape \[2, 3\]\) must be token ids \(\[5, 6, 7\], torch.int64 of shape",
        ),
        ({"prompt": torch.ones(3)}, r"prompt \(torch.float32 of shape \[3\]\) must be token ids"),
        ({"prompt": torch.ones(1, 0).long()}, r"prompt \(.*size=\(1, 0\).*\) has no tokens, expected at least one"),
        ({"prompt": torch.ones(1, 3)}, r"prompt \(torch.float32 of shape"),
        (
            {"prompt": torch.ones(1, 129).long()},
            r"prompt \(129 tokens\) must be at most the model's number of positions \(128\): shorten it",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_at_once(model, reads, options, message):
    with pytest.raises(ConfigError, match=message):
        weft.stream(model, options.pop("prompt", PROMPT), **options)
    assert reads == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_options_that_leave_no_probabilities_are_named(model, temperature):
    steps = weft.stream(model, PROMPT, temperature=temperature, repetition_penalty=1e-300)
    with pytest.raises(ConfigError) as err:
        next(steps)
    assert str(err.value) == (
        f"temperature ({temperature:g}) and repetition_penalty (1e-300) leave no probabilities to sample from: use "
        "values nearer to 1"
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_numbers_choose_no_token(temperature, value):
    logits = torch.zeros(1, 9)
    logits[0, 4] = value
    with pytest.raises(WeftError, match=r"the model's logits are NaN or infinite after 5 tokens: look at"):
        Sampler(temperature=temperature)(PROMPT[:, :5] % 9, logits)


def test_only_a_mixture_can_be_streamed():
    with pytest.raises(
        ConfigError, match=r"model \(LlamaForCausalLM\) must be a mixture: make one with weft.from_adap"
    ):
        weft.stream(tiny_llama(), PROMPT)


def test_a_model_without_a_cache_of_keys_and_values_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.base_model.backbone, "takes", lambda name: False)
    with pytest.raises(CacheError, match=r"model \(LlamaForCausalLM\) keeps its state in no cache of transformers"):
        weft.stream(model, PROMPT)


def test_a_cache_as_long_as_the_prompt_is_refused(model):
    cache = DynamicCache(config=model.config)
    list(weft.stream(model, PROMPT, max_new_tokens=1, past_key_values=cache))
    with pytest.raises(CacheError, match=r"past_key_values \(6 tokens\) must be shorter than the prompt \(6 tokens\)"):
        weft.stream(model, PROMPT, past_key_values=cache)


def test_a_cache_that_another_model_filled_is_refused_and_left_alone(model):
    with torch.no_grad():
        cache = tiny_llama()(input_ids=PROMPT[:, :3], use_cache=True).past_key_values
    with pytest.raises(CacheError, match="was not filled by this model"):
        next(weft.stream(model, PROMPT, past_key_values=cache))
    assert cache.get_seq_length() == 3
