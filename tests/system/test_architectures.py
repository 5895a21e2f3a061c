"""One test over many architectures: weft equals peft's X-LoRA, whatever the backbone and its names."""

import peft
import pytest
import torch

from models import VOCAB, make_architecture, peft_model, quietly, weft_model


def batch():
    input_ids = torch.randint(1, VOCAB, (2, 9))
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layerwise_scalings": False},
        {"top_k_lora": 2},
        {"scaling_pass_value": 0.4},
        {"enable_softmax": False, "top_k_lora": 2, "enable_softmax_topk": True, "global_scaling_weight": 0.7},
    ],
    ids=["layerwise", "shared", "top-k", "scaling pass with experts", "softmax over top-k"],
)
def test_same_gate_gives_the_logits_of_pefts_xlora(architecture, options, monkeypatch):
    theirs = peft_model(architecture, monkeypatch, **options)
    ours = weft_model(architecture, **options)
    ours.internal_xlora_classifier.load_state_dict(theirs.base_model.internal_xlora_classifier.state_dict())
    inputs = batch()
    with torch.no_grad():
        expected, found = theirs(**inputs).logits, ours(**inputs).logits
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-4)


def test_one_expert_with_all_the_weight_is_that_adapter_alone(architecture):
    name, paths = architecture
    model, inputs = weft_model(architecture), batch()
    for expert, path in paths.items():
        alone = quietly(peft.PeftModel.from_pretrained, make_architecture(name)[0], path)
        with torch.no_grad(), model.fixed_scalings({expert: 1.0}):
            torch.testing.assert_close(model(**inputs).logits, alone(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_disabled_is_exactly_the_base_model_and_unload_gives_it_back(architecture):
    model, inputs = weft_model(architecture), batch()
    base, _ = make_architecture(architecture[0])
    with torch.no_grad():
        expected = base(**inputs).logits
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, expected)
        assert not torch.allclose(model(**inputs).logits, expected)
        unloaded = model.base_model.unload()
        assert torch.equal(unloaded(**inputs).logits, expected)
    assert [name for name, _ in unloaded.named_modules()] == [name for name, _ in base.named_modules()]
    assert [p.requires_grad for p in unloaded.parameters()] == [p.requires_grad for p in base.parameters()]


def test_padding_never_changes_a_result(architecture):
    model = weft_model(architecture)
    short = torch.randint(1, VOCAB, (1, 5))
    with torch.no_grad():
        expected = model(input_ids=short).logits
        for side in ("left", "right"):
            pad = torch.zeros(1, 3, dtype=torch.long)
            parts = (pad, short) if side == "left" else (short, pad)
            mask = torch.cat([torch.zeros_like(pad) if part is pad else torch.ones_like(part) for part in parts], 1)
            inputs = {"input_ids": torch.cat(parts, 1), "attention_mask": mask}
            if model.backbone.takes("position_ids"):
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            found = model(**inputs).logits[mask.bool()][None]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_greedy_generation_equals_a_loop_over_full_forwards(architecture):
    model = weft_model(architecture)
    if not model.get_base_model().can_generate():
        pytest.skip("no generating model")
    prompt = torch.randint(1, VOCAB, (2, 5))
    found = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    expected = prompt
    with torch.no_grad():
        for _ in range(4):
            logits = model(input_ids=expected, attention_mask=torch.ones_like(expected)).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, expected)


def test_inputs_embeds_give_what_input_ids_give(architecture):
    name, _ = architecture
    if name == "gemma3":
        pytest.skip("its experts adapt the embedding, which inputs_embeds go past")
    model, inputs = weft_model(architecture), batch()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(
            model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits, expected
        )
