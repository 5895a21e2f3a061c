"""Cached = uncached: the same tokens and logits, whatever `generate` does with the cache."""

import copy
import pickle

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import weft
from models import GENERATE_MAKES_NO_CACHE, VOCAB, make_architecture, peft_model, quietly, tiny_llama, weft_model
from weft.errors import CacheError
from weft.passes.cache import XLoraCache

OPTIONS = {
    "layerwise": {},
    "shared": {"layerwise_scalings": False},
    "top-k": {"top_k_lora": 2},
    "scaling pass with experts": {"scaling_pass_value": 0.4},
    "softmax over top-k": {"enable_softmax": False, "top_k_lora": 2, "enable_softmax_topk": True},
}
PLAIN = {"max_new_tokens": 8, "do_sample": False}


def prompts(padded):
    """Six tokens (more than the sliding windows of the tiny models), twice; padded: two and none on the left."""
    input_ids = torch.randint(1, VOCAB, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(input_ids)
    if padded:
        mask[0, :2] = 0
        input_ids[0, :2] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def positions(model, mask, new):
    """What `generate` passes as positions, where the model takes them."""
    if not model.backbone.takes("position_ids"):
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]}


# -------------------------------------------------------------------------------------- cached = uncached


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_cached_logits_are_those_of_reading_the_whole_text(decoder, options, padded):
    model, inputs = weft_model(decoder, **options), prompts(padded)
    ids, mask = (
        torch.cat([inputs["input_ids"]] * 2, 1),
        torch.cat([inputs["attention_mask"], torch.ones(2, 6).long()], 1),
    )
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions(model, mask, 12))
        assert expected.past_key_values is None
        scalings = model.get_latest_scalings()
        cache, found, found_scalings = None, [], []
        for start, stop in ((0, 6), (6, 7), (7, 11), (11, 12)):
            output = model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                past_key_values=cache,
                use_cache=True,
                **positions(model, mask[:, :stop], stop - start),
            )
            cache = output.past_key_values
            found.append(output.logits)
            found_scalings.append(model.get_latest_scalings())
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[seen], expected.logits[seen], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(found_scalings, 1)[seen], scalings[seen], rtol=1e-4, atol=1e-4)


STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, all of them": {"num_beams": 3, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "penalties and stops": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "eos_token_id": 5},
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_generate_gives_the_same_tokens_with_and_without_a_cache(decoder, strategy, padded):
    model = weft_model(decoder)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        texts.append(model.generate(**prompts(padded), **{**PLAIN, **strategy}, use_cache=use_cache))
    assert torch.equal(*texts)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cached_generation_gives_the_tokens_of_pefts_xlora(decoder, options, monkeypatch):
    theirs, ours = peft_model(decoder, monkeypatch, **options), weft_model(decoder, **options)
    ours.internal_xlora_classifier.load_state_dict(theirs.base_model.internal_xlora_classifier.state_dict())
    inputs = prompts(padded=True)
    expected = inputs["input_ids"]
    with torch.no_grad():
        for step in range(8):
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, step).long()], 1)
            logits = theirs(input_ids=expected, attention_mask=mask, **positions(ours, mask, 6 + step)).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ours.generate(**inputs, **PLAIN), expected)


# -------------------------------------------------------------------------------------- what generate offers


def test_static_cache(decoder):
    model, inputs = weft_model(decoder), prompts(padded=True)
    expected = model.generate(**inputs, **PLAIN)
    if not model.get_base_model()._can_compile_fullgraph:
        pytest.skip("the base model does not support static caches")
    for _ in range(2):  # transformers keeps the cache for the next call
        assert torch.equal(model.generate(**inputs, **PLAIN, cache_implementation="static"), expected)


@pytest.mark.skipif(GENERATE_MAKES_NO_CACHE, reason="transformers 5.0 has no cache for chunks")
def test_long_prompts_are_read_in_chunks(decoder):
    model, inputs = weft_model(decoder), prompts(padded=True)
    expected = model.generate(**inputs, **PLAIN)
    assert torch.equal(model.generate(**inputs, **PLAIN, prefill_chunk_size=4), expected)


@pytest.mark.parametrize("how", ["prompt lookup", "assistant model"])
def test_assisted_decoding_crops_both_caches(decoder, how):
    model = weft_model(decoder)
    base, _ = make_architecture(decoder[0])
    inputs = {name: value[:1] for name, value in prompts(padded=False).items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"]] * 2, 1)  # something to look up
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    # An end that no text reaches: the lookup of transformers before 5.14 needs one.
    lookup = {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCAB}
    options = lookup if how == "prompt lookup" else {"assistant_model": base}
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    found = quietly(model.generate, **inputs, max_new_tokens=16, do_sample=False, **options)
    assert torch.equal(found[:, : expected.shape[1]], expected)  # old versions of transformers may give one token more


def test_a_conversation_goes_on_from_its_cache(decoder):
    model, inputs = weft_model(decoder), prompts(padded=False)
    first = model.generate(**inputs, **PLAIN, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, torch.randint(1, VOCAB, (2, 3))], 1)
    everything = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
    expected = model.generate(**everything, **PLAIN)
    read = []
    handle = model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = model.generate(**everything, **PLAIN, past_key_values=first.past_key_values)
    handle.remove()
    assert torch.equal(found, expected)
    assert read[0] == 4  # the last generated token, which nothing has read yet, and the three new ones


def test_an_empty_cache_of_the_user_serves_several_turns(decoder):
    model, inputs = weft_model(decoder), prompts(padded=False)
    cache = DynamicCache(config=model.config)
    first = model.generate(**inputs, **PLAIN, past_key_values=cache)
    assert isinstance(cache, XLoraCache)
    assert isinstance(cache, DynamicCache)
    turn = torch.cat([first, torch.randint(1, VOCAB, (2, 3))], 1)
    found = model.generate(input_ids=turn, attention_mask=torch.ones_like(turn), **PLAIN, past_key_values=cache)
    assert torch.equal(found, model.generate(input_ids=turn, attention_mask=torch.ones_like(turn), **PLAIN))


@pytest.mark.skipif(
    not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"), reason="transformers before 5.21 has no fp8 cache"
)
def test_quantised_cache(llama_adapters):
    model = weft.from_adapters(tiny_llama(), llama_adapters).eval()
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    found = model.generate(**prompts(padded=False), **PLAIN, return_dict_in_generate=True, **options)
    cache = found.past_key_values
    assert isinstance(cache, transformers.QuantizedCache)
    assert isinstance(cache.scaling, transformers.QuantizedCache)
    assert cache.get_seq_length() == cache.scaling.get_seq_length() == 13


def test_streamer_and_stopping_criteria_see_every_token(llama_adapters):
    model = weft.from_adapters(tiny_llama(), llama_adapters).eval()
    inputs = {name: value[:1] for name, value in prompts(padded=False).items()}
    seen = []

    class Streamer(transformers.generation.BaseStreamer):
        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append("end")

    class AtNine(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9)

    found = model.generate(**inputs, **PLAIN, streamer=Streamer(), stopping_criteria=[AtNine()])
    assert seen == [*found[0].tolist(), "end"]
    assert found.shape == (1, 9)


# -------------------------------------------------------------------------------------- the cache itself


@pytest.fixture
def model(llama_adapters):
    return weft.from_adapters(tiny_llama(), llama_adapters, layerwise_scalings=True).eval()


@torch.no_grad()
def filled(model, **inputs):
    return model(**(inputs or prompts(padded=False)), use_cache=True).past_key_values


@torch.no_grad()
def next_logits(model, cache, token=3):
    rows = cache.layers[0].keys.shape[0]
    return model(input_ids=torch.full((rows, 1), token), past_key_values=cache).logits


def test_both_passes_have_keys_and_values_of_their_own(model):
    cache = filled(model)
    assert cache.get_seq_length() == cache.scaling.get_seq_length() == 6
    assert not torch.allclose(cache.layers[1].keys, cache.scaling.layers[1].keys)


def test_repeat_select_reorder_and_crop_act_on_both(model):
    expected = next_logits(model, filled(model))
    cache = filled(model)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    cache.reorder_cache(torch.tensor([1, 0]))
    next_logits(model, cache, token=9)
    cache.crop(-1)
    torch.testing.assert_close(next_logits(model, cache), expected.flip(0))


def test_reset_empties_both(model):
    cache = filled(model)
    cache.reset()
    with torch.no_grad(), model.disable_adapter():
        model(**prompts(padded=False), past_key_values=cache)
    cache.reset()
    expected = filled(model)
    torch.testing.assert_close(
        filled(model, **prompts(padded=False), past_key_values=cache).layers[1].keys, expected.layers[1].keys
    )


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"]
)
def test_a_copied_cache_goes_on_alone(model, copied):
    cache = filled(model)
    twin = copied(cache)
    assert type(twin) is type(cache)
    expected = next_logits(model, cache)
    torch.testing.assert_close(next_logits(model, twin), expected)
    assert twin.scaling.get_seq_length() == 7


def test_without_a_word_the_config_decides_but_training_keeps_no_cache(model):
    inputs = prompts(padded=False)
    with torch.no_grad():
        assert isinstance(model(**inputs).past_key_values, XLoraCache)
        model.config.use_cache = False
        assert model(**inputs).past_key_values is None
        model.config.use_cache = True
        assert model.train()(**inputs).past_key_values is None
        assert isinstance(model(**inputs, use_cache=True).past_key_values, XLoraCache)


def test_early_initialisation_allocates_both(model):
    cache = StaticCache(config=model.config, max_cache_len=20)
    weft.passes.cache.doubled(cache).early_initialization(2, 2, 8, torch.float32, "cpu")
    assert cache.is_initialized
    assert cache.scaling.is_initialized
    assert cache.is_compileable


# -------------------------------------------------------------------------------------- never silently wrong


def test_a_cache_that_another_model_filled_is_refused(model):
    with torch.no_grad():
        plain = tiny_llama()(**prompts(padded=False), use_cache=True).past_key_values
    with pytest.raises(
        CacheError, match=r"past_key_values \(DynamicCache with 6 tokens\) was not filled by this model"
    ):
        next_logits(model, plain)
    with pytest.raises(CacheError, match=r"pass an empty cache \(DynamicCache\(config=model.config\)\), or the past"):
        model.generate(input_ids=torch.ones(2, 7).long(), past_key_values=plain, max_new_tokens=2)
    assert type(plain) is DynamicCache


def test_a_tuple_is_refused(model):
    with pytest.raises(CacheError, match=r"past_key_values \(tuple\) must be a cache of transformers"):
        model(input_ids=torch.ones(1, 1).long(), past_key_values=((torch.ones(1), torch.ones(1)),))


@pytest.mark.parametrize("how", ["off", "fixed"])
def test_tokens_without_a_scaling_pass_end_a_caches_use(model, how):
    cache = filled(model)
    with model.disable_adapter() if how == "off" else model.fixed_scalings({"math": 1.0}):
        next_logits(model, cache)
    with pytest.raises(CacheError, match="lacks the scaling pass of some tokens"):
        next_logits(model, cache)


def test_fixed_scalings_need_one_ordinary_cache_only(model):
    with torch.no_grad(), model.fixed_scalings({"math": 1.0}):
        cache = filled(model)
        assert type(cache) is DynamicCache
        cached = next_logits(model, cache)
        ids = torch.cat([prompts(padded=False)["input_ids"], torch.full((2, 1), 3)], 1)
        torch.testing.assert_close(cached[:, 0], model(input_ids=ids).logits[:, -1])
