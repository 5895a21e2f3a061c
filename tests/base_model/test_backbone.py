"""Backbones that are not where their class says, and models without one, which are refused when the mixture is made."""

import pytest
import torch

import unusual_models
import weft
from models import VOCAB, lora, quietly, save_adapter


def test_a_backbone_under_another_name_than_the_class_says_is_found(tmp_path):
    make = unusual_models.llama4
    path = save_adapter(make(), lora(target_modules=["q_proj", "down_proj"]), tmp_path / "a", seed=1)
    model, ids = quietly(weft.from_adapters, make(), {"a": path, "b": path}).eval(), torch.randint(3, VOCAB, (2, 7))
    read = []
    model.internal_xlora_classifier.register_forward_hook(lambda module, args, output: read.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
        assert torch.equal(read[0], make().model(ids).last_hidden_state)
    cached = quietly(model.generate, input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(
        cached, quietly(model.generate, input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=False)
    )


def test_a_model_whose_language_model_is_a_whole_one_is_refused_when_the_mixture_is_made(tmp_path):
    make = unusual_models.blip2
    targets = r".*language_model.*q_proj"
    path = save_adapter(make(), lora(task_type=None, target_modules=targets), tmp_path / "a", seed=1)
    base = make()
    with pytest.raises(ValueError, match=r"\(Blip2ForConditionalGeneration\) gives no last_hidden_state that a gate"):
        quietly(weft.from_adapters, base, {"a": path})
    before = make().state_dict()
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
