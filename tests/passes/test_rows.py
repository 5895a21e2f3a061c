"""peft's `adapter_names`: each row of a batch follows one expert, none, or the gate."""

import peft
import pytest
import torch

import unusual_models
import weft
from models import VOCAB, lora, quietly, save_adapter, tiny_llama
from weft.errors import ConfigError


def folders(make, folder, **options):
    return {
        name: save_adapter(make(), lora(**options), folder / name, seed=seed)
        for seed, name in enumerate(("math", "code", "law"))
    }


def mixture(paths, make=tiny_llama, **options):
    torch.manual_seed(1)
    model = quietly(weft.from_adapters, make(), paths, layerwise_scalings=True, **options).eval()
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def theirs(paths, make=tiny_llama):
    """The same adapters in peft's own model."""
    model = quietly(peft.PeftModel.from_pretrained, make(), paths["math"], adapter_name="math")
    for name in ("code", "law"):
        quietly(model.load_adapter, paths[name], adapter_name=name)
    return model.eval()


def text(batch):
    ids = torch.randint(1, VOCAB, (batch, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


NAMES = ["code", "__base__", "law", "code"]
SCHEMES = [{}, {"gate_layer": 1}, {"top_k_lora": 1}, {"global_scaling_weight": 2.0}, {"scaling_pass_value": 0.3}]


@pytest.mark.parametrize("options", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", [{}, {"lora_bias": True}], ids=["plain", "biased"])
def test_rows_of_experts_are_pefts_mixed_batch(options, kind, tmp_path):
    paths = folders(tiny_llama, tmp_path, **kind)
    model, inputs = mixture(paths, **options), text(4)
    with torch.no_grad():
        found = model(**inputs, adapter_names=NAMES).logits
        expected = theirs(paths)(**inputs, adapter_names=NAMES).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", SCHEMES, ids=str)
def test_gated_rows_beside_them_are_what_they_are_alone(options, tmp_path):
    paths = folders(tiny_llama, tmp_path, lora_bias=True)
    model, inputs = mixture(paths, **options), text(4)
    names = ["default", "math", "default", "__base__"]
    with torch.no_grad():
        found = model(**inputs, adapter_names=names).logits
        gated = model(**inputs).logits
        torch.testing.assert_close(found[[0, 2]], gated[[0, 2]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[3], tiny_llama()(**inputs).logits[3], rtol=1e-4, atol=1e-4)
        alone = theirs(paths)(**inputs, adapter_names=["math"] * 4).logits
        torch.testing.assert_close(found[1], alone[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("generation", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_generation_of_named_rows_is_each_rows_own(generation, tmp_path):
    paths = folders(tiny_llama, tmp_path)
    model, inputs = mixture(paths), text(3)
    model.get_base_model().generation_config.eos_token_id = None
    options = {"max_new_tokens": 4, "do_sample": False, **generation}
    found = model.generate(**inputs, **options, adapter_names=["code", "default", "__base__"])
    row = [{name: value[number : number + 1] for name, value in inputs.items()} for number in range(3)]
    code = quietly(peft.PeftModel.from_pretrained, tiny_llama(), paths["code"])
    code.get_base_model().generation_config.eos_token_id = None
    base = tiny_llama()
    base.generation_config.eos_token_id = None
    assert torch.equal(found[:1], code.generate(**row[0], **options))
    assert torch.equal(found[1:2], model.generate(**row[1], **options))
    assert torch.equal(found[2:], base.generate(**row[2], **options))


def test_rows_of_an_encoder_decoder_follow_their_expert_in_both_parts(tmp_path):
    make = unusual_models.encoder_decoder
    paths = folders(make, tmp_path, target_modules=["query", "key", "intermediate.dense"], task_type="SEQ_2_SEQ_LM")
    model, ids = mixture(paths, make), torch.randint(1, VOCAB, (3, 6))
    names = ["code", "__base__", "default"]
    with torch.no_grad():
        found = model(input_ids=ids, decoder_input_ids=ids[:, :4], adapter_names=names).logits
        expected = theirs(paths, make)(
            input_ids=ids, decoder_input_ids=ids[:, :4], adapter_names=["code", "__base__", "__base__"]
        ).logits
        torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-4)
        gated = model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
        torch.testing.assert_close(found[2], gated[2], rtol=1e-4, atol=1e-4)
    generated = quietly(model.generate, input_ids=ids, max_new_tokens=3, do_sample=False, adapter_names=names)
    alone = quietly(model.generate, input_ids=ids[2:], max_new_tokens=3, do_sample=False)
    assert torch.equal(generated[2:], alone)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["code", "poems"],
            r"adapter_names has \['poems'\], expected one of \['math', 'code', 'law', '__base__', 'default'\]",
        ),
        (["code"], r"adapter_names has 1 names, expected 2: one for each row of the batch"),
        (["code"] * 3, r"adapter_names has 3 names, expected 2"),
        (["code"] * 4, r"adapter_names has 4 names, expected 2"),
    ],
)
def test_names_that_do_not_fit_are_refused_and_the_model_goes_on(names, message, tmp_path):
    model, inputs = mixture(folders(tiny_llama, tmp_path)), text(2)
    with torch.no_grad():
        before = model(**inputs).logits
        with pytest.raises(ConfigError, match=message):
            model(**inputs, adapter_names=names)
        assert torch.equal(model(**inputs).logits, before)


def test_they_are_for_evaluation_and_for_a_mixture_that_has_a_weight(tmp_path):
    model, inputs = mixture(folders(tiny_llama, tmp_path)), text(1)
    with pytest.raises(ConfigError, match=r"adapter_names cannot be used in training mode: call model.eval\(\)"):
        model.train()(**inputs, adapter_names=["code"])
    model.eval().set_global_scaling_weight(0.0)
    with pytest.raises(ConfigError, match=r"adapter_names has 'code', but global_scaling_weight \(0\) leaves all"):
        model(**inputs, adapter_names=["code"])
    with pytest.raises(ConfigError, match="alora_offsets cannot be used"):
        model(**inputs, alora_offsets=[None])


def test_one_head_cannot_be_that_of_a_row(tmp_path):
    paths = folders(unusual_models.bert, tmp_path, target_modules=["query"], task_type=None)
    model = mixture(paths, unusual_models.bert, heads=["classifier"])
    with pytest.raises(ConfigError, match=r"adapter_names cannot be used with heads \(\['classifier'\]\)"):
        model(**text(1), adapter_names=["code"])
