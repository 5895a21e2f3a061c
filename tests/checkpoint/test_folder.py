"""A saved folder is whole: it goes anywhere, comes back bit by bit, and says what is wrong with it."""

import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

import weft
from models import folder_files, lora, quietly, randomise, save_adapter, tiny_llama, tiny_tokenizer
from weft.cli import main
from weft.errors import AdapterError, CheckpointError, ConfigError

CONFIG, TENSORS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "weft_manifest.json"
GATE = "base_model.internal_xlora_classifier.layers"
TOKENS = torch.arange(1, 19).view(2, 9)
NAMES = ("math", "code", "adapter_3")
EXPERTS = "experts"  # the subfolder in which they lie
OPTIONS = {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16}


def logits(model):
    return model(TOKENS).logits


def fill(module, seed):
    """Other weights than any fresh gate has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def mixture(adapters, names=NAMES, base=None, **options):
    """A model whose experts have these names, with a gate that is not as it was made."""
    paths = dict(zip(names, adapters.values(), strict=False))
    model = weft.from_adapters(base or tiny_llama(), paths, **{**OPTIONS, **options})
    fill(model.internal_xlora_classifier, seed=5)
    return model.eval()


def saved(model, folder):
    quietly(model.save_pretrained, str(folder))
    return folder


@pytest.fixture
def folder(llama_adapters, tmp_path):
    """A saved mixture, for a test to damage."""
    return saved(mixture(llama_adapters), tmp_path / "mixture")


def change_config(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.fixture
def untouched_base():
    """A base model that must come out of the test as it went in."""
    base = tiny_llama()
    base.model.embed_tokens.requires_grad_(False)
    before = logits(base)

    def state():
        modules = {
            name: (
                module,
                module.training,
                sorted(vars(module)),
                bool(module._forward_hooks or module._forward_pre_hooks),
            )
            for name, module in base.named_modules()
        }
        return modules, [(parameter, parameter.requires_grad) for parameter in base.parameters()]

    modules, parameters = state()
    yield base
    assert state()[0] == modules
    assert all(a is b and x == y for (a, x), (b, y) in zip(state()[1], parameters, strict=True))
    assert not any(isinstance(module, LoraLayer) for module in base.modules())
    assert torch.equal(logits(base), before)


# ---------------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    "names",
    [NAMES, ("0", "1", "2"), ("2", "0", "1"), ("adapter_1", "adapter_2", "adapter_10"), ("zeta", "alpha", "mid")],
    ids=" ".join,
)
def test_moved_folder_gives_bit_identical_logits_without_the_adapters_it_was_made_of(names, llama_adapters, tmp_path):
    adapters = {name: shutil.copytree(path, tmp_path / "adapters" / name) for name, path in llama_adapters.items()}
    model = mixture({name: str(path) for name, path in adapters.items()}, names)
    expected = logits(model)
    saved(model, tmp_path / "mixture")
    shutil.rmtree(tmp_path / "adapters")
    moved = shutil.move(tmp_path / "mixture", tmp_path / "elsewhere")
    again = weft.from_pretrained(moved, tiny_llama())
    assert torch.equal(logits(again), expected)
    assert again.xlora_config.expert_names == list(names)


@pytest.mark.parametrize(
    "options",
    [
        {"layerwise_scalings": False, "xlora_depth": 1},
        {"xlora_depth": 3, "xlora_dropout_p": 0.0},
        {"top_k_lora": 2},
        {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
        {"scaling_pass_value": 0.3, "global_scaling_weight": 1.7, "softmax_temperature": 0.4},
        {"use_trainable_adapters": True, "scalings_log_size": 3},
    ],
    ids=str,
)
def test_options_come_back(options, llama_adapters, tmp_path):
    model = mixture(llama_adapters, **options)
    again = weft.from_pretrained(saved(model, tmp_path / "mixture"), tiny_llama())
    assert torch.equal(logits(again), logits(model))
    theirs, ours = again.xlora_config.to_dict(), model.xlora_config.to_dict()
    not_options = {"adapters", "format_version", "inference_mode"}
    assert {k: v for k, v in theirs.items() if k not in not_options} == {
        k: v for k, v in ours.items() if k not in not_options
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_base_model_of_another_dtype_gives_bit_identical_logits(dtype, llama_adapters, tmp_path):
    model = mixture(llama_adapters, base=tiny_llama().to(dtype))
    again = weft.from_pretrained(saved(model, tmp_path / "mixture"), tiny_llama().to(dtype))
    assert torch.equal(logits(again), logits(model))


def test_base_model_is_found_by_its_saved_name(base_folder, base_adapters, tmp_path):
    model = weft.from_adapters(str(base_folder), base_adapters, **OPTIONS).eval()
    fill(model.internal_xlora_classifier, seed=5)
    folder = saved(model, tmp_path / "mixture")
    for again in (weft.from_pretrained(folder), weft.from_pretrained(str(folder), base_folder)):
        assert torch.equal(logits(again), logits(model))


def test_folder_holds_gate_options_and_experts_and_nothing_unfinished(folder):
    assert folder_files(folder) == sorted(
        [
            "README.md",
            CONFIG,
            TENSORS,
            MANIFEST,
            *(f"{EXPERTS}/{name}/{file}" for name in NAMES for file in (CONFIG, TENSORS)),
        ]
    )
    assert {key.removeprefix(GATE) for key in load_file(folder / TENSORS)} == {
        ".0.weight", ".0.bias", ".3.weight", ".3.bias"
    }  # fmt: skip


def test_saved_paths_are_relative(folder):
    config = json.loads((folder / CONFIG).read_text())
    assert config["adapters"] == {name: f"{EXPERTS}/{name}" for name in NAMES}
    assert config["expert_names"] == list(NAMES)
    assert str(folder.parent) not in (folder / CONFIG).read_text()


def test_each_expert_is_an_ordinary_peft_adapter(llama_adapters, tmp_path):
    model = mixture(llama_adapters)
    folder = saved(model, tmp_path / "mixture")
    for name in NAMES:
        alone = peft.PeftModel.from_pretrained(tiny_llama(), folder / EXPERTS / name).eval()
        with model.fixed_scalings({name: 1.0}):
            torch.testing.assert_close(logits(alone), logits(model), atol=1e-5, rtol=1e-5)
        assert {key: value.tolist() for key, value in load_file(folder / EXPERTS / name / TENSORS).items()} == {
            key: value.tolist() for key, value in load_file(f"{llama_adapters[name]}/{TENSORS}").items()
        }


def test_trained_experts_are_saved_as_trained(llama_adapters, tmp_path):
    model = mixture(llama_adapters, use_trainable_adapters=True)
    untrained = logits(model)
    randomise(model, seed=9)
    folder = saved(model, tmp_path / "mixture")
    assert not torch.equal(logits(model), untrained)
    assert torch.equal(logits(weft.from_pretrained(folder, tiny_llama())), logits(model))
    with model.fixed_scalings({"code": 1.0}):
        alone = peft.PeftModel.from_pretrained(tiny_llama(), folder / EXPERTS / "code").eval()
        torch.testing.assert_close(logits(alone), logits(model), atol=1e-5, rtol=1e-5)


def test_saving_again_replaces_what_was_there(folder, llama_adapters):
    model = weft.from_pretrained(folder, tiny_llama())
    fill(model.internal_xlora_classifier, seed=6)
    randomise(model, seed=9)
    saved(model, folder)
    assert torch.equal(logits(weft.from_pretrained(folder, tiny_llama())), logits(model))


def test_saving_changes_nothing_in_the_model(llama_adapters, tmp_path):
    model = mixture(llama_adapters, use_trainable_adapters=True)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapters, before = dict(model.xlora_config.adapters), logits(model)
    modes = {name: config.inference_mode for name, config in model.lora_model.peft_config.items()}
    saved(model, tmp_path / "mixture")
    assert torch.equal(logits(model), before)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert model.xlora_config.adapters == adapters
    assert {name: config.inference_mode for name, config in model.lora_model.peft_config.items()} == modes


@pytest.mark.parametrize("is_trainable", [True, False])
def test_only_a_model_to_train_has_gradients(is_trainable, folder):
    model = weft.from_pretrained(folder, tiny_llama(), is_trainable=is_trainable)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == ({name for name, _ in model.named_parameters() if GATE in name} if is_trainable else set())
    assert model.training is is_trainable


@pytest.mark.usefixtures("peft_xlora_restored")
def test_peft_loads_the_folder_once_weft_is_registered(folder):
    expected = logits(weft.from_pretrained(folder, tiny_llama()))
    weft.register_with_peft()
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny_llama(), folder)), expected)


def test_options_are_read_with_paths_inside_the_folder(folder):
    config = weft.XLoraConfig.from_pretrained(str(folder))
    assert config.adapters == {name: str(folder / EXPERTS / name) for name in NAMES}


# ---------------------------------------------------------------------- experts from elsewhere


@pytest.fixture
def moved_experts(folder, tmp_path):
    """Where the experts of a folder are that holds them no longer."""
    return {name: shutil.move(folder / EXPERTS / name, str(tmp_path / f"moved-{name}")) for name in NAMES}


def test_adapters_say_where_the_experts_are(folder, moved_experts, llama_adapters):
    with pytest.raises(CheckpointError, match=f"math/{TENSORS} is missing"):
        weft.from_pretrained(folder, tiny_llama())
    model = weft.from_pretrained(folder, tiny_llama(), adapters=dict(reversed(moved_experts.items())))
    assert torch.equal(logits(model), logits(mixture(llama_adapters)))


def test_adapters_must_have_the_names_of_the_experts(folder, moved_experts, untouched_base):
    adapters = {**moved_experts, "physics": moved_experts.pop("code")}
    del adapters["code"]
    with pytest.raises(ConfigError, match=r"expert_names \(.*'code'.*\) must be the names in adapters \(.*'physics'"):
        weft.from_pretrained(folder, untouched_base, adapters=adapters)


def test_adapters_of_other_layers_are_refused(folder, moved_experts, tmp_path, untouched_base):
    other = {
        name: save_adapter(tiny_llama(), lora(target_modules=["q_proj"]), tmp_path / "q_proj" / name, seed=1)
        for name in NAMES
    }
    with pytest.raises(CheckpointError, match=r"gate was saved for 8 LoRA layers, the experts have 2 in this base"):
        weft.from_pretrained(folder, untouched_base, adapters=other)


def test_changed_gate_is_found_also_when_the_experts_are_elsewhere(folder, moved_experts, untouched_base):
    change_tensors(folder / TENSORS, lambda tensors: tensors[f"{GATE}.0.weight"].add_(1))
    with pytest.raises(CheckpointError, match=rf"{TENSORS}: changed tensors \(1\): {GATE}.0.weight"):
        weft.from_pretrained(folder, untouched_base, adapters=moved_experts)


# ---------------------------------------------------------------------- damage


def truncate(file):
    file.write_bytes(file.read_bytes()[:-50])


FILES = {f"the {what}": file for what, file in {"gate": TENSORS, "expert": f"{EXPERTS}/code/{TENSORS}"}.items()}
KEYS = {
    TENSORS: f"{GATE}.0.weight",
    f"{EXPERTS}/code/{TENSORS}": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
}


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file, key: file.unlink(), "{file} is missing"),
        (lambda file, key: truncate(file), "{file} is no whole safetensors file .*: copy it again"),
        (lambda file, key: file.write_bytes(b""), "{file} is no whole safetensors file"),
        (
            lambda file, key: change_tensors(file, lambda tensors: tensors.pop(key)),
            r"is not as it was saved:\n  - {file}: missing keys \(1\): {key}$",
        ),
        (
            lambda file, key: change_tensors(file, lambda tensors: tensors.update(spare=torch.ones(1))),
            r"is not as it was saved:\n  - {file}: unexpected keys \(1\): spare$",
        ),
        (
            lambda file, key: change_tensors(file, lambda tensors: tensors[key].view(-1)[0].add_(1e-3)),
            r"is not as it was saved:\n  - {file}: changed tensors \(1\): {key}$",
        ),
        (
            lambda file, key: change_tensors(file, lambda tensors: tensors.update({key: tensors[key].T.contiguous()})),
            r"{file}: changed tensors \(1\): {key}$",
        ),
        (
            lambda file, key: change_tensors(file, lambda tensors: tensors.update({key: tensors[key].double()})),
            r"{file}: changed tensors \(1\): {key}$",
        ),
    ],
    ids=[
        "missing",
        "truncated",
        "empty",
        "key removed",
        "key added",
        "value changed",
        "shape changed",
        "dtype changed",
    ],
)
def test_damaged_tensors_are_named_and_the_base_model_untouched(damage, message, file, folder, untouched_base):
    damage(folder / file, KEYS[file])
    with pytest.raises(CheckpointError, match=message.format(file=file, key=KEYS[file])):
        weft.from_pretrained(folder, untouched_base)


DAMAGES = {
    "expert gone": (lambda at: shutil.rmtree(at / EXPERTS / "code"), f"code/{TENSORS} is missing"),
    "expert config gone": (lambda at: (at / EXPERTS / "code" / CONFIG).unlink(), f"code/{CONFIG} is missing"),
    "expert config changed": (
        lambda at: change_config(at / EXPERTS / "code" / CONFIG, lora_alpha=16),
        rf"is not as it was saved:\n  - {EXPERTS}/code/{CONFIG} was changed after it was saved$",
    ),
    "experts swapped": (
        lambda at: [
            (at / EXPERTS / a).rename(at / EXPERTS / b) for a, b in (("math", "x"), ("code", "math"), ("x", "code"))
        ],
        rf"math/{TENSORS}: changed tensors \(12\)(.*\n)*.*math/{CONFIG} was changed(.*\n)*.*code/{CONFIG} was changed",
    ),
    "config gone": (lambda at: (at / CONFIG).unlink(), f"mixture/{CONFIG} is missing"),
    "config truncated": (lambda at: truncate(at / CONFIG), f"mixture/{CONFIG} is no valid JSON"),
    "another type": (
        lambda at: change_config(at / CONFIG, peft_type="LORA"),
        f"mixture/{CONFIG} is of type LORA, expected XLORA",
    ),
    "an expert's folder": (
        lambda at: [shutil.copy(at / EXPERTS / "code" / file, at / file) for file in (CONFIG, TENSORS)],
        f"mixture/{CONFIG} is of type LORA, expected XLORA",
    ),
    "too new": (
        lambda at: change_config(at / CONFIG, format_version=2),
        rf"mixture/{CONFIG}: format_version \(2\) must be at most 1: upgrade weft",
    ),
    "expert left out of the config": (
        lambda at: change_config(at / CONFIG, expert_names=["math", "code"], adapters={"math": "x", "code": "y"}),
        f"{CONFIG}: expert_names is not in the order in which the gate was saved",
    ),
    "experts in another order": (
        lambda at: change_config(at / CONFIG, expert_names=["code", "math", "adapter_3"]),
        "expert_names",
    ),
    "layers in another order": (
        lambda at: change_config(at / CONFIG, layer_names=json.loads((at / CONFIG).read_text())["layer_names"][::-1]),
        f"{CONFIG}: layer_names is not in the order in which the gate was saved",
    ),
    "gate of another shape": (
        lambda at: change_config(at / CONFIG, xlora_size=8),
        rf"mixture/{CONFIG} does not fit the gate in .*mixture/{TENSORS}:\n  - xlora_size \(8\) must be 16, the width",
    ),
    "manifest gone": (lambda at: (at / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    "manifest truncated": (lambda at: truncate(at / MANIFEST), f"{MANIFEST} is no valid JSON"),
    "gate as a pickle": (lambda at: (at / TENSORS).rename(at / "adapter_model.bin"), f"mixture/{TENSORS} is missing"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_folder_is_described_and_the_base_model_untouched(damage, message, folder, untouched_base):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        weft.from_pretrained(folder, untouched_base)


def test_all_damage_is_reported_in_one_error(folder, untouched_base):
    change_config(folder / EXPERTS / "math" / CONFIG, lora_alpha=1)
    change_tensors(folder / EXPERTS / "code" / TENSORS, lambda tensors: tensors.popitem())
    change_tensors(
        folder / TENSORS, lambda tensors: [tensors.update(spare=torch.ones(1)), tensors.pop(f"{GATE}.0.bias")]
    )
    with pytest.raises(CheckpointError) as error:
        weft.from_pretrained(folder, untouched_base)
    lines = str(error.value).splitlines()[1:]
    assert sorted(line.split(":")[0].split()[1] for line in lines) == sorted(
        [f"{EXPERTS}/math/{CONFIG}", f"{EXPERTS}/code/{TENSORS}", TENSORS, TENSORS]
    )


def test_options_that_cannot_work_are_an_error_of_the_options(folder, untouched_base):
    change_config(folder / CONFIG, top_k_lora=9, xlora_dropout_p=2.0)
    with pytest.raises(ConfigError, match=r"xlora_dropout_p \(2.0\)(.*\n)*.*top_k_lora \(9\) must be between 1 and"):
        weft.from_pretrained(folder, untouched_base)


def test_unknown_option_in_a_folder_names_the_file_and_the_nearest(folder, untouched_base):
    change_config(folder / CONFIG, xlora_dept=2)
    with pytest.raises(ConfigError, match=rf"mixture/{CONFIG} cannot be read:\n.*xlora_dept .* mean xlora_depth"):
        weft.from_pretrained(folder, untouched_base)


def test_reformatted_configs_are_no_damage(folder):
    expected = logits(weft.from_pretrained(folder, tiny_llama()))
    for file in folder.rglob("*.json"):
        file.write_text(json.dumps(dict(reversed(json.loads(file.read_text()).items()))))
    assert torch.equal(logits(weft.from_pretrained(folder, tiny_llama())), expected)


def test_option_that_is_not_of_the_saved_tensors_may_be_changed_by_hand(folder):
    change_config(folder / CONFIG, top_k_lora=1)
    model = weft.from_pretrained(folder, tiny_llama())
    reference = weft.from_pretrained(folder, tiny_llama())
    reference.set_topk_lora(1)
    assert torch.equal(logits(model), logits(reference))


def test_base_model_of_another_width_is_refused(folder):
    another = r"base \(LlamaForCausalLM\) is another model than that of the mixture: its hidden size is 16, the m.* 32:"
    with pytest.raises(CheckpointError, match=another):
        weft.from_pretrained(folder, tiny_llama(hidden_size=16))


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--start-from", "MIXTURE", "--data", "DATA", "--output", "out"],
        ["eval", "MIXTURE", "--data", "DATA"],
        ["generate", "MIXTURE", "--prompt", "x"],
        ["add-expert", "MIXTURE", "law=MIXTURE/experts/math", "--output", "out"],
    ],
    ids=lambda command: command[0],
)
def test_so_it_is_in_every_command_and_no_option_is_named(command, mixture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), hidden_size=48, max_position_embeddings=1024).save_pretrained("other-model")
    tokenizer.save_pretrained("other-model")
    Path("data.txt").write_text("the quick brown fox " * 20)
    words = [word.replace("MIXTURE", mixture).replace("DATA", "data.txt") for word in command]
    assert main([*words, "--base", "other-model"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"weft {command[0]}: error: base (other-model) is another model than that of the mixture: its hidden size is "
        "48, the mixture's 32: give the base model that the mixture was made for"
    )


def test_base_model_that_is_not_named_must_be_given(folder):
    with pytest.raises(CheckpointError, match=r"base \(None\) must be given: the folder does not name its base model"):
        weft.from_pretrained(folder)


def test_base_model_that_cannot_be_loaded_is_named(folder):
    with pytest.raises(CheckpointError, match=r"base \(no/such-model\) cannot be loaded: .*\. Pass the base model"):
        weft.from_pretrained(folder, "no/such-model")


@pytest.mark.parametrize("path", ["no-such-folder", "user/none", "/no/such/folder"])
def test_folder_that_is_not_there_is_named(path, untouched_base):
    with pytest.raises(CheckpointError, match=rf"the X-LoRA model \({path}\) is neither a folder here nor a Hub id"):
        weft.from_pretrained(path, untouched_base)


def test_saving_as_a_pickle_is_refused(llama_adapters, tmp_path):
    with pytest.raises(CheckpointError, match=r"safe_serialization \(False\) must be True"):
        quietly(mixture(llama_adapters).save_pretrained, str(tmp_path / "mixture"), safe_serialization=False)


def test_saving_as_a_pickle_over_an_older_folder_is_refused_too(folder, llama_adapters):
    model = mixture(llama_adapters)
    fill(model.internal_xlora_classifier, seed=6)
    with pytest.raises(CheckpointError, match=r"safe_serialization \(False\) must be True"):
        quietly(model.save_pretrained, str(folder), safe_serialization=False)


# ---------------------------------------------------------------------- peft's format


def pefts_mixture(adapters, **options):
    """peft's own X-LoRA, which calls its experts 0, 1, ..."""
    base = tiny_llama()
    base.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=32,
        adapters={str(number): path for number, path in enumerate(adapters.values())},
        **{**OPTIONS, **options},
    )
    model = quietly(peft.get_peft_model, base, config)
    fill(model.base_model.internal_xlora_classifier, seed=5)
    return model.eval()


def saved_by_peft(model, folder, **changes):
    """The folder that peft would write, with the gate's keys that it loses (see below)."""
    config = model.base_model.xlora_config
    folder.mkdir()
    config.save_pretrained(str(folder))
    change_config(folder / CONFIG, **changes)
    gate = {key: value for key, value in model.state_dict().items() if "internal_xlora_classifier" in key}
    save_file(gate, folder / TENSORS)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layerwise_scalings": False, "xlora_depth": 1},
        {"xlora_depth": 4, "xlora_dropout_p": 0.0},
        {"top_k_lora": 2},
        {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
        {"softmax_temperature": 0.3, "global_scaling_weight": 0.5},
    ],
    ids=str,
)
def test_folder_of_pefts_gives_pefts_logits(options, llama_adapters, tmp_path):
    theirs = pefts_mixture(llama_adapters, **options)
    ours = weft.from_pretrained(saved_by_peft(theirs, tmp_path / "peft"), tiny_llama())
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"layerwise_scalings": False, "xlora_depth": 1}], ids=str)
def test_peft_reads_what_weft_saved_and_gives_the_same_logits(options, llama_adapters, tmp_path):
    model = mixture(llama_adapters, names=("0", "1", "2"), **options)
    folder = saved(model, tmp_path / "mixture")
    base = tiny_llama()
    base.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=32,
        adapters={name: str(folder / EXPERTS / name) for name in ("0", "1", "2")},
        **{**OPTIONS, **options},
    )
    theirs = quietly(peft.PeftModel.from_pretrained, base, str(folder), config=config).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)


def test_folder_of_pefts_becomes_a_whole_one_when_saved_again(llama_adapters, tmp_path):
    ours = weft.from_pretrained(saved_by_peft(pefts_mixture(llama_adapters), tmp_path / "peft"), tiny_llama())
    folder = saved(ours, tmp_path / "mixture")
    shutil.rmtree(tmp_path / "peft")
    assert torch.equal(logits(weft.from_pretrained(folder, tiny_llama())), logits(ours))


def test_adapters_replace_the_paths_of_a_folder_of_pefts(llama_adapters, tmp_path, untouched_base):
    theirs = pefts_mixture(llama_adapters)
    folder = saved_by_peft(theirs, tmp_path / "peft", adapters={"0": "/gone/0", "1": "/gone/1", "2": "/gone/2"})
    with pytest.raises(AdapterError, match=r"adapter '0' \(/gone/0\) is neither(.*\n)*.*adapter '2' \(/gone/2\)"):
        weft.from_pretrained(folder, untouched_base)
    adapters = {str(number): path for number, path in enumerate(llama_adapters.values())}
    ours = weft.from_pretrained(folder, tiny_llama(), adapters=adapters)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inside", [True, False], ids=["inside the folder", "from the working directory"])
def test_relative_paths_of_a_folder_of_pefts_are_found(inside, llama_adapters, tmp_path, monkeypatch):
    theirs = pefts_mixture(llama_adapters)
    relative = {str(number): f"experts/{number}" for number in range(3)}
    folder = saved_by_peft(theirs, tmp_path / "peft", adapters=relative)
    for at, path in zip(relative.values(), llama_adapters.values(), strict=True):
        shutil.copytree(path, (folder if inside else tmp_path) / at)
    monkeypatch.chdir("/" if inside else tmp_path)
    ours = weft.from_pretrained(os.path.relpath(folder), tiny_llama())
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)


def test_keys_that_pefts_own_saving_loses_are_named(llama_adapters, tmp_path, untouched_base):
    # peft 0.21 leaves out what looks like a parameter of an adapter: ".0." of the gate, when an expert is called 0.
    theirs = pefts_mixture(llama_adapters)
    quietly(theirs.save_pretrained, str(tmp_path / "peft"))
    if f"{GATE}.0.bias" in load_file(tmp_path / "peft" / TENSORS):
        pytest.skip("peft before 0.21 loses none")
    assert set(load_file(tmp_path / "peft" / TENSORS)) == {f"{GATE}.3.weight", f"{GATE}.3.bias"}
    with pytest.raises(
        CheckpointError,
        match=rf"peft/{TENSORS}:\n  - xlora_depth \(2\) must be 1, as its linear layers are {GATE}.3.weight$",
    ):
        weft.from_pretrained(tmp_path / "peft", untouched_base)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: (at / TENSORS).unlink(), f"peft/{TENSORS} is missing"),
        (lambda at: truncate(at / TENSORS), f"peft/{TENSORS} is no whole safetensors file"),
        (
            lambda at: change_tensors(at / TENSORS, lambda tensors: tensors.update(spare=torch.ones(1))),
            rf"peft/{TENSORS} does not fit this model:\n  - unexpected keys \(1\): spare$",
        ),
        (
            lambda at: change_tensors(at / TENSORS, lambda tensors: tensors.update({f"{GATE}.3.bias": torch.ones(3)})),
            rf"does not fit this model:\n  - {GATE}.3.bias has shape \[3\], expected \[24\]$",
        ),
    ],
    ids=["missing", "truncated", "key added", "another shape"],
)
def test_gate_of_pefts_that_does_not_fit_leaves_the_base_model_untouched(
    damage, message, llama_adapters, tmp_path, untouched_base
):
    folder = saved_by_peft(pefts_mixture(llama_adapters), tmp_path / "peft")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        weft.from_pretrained(folder, untouched_base)


def test_gate_that_does_not_fit_leaves_gradient_checkpointing_as_it_was(folder):
    change_config(folder / CONFIG, xlora_size=8)
    base = tiny_llama()
    quietly(base.gradient_checkpointing_enable)
    with pytest.raises(CheckpointError):
        quietly(weft.from_pretrained, folder, base)
    expected = tiny_llama()
    quietly(expected.gradient_checkpointing_enable)
    for own, other in zip(base.modules(), expected.modules(), strict=True):
        assert (len(own._forward_hooks), len(own._forward_pre_hooks)) == (
            len(other._forward_hooks),
            len(other._forward_pre_hooks),
        )
    assert {name: sorted(vars(module)) for name, module in base.named_modules()} == {
        name: sorted(vars(module)) for name, module in expected.named_modules()
    }


class Bomb:
    """Unpickling this leaves a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_nothing_is_unpickled(llama_adapters, tmp_path, untouched_base):
    folder = saved_by_peft(pefts_mixture(llama_adapters), tmp_path / "peft")
    (folder / TENSORS).unlink()
    torch.save({f"{GATE}.0.weight": Bomb(tmp_path / "exploded")}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"peft holds the gate as a pickle \(adapter_model.bin\), which weft"):
        weft.from_pretrained(folder, untouched_base)
    assert not (tmp_path / "exploded").exists()
