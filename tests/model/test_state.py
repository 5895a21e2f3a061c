"""Where a base model keeps the state of a text that it reads, the two passes never share it."""

import pytest
import torch
import transformers

import unusual_models
import weft
from models import VOCAB, lora, quietly, save_adapter, tiny_llama
from weft.errors import CacheError

ONE_PASS = {"gate_layer": 1}


def mixture(make, folder, targets, **options):
    paths = {
        name: save_adapter(make(), lora(task_type=None, target_modules=targets), folder / name, seed=seed)
        for seed, name in enumerate(("one", "two"))
    }
    torch.manual_seed(1)
    model = quietly(weft.from_adapters, make(), paths, layerwise_scalings=True, **options).eval()
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def prompt(batch=2, length=6):
    return torch.randint(3, VOCAB, (batch, length))


def by_hand(model, ids, new_tokens):
    """Greedy decoding, the whole text read for every token."""
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


MAMBAS = {
    "mamba": (unusual_models.mamba, ["in_proj", "x_proj", "embeddings"]),
    "mamba2": (unusual_models.mamba2, ["in_proj"]),
    "falcon mamba": (unusual_models.falcon_mamba, ["in_proj", "x_proj"]),
}


# Before transformers 5.5 these keep their states in something that is no cache of its own.
CLASS_OF_ITS_OWN = hasattr(transformers.models.mamba.modeling_mamba, "MambaCache")
TWO_PASSES = [{}, {"scaling_pass_layers": 2}, {"scaling_pass_value": 0.4}]


@pytest.mark.parametrize("options", [ONE_PASS, *([] if CLASS_OF_ITS_OWN else TWO_PASSES)], ids=str)
@pytest.mark.parametrize("name", MAMBAS)
def test_cached_generation_of_mamba_is_greedy_decoding_by_hand(name, options, tmp_path):
    make, targets = MAMBAS[name]
    model, ids = mixture(make, tmp_path, targets, **options), prompt()
    assert torch.equal(quietly(model.generate, ids, max_new_tokens=5, do_sample=False), by_hand(model, ids, 5))


@pytest.mark.skipif(CLASS_OF_ITS_OWN, reason="transformers before 5.5 has no such cache")
def test_a_stream_of_mamba_is_its_generation(tmp_path):
    model, ids = mixture(unusual_models.mamba, tmp_path, ["in_proj"]), prompt(batch=1)
    steps = weft.stream(model, ids, max_new_tokens=5, eos_token_id=[])
    assert [step.token for step in steps] == by_hand(model, ids, 5)[0, 6:].tolist()


@pytest.mark.skipif(CLASS_OF_ITS_OWN, reason="transformers before 5.5 has no such cache")
def test_a_filled_cache_of_recurrent_states_is_refused(tmp_path):
    model, ids = mixture(unusual_models.mamba, tmp_path, ["in_proj"]), prompt(batch=1)
    with torch.no_grad():
        cache = unusual_models.mamba()(ids, use_cache=True).cache_params
        with pytest.raises(CacheError, match=r"\(DynamicCache with recurrent states\) was not filled by this model"):
            model(input_ids=ids[:, -1:], cache_params=cache, use_cache=True)
        ours = model(input_ids=ids, use_cache=True).cache_params
    with pytest.raises(CacheError, match="recurrent states, which do not tell how many tokens"):
        weft.stream(model, ids, past_key_values=ours)


ELSEWHERE = {
    "recurrent gemma": (
        unusual_models.recurrent_gemma,
        ["linear_x", "q_proj"],
        r"its modules \(model\.layers\.0\.temp",
    ),
    "rwkv": (unusual_models.rwkv, ["key", "value"], "no cache of transformers' own"),
}
if CLASS_OF_ITS_OWN:
    ELSEWHERE["mamba"] = (unusual_models.mamba, ["in_proj"], "no cache of transformers' own")


@pytest.mark.parametrize(("make", "targets", "where"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_state_outside_of_a_cache_is_refused_with_two_passes_and_works_with_one(make, targets, where, tmp_path):
    two, ids = mixture(make, tmp_path / "two", targets), prompt()
    with pytest.raises(
        CacheError, match=rf"use_cache \(True\) is not supported with \w+, which keeps its state in {where}"
    ):
        quietly(two.generate, ids, max_new_tokens=3, do_sample=False, use_cache=True)
    with torch.no_grad():
        two(input_ids=ids)  # where nobody asks for a cache there is none
    uncached = quietly(two.generate, ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(uncached, by_hand(two, ids, 4))
    if make is unusual_models.rwkv:
        return  # transformers' own cached RWKV (5.23) gives other tokens than its uncached one
    one = mixture(make, tmp_path / "one", targets, **ONE_PASS)
    assert torch.equal(quietly(one.generate, ids, max_new_tokens=4, do_sample=False), by_hand(one, ids, 4))
    with two.fixed_scalings({"one": 1.0}):
        assert torch.equal(quietly(two.generate, ids, max_new_tokens=4, do_sample=False), by_hand(two, ids, 4))


def test_a_state_that_is_handed_in_is_refused_with_two_passes(tmp_path):
    model, ids = mixture(unusual_models.rwkv, tmp_path, ["key", "value"]), prompt()
    with torch.no_grad():
        state = unusual_models.rwkv()(ids, use_cache=True).state
    with pytest.raises(CacheError, match=r"state \(list\) is a state that the two passes would share"):
        model(input_ids=ids[:, -1:], state=state, use_cache=False)


def test_continuous_batching_is_refused_with_two_passes(tmp_path):
    model = mixture(tiny_llama, tmp_path, ["q_proj", "v_proj", "lm_head"])
    with pytest.raises(CacheError, match=r"generate_batch cannot be used with a scaling pass \(gate_layer is None\)"):
        model.generate_batch([prompt(1)[0].tolist()], max_new_tokens=4, do_sample=False)


@pytest.mark.skipif(
    not hasattr(transformers, "ContinuousBatchingConfig"), reason="since transformers 5.4; 5.0 has it on a GPU only"
)
def test_continuous_batching_is_greedy_decoding_with_one_pass(tmp_path):
    prompts = [prompt(1, length)[0].tolist() for length in (5, 7)]
    model = mixture(tiny_llama, tmp_path, ["q_proj", "v_proj", "lm_head"], **ONE_PASS)
    model.get_base_model().generation_config.eos_token_id = None
    expected = [by_hand(model, torch.tensor([ids]), 4)[0, len(ids) :].tolist() for ids in prompts]
    config = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    outputs = quietly(
        model.generate_batch, prompts, continuous_batching_config=config, max_new_tokens=4, do_sample=False
    )
    assert [output.generated_tokens for output in outputs.values()] == expected


def test_a_paged_cache_is_refused_by_the_passes_themselves(tmp_path):
    model = mixture(tiny_llama, tmp_path, ["q_proj"])
    with pytest.raises(
        CacheError, match=r"cache \(object\) is a state that the two passes would share: .*generate_batch"
    ):
        model(input_ids=prompt(), cache=object())
