"""A mixture goes from layout to layout with the same numbers, or it is said what hinders."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file

import weft
from models import folder_files, lora, make_architecture, quietly, save_adapter, tiny_llama
from original import OriginalGate, lora_layers, make_gate, original_logits, write_original
from weft.cli import main
from weft.errors import AdapterError, CheckpointError, ConfigError

TOKENS = torch.arange(1, 19).view(2, 9)
CONFIG, TENSORS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "weft_manifest.json"
SCHEMES = {
    "layerwise": {},
    "shared": {"layerwise_scalings": False},
    "depth 2": {"xlora_depth": 2, "xlora_size": 32},
    "depth 4, no dropout": {"xlora_depth": 4, "xlora_size": 32, "xlora_dropout_p": 0.0},
    "top-k": {"top_k_lora": 1, "softmax_temperature": 0.5, "global_scaling_weight": 1.5},
    "trained experts": {"use_trainable_adapters": True},
}


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """Two adapters of one rank and the same targets, which every layout can hold."""
    folder = tmp_path_factory.mktemp("alike")
    return {
        name: save_adapter(tiny_llama(), lora(), folder / name, seed=seed) for seed, name in enumerate(("0", "1"), 1)
    }


def saved(adapters, folder, base=None, **options):
    """A mixture of weft's with a gate that makes a difference, in a folder."""
    torch.manual_seed(3)
    model = weft.from_adapters(base or tiny_llama(), adapters, **{"layerwise_scalings": True, **options})
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.normal_()
    quietly(model.save_pretrained, folder)
    return folder


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def loaded(folder, **options):
    return weft.from_pretrained(folder, tiny_llama(), **options)


def options_of(folder):
    """The options of a folder, but for those that belong to where it lies and to no layout but weft's."""
    config = loaded(folder).xlora_config
    return {
        name: value
        for name, value in config.to_dict().items()
        if name not in {"adapters", "format_version", "auto_mapping", "task_type", "base_model_name_or_path"}
    }


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("to", ["weft", "peft", "xlora", "mistralrs"])
def test_there_and_back_again_gives_the_mixture_as_it_was(to, scheme, alike, tmp_path):
    folder = saved(alike, tmp_path / "mixture", **scheme)
    there = weft.convert_mixture(folder, to, tmp_path / to, base="tiny/llama")
    back = weft.convert_mixture(there, "weft", tmp_path / "back", base=tiny_llama())
    assert torch.equal(logits(loaded(back)), logits(loaded(folder)))
    before, after = options_of(folder), options_of(back)
    if to == "mistralrs":  # which leaves dropout on, so that there must be none
        before["xlora_dropout_p"] = 0.0
    assert after == before
    for name in alike:
        for file in (CONFIG, TENSORS):
            assert (back / "experts" / name / file).read_bytes() == (folder / "experts" / name / file).read_bytes()


@pytest.mark.parametrize("to", ["peft", "xlora"])
def test_what_is_written_loads_with_the_same_logits(to, alike, tmp_path):
    folder = saved(alike, tmp_path / "mixture", xlora_depth=3, xlora_size=32)
    assert torch.equal(logits(loaded(weft.convert_mixture(folder, to, tmp_path / to))), logits(loaded(folder)))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_peft_loads_what_is_written_for_it(scheme, alike, tmp_path):
    folder = saved(alike, tmp_path / "mixture", **scheme)
    base = tiny_llama()
    base.config.use_cache = False
    theirs = quietly(peft.PeftModel.from_pretrained, base, str(weft.convert_mixture(folder, "peft", tmp_path / "peft")))
    assert type(theirs.base_model).__module__ == "peft.tuners.xlora.model"
    torch.testing.assert_close(logits(theirs.eval()), logits(loaded(folder)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_original_library_loads_what_is_written_for_it(scheme, llama_adapters, tmp_path):
    folder = saved(llama_adapters, tmp_path / "mixture", **scheme)
    there = weft.convert_mixture(folder, "xlora", tmp_path / "xlora")
    options = json.loads((there / "xlora_config.json").read_text())
    assert options["adapters"] == list(llama_adapters)
    gate = OriginalGate(options, len(llama_adapters), len(lora_layers(llama_adapters)[1]))
    gate.load_state_dict(load_file(there / "xlora_classifier.safetensors"))
    below = there / "adapters" if options["use_trainable_adapters"] else there
    adapters = {name: str(below / name) for name in options["adapters"]}
    torch.testing.assert_close(original_logits(gate, adapters, TOKENS), logits(loaded(folder)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("relu", [True, False], ids=["ReLU", "linear"])
def test_a_folder_of_the_original_becomes_one_of_wefts(relu, base_folder, base_adapters, tmp_path):
    gate = make_gate_of(base_adapters, base_folder, xlora_depth=3, enable_relu_and_dropout=relu)
    folder = write_original(tmp_path / "original", gate, base_adapters)
    new = weft.convert_mixture(folder, "weft", tmp_path / "weft", base=base_folder)
    expected = weft.from_pretrained(folder, base_folder)
    assert torch.equal(logits(weft.from_pretrained(new)), logits(expected))
    assert options_without_paths(weft.from_pretrained(new)) == options_without_paths(expected)


def make_gate_of(adapters, base_folder, **options):
    return make_gate(adapters, base_model_id=str(base_folder), **options)


def options_without_paths(model):
    return {k: v for k, v in model.xlora_config.to_dict().items() if k not in {"adapters", "format_version"}}


def test_a_folder_of_pefts_becomes_one_of_wefts(alike, base_folder, tmp_path):
    folder = saved(alike, tmp_path / "mixture")
    theirs = weft.convert_mixture(folder, "peft", tmp_path / "peft")
    moved = shutil.move(theirs, tmp_path / "moved")  # its paths are gone then, also for peft
    assert torch.equal(
        logits(loaded(weft.convert_mixture(moved, "weft", tmp_path / "back", base=base_folder))), logits(loaded(folder))
    )


def test_experts_get_new_names(llama_adapters, tmp_path):
    folder = saved(llama_adapters, tmp_path / "mixture", xlora_depth=2, xlora_size=32)
    numbers = dict(zip(llama_adapters, ("0", "1", "2"), strict=True))
    there = weft.convert_mixture(folder, "peft", tmp_path / "peft", rename=numbers)
    back = weft.convert_mixture(
        there, "weft", tmp_path / "back", base=tiny_llama(), rename={new: old for old, new in numbers.items()}
    )
    assert loaded(back).xlora_config.expert_names == list(llama_adapters)
    assert torch.equal(logits(loaded(back)), logits(loaded(folder)))


def test_the_base_models_weights_are_not_read(base_folder, base_adapters, tmp_path):
    folder = write_original(tmp_path / "original", make_gate_of(base_adapters, base_folder), base_adapters)
    only_config = tmp_path / "base"
    only_config.mkdir()
    shutil.copy(base_folder / "config.json", only_config)
    new = weft.convert_mixture(folder, "weft", tmp_path / "weft", base=only_config)
    again = weft.from_pretrained(new, base_folder)
    assert torch.equal(logits(again), logits(weft.from_pretrained(folder, base_folder)))


def test_mistralrs_gets_a_flat_folder_and_the_layers_numbers(alike, tmp_path):
    folder = saved(alike, tmp_path / "mixture", xlora_depth=3, xlora_size=32)
    flat = weft.convert_mixture(folder, "mistralrs", tmp_path / "flat", base="/models/tiny")
    assert folder_files(flat) == sorted(
        ["ordering.json", "xlora_config.json", "xlora_classifier.safetensors"]
        + [f"{name}_{file}" for name in alike for file in ("config.json", "model.safetensors")]
    )
    ordering = json.loads((flat / "ordering.json").read_text())
    assert ordering["order"] == ["0", "1"]
    assert list(ordering["layers"]) == loaded(folder).xlora_config.layer_names
    assert list(ordering["layers"].values()) == list(range(6))
    assert ordering["base_model_id"] == json.loads((flat / "xlora_config.json").read_text())["base_model_id"]
    gate = load_file(flat / "xlora_classifier.safetensors")
    assert {key.rpartition(".")[0] for key in gate} == {"inner.0", "inner.1", "last"}  # as its engine counts
    with pytest.raises(CheckpointError, match=r"is in mistral.rs's flat layout .*: read it with  weft convert"):
        loaded(flat)


def test_tokenizers_go_along_and_checkpoints_do_not(mixture, base_folder, tmp_path):
    folder = tmp_path / "mixture"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_folder / file, folder)
    (folder / "optimizer.pt").write_bytes(b"")
    (folder / "trainer_state.json").write_text("{}")
    new = weft.convert_mixture(mixture, "weft", tmp_path / "new")
    beside = {name for name in folder_files(new) if "/" not in name}
    assert beside == {CONFIG, TENSORS, MANIFEST, "tokenizer.json", "tokenizer_config.json"}


# ---------------------------------------------------------------------- what a layout cannot hold


def refused(folder, to, tmp_path, **options):
    """The reasons, a line each."""
    output = tmp_path / "refused"
    with pytest.raises(ConfigError, match=rf"cannot be written in the layout of {to}:\n") as error:
        weft.convert_mixture(folder, to, output, **options)
    assert not output.exists()
    return error.value.problems


@pytest.mark.parametrize("to", ["peft", "xlora", "mistralrs"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_layer": 1}, "gate_layer (1) is unknown to "),
        ({"scaling_pass_layers": 1}, "scaling_pass_layers (1) is unknown to "),
        ({"scaling_pass_layers": 1, "scaling_pass_rank": 2}, "scaling_pass_rank (2) is unknown to "),
    ],
    ids=str,
)
def test_other_schemes_are_refused(options, message, to, alike, tmp_path):
    folder = saved(alike, tmp_path / "mixture", **options)
    problems = refused(folder, to, tmp_path, base="tiny")
    assert len(problems) == len(options)
    assert problems[-1].startswith(message)


@pytest.mark.parametrize("to", ["peft", "xlora", "mistralrs"])
def test_dora_is_refused(to, alike, tmp_path):
    dora = {"0": alike["0"], "1": save_adapter(tiny_llama(), lora(use_dora=True), tmp_path / "dora", seed=2)}
    folder = saved(dora, tmp_path / "mixture", allow_dora=True)
    reasons = refused(folder, to, tmp_path, base="tiny")
    assert len(reasons) == 1
    assert reasons[0].startswith("experts ['1'] have use_dora, which ")


@pytest.mark.parametrize("to", ["peft", "xlora", "mistralrs"])
def test_heads_are_refused(to, tmp_path):
    base, _ = make_architecture("bert")
    config = lora(target_modules=["query"], task_type=None)
    adapters = {
        name: save_adapter(make_architecture("bert")[0], config, tmp_path / name, seed=1) for name in ("0", "1")
    }
    folder = saved(adapters, tmp_path / "mixture", base=base, heads=["cls.predictions.transform"])
    reasons = refused(folder, to, tmp_path, base="tiny")
    assert reasons[0].startswith("heads (['cls.predictions.transform']) is unknown to ")


def test_names_that_peft_refuses_are_refused(llama_adapters, tmp_path):
    folder = saved(llama_adapters, tmp_path / "mixture")
    assert refused(folder, "peft", tmp_path) == [
        "experts ['math', 'code', 'adapter_3'] must be named ['0', '1', '2'], in this order: peft ends in a KeyError "
        "with other names. Rename them: --rename math=0 code=1 adapter_3=2"
    ]


def test_a_backbone_that_peft_does_not_find_is_refused(tmp_path):
    base, targets = make_architecture("gpt2")
    config = lora(target_modules=targets[:1], fan_in_fan_out=True)
    adapters = {
        name: save_adapter(make_architecture("gpt2")[0], config, tmp_path / name, seed=1) for name in ("0", "1")
    }
    reasons = refused(saved(adapters, tmp_path / "mixture", base=base), "peft", tmp_path)
    assert len(reasons) == 1
    assert reasons[0].startswith("layers ['transformer.h.0.attn.c_attn', 'transformer.h.1.attn.c_attn'] are not below")


@pytest.mark.parametrize("to", ["xlora", "mistralrs"])
def test_softmax_over_the_kept_and_embeddings_are_refused(to, tmp_path):
    config = lora(target_modules=["embed_tokens", "q_proj"])
    adapters = {name: save_adapter(tiny_llama(), config, tmp_path / name, seed=1) for name in ("a", "b")}
    options = {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 1}
    reasons = refused(saved(adapters, tmp_path / "mixture", **options), to, tmp_path, base="tiny")
    assert reasons[0].startswith("layers ['model.embed_tokens'] are embeddings, whose experts ")
    assert reasons[1].startswith("enable_softmax_topk (True): ")


def test_all_that_mistralrs_cannot_hold_is_named_at_once(tmp_path):
    configs = {
        "one": lora(r=2, use_rslora=True, target_modules=["q_proj"]),
        "one_more": lora(r=4, rank_pattern={"up_proj": 3}, target_modules=["q_proj", "up_proj"]),
    }
    adapters = {name: save_adapter(tiny_llama(), config, tmp_path / name, seed=1) for name, config in configs.items()}
    assert refused(saved(adapters, tmp_path / "mixture"), "mistralrs", tmp_path) == [
        "r ({'one': 2, 'one_more': 4}) must be the same for all experts",
        "target_modules ({'one': ['q_proj'], 'one_more': ['q_proj', 'up_proj']}) must be the same for all experts",
        "expert 'one' has use_rslora, which mistral.rs does not read",
        "expert 'one_more' has rank_pattern, which mistral.rs does not read",
        "experts 'one' and 'one_more': mistral.rs finds an expert's files by its name, and the one is in the other. "
        "Rename them: --rename one=... one_more=...",
        "base is missing: give --base, the name or folder by which the engine will load the base model",
    ]


def test_a_gate_narrower_than_the_model_is_widened_for_mistralrs(alike, tmp_path):
    folder = saved(alike, tmp_path / "mixture", xlora_depth=3, xlora_size=16)
    flat = weft.convert_mixture(folder, "mistralrs", tmp_path / "flat", base="tiny")
    gate = load_file(flat / "xlora_classifier.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in gate.items() if name.startswith("inner")} == {
        **{"inner.0.weight": (32, 32), "inner.0.bias": (32,)},
        **{"inner.1.weight": (32, 32), "inner.1.bias": (32,)},
    }
    back = loaded(weft.convert_mixture(flat, "weft", tmp_path / "back", base=tiny_llama()))
    assert back.xlora_config.xlora_size == 32
    torch.testing.assert_close(logits(back), logits(loaded(folder)))


def test_a_gate_wider_than_the_model_is_refused_for_mistralrs(alike, tmp_path):
    reasons = refused(
        saved(alike, tmp_path / "mixture", xlora_depth=2, xlora_size=48), "mistralrs", tmp_path, base="tiny"
    )
    assert reasons == [
        "xlora_size (48) must be at most hidden_size (32) where xlora_depth (2) is above 1: mistral.rs takes the "
        "one for the other"
    ]


def test_layers_outside_of_the_decoders_and_patterns_are_refused_for_mistralrs(tmp_path):
    config = lora(target_modules=r"lm_head|.*\.q_proj")
    adapters = {name: save_adapter(tiny_llama(), config, tmp_path / name, seed=1) for name in ("a", "b")}
    reasons = refused(saved(adapters, tmp_path / "mixture"), "mistralrs", tmp_path, base="tiny")
    assert [reason.split(" (")[0].split(" are")[0] for reason in reasons] == ["target_modules", "layers ['lm_head']"]


# ---------------------------------------------------------------------- errors


def test_unknown_layout_is_named(alike, tmp_path):
    with pytest.raises(ConfigError, match=r"to \('gguf'\) must be one of weft, peft, xlora, mistralrs"):
        weft.convert_mixture(saved(alike, tmp_path / "mixture"), "gguf", tmp_path / "new")


def test_a_folder_that_holds_something_is_not_written_to(alike, tmp_path):
    folder = saved(alike, tmp_path / "mixture")
    with pytest.raises(
        ConfigError, match=r"output \(.*mixture\) exists already and holds .*: give a new or empty folder"
    ):
        weft.convert_mixture(folder, "peft", folder)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"2": "math"}, r"rename has \['2'\], which are no experts of this mixture: it has \['0', '1'\]"),
        ({"0": "1"}, r"rename \({'0': '1'}\) gives two experts one name"),
        ({"0": "default"}, r"rename \({'0': 'default'}\) has the name 'default', which is the mixture's own in peft"),
        ({"0": "__base__"}, r"adapters has the name '__base__', which stands for no expert in adapter_names"),
    ],
)
def test_names_that_cannot_be_given_are_named(rename, message, alike, tmp_path):
    with pytest.raises((CheckpointError, ConfigError), match=message):
        weft.convert_mixture(saved(alike, tmp_path / "mixture"), "weft", tmp_path / "new", rename=rename)
    assert not (tmp_path / "new").exists()


def test_a_gate_of_other_adapters_is_found(alike, llama_adapters, tmp_path):
    folder = weft.convert_mixture(saved(alike, tmp_path / "mixture"), "xlora", tmp_path / "xlora")
    others = {"0": llama_adapters["math"], "1": llama_adapters["adapter_3"]}
    with pytest.raises(CheckpointError, match=r"has 12 outputs, expected 16: 2 experts times 8 LoRA layers"):
        weft.convert_mixture(folder, "weft", tmp_path / "new", base=tiny_llama(), adapters=others)


def test_a_base_model_without_the_layers_is_named(alike, tmp_path):
    folder = weft.convert_mixture(saved(alike, tmp_path / "mixture"), "xlora", tmp_path / "xlora")
    with pytest.raises(CheckpointError, match=r"base \(GPT2LMHeadModel\) has no layers \['model.layers.0.mlp.up_proj'"):
        weft.convert_mixture(folder, "weft", tmp_path / "new", base=make_architecture("gpt2")[0])
    with pytest.raises(CheckpointError, match=r"base \(None\) must be given: the mixture does not name its base model"):
        weft.convert_mixture(folder, "weft", tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"base \(no/such\) cannot be loaded: .*Give its folder or Hub id"):
        weft.convert_mixture(folder, "weft", tmp_path / "new", base="no/such")


def test_damage_is_found_before_anything_is_written(alike, tmp_path):
    folder = saved(alike, tmp_path / "mixture")
    (folder / "experts/1" / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=rf"1/{TENSORS} is missing"):
        weft.convert_mixture(folder, "xlora", tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------- the command


def test_convert_by_command(mixture, base_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", mixture, "--to", "peft", "--rename", "math=0", "code=1"]) == 0
    assert (
        "saved to mixture-peft: load it with  peft.PeftModel.from_pretrained(base, 'mixture-peft')"
        in capsys.readouterr().out
    )
    assert main(["convert", "mixture-peft", "--to", "weft", "--output", "back", "--base", str(base_folder)]) == 0
    assert "try  weft generate back" in capsys.readouterr().out
    assert weft.from_pretrained("back").xlora_config.expert_names == ["0", "1"]
    assert main(["convert", mixture, "--to", "peft", "--output", "other"]) == 1
    assert "Rename them: --rename math=0 code=1" in capsys.readouterr().err
    assert main(["convert", mixture, "--rename", "math"]) == 1
    assert "rename has the entry 'math', expected OLD=NEW" in capsys.readouterr().err


def test_what_is_left_out_is_said(alike, tmp_path, capsys):
    folder = saved(alike, tmp_path / "mixture", balance_loss_weight=0.1, scalings_log_size=3)
    assert main(["convert", str(folder), "--to", "xlora", "--output", str(tmp_path / "new")]) == 0
    assert "left out, as xlora has no place for it" in (said := capsys.readouterr().out)
    assert said.rstrip().endswith("balance_loss_weight, scalings_log_size")


# ---------------------------------------------------------------------- hostile folders


def flat(adapters, tmp_path):
    """A folder in mistral.rs's layout."""
    return weft.convert_mixture(saved(adapters, tmp_path / "mixture"), "mistralrs", tmp_path / "flat", base="tiny/base")


def change_json(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


FLAT = {
    "a name that leads out": (
        "ordering.json",
        lambda values: values["order"].__setitem__(0, "../../escaped"),
        r"ordering.json cannot be read:\n  - adapters has the name '../../escaped': names are letters, digits",
    ),
    "an absolute name": (
        "ordering.json",
        lambda values: values["order"].__setitem__(0, "/tmp/x"),
        "has the name '/tmp/x'",
    ),
    "one name twice": (
        "ordering.json",
        lambda values: values.update(order=["0", "0"]),
        r"order \(\['0', '0'\]\) must have",
    ),
    "a name of another type": (
        "ordering.json",
        lambda values: values.update(order=[0, 1]),
        r"ordering.json: order \(\[0, 1\]\) must be a list of strings",
    ),
    "layers without an order": (
        "ordering.json",
        lambda values: values["layers"].update(dict.fromkeys(values["layers"], 0)),
        r"ordering.json: layers \(.*\) must number the LoRA layers from 0 to 5",
    ),
    "a layer without a name": (
        "ordering.json",
        lambda values: values["layers"].update({"": values["layers"].pop("model.layers.0.mlp.up_proj")}),
        r"ordering.json: layers \(.*\) must be names, but one is empty",
    ),
    "a layer's number is none": (
        "ordering.json",
        lambda values: values["layers"].update({"model.layers.0.mlp.up_proj": "first"}),
        r"layers: model.layers.0.mlp.up_proj \('first'\) must be a whole number",
    ),
    "other layers": (
        "ordering.json",
        lambda values: values["layers"].update({"x": values["layers"].pop("model.layers.0.mlp.up_proj")}),
        r"ordering.json names other layers than the experts adapt: \['x'\] are adapted by none, and \['model.layers.0",
    ),
    "options of another expert's": (
        "0_config.json",
        lambda values: values.update(r="four"),
        r"/flat/0_config.json cannot be read: r \('four'\) must be a whole number",
    ),
}


@pytest.mark.parametrize(("file", "change", "message"), FLAT.values(), ids=FLAT)
def test_a_hostile_flat_folder_is_refused_before_anything_is_written(
    file, change, message, alike, tmp_path, monkeypatch
):
    folder = flat(alike, tmp_path)
    change_json(folder / file, change)
    for part in ("config.json", "model.safetensors"):  # what a name that leads out would be copied from
        source = next(folder.glob(f"*_{part}"))
        (tmp_path / f"escaped_{part}").write_bytes(source.read_bytes())
    work = tmp_path / "temporary"
    work.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(work))
    before = folder_files(tmp_path)
    with pytest.raises((CheckpointError, AdapterError), match=message):
        weft.convert_mixture(folder, "weft", tmp_path / "new")
    assert folder_files(tmp_path) == before


@pytest.mark.parametrize("layout", ["xlora", "peft"])
@pytest.mark.parametrize("name", ["../escaped", "a/b", "", "..", "forward", "x" * 300])
def test_names_are_checked_where_they_are_read(name, layout, alike, tmp_path):
    folder = weft.convert_mixture(saved(alike, tmp_path / "mixture"), layout, tmp_path / layout)
    file = folder / ("xlora_config.json" if layout == "xlora" else CONFIG)
    change_json(file, lambda values: values.update(adapters=dict.fromkeys([name, "1"], "0")))
    with pytest.raises(ConfigError, match=rf"{file.name} cannot be read:\n  - adapters has the name "):
        weft.convert_mixture(folder, "weft", tmp_path / "new")


def test_what_a_link_leads_to_outside_is_not_copied(alike, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    folder = saved(alike, tmp_path / "mixture")
    for place in (folder, folder / "experts" / "0"):
        (place / "notes.txt").symlink_to(tmp_path / "secret.txt")
    written = weft.convert_mixture(folder, "weft", tmp_path / "new", rename={"1": "other"})
    dropped = weft.drop_expert(folder, "1", tmp_path / "dropped")
    assert not list(written.rglob("notes.txt"))
    assert not list(dropped.rglob("notes.txt"))


HOSTILE_SIZES = {
    "xlora_depth": (10**4, r"xlora_depth \(10000\) must be 2, as its linear layers are"),
    "xlora_size": (10**9, r"xlora_size \(1000000000\) must be 32, the width of its hidden layers"),
    "hidden_size": (10**9, r"hidden_size \(1000000000\) must be 32, the width that it reads"),
}


@pytest.mark.parametrize("layout", ["weft", "peft", "xlora", "mistralrs"])
@pytest.mark.parametrize(("option", "value", "message"), [(k, *v) for k, v in HOSTILE_SIZES.items()], ids=HOSTILE_SIZES)
def test_sizes_are_compared_with_what_is_stored(option, value, message, layout, alike, tmp_path):
    folder = saved(alike, tmp_path / "mixture", xlora_depth=2, xlora_size=32)
    if layout != "weft":
        folder = weft.convert_mixture(folder, layout, tmp_path / layout, base="tiny/base")
    file = folder / (CONFIG if layout in ("weft", "peft") else "xlora_config.json")
    change_json(file, lambda values: values.update({option: value}))
    with pytest.raises(CheckpointError, match=message):
        weft.convert_mixture(folder, "weft", tmp_path / "new", base=tiny_llama())


@pytest.mark.parametrize("value", [10**400, "2", [2], None, True])
def test_errors_of_saved_options_name_the_file(value, alike, tmp_path, without_type_checks):
    folder = saved(alike, tmp_path / "mixture")
    change_json(folder / CONFIG, lambda values: values.update(xlora_depth=value))
    with pytest.raises(ConfigError, match=rf"mixture/{CONFIG} cannot be read:\n  - xlora_depth \(.*\) must be a whole"):
        weft.from_pretrained(folder, tiny_llama())
