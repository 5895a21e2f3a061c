"""weft inside peft: registered and not, from peft's config and weft's own."""

import shutil

import huggingface_hub
import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import weft
from models import VOCAB, lora, quietly, randomise, save_adapter, tiny_llama
from weft.errors import CheckpointError, ConfigError

PEFT_OWN = PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.XLORA], PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.XLORA]


@pytest.fixture
def registered():
    weft.register_with_peft()
    yield
    weft.unregister_from_peft()


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Adapters named as peft's X-LoRA needs them."""
    folder = tmp_path_factory.mktemp("numbered")
    return {str(i): save_adapter(tiny_llama(), lora(), folder / str(i), seed=i) for i in range(3)}


@pytest.fixture
def ids():
    return torch.randint(1, VOCAB, (2, 6))


def mapping():
    return PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.XLORA], PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.XLORA]


def pefts_script(adapters):
    """What a user of peft's X-LoRA has today."""
    base = tiny_llama()
    base.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, layerwise_scalings=True, xlora_depth=2, xlora_size=8
    )
    torch.manual_seed(3)
    return quietly(peft.get_peft_model, base, config)


def test_registering_is_idempotent_and_undone():
    for _ in range(2):
        weft.register_with_peft()
        assert mapping() == (weft.XLoraModel, weft.XLoraConfig)
    for _ in range(2):
        weft.unregister_from_peft()
        assert mapping() == PEFT_OWN


def test_building_without_registering_leaves_pefts_table_as_it_was(llama_adapters):
    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    assert before == PEFT_TYPE_TO_TUNER_MAPPING
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert isinstance(model.base_model, weft.XLoraModel)
    assert model.peft_type == peft.PeftType.XLORA == model.peft_config["default"].peft_type


def test_a_peft_script_gains_one_line_and_keeps_its_results(numbered, ids, registered):
    weft.unregister_from_peft()
    theirs = pefts_script(numbered).eval()
    weft.register_with_peft()
    ours = pefts_script(numbered).eval()
    assert isinstance(ours.base_model, weft.XLoraModel)
    assert not isinstance(theirs.base_model, weft.XLoraModel)
    gate, theirs_gate = ours.internal_xlora_classifier, theirs.internal_xlora_classifier
    gate.load_state_dict(theirs_gate.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(ours.generate(**inputs), theirs.generate(**inputs))
    for method in ("set_topk_lora", "get_global_scaling_weight", "get_scalings_log", "disable_scalings_logging"):
        assert callable(getattr(ours, method))
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
    if not trained:  # peft before 0.21 freezes its gate by mistake
        trained = {n for n, _ in theirs.named_parameters() if "internal_xlora_classifier" in n}
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == trained


def test_state_dict_keys_are_pefts(numbered, registered):
    ours = set(pefts_script(numbered).state_dict())
    weft.unregister_from_peft()
    assert ours == set(pefts_script(numbered).state_dict())


def test_registered_peft_saves_and_loads_by_itself(llama_adapters, ids, registered, tmp_path):
    config = weft.XLoraConfig(task_type="CAUSAL_LM", adapters=llama_adapters)
    model = peft.get_peft_model(tiny_llama(), config).eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "mixture")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "mixture")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "mixture", is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, _ in again.named_parameters() if "internal_xlora_classifier" in n
    }


def test_pefts_placeholder_for_hidden_size_is_no_hidden_size(numbered, registered):
    config = quietly(peft.XLoraConfig, task_type="CAUSAL_LM", adapters=numbered)
    assert config.hidden_size == 4096
    assert quietly(peft.get_peft_model, tiny_llama(), config).xlora_config.hidden_size == 32


@pytest.mark.parametrize("autocast", [True, False])
def test_autocast_adapter_dtype_is_pefts(numbered, registered, autocast):
    config = weft.XLoraConfig(task_type="CAUSAL_LM", adapters=numbered)
    model = peft.get_peft_model(tiny_llama().to(torch.bfloat16), config, autocast_adapter_dtype=autocast)
    dtypes = {p.dtype for n, p in model.named_parameters() if "lora_A." in n}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}
    model(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_base_may_be_a_path(base_folder, base_adapters, tmp_path):
    model = weft.from_adapters(str(base_folder), base_adapters)
    assert model.peft_config["default"].base_model_name_or_path == str(base_folder)
    model.save_pretrained(tmp_path / "mixture")
    loaded = weft.from_pretrained(tmp_path / "mixture")  # the base is the one the folder names
    ids = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_base_that_cannot_be_found_is_an_error(llama_adapters, tmp_path):
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    model.save_pretrained(tmp_path / "mixture")
    with pytest.raises(CheckpointError, match=r"base \(None\) must be given"):
        weft.from_pretrained(tmp_path / "mixture")
    with pytest.raises(CheckpointError, match=r"base \(/nowhere\) cannot be loaded"):
        weft.from_pretrained(tmp_path / "mixture", "/nowhere")


def test_one_config_may_serve_several_models(llama_adapters, registered, tmp_path, ids):
    config = weft.XLoraConfig(task_type="CAUSAL_LM", adapters=llama_adapters)
    models = [peft.get_peft_model(tiny_llama(), config).eval() for _ in range(2)]
    randomise(models[0], 5)
    models[0].set_topk_lora(1)
    assert (config.layer_names, config.top_k_lora, models[1].xlora_config.top_k_lora) == (None, None, None)
    models[0].save_pretrained(tmp_path / "mixture")
    loaded = weft.from_pretrained(tmp_path / "mixture", tiny_llama())
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, models[0](input_ids=ids).logits)


def test_all_unknown_options_are_named(llama_adapters):
    with pytest.raises(ConfigError, match=r"top_k is not an option: did you mean top_k_lora\?(.|\n)*depth"):
        weft.from_adapters(tiny_llama(), llama_adapters, top_k=2, depth=3)


def test_from_pretrained_is_frozen_and_in_evaluation_mode_unless_trainable(llama_adapters, tmp_path):
    weft.from_adapters(tiny_llama(), llama_adapters).save_pretrained(tmp_path / "mixture")
    loaded = weft.from_pretrained(tmp_path / "mixture", tiny_llama())
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = weft.from_pretrained(tmp_path / "mixture", tiny_llama().train(), is_trainable=True)
    assert trainable.training
    assert any(p.requires_grad for p in trainable.parameters())


# ---------------------------------------------------------------------- how models are named and loaded


def weights(model):
    return model.get_base_model().get_input_embeddings().weight


def test_mixture_and_base_may_be_given_in_either_order(mixture, base_folder, base_adapters, ids, without_type_checks):
    base = str(base_folder)
    with torch.no_grad():
        expected = weft.from_pretrained(mixture, base)(ids).logits
        for first, second in ((base, mixture), (transformers.AutoModelForCausalLM.from_pretrained(base), mixture)):
            assert torch.equal(weft.from_pretrained(first, second)(ids).logits, expected)
    swapped = weft.from_adapters(base_adapters, base)
    assert swapped.xlora_config.expert_names == list(base_adapters)


@pytest.mark.parametrize("second", [None, tiny_llama])
def test_a_model_in_the_place_of_the_mixture_is_named(second, without_type_checks):
    with pytest.raises(ConfigError, match=r"path \(LlamaForCausalLM\) must be the folder or Hub id of a mixture"):
        weft.from_pretrained(tiny_llama(), second and second())


def test_a_base_model_that_is_named_is_loaded_as_transformers_users_say(mixture, base_folder, base_adapters):
    loaded = weft.from_pretrained(mixture, dtype=torch.bfloat16, device_map="cpu")
    assert weights(loaded).dtype == torch.bfloat16
    made = weft.from_adapters(str(base_folder), base_adapters, dtype=torch.float64, device_map={"": "cpu"})
    assert weights(made).dtype == torch.float64


@pytest.mark.parametrize("option", [{"dtype": torch.float16}, {"device_map": "auto"}], ids=str)
def test_options_of_loading_are_refused_where_nothing_is_loaded(option, mixture, llama_adapters):
    name = next(iter(option))
    message = rf"{name} \(.*\) has no effect on a base model that is loaded already \(LlamaForCausalLM\)"
    with pytest.raises(ConfigError, match=message):
        weft.from_pretrained(mixture, tiny_llama(), **option)
    with pytest.raises(ConfigError, match=message):
        weft.from_adapters(tiny_llama(), llama_adapters, **option)


def test_revision_and_token_reach_the_hub(hub, mixture, base_folder, monkeypatch, registered):
    shutil.copytree(mixture, hub / "user/mix")
    base, asked = transformers.AutoModelForCausalLM.from_pretrained(base_folder), []
    fetch = huggingface_hub.snapshot_download

    def noted(repository, **options):
        asked.append((repository, options["revision"], options["token"]))
        return fetch(repository, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", noted)
    weft.from_pretrained("user/mix", base, revision="main", token="hf_right")
    assert asked == [("user/mix", "main", "hf_right")]
    weft.XLoraConfig.from_pretrained("user/mix", revision="main", token="hf_right")  # as peft calls it
    assert asked == [("user/mix", "main", "hf_right")] * 2
    peft.PeftConfig.from_pretrained("user/mix", revision="main", token="hf_right")  # as transformers reads it
    assert asked == [("user/mix", "main", "hf_right")] * 3


def test_the_default_is_scalings_for_each_layer_and_pefts_configs_keep_theirs(llama_adapters, numbered, registered):
    assert weft.XLoraConfig(adapters=llama_adapters).layerwise_scalings
    assert not weft.XLoraConfig.from_peft(peft.XLoraConfig(adapters=numbered, hidden_size=32)).layerwise_scalings
