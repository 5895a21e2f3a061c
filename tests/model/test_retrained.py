"""What adapters bring along for the base model (embeddings of new tokens, heads, norms) is in the mixture's base."""

import copy
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from models import VOCAB, lora, quietly, randomise, tiny_llama
from weft.errors import AdapterError, CheckpointError, ConfigError
from weft.evaluate.contestants import SharedBase, adapters

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NEW = VOCAB + 8
EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


def tokens_of(base):
    return torch.arange(1, base.get_input_embeddings().weight.shape[0]).view(1, -1)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request):
    return request.param


@pytest.fixture(scope="module")
def bases(tied, tmp_path_factory):
    """A base model's folder, which peft compares with to see whether the vocabulary was resized."""
    folder = tmp_path_factory.mktemp("bases")
    tiny_llama(tie_word_embeddings=tied).save_pretrained(folder)
    return folder


def original(bases):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(bases).eval()


def resized(bases):
    base = original(bases)
    torch.manual_seed(5)
    quietly(base.resize_token_embeddings, NEW, mean_resizing=False)
    return base


def train(base, config, folder, seed, *, others=True):
    """An adapter with noise in everything that peft saves, as after a training."""
    model = quietly(peft.get_peft_model, base, config)
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    quietly(model.save_pretrained, str(folder))
    return str(folder)


# name -> (made on a resized base model, options of the adapter)
KINDS = {
    "resized": (True, {}),
    "resized and saved": (True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "embeddings only": (False, {"modules_to_save": ["embed_tokens"]}),
    "head only": (False, {"modules_to_save": ["lm_head"]}),
    "norms too": (False, {"modules_to_save": ["embed_tokens", "norm", "post_attention_layernorm"]}),
    "rows": (False, {"trainable_token_indices": [3, 17, 95]}),
    "rows by layer": (False, {"trainable_token_indices": {"embed_tokens": [3, 17, 95]}}),
    "rows of new tokens": (True, {"trainable_token_indices": [3, NEW - 1]}),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def adapter(kind, bases, tmp_path_factory):
    on_resized, options = KINDS[kind]
    folder = tmp_path_factory.mktemp("adapter") / "one"
    return train(resized(bases) if on_resized else original(bases), lora(**options), folder, seed=1)


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    return train(original(bases), lora(), tmp_path_factory.mktemp("plain") / "plain", seed=2)


def by_peft(kind, bases, folder):
    base = resized(bases) if KINDS[kind][0] else original(bases)
    return quietly(peft.PeftModel.from_pretrained, base, folder).eval()


def logits(model, ids, **weights):
    with torch.no_grad():
        if not weights:
            return model(ids).logits
        with model.fixed_scalings(weights):
            return model(ids).logits


@pytest.mark.parametrize("given", ["original", "resized"])
def test_the_mixture_computes_what_peft_does_and_gives_the_base_model_back(
    kind, given, bases, adapter, plain, tmp_path
):
    if given == "resized" and not KINDS[kind][0]:
        pytest.skip("the vocabulary is the base model's")
    base = original(bases) if given == "original" else resized(bases)
    before, state, ids = logits(base, tokens_of(base)), copy.deepcopy(base.state_dict()), tokens_of(base)
    vocabulary, identities = base.config.vocab_size, {name: id(p) for name, p in base.named_parameters()}
    expected = by_peft(kind, bases, adapter)
    new_ids = tokens_of(expected.get_base_model())
    model = quietly(weft.from_adapters, base, {"one": adapter, "plain": plain}, layerwise_scalings=True).eval()
    torch.testing.assert_close(logits(model, new_ids, one=1.0), logits(expected, new_ids), atol=1e-5, rtol=1e-5)
    assert all("internal_xlora" in name for name, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        loss = model(new_ids, labels=new_ids).loss
        with model.disable_adapter():
            assert torch.equal(logits(model, ids), before)
            model(ids, labels=ids)
        assert torch.equal(model(new_ids, labels=new_ids).loss, loss)
    mixed = logits(model, new_ids)
    model.save_pretrained(tmp_path / "mixture")
    shutil.move(tmp_path / "mixture", tmp_path / "moved")
    loaded = quietly(weft.from_pretrained, tmp_path / "moved", original(bases))
    assert torch.equal(logits(loaded, new_ids), mixed)
    expert = quietly(
        peft.PeftModel.from_pretrained,
        resized(bases) if KINDS[kind][0] else original(bases),
        tmp_path / "moved/experts/one",
    ).eval()
    assert torch.equal(logits(expert, new_ids), logits(expected, new_ids))
    unloaded = model.base_model.unload()
    assert torch.equal(logits(unloaded, ids), before)
    assert unloaded.config.vocab_size == vocabulary
    assert {name: id(p) for name, p in unloaded.named_parameters()} == identities
    assert unloaded.state_dict().keys() == state.keys()
    assert all(parameter.requires_grad for parameter in unloaded.parameters())


def test_folded_the_adapter_brings_the_same(kind, bases, adapter, plain, tmp_path):
    model = quietly(weft.from_adapters, original(bases), {"one": adapter, "plain": plain}).eval()
    weft.fold(model, tmp_path / "folded", {"one": 0.5, "plain": 0.25})
    folded = by_peft(kind, bases, str(tmp_path / "folded"))
    ids = tokens_of(folded.get_base_model())
    torch.testing.assert_close(logits(folded, ids), logits(model, ids, one=0.5, plain=0.25), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("peft_xlora_restored")
def test_peft_loads_the_saved_mixture_too(bases, tmp_path):
    path = train(resized(bases), lora(), tmp_path / "one", seed=1)
    model = quietly(weft.from_adapters, original(bases), {"one": path}).eval()
    model.save_pretrained(tmp_path / "mixture")
    weft.register_with_peft()
    loaded = peft.PeftModel.from_pretrained(original(bases), tmp_path / "mixture")
    ids = tokens_of(loaded.get_base_model())
    assert ids.numel() == NEW - 1
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_ties_of_peft_stay(tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    path = train(base, lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), tmp_path / "one", seed=1)
    expected = quietly(peft.PeftModel.from_pretrained, tiny_llama(tie_word_embeddings=True), path).eval()
    model = quietly(weft.from_adapters, tiny_llama(tie_word_embeddings=True), {"one": path}).eval()
    ids = tokens_of(model.get_base_model())
    torch.testing.assert_close(logits(model, ids, one=1.0), logits(expected, ids), atol=1e-5, rtol=1e-5)
    assert model.get_base_model().lm_head.weight is model.get_base_model().model.embed_tokens.weight


def test_an_adapted_embedding_of_another_size_needs_the_base_model_resized(bases, tied, tmp_path):
    """peft saves the embeddings that LoRA adapts, and not the head that was resized with them."""
    config = lora(target_modules=["q_proj", "embed_tokens"])
    path = train(resized(bases), config, tmp_path / "one", seed=1)
    expected = quietly(peft.PeftModel.from_pretrained, resized(bases), path).eval()
    ids = tokens_of(resized(bases))
    model = quietly(weft.from_adapters, resized(bases), {"one": path}).eval()
    torch.testing.assert_close(logits(model, ids, one=1.0), logits(expected, ids), atol=1e-5, rtol=1e-5)
    quietly(model.save_pretrained, tmp_path / "mixture")
    again = quietly(weft.from_pretrained, tmp_path / "mixture", resized(bases))
    assert torch.equal(logits(again, ids, one=1.0), logits(model, ids, one=1.0))
    with pytest.raises(AdapterError, match=r"call model.resize_token_embeddings\(104\) first"):
        quietly(weft.from_pretrained, tmp_path / "mixture", original(bases))
    if tied:
        quietly(weft.from_adapters, original(bases), {"one": path})
    else:
        with pytest.raises(AdapterError, match=r"call model.resize_token_embeddings\(104\) first"):
            quietly(weft.from_adapters, original(bases), {"one": path})


@pytest.fixture
def several(bases, tmp_path):
    """Two adapters with the same new tokens, and two with others."""
    base = resized(bases)
    paths = {name: train(resized(bases), lora(), tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))}
    with torch.no_grad():
        base.get_input_embeddings().weight[-1] += 1
    return {
        **paths,
        "c": train(base, lora(), tmp_path / "c", seed=7),
        "d": train(original(bases), lora(), tmp_path / "d", seed=8),
    }


def test_experts_that_bring_the_same_share_it(several, bases, tmp_path):
    model = quietly(weft.from_adapters, original(bases), {name: several[name] for name in "ab"}).eval()
    for name in "ab":
        expected = quietly(peft.PeftModel.from_pretrained, resized(bases), several[name]).eval()
        ids = tokens_of(expected.get_base_model())
        torch.testing.assert_close(logits(model, ids, **{name: 1.0}), logits(expected, ids), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "mixture")
    without = weft.drop_expert(tmp_path / "mixture", "b", tmp_path / "without")
    loaded = quietly(weft.from_pretrained, without, original(bases))
    torch.testing.assert_close(logits(loaded, ids, a=1.0), logits(model, ids, a=1.0))


def test_experts_that_differ_are_refused_with_what_to_do(several, bases):
    base = original(bases)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(
        AdapterError,
        match=r"\['a', 'c'\] each contain their own model.embed_tokens.weight, and these differ, .*: leave all but one",
    ) as error:
        quietly(weft.from_adapters, base, {name: several[name] for name in "ac"})
    assert "heads=['model.embed_tokens']" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    weft.from_adapters(base, {"a": several["a"]})


def test_a_head_that_the_mixture_can_have_is_said_and_works(tmp_path):
    paths = {
        name: train(tiny_llama(), lora(modules_to_save=["lm_head"]), tmp_path / name, seed=seed)
        for seed, name in enumerate(("a", "b"))
    }
    with pytest.raises(
        AdapterError, match=r"their own lm_head.weight, .* train one of its own, by heads=\['lm_head'\], or"
    ):
        quietly(weft.from_adapters, tiny_llama(), paths)
    # peft 0.18 warns of tied weights also where they are not tied.
    quietly(weft.from_adapters, tiny_llama(), paths, heads=["lm_head"])


def test_an_expert_is_added_that_brings_new_tokens_and_only_it_cannot_be_dropped(several, bases, tmp_path):
    quietly(weft.from_adapters, original(bases), {"d": several["d"]}).save_pretrained(tmp_path / "mixture")
    added = quietly(weft.add_expert, tmp_path / "mixture", "a", several["a"], tmp_path / "added", base=original(bases))
    model = quietly(weft.from_pretrained, added, original(bases))
    expected = quietly(peft.PeftModel.from_pretrained, resized(bases), several["a"]).eval()
    ids = tokens_of(expected.get_base_model())
    torch.testing.assert_close(logits(model, ids, a=1.0), logits(expected, ids), atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterError, match=r"\['a', 'c'\] each contain their own model.embed_tokens.weight"):
        quietly(weft.add_expert, added, "c", several["c"], tmp_path / "two", base=original(bases))
    with pytest.raises(ConfigError, match=r"name \('a'\) is the only expert that contains .*embed_tokens.weight, with"):
        weft.drop_expert(added, "a", tmp_path / "dropped")
    assert not (tmp_path / "dropped").exists()


def test_evaluation_carries_what_single_adapters_bring(several, bases):
    base = original(bases)
    before = logits(base, tokens_of(base))
    expected = quietly(peft.PeftModel.from_pretrained, resized(bases), several["a"]).eval()
    ids = tokens_of(expected.get_base_model())
    shared = SharedBase(base)
    loaded = quietly(shared.load, adapters({"a": several["a"]}))
    torch.testing.assert_close(logits(loaded, ids), logits(expected, ids), atol=1e-5, rtol=1e-5)
    shared.clear()
    assert torch.equal(logits(base, tokens_of(base)), before)


@pytest.mark.parametrize("to", ["peft", "xlora", "mistralrs"])
def test_other_layouts_cannot_hold_what_experts_bring(to, several, bases, tmp_path):
    model = quietly(weft.from_adapters, original(bases), {"0": several["a"]})
    model.save_pretrained(tmp_path / "mixture")
    with pytest.raises(ConfigError, match=r"experts \['0'\] contain weights of the base model \(.*embed_tokens.weight"):
        weft.convert_mixture(tmp_path / "mixture", to, tmp_path / "converted")
    weft.convert_mixture(tmp_path / "mixture", "weft", tmp_path / "again")
    loaded = quietly(weft.from_pretrained, tmp_path / "again", original(bases))
    ids = tokens_of(model.get_base_model())
    assert torch.equal(logits(loaded, ids, **{"0": 1.0}), logits(model.eval(), ids, **{"0": 1.0}))


def test_what_was_altered_in_the_folder_is_named(several, bases, tmp_path):
    quietly(weft.from_adapters, original(bases), {"a": several["a"]}).save_pretrained(tmp_path / "mixture")
    file = tmp_path / "mixture/experts/a" / TENSORS
    tensors = load_file(file)
    tensors[EMBEDDING][0] += 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"experts/a/{TENSORS}: changed tensors \(1\): {EMBEDDING}"):
        quietly(weft.from_pretrained, tmp_path / "mixture", original(bases))


def test_the_model_moves_and_is_copied_with_what_was_brought(several, bases):
    base = original(bases)
    ids, before = tokens_of(base), logits(base, tokens_of(base))
    model = quietly(weft.from_adapters, base, {"a": several["a"]}).eval()
    twin = copy.deepcopy(model).double()
    new_ids = torch.arange(1, NEW).view(1, -1)
    torch.testing.assert_close(
        logits(twin, new_ids, a=1.0).float(), logits(model, new_ids, a=1.0), atol=1e-5, rtol=1e-5
    )
    with twin.disable_adapter():
        torch.testing.assert_close(logits(twin, ids).float(), before, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), before)


REFUSED = {
    "shape": (
        lambda folder: change(folder, lambda tensors: tensors.update({EMBEDDING: torch.zeros(NEW, 16)})),
        r"they contain model.embed_tokens.weight of shape \[104, 16\], expected \[96, 32\]",
    ),
    "one size only": (
        lambda folder: change(folder, lambda tensors: tensors.pop(HEAD)),
        r"weights in '.*:\n  - they hold embeddings of 104 tokens, but not all of model.embed_tokens.weight, "
        r"lm_head.weight, of which this base model has \[96, 96\]: call model.resize_token_embeddings\(104\) first",
    ),
    "unknown": (
        lambda folder: change(folder, lambda tensors: tensors.update({"base_model.model.spare.weight": torch.ones(1)})),
        r"unexpected keys \(1\): base_model.model.spare.weight",
    ),
}


def change(folder, function):
    tensors = load_file(f"{folder}/{TENSORS}")
    function(tensors)
    save_file(tensors, f"{folder}/{TENSORS}")


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_the_base_model_as_it_was(damage, message, several, bases, tied):
    damage(several["a"])
    base = original(bases)
    identities, vocabulary = {name: id(p) for name, p in base.named_parameters()}, base.config.vocab_size
    if tied and "not all of" in message:
        quietly(weft.from_adapters, base, {"a": several["a"]})  # they are one
        return
    with pytest.raises(AdapterError, match=message):
        quietly(weft.from_adapters, base, {"a": several["a"]})
    assert {name: id(p) for name, p in base.named_parameters()} == identities
    assert base.config.vocab_size == vocabulary
    assert base.model.embed_tokens.num_embeddings == VOCAB


def test_rows_of_tokens_that_the_base_model_lacks_are_refused(bases, tmp_path):
    path = train(original(bases), lora(trainable_token_indices=[3, 95]), tmp_path / "a", seed=1)
    config = json.loads((Path(path) / CONFIG).read_text())
    (Path(path) / CONFIG).write_text(json.dumps({**config, "trainable_token_indices": [3, 99]}))
    with pytest.raises(
        AdapterError,
        match=r"'a' trains 2 rows of model.embed_tokens.weight \(trainable_token_indices \[3, 99\]\), of .* has 96",
    ):
        quietly(weft.from_adapters, original(bases), {"a": path})


def test_what_overflows_in_the_base_models_dtype_is_refused(several, bases):
    change(several["a"], lambda tensors: tensors[EMBEDDING].fill_(1e6))
    with pytest.raises(
        AdapterError, match=r"in this base model model.embed_tokens.weight holds infinite numbers: load it"
    ):
        quietly(weft.from_adapters, original(bases).half(), {"a": several["a"]})
