"""Adapters are read and checked before the base model is touched; one that does not fit leaves no trace."""

import copy
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from models import VOCAB, lora, quietly, save_adapter, tiny_llama
from weft.checkpoint.adapters import read_adapters
from weft.errors import AdapterError, CheckpointError, WeftError
from weft.model.inject import adapter_parameters

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
DOWN = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
UP = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
TOKENS = torch.arange(1, 10).view(1, 9)


def change_config(folder, **values):
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_tensors(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


@pytest.fixture
def good(llama_adapters):
    return llama_adapters["math"]


@pytest.fixture
def bad(good, tmp_path):
    """A whole adapter, for a test to damage."""
    return Path(shutil.copytree(good, tmp_path / "bad"))


def trained(folder, **options):
    """An adapter with these options, as peft saves it, in place of the one in the folder."""
    shutil.rmtree(folder)
    save_adapter(tiny_llama(), lora(**options), folder, seed=7)


def snapshot(base):
    """Everything that a failed attempt must leave alone: modules, hooks, flags, attributes, config."""
    modules = {
        name: (
            module,
            module.training,
            sorted(vars(module)),
            {key: copy.copy(value) for key, value in vars(module).items() if "hooks" in key},
        )
        for name, module in base.named_modules()
    }
    parameters = {name: (id(parameter), parameter.requires_grad) for name, parameter in base.named_parameters()}
    return modules, parameters, base.config.to_dict()


@pytest.fixture
def untouched_base():
    """A base model, some of it frozen, that must come out of the test as it went in."""
    base = tiny_llama()
    base.model.embed_tokens.requires_grad_(False)
    base.model.layers[0].train()
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    logits = base(TOKENS).logits
    before = snapshot(base)
    yield base
    assert snapshot(base) == before
    assert all(torch.equal(value, weights[key]) for key, value in base.state_dict().items())
    assert torch.equal(base(TOKENS).logits, logits)


# ---------------------------------------------------------------------- adapters that cannot be experts

DAMAGES = {
    "no folder": (shutil.rmtree, r"adapter 'bad' \(.*/bad\) is neither a folder here nor a Hub id that can be read"),
    "no config": (lambda bad: (bad / CONFIG).unlink(), r"adapter 'bad': .*/bad/adapter_config.json is missing"),
    "config is no JSON": (lambda bad: (bad / CONFIG).write_text("{"), r"adapter_config.json is no valid JSON \(Expect"),
    "config is no object": (
        lambda bad: (bad / CONFIG).write_text("[]"),
        r"adapter_config.json must hold a JSON object, not a list",
    ),
    "no tensors": (lambda bad: (bad / TENSORS).unlink(), r"adapter 'bad': .*/bad/adapter_model.safetensors is missing"),
    "truncated tensors": (
        lambda bad: (bad / TENSORS).write_bytes((bad / TENSORS).read_bytes()[:-100]),
        r"adapter 'bad': .*/adapter_model.safetensors is no whole safetensors file \(.*\): copy it again",
    ),
    "truncated header": (
        lambda bad: (bad / TENSORS).write_bytes((bad / TENSORS).read_bytes()[:20]),
        r"adapter_model.safetensors is no whole safetensors file",
    ),
    "empty tensors": (lambda bad: (bad / TENSORS).write_bytes(b""), r"is no whole safetensors file"),
    "pickle": (
        lambda bad: (bad / TENSORS).rename(bad / "adapter_model.bin"),
        r"adapter 'bad' \(.*/bad\) is saved as a pickle \(adapter_model.bin\), which weft does not open: save it again",
    ),
    "another type": (
        lambda bad: change_config(bad, peft_type="IA3"),
        r"adapter 'bad' \(.*/bad\) is of type IA3, not LORA",
    ),
    "no type": (lambda bad: (bad / CONFIG).write_text("{}"), r"adapter 'bad' \(.*/bad\) is of type None, not LORA"),
    "DoRA": (lambda bad: trained(bad, use_dora=True), r"adapter 'bad' uses DoRA, .* convert_to_lora"),
    "bias": (lambda bad: trained(bad, bias="all"), r"adapter 'bad' has bias \('all'\): .*; expected 'none'"),
    "layer replication": (
        lambda bad: change_config(bad, layer_replication=[[0, 2], [1, 2]]),
        r"adapter 'bad' has layer_replication \(\[\[0, 2\], \[1, 2\]\]\): it replicates layers",
    ),
    "bare parameters": (
        lambda bad: change_config(bad, target_parameters=["mlp.experts.down_proj"]),
        r"adapter 'bad' has target_parameters \(\['mlp.experts.down_proj'\]\): it adapts bare parameters",
    ),
    "aLoRA": (
        lambda bad: change_config(bad, alora_invocation_tokens=[3]),
        r"adapter 'bad' has alora_invocation_tokens \(\[3\]\): it acts on a part of the text only",
    ),
    "Arrow": (
        lambda bad: change_config(bad, arrow_config={"top_k": 1}),
        r"adapter 'bad' has arrow_config \(.*\): it routes between other adapters",
    ),
    "options that peft refuses": (
        lambda bad: change_config(bad, layers_pattern="layers"),
        r"adapter 'bad'.*layers_to_transform",
    ),
    "rank 0": (
        lambda bad: change_config(bad, r=0),
        r"adapter 'bad': .*/bad/adapter_config.json cannot be read: r \(0\) must be a whole number of at least 1",
    ),
    "no such targets": (
        lambda bad: change_config(bad, target_modules=["nothing"]),
        r"adapter 'bad' \(.*/bad\) does not fit the base model: .*nothing.* not found in the base model",
    ),
    "missing keys": (
        lambda bad: change_tensors(bad, lambda tensors: [tensors.pop(key) for key in (DOWN, UP)]),
        rf"adapter 'bad' \(.*/bad/{TENSORS}\) does not fit the base model:\n  - missing keys \(2\): {DOWN}, {UP}$",
    ),
    "unexpected key": (
        lambda bad: change_tensors(bad, lambda tensors: tensors.update(spare=torch.zeros(1))),
        r"does not fit the base model:\n  - unexpected keys \(1\): .*spare$",
    ),
    "wrong shape": (
        lambda bad: change_tensors(bad, lambda tensors: tensors.update({DOWN: torch.zeros(4, 16)})),
        rf"does not fit the base model:\n  - {DOWN} has shape \[4, 16\], expected \[4, 32\]$",
    ),
    "another rank": (
        lambda bad: change_config(bad, r=6),
        rf"'bad': .*/{CONFIG} does not fit {TENSORS}: r \(6\) must be the rank of its tensors: .*A.weight has 4",
    ),
    "fewer targets than tensors": (
        lambda bad: change_config(bad, target_modules=["q_proj", "v_proj"]),
        r"does not fit the base model:\n  - unexpected keys \(4\): .*up_proj.lora_A.weight, .*up_proj.lora_B.weight",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("order", [["good", "bad"], ["bad", "good"]], ids=" ".join)
def test_adapter_that_cannot_be_an_expert_is_named_and_the_base_model_untouched(
    damage, message, order, good, bad, untouched_base
):
    damage(bad)
    paths = {"good": good, "bad": str(bad)}
    with pytest.raises(AdapterError, match=message):
        weft.from_adapters(untouched_base, {name: paths[name] for name in order})


def test_adapter_that_names_a_module_to_import_is_refused_and_nothing_is_imported(bad, untouched_base, monkeypatch):
    (bad / "imported_by_weft.py").write_text("raise AssertionError('this was run')")
    monkeypatch.syspath_prepend(bad)
    change_config(bad, megatron_config={"tensor_model_parallel_size": 1}, megatron_core="imported_by_weft")
    with pytest.raises(
        AdapterError, match=r"adapter 'bad' has megatron_config \(.*\): it has peft import a module that"
    ):
        weft.from_adapters(untouched_base, {"bad": str(bad)})


def test_adapter_error_is_a_value_error():
    assert issubclass(AdapterError, ValueError)
    assert issubclass(AdapterError, WeftError)


def test_adapter_of_another_model_is_refused_with_its_shapes(tmp_path, good, untouched_base):
    other = save_adapter(tiny_llama(hidden_size=16), lora(), tmp_path / "other", seed=1)
    with pytest.raises(
        AdapterError, match=rf"adapter 'other' .*\n(.*\n)*.*{DOWN} has shape \[4, 16\], expected \[4, 32\]"
    ):
        weft.from_adapters(untouched_base, {"good": good, "other": other})


def test_adapters_of_another_model_alone_are_refused_with_both_names_and_few_of_the_shapes(tmp_path, untouched_base):
    other = Path(
        save_adapter(tiny_llama(hidden_size=16), lora(target_modules="all-linear"), tmp_path / "other", seed=1)
    )
    change_config(other, base_model_name_or_path="org/other-1b")
    untouched_base.name_or_path = "/models/mine"
    with pytest.raises(AdapterError) as error:
        weft.from_adapters(untouched_base, {"other": str(other)})
    first, *lines = str(error.value).splitlines()
    assert first == (
        "adapter 'other' is made for the base model org/other-1b: hidden size 16, here 32 (/models/mine). "
        f"{other / TENSORS}:"
    )
    assert len(lines) == 3 + 1
    assert all(" has shape [" in line for line in lines[:3])
    assert lines[3] == "  - and 19 more of other shapes"


def test_adapter_of_another_architecture_is_refused_with_both_names(tmp_path, untouched_base):
    other = Path(save_adapter(tiny_llama(), lora(), tmp_path / "other", seed=1))
    change_config(other, base_model_name_or_path="org/gpt", target_modules=["c_attn"])
    untouched_base.name_or_path = "/models/mine"
    message = rf"adapter 'other' is made for the base model org/gpt, not for /models/mine. {other}: .*not found in the"
    with pytest.raises(AdapterError, match=message):
        weft.from_adapters(untouched_base, {"other": str(other)})


def test_adapter_of_a_model_of_the_same_name_but_another_size_is_refused_by_size(tmp_path, untouched_base):
    other = save_adapter(tiny_llama(hidden_size=16), lora(), tmp_path / "other", seed=1)
    message = rf"adapter 'other' does not fit the base model: hidden size 16, here 32. {other}/{TENSORS}:\n  - "
    with pytest.raises(AdapterError, match=message):
        weft.from_adapters(untouched_base, {"other": other})


def test_adapter_of_a_deeper_model_is_refused_with_both_depths(tmp_path, untouched_base):
    other = Path(save_adapter(tiny_llama(num_hidden_layers=5), lora(), tmp_path / "other", seed=1))
    change_config(other, base_model_name_or_path="org/deep")
    untouched_base.name_or_path = "/models/mine"
    here = untouched_base.config.num_hidden_layers
    message = rf"adapter 'other' is made for the base model org/deep: 5 layers, here {here} \(/models/mine\)"
    with pytest.raises(AdapterError, match=message):
        weft.from_adapters(untouched_base, {"other": str(other)})


def test_a_base_model_or_a_mixture_in_the_place_of_an_adapter_is_named(good, tmp_path, untouched_base):
    tiny_llama().save_pretrained(tmp_path / "base")
    message = rf"adapter 'bad' \({tmp_path}/base\) is a base model, not a LoRA adapter of one: give it with --base"
    with pytest.raises(AdapterError, match=message):
        weft.from_adapters(untouched_base, {"good": good, "bad": str(tmp_path / "base")})
    weft.from_adapters(tiny_llama(), {"good": good}).save_pretrained(tmp_path / "mixture")
    with pytest.raises(AdapterError, match=r"is of type XLORA, not LORA: it is a mixture, whose experts are adapters"):
        weft.from_adapters(untouched_base, {"good": good, "bad": str(tmp_path / "mixture")})


def test_all_problems_of_all_adapters_are_reported_in_one_error(tmp_path, good, untouched_base):
    paths = {name: tmp_path / name for name in ("one", "two", "three", "four")}
    for name in ("two", "three", "four"):
        shutil.copytree(good, paths[name])
    change_config(paths["two"], use_dora=True)
    (paths["three"] / TENSORS).unlink()
    change_config(paths["four"], alora_invocation_tokens=[3])
    with pytest.raises(AdapterError) as error:
        weft.from_adapters(untouched_base, {name: str(path) for name, path in paths.items()})
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + 4
    for line, words in zip(
        lines[1:], [("'one'", "neither"), ("'two'", "DoRA"), ("'three'", "missing"), ("'four'", "alora")], strict=True
    ):
        assert all(word in line for word in words), line


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_2", "olora"])
def test_adapter_whose_initialisation_changes_base_weights_is_refused(method, good, bad, untouched_base):
    trained(bad, init_lora_weights=method)
    with pytest.raises(AdapterError, match=rf"adapter 'bad'.*init_lora_weights \('{method}'\)"):
        weft.from_adapters(untouched_base, {"good": good, "bad": str(bad)})


def test_many_missing_keys_are_counted_and_not_all_listed(bad, untouched_base):
    change_tensors(bad, lambda tensors: [tensors.pop(key) for key in list(tensors)[1:]])
    with pytest.raises(AdapterError, match=r"missing keys \(11\): .*, and 8 more$") as error:
        weft.from_adapters(untouched_base, {"bad": str(bad)})
    assert str(error.value).count("base_model.model.") == 3


def test_base_model_with_adapters_already_is_refused(good):
    model = quietly(peft.get_peft_model, tiny_llama(), lora())
    with pytest.raises(AdapterError, match=r"already has peft adapters: pass the model itself"):
        weft.from_adapters(model.get_base_model(), {"math": good})


def test_base_model_can_be_used_again_after_a_failure(good, tmp_path):
    base = tiny_llama()
    with pytest.raises(AdapterError):
        weft.from_adapters(base, {"math": good, "code": str(tmp_path / "none")})
    again, fresh = (weft.from_adapters(model, {"math": good}) for model in (base, tiny_llama()))
    assert torch.equal(alone(again, "math"), alone(fresh, "math"))


def test_failure_leaves_gradient_checkpointing_as_it_was(good, bad):
    change_tensors(bad, lambda tensors: tensors.pop(UP))
    base = tiny_llama()
    quietly(base.gradient_checkpointing_enable)
    before = snapshot(base)
    with pytest.raises(AdapterError):
        weft.from_adapters(base, {"good": good, "bad": str(bad)})
    assert snapshot(base) == before


# ---------------------------------------------------------------------- base models by name


@pytest.mark.parametrize(
    "bases",
    [
        ("meta/Llama-8B", "/data/models/Llama-8B"),
        ("mirror/llama-8b", "meta/Llama-8B/"),
        ("meta/Llama-8B", None),
        ("meta/Llama-8B", ""),
    ],
)
def test_same_base_model_under_another_path_is_accepted(bases, good, bad):
    for folder, base in zip((Path(shutil.copytree(good, bad / "other")), bad), bases, strict=True):
        change_config(folder, base_model_name_or_path=base)
    assert [adapter.name for adapter in read_adapters({"b": str(bad / "other"), "a": str(bad)})] == ["b", "a"]


@pytest.fixture
def of_two_bases(good, tmp_path):
    """Adapters of one base model, trained with it as it is and in four bits."""
    paths = {name: str(shutil.copytree(good, tmp_path / name)) for name in ("a", "b")}
    change_config(Path(paths["a"]), base_model_name_or_path="meta-llama/Llama-3.1-8B")
    change_config(Path(paths["b"]), base_model_name_or_path="unsloth/Meta-Llama-3.1-8B-bnb-4bit")
    return paths


NAMED = r"\('a' of meta-llama/Llama-3.1-8B; 'b' of unsloth/Meta-Llama-3.1-8B-bnb-4bit\)"


def test_without_a_base_model_different_names_are_refused(of_two_bases):
    with pytest.raises(
        AdapterError, match=rf"different base models {NAMED}: .* give the base model too \(base, or --b"
    ):
        read_adapters(of_two_bases)


def test_with_a_base_model_the_tensors_decide_and_different_names_are_one_warning(of_two_bases, tmp_path):
    with pytest.warns(
        UserWarning, match=rf"different base models {NAMED}: all of their .* \(LlamaForCausalLM\)"
    ) as told:
        model = weft.from_adapters(tiny_llama(), of_two_bases)
    assert sum("different base models" in str(one.message) for one in told) == 1
    for name, folder in of_two_bases.items():
        torch.testing.assert_close(alone(model, name), by_peft(folder), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "mixture")
    weft.from_pretrained(tmp_path / "mixture", tiny_llama())  # says it no more


def test_a_mixture_is_converted_though_its_experts_name_different_base_models(of_two_bases, tmp_path):
    model = quietly(weft.from_adapters, tiny_llama(), of_two_bases)
    model.save_pretrained(tmp_path / "mixture")
    weft.convert_mixture(tmp_path / "mixture", "xlora", tmp_path / "xlora")  # which names no base model
    with pytest.raises(AdapterError, match=rf"different base models {NAMED}"):
        weft.convert_mixture(tmp_path / "xlora", "weft", tmp_path / "again")
    weft.convert_mixture(tmp_path / "xlora", "weft", tmp_path / "again", base=tiny_llama())
    assert torch.equal(alone(weft.from_pretrained(tmp_path / "again", tiny_llama()), "b"), alone(model, "b"))


def test_adapters_of_another_base_model_are_refused_by_shape_and_no_warning(of_two_bases, tmp_path, untouched_base):
    other = save_adapter(tiny_llama(hidden_size=16), lora(), tmp_path / "other", seed=1)
    change_config(Path(other), base_model_name_or_path="org/other")
    with pytest.raises(AdapterError, match=r"\[4, 16\], expected \[4, 32\]"):
        weft.from_adapters(untouched_base, {**of_two_bases, "c": other})


# ---------------------------------------------------------------------- what is read, and how


def alone(model, name):
    """Logits with one expert at weight 1."""
    with model.eval().fixed_scalings({name: 1.0}):
        return model(TOKENS).logits


def by_peft(folder, base=None):
    return quietly(peft.PeftModel.from_pretrained, base or tiny_llama(), folder).eval()(TOKENS).logits


def test_adapters_are_read_in_the_order_given(llama_adapters):
    names = ["code", "adapter_3", "math"]
    adapters = read_adapters({name: llama_adapters[name] for name in names})
    assert [adapter.name for adapter in adapters] == names
    assert [adapter.config.r for adapter in adapters] == [4, 6, 4]
    for adapter in adapters:
        assert {key: value.tolist() for key, value in adapter.weights.items()} == {
            key: value.tolist() for key, value in load_file(Path(llama_adapters[adapter.name]) / TENSORS).items()
        }


def test_each_expert_alone_is_that_adapter(llama_adapters):
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    for name, folder in llama_adapters.items():
        torch.testing.assert_close(alone(model, name), by_peft(folder), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float32_files_lose_nothing_in_a_model_of_half_precision(dtype, llama_adapters):
    base = tiny_llama().to(dtype)
    weft.from_adapters(base, llama_adapters)
    for name, folder in llama_adapters.items():
        parameters, saved = dict(adapter_parameters(base, name)), load_file(Path(folder) / TENSORS)
        assert parameters.keys() == saved.keys()
        assert all(torch.equal(parameters[key], saved[key]) for key in saved)


@pytest.fixture(scope="module")
def embedding_adapter(tmp_path_factory):
    """An adapter of the embeddings, with which peft saves a copy of the base model's."""
    config = lora(target_modules=["embed_tokens", "q_proj"])
    folder = save_adapter(tiny_llama(), config, tmp_path_factory.mktemp("embedding") / "embedding", seed=3)
    assert any(
        "embed_tokens" in key and value.shape[0] == VOCAB for key, value in load_file(f"{folder}/{TENSORS}").items()
    )
    return folder


def test_adapter_saved_with_embedding_weights_loads(embedding_adapter, good):
    model = weft.from_adapters(tiny_llama(), {"words": embedding_adapter, "math": good})
    torch.testing.assert_close(alone(model, "words"), by_peft(embedding_adapter), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_embedding_weights_may_be_of_another_dtype_than_the_base_model(dtype, embedding_adapter):
    base = tiny_llama().to(dtype)
    weft.from_adapters(base, {"words": embedding_adapter})
    assert dict(adapter_parameters(base, "words"))


def test_adapter_with_retrained_embeddings_brings_them(embedding_adapter, good, tmp_path):
    folder = Path(shutil.copytree(embedding_adapter, tmp_path / "words"))
    (key,) = (key for key, value in load_file(folder / TENSORS).items() if value.shape == (VOCAB, 32))
    change_tensors(folder, lambda tensors: tensors[key].add_(1))
    model = weft.from_adapters(tiny_llama(), {"math": good, "words": str(folder)})
    torch.testing.assert_close(alone(model, "words"), by_peft(str(folder)), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- the Hub


def test_adapter_is_read_from_the_hub_and_then_from_the_cache_offline(hub, good, monkeypatch):
    repository = Path(shutil.copytree(good, hub / "user" / "math"))
    (repository / "adapter_model.bin").write_bytes(b"a pickle")
    expected = alone(weft.from_adapters(tiny_llama(), {"math": good}), "math")
    (online,) = read_adapters({"math": "user/math"})
    assert sorted(file.name for file in online.folder.iterdir()) == ["README.md", CONFIG, TENSORS]  # no pickle
    assert torch.equal(alone(weft.from_adapters(tiny_llama(), {"math": "user/math"}), "math"), expected)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(alone(weft.from_adapters(tiny_llama(), {"math": "user/math"}), "math"), expected)


def test_saved_mixture_is_read_from_the_hub(hub, llama_adapters):
    model = weft.from_adapters(tiny_llama(), llama_adapters).eval()
    quietly(model.save_pretrained, str(hub / "user" / "mixture"))
    assert torch.equal(weft.from_pretrained("user/mixture", tiny_llama())(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("damage", ["no such repository", "no tensors", "a pickle"])
def test_hub_id_that_is_no_adapter_is_named(damage, hub, good, untouched_base):
    if damage != "no such repository":
        repository = Path(shutil.copytree(good, hub / "user" / "bad"))
        (repository / TENSORS).unlink()
        if damage == "a pickle":
            (repository / "adapter_model.bin").write_bytes(b"a pickle")
    message = {
        "no such repository": r"adapter 'bad' \(user/bad\) is neither a folder here nor a Hub id .*: .*404",
        "no tensors": r"adapter 'bad': .*adapter_model.safetensors is missing",
        "a pickle": r"adapter 'bad'.*adapter_model.bin",
    }[damage]
    with pytest.raises(AdapterError, match=message):
        weft.from_adapters(untouched_base, {"math": good, "bad": "user/bad"})


@pytest.mark.parametrize("path", ["user/none", "none", "/no/such/folder", "no folder", "a/b/c"])
def test_path_that_is_neither_a_folder_nor_cached_is_named_offline(path, untouched_base):
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(
        AdapterError, match=rf"adapter 'math' \({re.escape(path)}\) is neither a folder here nor a Hub id"
    ):
        weft.from_adapters(untouched_base, {"math": path})


# ---------------------------------------------------------------------- numbers that are none


def broken(key, value):
    return lambda bad: change_tensors(bad, lambda tensors: tensors[key].view(-1)[3:4].fill_(value))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            broken(UP, torch.nan),
            rf"adapter 'bad': .*{TENSORS} is broken, as {re.escape(UP)} holds NaN: .*Save it again",
        ),
        (broken(DOWN, torch.inf), rf"adapter 'bad': .* as {re.escape(DOWN)} holds infinite numbers"),
        (
            lambda bad: change_tensors(
                bad, lambda tensors: tensors.update({UP: torch.full((48, 4), 1e300, dtype=torch.float64)})
            ),
            rf"adapter 'bad' is broken in this model, as {re.escape(UP)} holds infinite numbers: expected finite",
        ),
        (
            lambda bad: (bad / CONFIG).write_text(
                (bad / CONFIG).read_text().replace('"lora_alpha": 8', '"lora_alpha": NaN')
            ),
            rf"adapter 'bad': .*/{CONFIG} cannot be read: lora_alpha \(nan\) must be a finite number",
        ),
        (
            lambda bad: (bad / CONFIG).write_text(
                (bad / CONFIG).read_text().replace('"alpha_pattern": {}', '"alpha_pattern": {"q_proj": 1e300}')
            ),
            r"adapter 'bad' is broken in this model, as its scaling in \S+q_proj is 2.5e\+299 \(from lora_alpha",
        ),
    ],
    ids=["NaN", "inf", "overflow", "alpha", "alpha of a layer"],
)
def test_a_broken_adapter_is_refused_by_name_and_tensor(damage, message, good, bad, untouched_base):
    damage(bad)
    with pytest.raises(AdapterError, match=message):
        weft.from_adapters(untouched_base, {"good": good, "bad": str(bad)})


def test_a_broken_head_of_an_adapter_is_refused(tmp_path):
    folder = Path(save_adapter(tiny_llama(), lora(modules_to_save=["lm_head"]), tmp_path / "one", seed=1))
    broken("base_model.model.lm_head.weight", torch.nan)(folder)
    with pytest.raises(AdapterError, match=r"adapter 'one': .* as base_model.model.lm_head.weight holds NaN"):
        weft.from_adapters(tiny_llama(), {"one": str(folder)}, heads=["lm_head"])


@pytest.mark.usefixtures("peft_xlora_restored")
def test_a_cast_that_overflows_is_refused_and_the_base_model_as_it_was(bad):
    change_tensors(bad, lambda tensors: tensors[DOWN].fill_(1e6))
    base = tiny_llama().half()
    weft.register_with_peft()
    before = snapshot(base)
    with pytest.raises(
        AdapterError, match=rf"adapter 'bad' is broken in this model, as {re.escape(DOWN)} holds infinite"
    ):
        peft.get_peft_model(base, weft.XLoraConfig(adapters={"bad": str(bad)}), autocast_adapter_dtype=False)
    assert snapshot(base)[1:] == before[1:]


@pytest.mark.parametrize("way", ["from_pretrained", "peft", "convert"])
@pytest.mark.usefixtures("peft_xlora_restored")
def test_a_broken_gate_is_refused_however_it_is_read(way, mixture, base_folder, tmp_path):
    key = next(key for key in load_file(f"{mixture}/{TENSORS}") if key.endswith(".weight"))
    broken(key, torch.nan)(Path(mixture))
    (Path(mixture) / "weft_manifest.json").unlink()
    config = json.loads((Path(mixture) / CONFIG).read_text())
    (Path(mixture) / CONFIG).write_text(json.dumps({**config, "format_version": None}))
    weft.register_with_peft()
    ways = {
        "from_pretrained": lambda: weft.from_pretrained(mixture),
        "peft": lambda: peft.PeftModel.from_pretrained(tiny_llama(258, max_position_embeddings=1024), mixture),
        "convert": lambda: weft.convert_mixture(mixture, "xlora", tmp_path / "converted"),
    }
    with pytest.raises(WeftError, match=rf"{re.escape(key)} holds NaN"):
        ways[way]()


def test_an_expert_broken_in_memory_is_neither_saved_nor_folded(llama_adapters, tmp_path):
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    model.save_pretrained(tmp_path / "mixture")
    before = {file: file.read_bytes() for file in (tmp_path / "mixture").rglob("*") if file.is_file()}
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.lora_B["code"].weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=rf"expert 'code' cannot be saved, as {re.escape(UP)} holds NaN"):
        model.save_pretrained(tmp_path / "mixture")
    assert {file: file.read_bytes() for file in (tmp_path / "mixture").rglob("*") if file.is_file()} == before
    with pytest.raises(AdapterError, match=rf"the mixture cannot be folded, as {re.escape(UP)} holds NaN"):
        weft.fold(model, tmp_path / "folded", {"math": 0.5, "code": 0.5})
    assert not (tmp_path / "folded").exists()


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS.repeat(1, 9)], ids=["few", "many"])
@pytest.mark.parametrize("names", [("math", "code"), ("math", "adapter_3")], ids=["one rank", "two ranks"])
@pytest.mark.parametrize("grad", [True, False])
def test_an_expert_whose_products_overflow_is_not_heard_at_weight_0(tokens, names, grad, llama_adapters):
    one, other = names
    model = weft.from_adapters(tiny_llama(), {name: llama_adapters[name] for name in names}, layerwise_scalings=True)
    model.eval()
    with torch.set_grad_enabled(grad), model.fixed_scalings({one: 1.0}):
        expected = model(tokens).logits
    for name, parameter in model.named_parameters():
        if f"lora_A.{other}" in name:
            parameter.data.fill_(torch.finfo(torch.float32).max)
    with torch.set_grad_enabled(grad), model.fixed_scalings({one: 1.0}):
        torch.testing.assert_close(model(tokens).logits, expected)
    with torch.set_grad_enabled(grad), model.fixed_scalings({other: 1.0}):
        assert model(tokens).logits.isnan().any()


def test_an_expert_whose_products_overflow_is_not_heard_in_the_rows_of_others(llama_adapters):
    model = weft.from_adapters(tiny_llama(), {name: llama_adapters[name] for name in ("math", "code")}).eval()
    ids = TOKENS.repeat(2, 1)

    def of_rows():
        with torch.no_grad():
            return model(ids, adapter_names=["math", "code"]).logits

    expected = of_rows()[0]
    for name, parameter in model.named_parameters():
        if "lora_A.code" in name:
            parameter.data.fill_(torch.finfo(torch.float32).max)
    found = of_rows()
    torch.testing.assert_close(found[0], expected)
    assert found[1].isnan().any()


@pytest.mark.parametrize("tokens", [TOKENS[:, :1], TOKENS, TOKENS.repeat(1, 9)], ids=["one", "few", "many"])
@pytest.mark.parametrize("grad", [True, False])
def test_an_expert_whose_products_overflow_is_not_heard_outside_of_top_k(tokens, grad, llama_adapters):
    model = weft.from_adapters(tiny_llama(), llama_adapters, top_k_lora=1, xlora_depth=1).eval()
    gate = model.internal_xlora_classifier
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        gate.layers[-1].bias.view(-1, 3)[:, 0] = 5.0
    with torch.set_grad_enabled(grad):
        expected = model(tokens).logits
    for name, parameter in model.named_parameters():
        if "lora_A.code" in name or "lora_A.adapter_3" in name:
            parameter.data.fill_(torch.finfo(torch.float32).max)
    with torch.set_grad_enabled(grad):
        logits = model(tokens).logits
        torch.testing.assert_close(logits, expected)
    if grad:
        logits.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in gate.parameters())
