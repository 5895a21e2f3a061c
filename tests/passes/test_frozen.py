"""From some token on each sequence keeps its mean scalings, and a token costs one pass."""

import pytest
import torch

import weft
from models import GENERATE_MAKES_NO_CACHE, VOCAB, tiny_llama, weft_model
from weft.errors import CacheError, ConfigError
from weft.gate.routing import keep_top_k
from weft.passes.frozen import SequenceMeans

PLAIN = {"max_new_tokens": 8, "do_sample": False}


def prompts():
    """Two texts of six and four tokens."""
    input_ids = torch.randint(1, VOCAB, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(input_ids)
    mask[0, :2] = 0
    input_ids[0, :2] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


@pytest.fixture
def model(llama_adapters):
    return weft.from_adapters(tiny_llama(), llama_adapters, layerwise_scalings=True).eval()


def passes_run(model, **options):
    """How many tokens each run of the backbone read, in a generation."""
    read = []
    handle = model.backbone.module.register_forward_hook(
        lambda module, args, kwargs, output: read.append(output.last_hidden_state.shape[1]), with_kwargs=True
    )
    model.generate(**prompts(), **PLAIN, **options)
    handle.remove()
    return read


@pytest.mark.parametrize("options", [{}, {"top_k_lora": 2}, {"layerwise_scalings": False}], ids=str)
@pytest.mark.parametrize("after", [0, 3])
def test_frozen_generation_equals_a_loop_done_by_hand(decoder, after, options):
    model, inputs = weft_model(decoder, **options), prompts()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    config = model.xlora_config
    before = model.generate(**inputs, **{**PLAIN, "max_new_tokens": after + 1}) if after else None
    with torch.no_grad():
        # The text as far as the gate decides, and the mean of what it says there.
        text = ids if before is None else before[:, :-1]
        seen = torch.cat([mask, torch.ones(2, text.shape[1] - 6).long()], 1)
        given = {"position_ids": (seen.cumsum(-1) - 1).clamp(min=0)} if model.backbone.takes("position_ids") else {}
        cache = model(input_ids=text, attention_mask=seen, use_cache=True, **given).past_key_values
        scalings = keep_top_k(model.get_latest_scalings(), config.top_k_lora)
        mean = torch.stack([row[kept.bool()].mean(0) for row, kept in zip(scalings, seen, strict=True)])[:, None]
        found = model.generate(**inputs, **PLAIN, freeze_scalings_after=after)
        model.passes.routings.fixed = mean
        # Greedy steps at that mean, from the keys and values so far.
        new = found[:, text.shape[1] : text.shape[1] + 1]
        for _ in range(found.shape[1] - text.shape[1] - 1):
            seen = torch.cat([seen, torch.ones(2, 1).long()], 1)
            given = {key: (seen.cumsum(-1) - 1)[:, -1:] for key in given}
            logits = model(input_ids=new[:, -1:], attention_mask=seen, past_key_values=cache, **given).logits
            new = torch.cat([new, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, torch.cat([text, new], 1))


@pytest.mark.parametrize(("after", "frozen_steps"), [(0, 7), (2, 5), (100, 0)])
def test_frozen_steps_run_one_pass(model, after, frozen_steps):
    expected = [6, 6, *[1] * (2 * (7 - frozen_steps)), *[1] * frozen_steps]
    assert passes_run(model, freeze_scalings_after=after) == expected


def test_never_reaching_the_point_changes_nothing(model):
    expected = model.generate(**prompts(), **PLAIN)
    assert torch.equal(model.generate(**prompts(), **PLAIN, freeze_scalings_after=100), expected)


def test_every_beam_keeps_its_own_mean(model):
    found = model.generate(**prompts(), **PLAIN, num_beams=3, num_return_sequences=3, freeze_scalings_after=4)
    assert found.shape == (6, 14)
    means = SequenceMeans()
    rows = torch.rand(3, 2, 1, 4)
    means.add(rows, None)
    means.change_rows(lambda values: values[[2, 0]])
    torch.testing.assert_close(means.mean(), rows[[2, 0]].mean(1, keepdim=True))


def test_sampling_rows_and_chunks_work(model):
    torch.manual_seed(0)
    sampled = model.generate(
        **prompts(), max_new_tokens=5, do_sample=True, num_return_sequences=2, freeze_scalings_after=1
    )
    assert sampled.shape == (4, 11)
    if not GENERATE_MAKES_NO_CACHE:  # for chunks
        whole = model.generate(**prompts(), **PLAIN, freeze_scalings_after=2)
        assert torch.equal(model.generate(**prompts(), **PLAIN, freeze_scalings_after=2, prefill_chunk_size=4), whole)


def test_a_static_cache_works_for_one_text(model):
    one = {name: value[1:] for name, value in prompts().items()}
    expected = model.generate(**one, **PLAIN, freeze_scalings_after=2)
    assert torch.equal(model.generate(**one, **PLAIN, freeze_scalings_after=2, cache_implementation="static"), expected)


def test_a_conversation_stays_frozen_but_the_gate_cannot_come_back(model):
    first = model.generate(**prompts(), **PLAIN, freeze_scalings_after=2, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, torch.ones(2, 2).long()], 1)
    mask = torch.cat([prompts()["attention_mask"], torch.ones(2, 10).long()], 1)
    cache = first.past_key_values
    turn = model.generate(input_ids=turn, attention_mask=mask, past_key_values=cache, **PLAIN)
    assert cache.means.frozen
    cache.means.frozen = False
    mask = torch.cat([mask, torch.ones(2, turn.shape[1] - mask.shape[1]).long()], 1)
    with pytest.raises(CacheError, match="at fixed or frozen scalings"):
        model.generate(input_ids=turn, attention_mask=mask, past_key_values=cache, max_new_tokens=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_scalings_after": -1}, r"freeze_scalings_after \(-1\) must be a whole number of at least 0"),
        ({"freeze_scalings_after": 1.5}, r"freeze_scalings_after \(1.5\) must be a whole number"),
        ({"freeze_scalings_after": 2, "prompt_lookup_num_tokens": 3}, r"\(2\) and prompt_lookup_num_tokens exclude"),
        ({"freeze_scalings_after": 2, "use_cache": False}, r"\(2\) needs a cache: leave use_cache \(False\) out"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("without_type_checks")
def test_what_cannot_be_frozen_is_said(model, options, message):
    with pytest.raises(ConfigError, match=message):
        model.generate(**prompts(), **PLAIN, **options)


def test_one_pass_has_nothing_to_freeze(llama_adapters):
    model = weft.from_adapters(tiny_llama(), llama_adapters, gate_layer=1).eval()
    with pytest.raises(ConfigError, match=r"freeze_scalings_after \(3\) saves nothing with gate_layer \(1\)"):
        model.generate(**prompts(), **PLAIN, freeze_scalings_after=3)


def test_padding_under_a_static_cache_is_refused(model):
    with pytest.raises(ConfigError, match="cannot tell padding in a batch with a static cache"):
        model.generate(**prompts(), **PLAIN, freeze_scalings_after=3, cache_implementation="static")
