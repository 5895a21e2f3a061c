"""A mixture finds its base model again: moved with it, moved alone, copied, and from any directory."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers

import weft
from models import quietly
from weft.checkpoint.base_place import FROM_HERE, is_path, path_from
from weft.cli import main
from weft.errors import CheckpointError
from weft.model.build import base_name
from weft.options import TrainOptions
from weft.train.gate import train

CONFIG, MANIFEST = "adapter_config.json", "weft_manifest.json"
TOKENS = torch.arange(1, 10).view(1, -1)


@pytest.fixture
def project(base_folder, base_adapters, tmp_path, monkeypatch):
    """A folder with my-model and my-mixture, made there with relative paths; the tests run elsewhere."""
    root = tmp_path / "project"
    shutil.copytree(base_folder, root / "my-model")
    for name, folder in base_adapters.items():
        shutil.copytree(folder, root / "adapters" / name)
        change_json(root / "adapters" / name / CONFIG, base_model_name_or_path="my-model")
    monkeypatch.chdir(root)
    model = weft.from_adapters("my-model", {name: f"adapters/{name}" for name in base_adapters})
    quietly(model.save_pretrained, "my-mixture")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return root


def change_json(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def base_of(folder):
    """Where the base model comes from that a mixture is loaded on."""
    return weft.from_pretrained(folder).get_base_model().config._name_or_path


def saved_name(folder):
    return json.loads(Path(folder, CONFIG).read_text())["base_model_name_or_path"]


def from_here(folder):
    return json.loads(Path(folder, MANIFEST).read_text()).get(FROM_HERE)


# ------------------------------------------------------------------------------------------ where it is looked for


def test_a_relative_base_is_found_from_another_directory(project):
    assert base_of(project / "my-mixture") == str(project / "my-model")
    assert saved_name(project / "my-mixture") == str(project / "my-model")
    assert from_here(project / "my-mixture") == "../my-model"
    assert saved_name(project / "my-mixture/experts/code") == str(project / "my-model")


def test_moved_together_they_find_each_other(project, tmp_path, capsys):
    expected = weft.from_pretrained(project / "my-mixture")(TOKENS).logits
    moved = project.rename(tmp_path / "moved")
    model = weft.from_pretrained(moved / "my-mixture")
    assert torch.equal(model(TOKENS).logits, expected)
    assert base_name(str(moved / "my-mixture"), None) == str(moved / "my-model")  # of the commands, and of `weft serve`
    assert main(["generate", str(moved / "my-mixture"), "--prompt", "the", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("the")


def test_moved_alone_it_takes_the_base_where_it_was(project, tmp_path):
    alone = (project / "my-mixture").rename(tmp_path / "alone")
    assert base_of(alone) == str(project / "my-model")


def test_copied_together_it_takes_the_copy(project, tmp_path):
    copy = shutil.copytree(project, tmp_path / "copy")
    assert base_of(copy / "my-mixture") == str(copy / "my-model")
    assert base_of(project / "my-mixture") == str(project / "my-model")


def test_through_a_link_to_the_mixture_it_is_found(project, tmp_path):
    (tmp_path / "link").symlink_to(project / "my-mixture")
    assert base_of(tmp_path / "link") == str(project / "my-model")


def test_a_mixture_that_is_saved_again_elsewhere_finds_it_from_there(project, tmp_path):
    again = tmp_path / "deep/er/again"
    quietly(weft.from_pretrained(project / "my-mixture").save_pretrained, again)
    assert (saved_name(again), from_here(again)) == (str(project / "my-model"), "../../../project/my-model")
    fewer = weft.drop_expert(project / "my-mixture", "code", project / "fewer")
    assert from_here(fewer) == "../my-model"


@pytest.mark.parametrize("base", ["my-model", "loaded"])
def test_a_change_of_directory_before_saving_changes_nothing(base, project, base_adapters, monkeypatch):
    monkeypatch.chdir(project)
    if base == "loaded":
        base = transformers.AutoModelForCausalLM.from_pretrained("my-model")
    model = weft.from_adapters(base, {name: f"adapters/{name}" for name in base_adapters})
    again = weft.from_pretrained("my-mixture")
    monkeypatch.chdir("/")
    for name, saved in (("one", model), ("two", again)):
        folder = project / "runs" / name
        quietly(saved.save_pretrained, folder)
        for file in (CONFIG, "experts/math/" + CONFIG):
            stored, before = (json.loads((place / file).read_text()) for place in (folder, project / "my-mixture"))
            assert stored == before
        assert from_here(folder) == "../../my-model"
        assert base_of(folder) == str(project / "my-model")
    peft_config = peft.PeftConfig.from_pretrained(project / "runs/one/experts/math")
    assert peft_config.base_model_name_or_path == str(project / "my-model")


def test_a_hub_id_stays_one(project):
    change_json(project / "my-mixture" / CONFIG, base_model_name_or_path="org/model")  # which somebody has changed
    assert base_name(str(project / "my-mixture"), None) == "org/model"
    config = weft.XLoraConfig.from_pretrained(project / "my-mixture")
    config.save_pretrained(project / "options")
    assert saved_name(project / "options") == "org/model"


def test_a_folder_that_is_far_away_is_absolute_alone(project):
    assert path_from(project / "a/b/c/d", str(project / "my-model")) == "../../../../my-model"
    assert path_from(project / "a/b/c/d/e", str(project / "my-model")) is None
    assert path_from(project, "org/model") is path_from(project, None) is None


def test_names_of_earlier_versions_are_relative_to_the_mixture_or_the_current_directory(project, monkeypatch):
    mixture = project / "my-mixture"
    change_json(mixture / MANIFEST, **{FROM_HERE: None})
    change_json(mixture / CONFIG, base_model_name_or_path="my-model")
    monkeypatch.chdir(project)
    assert base_of("my-mixture") == str(project / "my-model")
    monkeypatch.chdir(project / "adapters")
    change_json(mixture / CONFIG, base_model_name_or_path="../my-model")
    assert base_of(mixture) == str(project / "my-model")


def test_what_peft_and_transformers_read_is_found_from_any_directory(project, peft_xlora_restored):
    weft.register_with_peft()
    expected = weft.from_pretrained(project / "my-mixture")(TOKENS).logits
    model = transformers.AutoModelForCausalLM.from_pretrained(project / "my-mixture")
    assert torch.equal(model(TOKENS).logits, expected)
    weft.fold(weft.from_pretrained(project / "my-mixture"), project / "folded", {"math": 1.0, "code": 0.0})
    folded = peft.AutoPeftModelForCausalLM.from_pretrained(project / "folded")
    assert folded.get_base_model().config._name_or_path == str(project / "my-model")


@pytest.mark.parametrize("layout", ["peft", "xlora"])
def test_converted_it_names_the_base_by_its_absolute_path(layout, project, monkeypatch):
    monkeypatch.chdir(project)
    rename = {"math": "0", "code": "1"}
    converted = weft.convert_mixture("my-mixture", layout, "converted", base="my-model", rename=rename)
    file = converted / ("adapter_config.json" if layout == "peft" else "xlora_config.json")
    assert json.loads(file.read_text())["base_model_name_or_path" if layout == "peft" else "base_model_id"] == str(
        project / "my-model"
    )


# ------------------------------------------------------------------------------------------ training


def test_a_checkpoint_and_a_training_from_it_find_the_base_after_a_move(project, tmp_path, monkeypatch):
    (project / "texts.txt").write_text("the quick brown fox " * 20)
    options = {"data": ["texts.txt"], "max_steps": 1, "sequence_length": 8, "gate_start": "random"}
    monkeypatch.chdir(project)
    adapters = ["math=adapters/math", "code=adapters/code"]
    quietly(train, TrainOptions(base="my-model", adapters=adapters, output="out", save_steps=1, **options))
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = project.rename(tmp_path / "moved")
    checkpoint = moved / "out/checkpoints/checkpoint-1"
    assert from_here(checkpoint) == "../../../my-model"
    assert base_of(checkpoint) == base_of(moved / "out") == str(moved / "my-model")
    options["data"] = [str(moved / "texts.txt")]
    further = TrainOptions(start_from=str(moved / "out"), output=str(moved / "further"), **options)
    assert base_of(quietly(train, further)) == str(moved / "my-model")


# ------------------------------------------------------------------------------------------ where there is none


COMMANDS = {
    "generate": ["generate", "{}", "--prompt", "a"],
    "eval": ["eval", "{}", "--data", "data.txt"],
    "inspect": ["inspect", "{}", "--text", "a"],
    "fold": ["fold", "{}", "--weights", "math=1", "code=0", "--output", "folded"],
    "chat": ["chat", "{}"],
    "train": ["train", "--start-from", "{}", "--data", "data.txt", "--output", "out"],
    "add-expert": ["add-expert", "{}", "new={}/experts/math"],
    "serve": ["serve", "{}", "--engine", "embedded", "--port", "0"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_base_that_is_nowhere_is_named_with_all_places(command, project, tmp_path, capsys):
    Path("data.txt").write_text("one two three")
    moved = project.rename(tmp_path / "moved")
    shutil.rmtree(moved / "my-model")
    mixture = moved / "my-mixture"
    assert main([part.format(mixture) for part in command]) == 1
    message = (
        f"weft {command[0]}: error: base ({project}/my-model) is not here: no folder {moved}/my-model, no folder "
        f"{project}/my-model. The mixture {mixture} names it: give the base model's folder or Hub id, with --base (in "
        "Python base=...)\n"
    )
    assert capsys.readouterr().err == message


def test_so_it_is_in_python_and_with_the_base_given_it_loads(project, base_folder):
    shutil.rmtree(project / "my-model")
    with pytest.raises(CheckpointError, match=rf"base \({project}/my-model\) is not here: no folder .*, with --base"):
        weft.from_pretrained(project / "my-mixture")
    assert weft.from_pretrained(project / "my-mixture", base_folder).xlora_config.num_experts == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./my-model", r"base \(./my-model\) cannot be loaded: there is no such folder. Pass the base model"),
        ("a/b/my-model", r"base \(a/b/my-model\) cannot be loaded: there is no such folder. Pass"),
        ("~/no-such-model", r"no-such-model\) cannot be loaded: there is no such folder. Pass"),
        ("my-model", r"base \(my-model\) cannot be loaded: there is no folder my-model here, and as a Hub id: .*Pass"),
        ("org/my-model", r"cannot be loaded: there is no folder org/my-model here, and as a Hub id: .*Pass"),
    ],
)
def test_a_base_that_is_given_and_is_no_folder_is_named_before_the_hub(name, message, project):
    with pytest.raises(CheckpointError, match=message):
        weft.from_pretrained(project / "my-mixture", name)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gpt2", False),
        ("org/model", False),
        ("/m", True),
        ("./m", True),
        ("~/m", True),
        ("a/b/c", True),
        ("a\\b", True),
    ],
)
def test_which_names_can_be_no_hub_id(name, path):
    assert is_path(name) is path


def test_a_manifest_of_another_type_is_refused(project):
    change_json(project / "my-mixture" / MANIFEST, **{FROM_HERE: 5})
    with pytest.raises(CheckpointError, match=r"weft_manifest.json: base_model \(5\) must be a string"):
        weft.from_pretrained(project / "my-mixture")
