"""One expert more or less: what the gate knows of the others stays, and nothing is ever half-written."""

import shutil

import peft
import pytest
import torch

import weft
from models import folder_files, is_expert, lora, save_adapter, tiny_llama
from weft.cli import main
from weft.errors import AdapterError, CheckpointError, ConfigError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = torch.arange(1, 19).view(2, 9)
SCHEMES = {
    "layerwise": {},
    "shared": {"layerwise_scalings": False},
    "deep": {"xlora_depth": 3, "xlora_size": 16},
    "top-k": {"top_k_lora": 1},
    "gate inside": {"gate_layer": 1},
    "gate inside, shared": {"gate_layer": 1, "layerwise_scalings": False},
    "own LoRA": {"scaling_pass_layers": 1, "scaling_pass_rank": 2},
    "experts in the scaling pass": {"scaling_pass_value": 0.3},
    "trained experts": {"use_trainable_adapters": True},
}


def saved(adapters, folder, **options):
    """A mixture with a gate that makes a difference, in a folder."""
    torch.manual_seed(3)
    model = weft.from_adapters(tiny_llama(), adapters, **{"layerwise_scalings": True, **options})
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    return folder


def loaded(folder, **options):
    return weft.from_pretrained(folder, tiny_llama(), **options)


def shares(model):
    """{layer: the gate's scalings [batch, seq, expert]} of the layers that follow it."""
    with torch.no_grad():
        model(input_ids=TOKENS)
    layers = zip(model.xlora_config.layer_names, model.get_latest_scalings().unbind(2), strict=True)
    return dict(list(layers)[-model.internal_xlora_classifier.num_layers :])


def contents(folder):
    """Every file's bytes."""
    return {name: (folder / name).read_bytes() for name in folder_files(folder)}


@pytest.fixture(scope="module")
def two(llama_adapters):
    return {name: llama_adapters[name] for name in ("math", "code")}


@pytest.fixture(scope="module")
def third(llama_adapters):
    return llama_adapters["adapter_3"]  # also adapts down_proj, which no other does, and not v_proj


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_adding_and_dropping_the_same_expert_gives_the_mixture_as_it_was(scheme, two, third, tmp_path):
    before = saved(two, tmp_path / "mixture", **scheme)
    more = weft.add_expert(before, "new", third, base=tiny_llama())
    assert more == tmp_path / "mixture-with-new"
    assert loaded(more).xlora_config.expert_names == ["math", "code", "new"]
    again = weft.drop_expert(more, "new", tmp_path / "again")
    one, other = loaded(before), loaded(again)
    assert one.xlora_config.to_dict() | {"adapters": None} == other.xlora_config.to_dict() | {"adapters": None}
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    with torch.no_grad():
        assert torch.equal(one(input_ids=TOKENS).logits, other(input_ids=TOKENS).logits)


@pytest.mark.parametrize(
    "scheme",
    [SCHEMES["layerwise"], SCHEMES["shared"], SCHEMES["deep"], {"gate_layer": 1, "scaling_pass_value": 0.0}],
    ids=str,
)
def test_a_new_expert_has_the_mean_logit_and_the_others_keep_their_ratios(scheme, two, third, tmp_path):
    folder = saved(two, tmp_path / "mixture", **scheme)
    new = shares(loaded(weft.add_expert(folder, "new", third, base=tiny_llama())))
    for layer, old in shares(loaded(folder)).items():
        torch.testing.assert_close(new[layer][..., :2] / new[layer][..., :2].sum(-1, keepdim=True), old)
        mean = old.log().mean(-1).exp()
        torch.testing.assert_close(new[layer][..., 2], mean / (1 + mean))
        assert (new[layer][..., 2] <= 1 / 3 + 1e-6).all()
    assert all(share.shape == (2, 9, 3) for share in new.values())


def test_a_layer_of_the_new_expert_alone_starts_with_the_mean_logits_of_all_layers(two, third, tmp_path):
    folder = saved(two, tmp_path / "mixture")
    old = torch.stack([share.log() for share in shares(loaded(folder)).values()])  # up to a number for each layer
    new = shares(loaded(weft.add_expert(folder, "new", third, base=tiny_llama())))
    added = new.keys() - shares(loaded(folder)).keys()
    assert added == {f"model.layers.{number}.mlp.down_proj" for number in range(2)}
    for layer in added:
        mean = torch.softmax(old.mean(0), -1)
        torch.testing.assert_close(new[layer][..., :2] / new[layer][..., :2].sum(-1, keepdim=True), mean)


def test_without_a_softmax_a_new_expert_starts_at_0_and_changes_nothing(two, third, tmp_path):
    folder = saved(two, tmp_path / "mixture", enable_softmax=False)
    more = loaded(weft.add_expert(folder, "new", third, base=tiny_llama()), is_trainable=True)
    torch.testing.assert_close(more(input_ids=TOKENS).logits, loaded(folder)(input_ids=TOKENS).logits)
    more(input_ids=TOKENS, labels=TOKENS).loss.backward()
    head = more.internal_xlora_classifier.layers[-1].weight
    assert head.grad.unflatten(0, (-1, 3))[:, 2].abs().sum() > 0


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if "scaling pass" not in scheme])
@pytest.mark.parametrize("name", ["math", "adapter_3"])
def test_a_dropped_expert_is_one_whose_logits_are_minus_infinity(scheme, name, llama_adapters, tmp_path):
    folder = saved(llama_adapters, tmp_path / "mixture", **SCHEMES[scheme])
    whole, less = loaded(folder), loaded(weft.drop_expert(folder, name))
    assert less.xlora_config.expert_names == [other for other in llama_adapters if other != name]
    column = torch.tensor([list(llama_adapters).index(name)])
    if whole.xlora_config.gate_layer is not None:  # below, without a gate, nothing can follow from its logits
        less.set_scaling_pass_value(0.0)
        whole.set_scaling_pass_value(0.0)
    whole.internal_xlora_classifier.layers[-1].register_forward_hook(
        lambda module, inputs, logits: logits.unflatten(-1, (-1, 3)).index_fill(-1, column, -torch.inf).flatten(-2)
    )
    with torch.no_grad():
        torch.testing.assert_close(less(input_ids=TOKENS).logits, whole(input_ids=TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_layers_that_only_the_dropped_expert_adapted_leave_the_mixture(llama_adapters, tmp_path):
    less = loaded(weft.drop_expert(saved(llama_adapters, tmp_path / "mixture"), "adapter_3"))
    fresh = weft.from_adapters(tiny_llama(), {name: llama_adapters[name] for name in ("math", "code")})
    assert less.xlora_config.layer_names == fresh.xlora_config.layer_names
    assert not any("down_proj" in layer for layer in less.xlora_config.layer_names)


@pytest.mark.parametrize(("value", "after"), [(0.0, 0.0), (0.7, 0.7), (1 / 2, 1 / 3)])
def test_an_even_share_in_the_scaling_pass_stays_one(value, after, two, third, tmp_path):
    folder = saved(two, tmp_path / "mixture", scaling_pass_value=value)
    more = weft.add_expert(folder, "new", third, base=tiny_llama())
    assert weft.XLoraConfig.from_pretrained(more).scaling_pass_value == after
    again = weft.drop_expert(more, "new", tmp_path / "again")
    assert weft.XLoraConfig.from_pretrained(again).scaling_pass_value == value


def test_the_base_model_is_as_it_was(two, third, tmp_path):
    base = tiny_llama()
    before = base(input_ids=TOKENS).logits
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    weft.add_expert(saved(two, tmp_path / "mixture"), "new", third, base=base)
    assert torch.equal(base(input_ids=TOKENS).logits, before)
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == flags
    assert not any(is_expert(name) for name in flags)


def test_the_others_files_are_copied_and_a_trainings_state_is_not(two, third, tmp_path):
    folder = saved(two, tmp_path / "mixture")
    (folder / "tokenizer.json").write_text("{}")
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", "checkpoints/x"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    before = contents(folder)
    more = weft.add_expert(folder, "new", third, base=tiny_llama())
    less = weft.drop_expert(more, "math", tmp_path / "less")
    assert contents(folder) == before
    assert (more / "tokenizer.json").exists()
    for output, names in ((more, ("math", "code", "new")), (less, ("code", "new"))):
        assert folder_files(output) == sorted(
            ["README.md", CONFIG, TENSORS, "tokenizer.json", "weft_manifest.json"]
            + [f"experts/{name}/{file}" for name in names for file in (CONFIG, TENSORS)]
        )
    for file in (CONFIG, TENSORS):
        assert (less / f"experts/code/{file}").read_bytes() == before[f"experts/code/{file}"]


def test_in_place_the_rest_of_the_folder_stays(two, third, tmp_path):
    folder = saved(two, tmp_path / "mixture")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/x").write_text("x")
    expected = contents(weft.add_expert(folder, "new", third, tmp_path / "elsewhere", base=tiny_llama()))
    assert weft.add_expert(folder, "new", third, folder, base=tiny_llama()) == folder
    assert contents(folder) == {**expected, "checkpoints/x": b"x"}
    link = tmp_path / "link"
    link.symlink_to(folder)
    weft.drop_expert(link, "math", link)
    assert not (folder / "experts/math").exists()
    assert link.is_symlink()
    loaded(folder)


def test_the_mixture_and_the_adapter_may_be_on_the_hub(hub, two, third, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(two, hub / "user" / "mixture")
    shutil.copytree(third, hub / "user" / "new")
    more = weft.add_expert("user/mixture", "new", "user/new", base=tiny_llama())
    assert str(more) == "mixture-with-new"
    expected = weft.add_expert(hub / "user/mixture", "new", third, tmp_path / "other", base=tiny_llama())
    with torch.no_grad():
        assert torch.equal(loaded(more)(input_ids=TOKENS).logits, loaded(expected)(input_ids=TOKENS).logits)


# ---------------------------------------------------------------------- what cannot be


@pytest.fixture
def kept(two, tmp_path):
    """A mixture that a failed change must leave as it is, with nothing beside it."""
    folder = saved(two, tmp_path / "at" / "mixture")
    before = contents(folder)
    yield folder
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["mixture"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("math", r"name \('math'\) must not be one of the mixture's experts: it has \['math', 'code'\]"),
        ("Math", r"adapters \(\['math', 'code', 'Math'\]\) must have names that differ in more than upper and lower"),
        ("a/b", "adapters has the name 'a/b': names are letters"),
        ("default", "adapters has the name 'default', which is the name of the mixture itself"),
    ],
)
def test_names_that_cannot_be_are_refused(name, message, kept, third):
    with pytest.raises(ConfigError, match=message):
        weft.add_expert(kept, name, third, base=tiny_llama())


def test_an_adapter_of_another_model_is_refused(kept, tmp_path):
    other = save_adapter(tiny_llama(hidden_size=16), lora(), tmp_path / "other", seed=1)
    base = tiny_llama()
    with pytest.raises(AdapterError, match=r"adapter 'new' .*(.*\n)*.*has shape \[4, 16\], expected \[4, 32\]"):
        weft.add_expert(kept, "new", other, base=base)
    assert not any(is_expert(name) for name, _ in base.named_parameters())
    with pytest.raises(AdapterError, match=r"adapter 'new' \(/nowhere\) is neither a folder here nor a Hub id"):
        weft.add_expert(kept, "new", "/nowhere", base=tiny_llama())
    shutil.rmtree(tmp_path / "other")


def test_dropping_says_what_cannot_be_dropped(kept, two, tmp_path):
    with pytest.raises(ConfigError, match=r"name \('law'\) must be one of the mixture's experts \['math', 'code'\]"):
        weft.drop_expert(kept, "law")
    top_2 = saved(two, tmp_path / "top-2", top_k_lora=2)
    with pytest.raises(
        ConfigError,
        match=r"top_k_lora \(2\) must be at most the number of experts that are left \(1\): lower it first, "
        r"with model.set_topk_lora\(1\)",
    ):
        weft.drop_expert(top_2, "math")
    one = saved({"math": two["math"]}, tmp_path / "one")
    with pytest.raises(ConfigError, match=r"name \('math'\) is the mixture's only expert, which cannot be dropped"):
        weft.drop_expert(one, "math")


@pytest.mark.parametrize("layerwise", [True, False])
def test_a_gate_inside_needs_a_layer_that_follows_it(layerwise, two, tmp_path):
    below = save_adapter(tiny_llama(), lora(layers_to_transform=[0]), tmp_path / "below", seed=1)
    adapters = {"math": two["math"], "below": below}
    folder = saved(adapters, tmp_path / "mixture", gate_layer=1, layerwise_scalings=layerwise)
    with pytest.raises(ConfigError, match=r"name \('math'\) is the only expert with layers behind gate_layer \(1\)"):
        weft.drop_expert(folder, "math")
    assert loaded(weft.drop_expert(folder, "below")).xlora_config.expert_names == ["math"]


def test_a_folder_that_holds_something_else_is_not_touched(kept, third, tmp_path):
    output = tmp_path / "full"
    output.mkdir()
    (output / "thesis.txt").write_text("years")
    with pytest.raises(
        ConfigError, match=r"output \(.*/full\) exists already and holds thesis.txt: .*, or the mixture's"
    ):
        weft.add_expert(kept, "new", third, output, base=tiny_llama())
    with pytest.raises(
        ConfigError, match=r"output \(.*/thesis.txt\) is a file, expected a folder: .*, or the mixture's"
    ):
        weft.drop_expert(kept, "math", output / "thesis.txt")
    assert contents(output) == {"thesis.txt": b"years"}


def test_a_checkpoint_of_a_training_is_not_changed_in_place(two, tmp_path):
    folder = saved(two, tmp_path / "checkpoint-4")
    (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"output \(.*/checkpoint-4\) is a checkpoint of a training, which could not"):
        weft.drop_expert(folder, "math", folder)


def test_a_damaged_mixture_or_one_of_pefts_is_refused(two, third, tmp_path):
    folder = saved(two, tmp_path / "mixture")
    (folder / "experts/code" / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=f"code/{TENSORS} is missing"):
        weft.drop_expert(folder, "math")
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=two)
    config.save_pretrained(str(tmp_path / "peft"))
    with pytest.raises(CheckpointError, match=r"peft was not saved by weft, so its experts lie elsewhere: save"):
        weft.add_expert(tmp_path / "peft", "new", third)


# ---------------------------------------------------------------------- the command line


def test_the_commands_add_and_drop(mixture, base_adapters, tmp_path, capsys):
    assert main(["add-expert", mixture, f"law={base_adapters['math']}"]) == 0
    assert f"saved to {mixture}-with-law: 'law' starts as an average expert" in capsys.readouterr().out
    assert main(["generate", f"{mixture}-with-law", "--prompt", "the", "--max-new-tokens", "2"]) == 0
    output = str(tmp_path / "less")
    assert main(["drop-expert", f"{mixture}-with-law", "math", "--output", output]) == 0
    assert weft.from_pretrained(output).xlora_config.expert_names == ["code", "law"]
    capsys.readouterr()
    assert main(["add-expert", mixture, "law"]) == 1
    assert "expert ('law') must be name=FOLDER or name=HUB_ID" in capsys.readouterr().err
    assert main(["drop-expert", mixture, "law"]) == 1
    assert "name ('law') must be one of the mixture's experts ['math', 'code']" in capsys.readouterr().err
