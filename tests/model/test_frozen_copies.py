"""A frozen copy of the mixture beside it, as TRL's preference trainers make one by `add_adapter` and `set_adapter`."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import unusual_models
import weft
from models import VOCAB, folder_files, lora, quietly, save_adapter, tiny_llama
from weft.errors import ConfigError


def folders(make, folder, **options):
    return {
        name: save_adapter(make(), quietly(lora, **options), folder / name, seed=i)
        for i, name in enumerate(("one", "two"))
    }


def mixture(paths, make=tiny_llama, **options):
    torch.manual_seed(1)
    options |= {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16}
    model = quietly(weft.from_adapters, make(), paths, **options)
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def text():
    ids = torch.randint(3, VOCAB, (2, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def add_reference(model):
    """What TRL's trainers do."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


def train_a_step(model, inputs, gate_only=False):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=50.0 if gate_only else 0.5)
    logits = model(**inputs).logits
    reference = None
    if "ref" in model.peft_config:  # between the forward and the backward pass, as in DPO
        with torch.no_grad():
            model.set_adapter("ref")
            reference = model(**inputs).logits
            model.set_adapter("default")
    logits.square().mean().backward()
    optimizer.step()
    return reference


def classifier():
    return unusual_models.bert()


KINDS = {
    "the gate": (tiny_llama, {}, {}),
    "experts too": (tiny_llama, {"lora_dropout": 0.5, "lora_bias": True}, {"use_trainable_adapters": True}),
    "dora experts too": (
        tiny_llama,
        {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
        {"use_trainable_adapters": True, "allow_dora": True},
    ),
    "a head": (classifier, {"target_modules": ["query"], "task_type": None}, {"heads": ["classifier"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_stays_and_the_mixture_trains_as_without_it(kind, tmp_path):
    make, adapter, options = KINDS[kind]
    paths, inputs = folders(make, tmp_path, **adapter), text()
    plain, model = (mixture(paths, make, **options) for _ in range(2))
    with torch.no_grad():
        first = model.eval()(**inputs).logits
    add_reference(model.train())
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [name for name in trainable if "ref" in name]
    for module in (model, plain):
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout) and "experts too" not in kind:
                part.p = 0.0
    for _ in range(2):
        torch.manual_seed(2)
        train_a_step(plain.train(), inputs, kind == "the gate")
        torch.manual_seed(2)
        reference = train_a_step(model, inputs, kind == "the gate")
        if make is tiny_llama:  # the head of the classifier drops out by itself
            torch.testing.assert_close(reference, first, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.set_adapter("ref")
        torch.testing.assert_close(model.eval()(**inputs).logits, first, rtol=1e-4, atol=1e-4)
        model.set_adapter("default")
        found = model(**inputs).logits
        assert not torch.allclose(found, first, atol=1e-3)
        torch.testing.assert_close(found, plain.eval()(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_not_saved(kind, registered, tmp_path, peft_xlora_restored):
    make, adapter, options = KINDS[kind]
    model = mixture(folders(make, tmp_path, **adapter), make, **options)
    if registered:
        weft.register_with_peft()
        del model.save_pretrained  # peft's own
    model.save_pretrained(str(tmp_path / "before"))
    add_reference(model)
    model.save_pretrained(str(tmp_path / "after"))
    assert folder_files(tmp_path / "after") == folder_files(tmp_path / "before")
    for file in ("weft_manifest.json", "adapter_config.json"):
        assert json.loads((tmp_path / "after" / file).read_text()) == json.loads(
            (tmp_path / "before" / file).read_text()
        )
    tensors = load_file(tmp_path / "after/adapter_model.safetensors")
    assert tensors.keys() == load_file(tmp_path / "before/adapter_model.safetensors").keys()
    assert not (tmp_path / "after/ref").exists()


def test_a_copy_is_moved_copied_deleted_and_taken_out_with_the_mixture(tmp_path):
    model, inputs = mixture(folders(tiny_llama, tmp_path), use_trainable_adapters=True).eval(), text()
    before = {name for name, _ in model.named_parameters()}
    add_reference(model)
    twin = copy.deepcopy(model)
    model.set_adapter("ref")
    with torch.no_grad():
        expected = model(**inputs).logits
        twin.set_adapter("ref")
        assert torch.equal(twin(**inputs).logits, expected)
        torch.testing.assert_close(model.double()(**inputs).logits.float(), expected, rtol=1e-4, atol=1e-4)
    model.delete_adapter("ref")
    assert model.active_adapter == "default"
    assert list(model.peft_config) == ["default"]
    assert {name for name, _ in model.named_parameters()} == before
    unloaded = twin.base_model.unload()
    with torch.no_grad():
        assert torch.equal(unloaded(**inputs).logits, tiny_llama()(**inputs).logits)


def test_what_is_no_copy_is_refused(tmp_path):
    paths = folders(tiny_llama, tmp_path)
    model = mixture(paths)
    other = weft.XLoraConfig(adapters=paths, top_k_lora=1)
    with pytest.raises(ValueError, match=r"adapter 'more' cannot be added .* model\.peft_config\['default'\]"):
        model.add_adapter("more", other)
    with pytest.raises(ValueError, match=r"adapter_name \('more'\) must be 'default', the mixture, or a frozen copy"):
        model.base_model.set_adapter("more")
    with pytest.raises(ValueError, match="adapter 'default' cannot be deleted"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["default"]
    add_reference(model)
    with pytest.raises(ConfigError, match="adapter 'ref' is a frozen copy of the mixture, which is neither loaded nor"):
        model.save_pretrained(str(tmp_path / "out"), selected_adapters=["ref"])
    model.set_adapter("ref")
    with pytest.raises(ConfigError, match=r"adapter 'ref' is a frozen copy of the mixture, into which nothing"):
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(model), adapter_name="ref")


def test_a_copys_name_may_not_make_an_experts_name(tmp_path):
    paths = folders(tiny_llama, tmp_path)
    model = mixture({"one": paths["one"], "ref-one": paths["two"]}, use_trainable_adapters=True)
    with pytest.raises(ConfigError, match=r"adapter_name \('ref'\) would copy an expert to 'ref-one', which is there"):
        model.add_adapter("ref", model.peft_config["default"])
    assert list(model.peft_config) == ["default"]


# ---------------------------------------------------------------------- TRL


def preference_rows():
    from datasets import Dataset

    rows = [{"prompt": f"question {i} ", "chosen": f"yes {i}", "rejected": "no"} for i in range(8)]
    return Dataset.from_list(rows)


def trainer_of(name, folder, model, tokenizer):
    import trl

    common = {
        **{"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none"},
        **{"beta": 0.1, "learning_rate": 0.05, "use_cpu": True, "logging_steps": 1, "save_steps": 1, "bf16": False},
    }
    if name in ("DPO", "KTO"):
        arguments = getattr(trl, f"{name}Config")(**common, max_length=48)
        return getattr(trl, f"{name}Trainer")(
            model, args=arguments, train_dataset=preference_rows(), processing_class=tokenizer
        )
    arguments = getattr(trl, f"{name}Config")(**common, num_generations=2, max_completion_length=6)
    return getattr(trl, f"{name}Trainer")(
        model,
        reward_funcs=lambda completions, **others: [float(len(set(text))) for text in completions],
        args=arguments,
        train_dataset=preference_rows().select_columns(["prompt"]),
        processing_class=tokenizer,
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_trainable_adapters": True}, {"gate_layer": 1}], ids=str)
@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "RLOO"])
def test_trls_preference_trainers_train_against_the_mixture_as_it_was(
    name, options, base_folder, base_adapters, tmp_path
):
    pytest.importorskip("trl")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = weft.from_adapters(str(base_folder), base_adapters, layerwise_scalings=True, **options)
    inputs = {"input_ids": torch.randint(3, 200, (1, 8))}
    with torch.no_grad():
        first = model.eval()(**inputs).logits
    trainer = quietly(trainer_of, name, tmp_path / "run", model.train(), tokenizer)
    quietly(trainer.train)
    logs = trainer.state.log_history
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in logs if "loss" in log)
    model.eval()
    with torch.no_grad():
        trained = model(**inputs).logits
        model.set_adapter("ref")
        torch.testing.assert_close(model(**inputs).logits, first, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(trained, first)
    model.set_adapter("default")
    loaded = weft.from_pretrained(str(tmp_path / "run/checkpoint-2"), str(base_folder))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, trained, rtol=1e-4, atol=1e-4)
    assert not list((tmp_path / "run").rglob("ref"))
