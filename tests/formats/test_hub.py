"""A mixture goes to the Hub and comes back; its card says what it is. The Hub is a stand-in on this machine."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml

import weft
from models import folder_files, lora, quietly, save_adapter, tiny_llama
from weft.cli import main
from weft.errors import CheckpointError, ConfigError, HubError
from weft.formats.publication import is_local

TOKENS = torch.arange(1, 19).view(2, 9)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BASE = "tiny/llama"


@pytest.fixture
def licensed(llama_adapters, tmp_path):
    """Two adapters, one with a model card that declares a licence: {name: folder}."""
    adapters = {name: shutil.copytree(llama_adapters[name], tmp_path / "adapters" / name) for name in ("math", "code")}
    (adapters["math"] / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Math\n")
    return {name: str(path) for name, path in adapters.items()}


@pytest.fixture
def folder(licensed, tmp_path):
    """A saved mixture."""
    model = weft.from_adapters(tiny_llama(), licensed, layerwise_scalings=True)
    quietly(model.save_pretrained, tmp_path / "mixture")
    return tmp_path / "mixture"


@torch.no_grad()
def logits(folder):
    return weft.from_pretrained(folder, tiny_llama())(TOKENS).logits


def metadata(card):
    return yaml.safe_load(card.read_text().split("---")[1])


# ---------------------------------------------------------------------- there and back


def test_pushed_and_pulled_it_is_the_same_mixture(hub, folder, tmp_path):
    address = weft.push(folder, "user/mixture", private=True, base=BASE, license="apache-2.0")
    assert "/user/mixture/commit/" in address
    wanted = json.loads((hub / "user" / "visibility").read_text())
    assert wanted.get("visibility") == "private" or wanted["private"]  # of older clients
    pulled = weft.pull("user/mixture", tmp_path / "pulled")
    assert torch.equal(logits(pulled), logits(folder))
    assert folder_files(pulled) == folder_files(folder)
    assert torch.equal(logits("user/mixture"), logits(folder))


def test_the_base_models_id_goes_up_and_the_folder_here_stays_as_it_is(hub, folder):
    before = {name: (folder / name).read_bytes() for name in folder_files(folder)}
    weft.push(folder, "user/mixture", base=BASE)
    config = json.loads((hub / "user/mixture" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == BASE
    assert {name: (folder / name).read_bytes() for name in folder_files(folder)} == before


def test_checkpoints_and_pickles_stay_here(hub, folder):
    (folder / "checkpoints/checkpoint-1").mkdir(parents=True)
    (folder / "checkpoints/checkpoint-1/model.safetensors").write_bytes(b"")
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json"):
        (folder / name).write_bytes(b"")
    for name in ("tokenizer.json", "LICENSE"):
        (folder / name).write_text("{}")
    (folder / "eval.json").write_text('{"perplexity": {"base": {"math": 9.5, "code": null}}}')
    weft.push(folder, "user/mixture")
    beside = {name for name in folder_files(hub / "user/mixture") if "/" not in name}
    assert beside == {"README.md", CONFIG, TENSORS, "weft_manifest.json", "tokenizer.json", "LICENSE", "eval.json"}


def test_push_and_pull_by_command(hub, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path / "adapters")
    assert main(["push", str(folder), "user/mixture", "--base", BASE, "--license", "mit", "--private"]) == 0
    assert "pushed: http" in capsys.readouterr().out
    assert main(["pull", "user/mixture"]) == 0
    assert "saved to mixture: try  weft generate mixture" in capsys.readouterr().out
    assert torch.equal(logits("mixture"), logits(folder))
    assert main(["push", str(folder), "mixture"]) == 1
    assert "weft push: error: repo_id ('mixture') must be user/name" in capsys.readouterr().err


# ---------------------------------------------------------------------- what cannot go


def test_without_a_token_nothing_is_sent(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(HubError, match=r"repo_id \(user/new\) cannot be written without a token: .*hf auth login"):
        weft.push(folder, "user/new")
    assert not (hub / "user" / "new").exists()


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_wrong", "user/new", r"repo_id \(user/new\) cannot be written: .*hf auth login"),
        (None, "others/new", r"repo_id \(others/new\) cannot be written: the token .*may not do that \(403\)"),
    ],
)
def test_a_token_without_the_right_is_named(token, repo_id, message, hub, folder, monkeypatch):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=message):
        weft.push(folder, repo_id)


def test_offline_is_named(hub, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"cannot be written: HF_HUB_OFFLINE is set: unset it"):
        weft.push(folder, "user/mixture")
    with pytest.raises(HubError, match=r"cannot be read: HF_HUB_OFFLINE is set: unset it"):
        weft.pull("user/mixture", tmp_path / "pulled")


def test_a_hub_out_of_reach_is_named(hub, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for call in (lambda: weft.push(folder, "user/mixture"), lambda: weft.pull("user/mixture", tmp_path / "pulled")):
        with pytest.raises(HubError, match="the Hub is not in reach"):
            call()


def test_a_repository_that_is_not_there_is_named(hub, tmp_path):
    with pytest.raises(HubError, match=r"repo_id \(user/none\) cannot be read: there is no such repository, or it is"):
        weft.pull("user/none", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_repository_that_is_no_mixture_leaves_nothing(hub, folder, tmp_path):
    shutil.copytree(folder / "experts" / "math", hub / "user" / "math")
    with pytest.raises(CheckpointError, match="is of type LORA, expected XLORA"):
        weft.pull("user/math", tmp_path / "pulled")
    weft.push(folder, "user/mixture")
    (hub / "user/mixture/experts/math" / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=f"math/{TENSORS} is missing"):
        weft.pull("user/mixture", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_damaged_folder_is_not_pushed(hub, folder):
    (folder / "experts/code" / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=f"code/{TENSORS} is missing"):
        weft.push(folder, "user/mixture")
    assert not (hub / "user/mixture").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a b/c", {}), r"repo_id \('a b/c'\) must be user/name"),
        (("user/new", {"base": "/models/llama"}), r"base \('/models/llama'\) must be a Hub id"),
    ],
)
def test_names_that_cannot_be_are_named(arguments, message, folder):
    with pytest.raises(ConfigError, match=message):
        weft.push(folder, arguments[0], **arguments[1])


def test_what_cannot_be_pushed_or_pulled_to_is_named(hub, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"folder \(no-such\) must be a saved mixture's folder here"):
        weft.push("no-such", "user/mixture")
    with pytest.raises(
        ConfigError, match=r"output \(.*mixture\) exists already and holds .*: give a new or empty folder"
    ):
        weft.pull("user/mixture", folder)


# ---------------------------------------------------------------------- what is sent, and what never


def sent(hub):
    """All that is in the repository, as text."""
    files = [path for path in (hub / "user/mixture").rglob("*") if path.is_file()]
    return {
        path.relative_to(hub / "user/mixture").as_posix(): path.read_bytes().decode(errors="replace") for path in files
    }


def test_no_path_of_this_machine_is_sent(hub, mixture, base_folder, tmp_path):
    expert = Path(mixture, "experts/math/README.md")
    expert.write_text(f"---\nlicense: mit\nbase_model: {base_folder}\n---\n# Math\n")
    assert str(base_folder) in Path(mixture, CONFIG).read_text()
    assert str(base_folder) in Path(mixture, "experts/math", CONFIG).read_text()
    assert json.loads(Path(mixture, "weft_manifest.json").read_text())["base_model"].startswith("../")
    for base in (BASE, None):
        weft.push(mixture, "user/mixture", base=base)
        assert "base_model" not in json.loads(sent(hub)["weft_manifest.json"])
        for name, text in sent(hub).items():
            assert str(tmp_path) not in text, name
            assert str(base_folder) not in text, name
        for name in (CONFIG, f"experts/math/{CONFIG}", f"experts/code/{CONFIG}"):
            assert json.loads(sent(hub)[name])["base_model_name_or_path"] == base
        pulled = weft.pull("user/mixture", tmp_path / f"pulled-{base is None}")  # whose manifest verifies
        model = weft.from_pretrained(pulled, str(base_folder))
        expected = weft.from_pretrained(mixture)(TOKENS).logits
        assert torch.equal(model(TOKENS).logits, expected)


def test_what_lies_beside_the_mixture_is_not_sent(hub, folder):
    for name in ("notes.txt", "secrets.json", "diary.md", "train.jsonl", "weft_expert.json", "id_rsa", "run.py"):
        (folder / name).write_text("{}")
    (folder / "experts/math/weft_expert.json").write_text("{}")
    (folder / "experts/notes.txt").write_text("")
    (folder / "eval.json").write_text('{"my": "own"}')  # no table
    (folder / "link.txt").symlink_to("/etc/passwd")
    weft.push(folder, "user/mixture")
    assert set(sent(hub)) == {
        *("README.md", CONFIG, TENSORS, "weft_manifest.json", "experts/math/README.md"),
        *(f"experts/{name}/{file}" for name in ("math", "code") for file in (CONFIG, TENSORS)),
    }


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "tokenizer.json", TENSORS, "experts/math", "experts"])
def test_a_link_in_the_place_of_a_file_is_an_error(hub, folder, name, tmp_path):
    target = folder / name
    if target.exists():
        shutil.move(target, tmp_path / "elsewhere")
    else:
        (tmp_path / "elsewhere").write_text("{}")
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"is a link, which is not followed to the Hub"):
        weft.push(folder, "user/mixture")
    assert not (hub / "user/mixture").exists()


def test_a_card_with_a_path_of_this_machine_is_an_error(hub, folder):
    (folder / "README.md").write_text(f"# Mine\n\nTrained in {folder}/runs.\n")
    with pytest.raises(ConfigError, match=r"has files with paths of this machine.*\n  - README.md: .*mixture"):
        weft.push(folder, "user/mixture")
    assert not (hub / "user/mixture").exists()


def test_a_dry_run_lists_the_files_and_sends_nothing(folder, mixture, base_folder, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["push", mixture, "user/mixture", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("would be sent to user/mixture:\n")
    names = [line.split()[1] for line in shown.splitlines()[1:] if line.startswith(" ")]
    assert {"README.md", CONFIG, TENSORS, "weft_manifest.json", f"experts/math/{TENSORS}"} <= set(names)
    assert f"base model {base_folder} is a folder here: it is left out; --base HUB_ID names it" in shown
    listing = weft.push(mixture, "user/mixture", base=BASE, dry_run=True)
    assert f"base model {base_folder} is a folder here: {BASE} stands in its place" in listing


@pytest.mark.parametrize(
    ("name", "local"),
    [("org/model", False), ("gpt2", False), ("/models/x", True), ("./x", True), ("~/x", True), ("a/b/c", True)],
)
def test_which_base_models_are_folders(name, local):
    assert is_local(name) is local


# ---------------------------------------------------------------------- the card


def test_the_card_says_what_the_mixture_is(folder, tmp_path):
    (folder / "eval.json").write_text(
        json.dumps({"perplexity": {"base": {"a|b": 9.5}, "weft": {"a|b": 8.25, "<i>": 7}}, "sequences": {"a|b": 3}})
    )
    card = weft.write_card(folder, base=BASE, license="mit", name="user/mixture")
    text = card.read_text()
    assert metadata(card) == {
        "base_model": BASE,
        "library_name": "weft",
        "license": "mit",
        "tags": ["weft", "x-lora", "lora", "mixture-of-experts"],
        "pipeline_tag": "text-generation",
    }
    assert "# user/mixture\n" in text
    assert "| base: `tiny/llama` |  |  | not declared |" in text
    assert "| `math` | 4 | q_proj, up_proj, v_proj | cc-by-4.0 |" in text
    assert "| `code` | 4 | q_proj, up_proj, v_proj | not declared |" in text
    assert "396 parameters in 1 linear layers; weights for each of 6 LoRA layers, each token takes all experts" in text
    assert "| perplexity | a\\|b | &lt;i> |\n| --- | ---: | ---: |\n| base | 9.50 |  |\n| weft | 8.25 | 7.00 |" in text
    assert 'weft.from_pretrained("user/mixture", base="tiny/llama")' in text  # the mixture itself names no base model


def test_the_picture_of_the_gate_is_in_the_card_and_goes_with_it(hub, mixture):
    mixture = Path(mixture)
    assert "![" not in weft.write_card(mixture).read_text()
    assert main(["inspect", str(mixture), "--text", "a b", "--figure", str(mixture / "gate.png")]) == 0
    weft.push(mixture, "user/mixture")
    assert "as `weft inspect` drew them](gate.png)" in (hub / "user/mixture/README.md").read_text()
    assert (hub / "user/mixture/gate.png").read_bytes() == (mixture / "gate.png").read_bytes()


def test_the_code_in_the_card_loads_the_mixture(hub, mixture):
    weft.push(mixture, "user/mixture")
    text = (hub / "user/mixture/README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace('base="..."', f"base={_base(mixture)!r}")
    names: dict = {}
    exec(code, names)
    assert names["model"].xlora_config.expert_names == ["math", "code"]


def _base(folder):
    return json.loads(Path(folder, CONFIG).read_text())["base_model_name_or_path"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"top_k_lora": 1, "layerwise_scalings": False},
            "weights for all LoRA layers, each token keeps 1. It reads the base model's last hidden state",
        ),
        ({"scaling_pass_layers": 1}, "It reads what leaves the first 1 decoder layers"),
        (
            {"scaling_pass_layers": 1, "scaling_pass_rank": 2},
            "first 1 decoder layers (a short scaling pass) with a LoRA of the gate's own in them, of rank 2.",
        ),
        ({"gate_layer": 1}, "It reads what enters decoder layer 1 (one pass in all)"),
    ],
    ids=str,
)
def test_the_card_says_how_the_gate_works(options, sentence, licensed, tmp_path):
    model = weft.from_adapters(tiny_llama(), licensed, **options)
    quietly(model.save_pretrained, tmp_path / "mixture")
    assert sentence in weft.write_card(tmp_path / "mixture").read_text()


def test_the_earlier_spelling_of_license_is_taken(folder):
    with pytest.warns(FutureWarning, match="licence is called license now"):
        card = weft.write_card(folder, licence="mit")
    assert metadata(card)["license"] == "mit"
    with pytest.warns(FutureWarning, match="licence is called license now"):
        assert "README.md" in weft.push(folder, "user/mixture", licence="mit", dry_run=True)


def test_licences_stay_with_the_experts_wherever_they_go(folder, licensed, tmp_path):
    assert (folder / "experts/math/README.md").read_text() == Path(licensed["math"], "README.md").read_text()
    assert not (folder / "experts/code/README.md").exists()  # peft's blank form declares nothing
    quietly(weft.from_pretrained(folder, tiny_llama()).save_pretrained, tmp_path / "again")
    more = weft.add_expert(tmp_path / "again", "new", licensed["math"], tmp_path / "more", base=tiny_llama())
    converted = weft.convert_mixture(more, "weft", tmp_path / "converted")
    assert "| `new` | 4 | q_proj, up_proj, v_proj | cc-by-4.0 |" in weft.write_card(converted).read_text()
    assert "| `math` | 4 | q_proj, up_proj, v_proj | cc-by-4.0 |" in weft.write_card(converted).read_text()


@pytest.mark.parametrize(
    ("front", "shown"),
    [
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license: other\nlicense_name: weird|one", "weird\\|one"),
        ("license: other", "other"),
        ("tags: [x]", "not declared"),
        ("license: [", "not declared"),
    ],
    ids=str,
)
def test_licences_are_shown_as_declared(front, shown, folder):
    (folder / "experts/code/README.md").write_text(f"---\n{front}\n---\n")
    assert f"| `code` | 4 | q_proj, up_proj, v_proj | {shown} |" in weft.write_card(folder).read_text()


def test_the_base_models_licence_is_read_from_its_folder_or_the_hub(hub, mixture, base_folder, tmp_path):
    (hub / "tiny/llama").mkdir(parents=True)
    (hub / "tiny/llama/README.md").write_text("---\nlicense: gemma\n---\n")
    assert "| base: `tiny/llama` |  |  | gemma |" in weft.write_card(mixture, base=BASE).read_text()
    copy = shutil.copytree(base_folder, tmp_path / "base")
    (copy / "README.md").write_text("---\nlicense: llama3\n---\n")
    card = weft.write_card(mixture, base=str(copy))
    assert "| base: `base` |  |  | llama3 |" in card.read_text()
    assert "base_model" not in metadata(card)  # nobody else has that folder


def test_a_card_that_somebody_wrote_stays(hub, folder, capsys):
    (folder / "README.md").write_text("# Mine\n")
    weft.push(folder, "user/mixture")
    assert (hub / "user/mixture/README.md").read_text() == "# Mine\n"
    assert main(["card", str(folder)]) == 1
    assert "has a README.md that somebody wrote: --overwrite replaces it" in capsys.readouterr().err
    assert main(["card", str(folder), "--overwrite"]) == 0
    assert main(["card", str(folder)]) == 0  # weft's own is written anew
    assert "# mixture\n" in (folder / "README.md").read_text()


def test_an_evaluation_that_is_given_must_hold_a_table(folder, tmp_path):
    file = tmp_path / "table.json"
    with pytest.raises(CheckpointError, match=r"table.json is missing"):
        weft.write_card(folder, evaluation=file)
    file.write_text('{"perplexity": {}}')
    with pytest.raises(CheckpointError, match=r"table.json holds no table of rows and data sets"):
        weft.write_card(folder, evaluation=file)


def test_a_card_needs_a_folder_of_wefts(llama_adapters, tmp_path):
    adapters = {"0": save_adapter(tiny_llama(), lora(), tmp_path / "0", 1)}
    quietly(weft.from_adapters(tiny_llama(), adapters).save_pretrained, tmp_path / "mixture")
    theirs = weft.convert_mixture(tmp_path / "mixture", "peft", tmp_path / "peft")
    with pytest.raises(CheckpointError, match=r"peft was not saved by weft, .*write it anew, with  weft convert"):
        weft.write_card(theirs)
