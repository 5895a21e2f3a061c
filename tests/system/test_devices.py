"""A base model over several devices, and one whose weights are offloaded: the numbers are those of a plain one."""

import peft
import pytest
import torch
import transformers

import accelerate
import weft
from models import VOCAB, gate_options, lora, quietly, save_adapter, tiny_llama
from pretend_devices import PretendedDevices, dispatch, whereabouts
from weft.base_model.devices import execution_device
from weft.errors import AdapterError
from weft.evaluate import perplexity

FIRST, SECOND = torch.device("cpu:1"), torch.device("cpu:2")
DEVICE_MAP = {
    "model.embed_tokens": FIRST,
    "model.rotary_emb": FIRST,
    "model.layers.0": FIRST,
    "model.layers.1": SECOND,
    "model.norm": SECOND,
    "lm_head": SECOND,
}
SCHEMES = {
    "two passes": {},
    "top-k": {"top_k_lora": 2},
    "gathered": {"top_k_lora": 1},
    "short": {"scaling_pass_layers": 1},
    "one pass": {"gate_layer": 1},
    "scaled": {"scaling_pass_value": 0.5, "global_scaling_weight": 2.0},
}


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """Three adapters of one shape, whose experts can be gathered."""
    folder = tmp_path_factory.mktemp("alike")
    return {name: save_adapter(tiny_llama(), lora(), folder / name, seed=i) for i, name in enumerate("abc")}


@pytest.fixture
def ids():
    return torch.randint(1, VOCAB, (2, 7))


@pytest.fixture
def mask():
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    return mask


def mixture(base, adapters, **options):
    torch.manual_seed(1)
    return quietly(weft.from_adapters, base, adapters, **gate_options(**options)).eval()


def over_two_devices(adapters, **options):
    return mixture(dispatch(tiny_llama(), DEVICE_MAP), adapters, **options)


def test_the_pretended_devices_cannot_be_mixed_and_moves_can_be_forgotten():
    with PretendedDevices() as devices:
        one, other = torch.ones(2, device=FIRST), torch.ones(2).to(SECOND)
        assert (one.device, other.device, (one * 2)[:1].device) == (FIRST, SECOND, FIRST)
        with pytest.raises(RuntimeError, match=r"expected all tensors on one device, found \['cpu:1', 'cpu:2'\]"):
            one + other
        with pytest.raises(RuntimeError, match=r"found \['cpu', 'cpu:1'\]"):
            torch.nn.functional.linear(one, torch.ones(3, 2))
        assert (one + other.to(one.device)).device == FIRST
        assert devices.moves == set()  # of weft's own files


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_gives_the_same_over_two_devices(llama_adapters, alike, ids, mask, scheme):
    adapters = alike if scheme == "gathered" else llama_adapters
    plain = mixture(tiny_llama(), adapters, **SCHEMES[scheme])
    expected = plain(input_ids=ids, attention_mask=mask, labels=ids)
    expected.loss.backward()
    with PretendedDevices():
        model = over_two_devices(adapters, **SCHEMES[scheme])
        found = model(input_ids=ids, attention_mask=mask, labels=ids)
        weights = [next(iter(layer.lora_A.parameters())) for layer in layers(model)]
        assert {whereabouts(weight) for weight in weights} == {FIRST, SECOND}
        assert whereabouts(next(model.internal_xlora_classifier.parameters())) == FIRST
        found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def layers(model):
    return [module for module in model.base_model.model.modules() if getattr(module, "lora_A", None)]


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        *((scheme, {}) for scheme in SCHEMES),
        ("two passes", {"num_beams": 2}),
        ("two passes", {"freeze_scalings_after": 2}),
        ("short", {"num_beams": 2, "freeze_scalings_after": 2}),
    ],
)
def test_generation_gives_the_same_over_two_devices(llama_adapters, alike, ids, mask, scheme, options):
    adapters = alike if scheme == "gathered" else llama_adapters
    options = {**options, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = mixture(tiny_llama(), adapters, **SCHEMES[scheme]).generate(ids, **options)
    with PretendedDevices(), torch.no_grad():
        model = over_two_devices(adapters, **SCHEMES[scheme])
        moved = {**options, "attention_mask": mask.to(FIRST)}
        assert torch.equal(model.generate(ids.to(FIRST), **moved), expected)


def test_what_reads_texts_gives_the_same_over_two_devices(llama_adapters, ids):
    plain = mixture(tiny_llama(), llama_adapters)
    texts = [row.tolist() for row in ids]
    options = {"max_new_tokens": 6, "speculate": 3}
    steps = weft.generate(plain, ids[:1], **options).tokens
    measured, means = perplexity(plain, texts, 2), weft.mean_scalings(plain, texts)
    with PretendedDevices():
        model = over_two_devices(llama_adapters)
        assert weft.generate(model, ids[:1], **options).tokens == steps
        assert perplexity(model, texts, 2) == pytest.approx(measured)
        torch.testing.assert_close(weft.mean_scalings(model, texts), means)
        with model.fixed_scalings(means):
            found = model(input_ids=ids).logits
    with plain.fixed_scalings(means):
        torch.testing.assert_close(found, plain(input_ids=ids).logits)


def test_folding_gives_the_same_over_two_devices(llama_adapters, tmp_path):
    weights = {"math": 0.5, "code": 0.25}
    weft.fold(mixture(tiny_llama(), llama_adapters), tmp_path / "plain", weights)
    with PretendedDevices():
        weft.fold(over_two_devices(llama_adapters), tmp_path / "spread", weights)
    plain, spread = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "spread"))
    assert plain == spread


@pytest.mark.parametrize("file", ["passes/base.py", "layers/base.py"])
def test_without_its_moves_it_would_fail(llama_adapters, ids, mask, file):
    with PretendedDevices() as devices:
        over_two_devices(llama_adapters)(input_ids=ids, attention_mask=mask)
    assert file in devices.moves
    with PretendedDevices(without_moves_in=file), pytest.raises(RuntimeError, match="expected all tensors on one"):
        over_two_devices(llama_adapters)(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("scheme", ["two passes", "short"])
def test_the_scaling_pass_gets_the_tokens_where_the_adapted_pass_gets_them(llama_adapters, ids, mask, scheme):
    with PretendedDevices():
        model, places = over_two_devices(llama_adapters, **SCHEMES[scheme]), []
        model.get_base_model().model.register_forward_pre_hook(
            lambda backbone, args, kwargs: places.append(
                (whereabouts(kwargs["input_ids"]), kwargs["attention_mask"].device)
            ),
            with_kwargs=True,
        )
        model(input_ids=ids, attention_mask=mask)
    assert places == [(FIRST, FIRST)] * 2


def test_encoder_decoders_give_the_same_over_two_devices(tmp_path, ids, mask):
    def t5():
        torch.manual_seed(0)
        config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        config.decoder_start_token_id = 0
        return transformers.T5ForConditionalGeneration(config).eval()

    config = lora(target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    adapters = {name: save_adapter(t5(), config, tmp_path / name, seed=i) for i, name in enumerate("ab")}
    call = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    plain = mixture(t5(), adapters)
    expected = plain(**call).logits
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    text = plain.generate(input_ids=ids, attention_mask=mask, **options)
    places = {"shared": FIRST, "encoder": FIRST, "decoder": SECOND, "lm_head": SECOND}
    with PretendedDevices(), torch.no_grad():
        model = mixture(dispatch(t5(), places), adapters)
        torch.testing.assert_close(model(**call).logits, expected)
        found = model.generate(input_ids=ids.to(FIRST), attention_mask=mask.to(FIRST), **options)
        assert torch.equal(found, text)


# ------------------------------------------------------------------ offload, with accelerate's own hooks


def offloaded(kind, folder):
    base = tiny_llama()
    if kind == "cpu":
        return accelerate.cpu_offload(base, execution_device="cpu")
    if kind == "disk":
        return accelerate.disk_offload(base, str(folder), execution_device="cpu")
    places = {name: "disk" if name == "model.layers.1" else "cpu" for name in DEVICE_MAP}
    return accelerate.dispatch_model(base, places, offload_dir=str(folder))


def is_on_meta(model):
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("cpu", "two passes"), ("cpu", "one pass"), ("disk", "short"), ("one layer on disk", "two passes")],
)
def test_with_an_offloaded_base_everything_is_the_same(llama_adapters, ids, mask, tmp_path, kind, scheme):
    plain = mixture(tiny_llama(), llama_adapters, **SCHEMES[scheme])
    model = mixture(offloaded(kind, tmp_path / "weights"), llama_adapters, **SCHEMES[scheme])
    away = is_on_meta(model)
    assert away
    assert not any("lora_A" in name or "lora_B" in name or "classifier" in name for name in away)
    call = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    expected, found = plain(**call), model(**call)
    assert torch.equal(found.logits, expected.logits)
    expected.loss.backward()
    found.loss.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert other.grad is None or torch.equal(one.grad, other.grad)
    assert is_on_meta(model) == away

    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    # transformers 5.0 warns of a model on meta, where offloaded weights are.
    assert torch.equal(quietly(model.generate, ids, **options), plain.generate(ids, **options))
    options = {"max_new_tokens": 5, "speculate": 2}
    assert weft.generate(model, ids[:1], **options).tokens == weft.generate(plain, ids[:1], **options).tokens

    quietly(model.save_pretrained, tmp_path / "mixture")
    again = weft.from_pretrained(tmp_path / "mixture", offloaded(kind, tmp_path / "again"))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, expected.logits)
        base = again.base_model.unload()
        found = base(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(found, tiny_llama()(input_ids=ids, attention_mask=mask).logits)


def test_adapters_of_an_offloaded_embedding_are_taken(ids, tmp_path):
    config = lora(target_modules=["embed_tokens", "q_proj"])
    adapters = {name: save_adapter(tiny_llama(), config, tmp_path / name, seed=i) for i, name in enumerate("ab")}
    plain = mixture(tiny_llama(), adapters)
    model = mixture(accelerate.cpu_offload(tiny_llama(), execution_device="cpu"), adapters)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_experts_in_the_dtype_of_an_offloaded_base_stay_where_they_are(llama_adapters, ids):
    bases = [tiny_llama().bfloat16(), accelerate.cpu_offload(tiny_llama().bfloat16(), execution_device="cpu")]
    weft.register_with_peft()
    try:
        logits = []
        for base in bases:
            torch.manual_seed(1)
            config = weft.XLoraConfig(task_type="CAUSAL_LM", adapters=llama_adapters, **gate_options())
            model = quietly(peft.get_peft_model, base, config, autocast_adapter_dtype=False).eval()
            assert {module.lora_A["math"].weight.dtype for module in layers(model) if "math" in module.lora_A} == {
                torch.bfloat16
            }
            with torch.no_grad():
                logits.append(model(input_ids=ids).logits)
    finally:
        weft.unregister_from_peft()
    assert torch.equal(*logits)


def test_a_mixture_may_be_offloaded_after_it_was_made(llama_adapters, ids):
    expected = mixture(tiny_llama(), llama_adapters)(input_ids=ids).logits
    model = mixture(tiny_llama(), llama_adapters)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert any("lora_A" in name for name in is_on_meta(model))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
    away = is_on_meta(model)
    assert away
    assert not any("lora_A" in name or "lora_B" in name or "classifier" in name for name in away)
    model.base_model._restack()  # as `generate` does


def test_a_base_that_lost_its_hooks_on_disk_is_refused_with_a_way_out(llama_adapters, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    places = {name: "disk" if name == "model.layers.1" else "cpu" for name in DEVICE_MAP}
    load = transformers.AutoModelForCausalLM.from_pretrained
    base = load(tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "weights"))
    accelerate.hooks.remove_hook_from_submodules(base)  # as peft's own from_pretrained does first
    pattern = r"adapter 'math' .* on the meta device: load with low_cpu_mem_usage=False, and with weft\.from_pretrained"
    with pytest.raises(AdapterError, match=r"(?s)" + pattern):
        mixture(base, llama_adapters)


def test_where_a_module_computes():
    linear = torch.nn.Linear(2, 2)
    assert execution_device(linear) == torch.device("cpu")
    with torch.device("meta"):
        nowhere = torch.nn.Linear(2, 2)
    assert execution_device(nowhere) == torch.device("cpu")
    buffers_only = torch.nn.Module()
    buffers_only.register_buffer("qweight", torch.empty(2, device="meta"))
    assert execution_device(buffers_only) == torch.device("cpu")
    assert execution_device(accelerate.cpu_offload(linear, execution_device=FIRST)) == FIRST
