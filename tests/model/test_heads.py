"""The mixture has one head, trained and saved with the gate, whatever heads its experts were trained with."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import weft
from models import VOCAB, is_expert, lora, quietly, save_adapter, tiny_llama
from weft.errors import AdapterError, CheckpointError, ConfigError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def tiny(kind, num_labels=3):
    """BertForSequenceClassification and the like."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=num_labels,
    )
    return getattr(transformers, f"BertFor{kind}")(config).eval()


def llama_classifier():
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_labels, config.pad_token_id = 3, 0
    return transformers.LlamaForSequenceClassification(config).eval()


# model, peft's task, head, modules to adapt, labels of a batch of token ids
KINDS = {
    "sequences": (
        lambda: tiny("SequenceClassification"),
        "SEQ_CLS",
        "classifier",
        ["query", "value"],
        lambda ids: {"labels": ids[:, 0] % 3},
    ),
    "tokens": (
        lambda: tiny("TokenClassification"),
        "TOKEN_CLS",
        "classifier",
        ["query", "value"],
        lambda ids: {"labels": ids % 3},
    ),
    "questions": (
        lambda: tiny("QuestionAnswering", 2),
        "QUESTION_ANS",
        "qa_outputs",
        ["query", "value"],
        lambda ids: {"start_positions": ids[:, 0] % 4, "end_positions": ids[:, 1] % 4},
    ),
    "decoder": (llama_classifier, "SEQ_CLS", "score", ["q_proj"], lambda ids: {"labels": ids[:, 0] % 3}),
}


@pytest.fixture(scope="module")
def all_paths(tmp_path_factory):
    """kind -> {expert: folder}; each expert has a head of its own, as peft gives it one for these tasks."""
    folder = tmp_path_factory.mktemp("heads")
    paths = {}
    for kind, (make, task, head, targets, _) in KINDS.items():
        paths[kind] = {}
        for seed, name in enumerate(("one", "two")):
            config = lora(task_type=task, target_modules=targets)
            path = save_adapter(make(), config, folder / kind / name, seed=seed)
            change_head(path, head, lambda value, seed=seed: value + seed)
            paths[kind][name] = path
    return paths


def change_head(folder, head, change):
    tensors = load_file(f"{folder}/{TENSORS}")
    own = [key for key in tensors if f".{head}." in key and not is_expert(key)]
    assert own
    save_file({key: change(value) if key in own else value for key, value in tensors.items()}, f"{folder}/{TENSORS}")


@pytest.fixture
def ids():
    return torch.randint(1, VOCAB, (4, 6))


@pytest.fixture
def bert(all_paths):
    return all_paths["sequences"]


def outputs(model, ids):
    with torch.no_grad():
        found = model(input_ids=ids)
    return found.start_logits if "start_logits" in found else found.logits


@pytest.mark.parametrize("kind", KINDS)
def test_gate_and_head_learn_and_come_back_as_saved(kind, all_paths, ids, tmp_path):
    make, _, head, _, labels = KINDS[kind]
    model = weft.from_adapters(make(), all_paths[kind], heads=[head], layerwise_scalings=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(f"{head}.modules_to_save" in name for name in trained)
    assert all("internal_xlora_classifier" in name or f"{head}.modules_to_save" in name for name in trained)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, **labels(ids)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = outputs(model.eval(), ids)
    model.save_pretrained(tmp_path / "mixture")
    loaded = weft.from_pretrained(tmp_path / "mixture", make())
    assert torch.equal(outputs(loaded, ids), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    # The experts are saved with the heads that they came with, as ordinary adapters of peft's.
    for name, path in all_paths[kind].items():
        before, after = (load_file(f"{folder}/{TENSORS}") for folder in (path, tmp_path / "mixture/experts" / name))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        quietly(peft.PeftModel.from_pretrained, make(), str(tmp_path / "mixture/experts" / name))


def test_a_user_of_trainer_resumes_with_the_head(bert, tmp_path):
    rows = [{"input_ids": torch.randint(1, VOCAB, (6,)), "labels": i % 3} for i in range(8)]

    def run(**resume):
        torch.manual_seed(1)
        model = weft.from_adapters(tiny("SequenceClassification"), bert, heads=["classifier"], xlora_dropout_p=0.0)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=2,
            learning_rate=0.05,
            max_steps=4,
            save_steps=2,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            label_names=["labels"],
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        quietly(trainer.train, **resume)
        return model.state_dict()

    whole = run()
    resumed = run(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_base_models_head_acts_with_the_experts_off_and_after_unload(bert, ids):
    base = outputs(tiny("SequenceClassification"), ids)
    model = weft.from_adapters(tiny("SequenceClassification"), bert, heads=["classifier"])
    head = model.get_base_model().classifier.modules_to_save["default"]
    with torch.no_grad():
        head.weight.add_(1.0)
    mixed = outputs(model, ids)
    with model.disable_adapter():
        assert torch.equal(outputs(model, ids), base)
    assert torch.equal(outputs(model, ids), mixed)
    unloaded = model.base_model.unload()
    assert torch.equal(outputs(unloaded, ids), base)
    assert all(parameter.requires_grad for parameter in unloaded.parameters())


def test_set_adapter_freezes_the_head_and_lets_it_train_again(bert):
    model = weft.from_adapters(tiny("SequenceClassification"), bert, heads=["classifier"], use_trainable_adapters=True)
    wrapper = model.get_base_model().classifier
    for frozen in (True, False):
        model.base_model.set_adapter("default", inference_mode=frozen)
        assert wrapper.active_adapters == ["default"]
        assert all(parameter.requires_grad is not frozen for parameter in wrapper.modules_to_save.parameters())


@pytest.mark.parametrize("alike", [True, False])
def test_the_head_starts_from_the_experts_where_they_agree_and_else_from_the_base_models(bert, tmp_path, alike):
    if alike:
        head = {key: value for key, value in load_file(f"{bert['two']}/{TENSORS}").items() if not is_expert(key)}
        one = {**load_file(f"{bert['one']}/{TENSORS}"), **head}
        (tmp_path / "one").mkdir()
        save_file(one, tmp_path / "one" / TENSORS)
        (tmp_path / "one" / CONFIG).write_text((Path(bert["one"]) / CONFIG).read_text())
        bert = {**bert, "one": str(tmp_path / "one")}
    model = weft.from_adapters(tiny("SequenceClassification"), bert, heads=["classifier"])
    start = model.get_base_model().classifier.modules_to_save["default"].weight
    expected = tiny("SequenceClassification").classifier.weight
    torch.testing.assert_close(start, expected + 1 if alike else expected)


def test_without_heads_only_the_gate_trains_and_the_base_models_head_acts(tmp_path, ids):
    path = save_adapter(
        tiny("SequenceClassification"), lora(task_type=None, target_modules=["query"]), tmp_path / "one", seed=1
    )
    model = weft.from_adapters(tiny("SequenceClassification"), {"one": path}, task_type="SEQ_CLS")
    assert all("internal_xlora" in name for name, p in model.named_parameters() if p.requires_grad)
    expected = outputs(model, ids)
    model.save_pretrained(tmp_path / "mixture")
    loaded = weft.from_pretrained(tmp_path / "mixture", tiny("SequenceClassification"))
    assert torch.equal(outputs(loaded, ids), expected)


@pytest.mark.parametrize("task", [None, "SEQ_CLS", "TOKEN_CLS"])
def test_the_base_model_is_loaded_as_what_it_is(tmp_path, ids, task, all_paths):
    kind = "tokens" if task == "TOKEN_CLS" else "sequences"
    KINDS[kind][0]().save_pretrained(tmp_path / "base")
    base = type(KINDS[kind][0]()).from_pretrained(tmp_path / "base")
    model = weft.from_adapters(base, all_paths[kind], heads=["classifier"], task_type=task).eval()
    expected = outputs(model, ids)
    quietly(model.save_pretrained, tmp_path / "mixture")
    assert torch.equal(outputs(weft.from_pretrained(tmp_path / "mixture"), ids), expected)


def test_folded_the_adapter_has_the_mixtures_head(bert, ids, tmp_path):
    model = weft.from_adapters(tiny("SequenceClassification"), bert, heads=["classifier"]).eval()
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.mul_(2)
    weft.fold(model, tmp_path / "folded", {"one": 0.5, "two": 0.5})
    folded = quietly(peft.PeftModel.from_pretrained, tiny("SequenceClassification"), str(tmp_path / "folded"))
    with model.fixed_scalings({"one": 0.5, "two": 0.5}):
        torch.testing.assert_close(outputs(folded, ids), outputs(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("peft_xlora_restored")
def test_pefts_own_functions_know_the_head(bert, ids, tmp_path):
    weft.register_with_peft()
    config = weft.XLoraConfig(task_type="SEQ_CLS", adapters=bert, heads=["classifier"])
    model = peft.get_peft_model(tiny("SequenceClassification"), config).eval()
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.mul_(2)
    expected = outputs(model, ids)
    model.save_pretrained(tmp_path / "mixture")
    loaded = peft.PeftModel.from_pretrained(tiny("SequenceClassification"), tmp_path / "mixture")
    assert torch.equal(outputs(loaded, ids), expected)
    for task in ("TOKEN_CLS", "QUESTION_ANS"):
        config = weft.XLoraConfig(task_type=task, adapters=bert, heads=["classifier"])
        with pytest.raises(ConfigError, match=rf"task_type \({task}\) must be left out with get_peft_model"):
            peft.get_peft_model(tiny("SequenceClassification"), config)


def test_an_expert_more_or_less_leaves_the_heads(bert, ids, tmp_path):
    model = weft.from_adapters(tiny("SequenceClassification"), {"one": bert["one"]}, heads=["classifier"]).eval()
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path / "mixture")
    base = tiny("SequenceClassification")
    weft.add_expert(tmp_path / "mixture", "two", bert["two"], tmp_path / "more", base=base)
    more = weft.from_pretrained(tmp_path / "more", tiny("SequenceClassification"))
    weft.drop_expert(tmp_path / "more", "two", tmp_path / "less")
    less = weft.from_pretrained(tmp_path / "less", tiny("SequenceClassification"))
    for each in (more, less):
        with each.fixed_scalings({"one": 1.0}), model.fixed_scalings({"one": 1.0}):
            torch.testing.assert_close(outputs(each, ids), outputs(model, ids))


# ---------------------------------------------------------------------- refused


def test_experts_with_heads_need_one_of_the_mixtures(bert):
    with pytest.raises(
        AdapterError, match=r"\['one', 'two'\] each contain their own classifier.weight, .* by heads=\['classifier'\]"
    ):
        weft.from_adapters(tiny("SequenceClassification"), bert)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (["clasifier"], r"heads has 'clasifier', which is no module's name of BertFor.* such as \['dropout', 'classi"),
        (["pooler"], r"heads has 'pooler', which is inside of the backbone \(BertModel\)"),
        (["bert"], r"heads has 'bert', which is inside of the backbone \(BertModel\)"),
    ],
)
def test_heads_are_modules_outside_of_the_backbone(heads, message, bert):
    with pytest.raises(ConfigError, match=message):
        weft.from_adapters(tiny("SequenceClassification"), bert, heads=heads)


def test_a_head_that_shares_parameters_with_the_backbone_is_refused(llama_adapters):
    with pytest.raises(ConfigError, match=r"heads has 'lm_head', which shares parameters with the backbone \(LlamaMo"):
        weft.from_adapters(tiny_llama(tie_word_embeddings=True), llama_adapters, heads=["lm_head"])


def test_an_adapted_head_is_refused_and_the_base_model_as_it_was(tmp_path):
    path = save_adapter(tiny_llama(), lora(target_modules=["lm_head", "q_proj"]), tmp_path / "one", seed=1)
    base = tiny_llama()
    with pytest.raises(ConfigError, match=r"heads has 'lm_head', which the experts adapt \(lora_A"):
        quietly(weft.from_adapters, base, {"one": path}, heads=["lm_head"])
    assert base.state_dict().keys() == tiny_llama().state_dict().keys()


def test_a_common_head_with_other_labels_is_refused(bert):
    with pytest.raises(AdapterError, match=r"experts' own 'classifier' does not fit (.*\n)+.* \[3\], expected \[5\]"):
        weft.from_adapters(tiny("SequenceClassification", 5), {"one": bert["one"]}, heads=["classifier"])


def test_other_modules_of_an_experts_own_are_in_the_mixtures_base(tmp_path, ids):
    config = lora(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler"])
    path = save_adapter(tiny("SequenceClassification"), config, tmp_path / "one", seed=1)
    change_head(path, "pooler", lambda value: value + 1)
    expected = quietly(peft.PeftModel.from_pretrained, tiny("SequenceClassification"), path).eval()
    model = weft.from_adapters(tiny("SequenceClassification"), {"one": path}, heads=["classifier"]).eval()
    with model.fixed_scalings({"one": 1.0}):
        torch.testing.assert_close(outputs(model, ids), outputs(expected, ids), atol=1e-5, rtol=1e-5)


def test_a_single_experts_own_head_is_the_mixtures(bert, ids, tmp_path):
    expected = quietly(peft.PeftModel.from_pretrained, tiny("SequenceClassification"), bert["two"]).eval()
    model = weft.from_adapters(tiny("SequenceClassification"), {"two": bert["two"]}).eval()
    with model.fixed_scalings({"two": 1.0}):
        torch.testing.assert_close(outputs(model, ids), outputs(expected, ids), atol=1e-5, rtol=1e-5)
    mixed = outputs(model, ids)
    model.save_pretrained(tmp_path / "mixture")
    assert torch.equal(outputs(weft.from_pretrained(tmp_path / "mixture", tiny("SequenceClassification")), ids), mixed)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("heads", [[], "classifier", [""], [1]])
def test_heads_are_a_list_of_names(heads):
    with pytest.raises(ConfigError, match=r"heads \(.*\) must be a list of module names, or None"):
        weft.XLoraConfig(adapters={"a": "."}, heads=heads)


def test_pefts_name_for_it_is_answered_with_wefts():
    with pytest.raises(ConfigError, match=r"modules_to_save is not an option: did you mean heads\?"):
        weft.XLoraConfig(adapters={"a": "."}, modules_to_save=["classifier"])


def test_a_lost_head_is_named_on_load(bert, tmp_path):
    model = weft.from_adapters(tiny("SequenceClassification"), bert, heads=["classifier"])
    model.save_pretrained(tmp_path / "mixture")
    file = tmp_path / "mixture" / TENSORS
    whole = {key: value.clone() for key, value in load_file(file).items()}  # not the file's own bytes
    save_file({key: value for key, value in whole.items() if "classifier.weight" not in key}, file)
    with pytest.raises(CheckpointError, match=r"missing keys \(1\): base_model\.lora_model\.model\.classifier\.weight"):
        weft.from_pretrained(tmp_path / "mixture", tiny("SequenceClassification"))
    values = json.loads((tmp_path / "mixture" / CONFIG).read_text())
    save_file(whole, file)
    (tmp_path / "mixture" / CONFIG).write_text(json.dumps({**values, "heads": None}))
    with pytest.raises(AdapterError, match=r"by heads=\['classifier'\]"):
        weft.from_pretrained(tmp_path / "mixture", tiny("SequenceClassification"))
