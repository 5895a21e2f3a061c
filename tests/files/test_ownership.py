"""What weft did not write stays: no command and no function writes over it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import weft
from models import folder_files, lora, quietly, save_adapter, tiny_llama
from weft.cli import main
from weft.errors import ConfigError
from weft.evaluate.report import check_outputs
from weft.files.ownership import refuse_used_folder, used_folder_problem
from weft.traces.figures import write_figure
from weft.traces.page import write_page

TENSORS = "adapter_model.safetensors"


def contents(folder):
    """Every file below a folder, with its bytes."""
    return {name: (Path(folder) / name).read_bytes() for name in folder_files(Path(folder))}


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "one two three four five six"}\n' * 4)
    return str(file)


@pytest.fixture
def train(base_folder, base_adapters, texts, capsys):
    """`weft train` into a folder; its exit code and its error."""

    def run(output, *more, adapters=base_adapters, base=base_folder):
        pairs = [f"{name}={path}" for name, path in adapters.items()]
        arguments = ["train", "--base", str(base), "--adapters", *pairs, "--data", texts, "--output", str(output)]
        code = main([*arguments, "--max-steps", "1", "--sequence-length", "8", *more])
        return code, capsys.readouterr().err

    return run


# ---------------------------------------------------------------------- weft train


@pytest.mark.parametrize("what", ["expert", "base", "mixture", "readme"])
def test_training_writes_over_nothing_that_is_not_its_own(what, train, base_folder, base_adapters, mixture, tmp_path):
    base = shutil.copytree(base_folder, tmp_path / "base")
    adapters = {name: shutil.copytree(path, tmp_path / "adapters" / name) for name, path in base_adapters.items()}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/README.md").write_text("# mine\n")
    output = {"expert": adapters["math"], "base": base, "mixture": mixture, "readme": tmp_path / "notes"}[what]
    before = contents(output)
    code, error = train(output, adapters=adapters, base=base)
    assert code == 1
    assert f"output ({output}) exists already and holds " in error
    assert "give a new or empty folder" in error
    assert contents(output) == before


def test_a_run_goes_on_in_its_own_folder_and_keeps_a_card_that_a_person_wrote(train, tmp_path):
    assert train(tmp_path / "out", "--save-steps", "1")[0] == 0
    (tmp_path / "out/README.md").write_text("# mine\n")
    assert train(tmp_path / "out", "--save-steps", "1", "--max-steps", "2", "--resume", "true")[0] == 0
    assert (tmp_path / "out/README.md").read_text() == "# mine\n"


def test_an_expert_is_not_trained_into_a_folder_with_something_else(base_folder, texts, tmp_path, capsys):
    (tmp_path / "out-experts/a").mkdir(parents=True)
    (tmp_path / "out-experts/a/README.md").write_text("# mine\n")
    options = ["--experts-from", f"a={texts}", f"b={texts}", "--output", str(tmp_path / "out"), "--expert-steps", "1"]
    assert main(["train", "--base", str(base_folder), *options]) == 1
    assert f"the folder of expert 'a' ({tmp_path}/out-experts/a) exists already and holds README.md" in (
        capsys.readouterr().err
    )
    assert folder_files(tmp_path / "out-experts") == ["a/README.md"]


# ---------------------------------------------------------------------- save_pretrained


def test_saving_replaces_a_mixture_and_nothing_else(llama_adapters, tmp_path):
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    quietly(model.save_pretrained, tmp_path / "mixture")
    quietly(model.save_pretrained, tmp_path / "mixture")
    adapter = shutil.copytree(llama_adapters["math"], tmp_path / "adapter")
    before = contents(adapter)
    with pytest.raises(
        ConfigError, match=r"save_directory \(.*adapter\) holds adapter_config.json, .* without a mixture, which"
    ):
        model.save_pretrained(adapter)
    assert contents(adapter) == before


def test_saving_takes_no_folder_of_adapters_for_experts(llama_adapters, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(llama_adapters["math"], project / "experts/math")
    before = contents(project)
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    with pytest.raises(ConfigError, match=r"holds experts without a mixture, which would be replaced"):
        model.save_pretrained(project)
    assert contents(project) == before
    quietly(model.save_pretrained, tmp_path / "mixture")
    shutil.copytree(llama_adapters["math"], tmp_path / "mixture/experts/mine")
    before = contents(tmp_path / "mixture")
    with pytest.raises(
        ConfigError, match=r"experts\) holds mine, which no mixture was saved with and which would be lost"
    ):
        model.save_pretrained(tmp_path / "mixture")
    assert contents(tmp_path / "mixture") == before


def test_a_card_that_a_person_wrote_is_kept_to_the_letter(llama_adapters, tmp_path):
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    quietly(model.save_pretrained, tmp_path / "mixture")
    (tmp_path / "mixture/README.md").write_text("---\ntags: [x]\n---\n# mine\n")
    quietly(model.save_pretrained, tmp_path / "mixture")
    assert (tmp_path / "mixture/README.md").read_text() == "---\ntags: [x]\n---\n# mine\n"


# ---------------------------------------------------------------------- the other writers


def test_folding_replaces_what_was_folded_and_no_other_adapter(llama_adapters, tmp_path):
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    weft.fold(model, tmp_path / "folded", {"math": 1.0})
    weft.fold(model, tmp_path / "folded", {"code": 1.0})
    other = Path(save_adapter(tiny_llama(), lora(), tmp_path / "other", 9))
    before = contents(other)
    with pytest.raises(
        ConfigError, match=r"output \(.*other\) exists already and holds README.md, adapter_config.json"
    ):
        weft.fold(model, other, {"math": 1.0})
    assert contents(other) == before


@pytest.mark.parametrize("command", ["convert", "pull", "add-expert", "drop-expert"])
def test_commands_that_make_a_folder_need_a_new_or_empty_one(command, mixture, base_adapters, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("mine")
    output = ["--output", str(tmp_path / "notes")]
    arguments = {
        "convert": ["convert", mixture, "--to", "xlora"],
        "pull": ["pull", "user/mixture"],
        "add-expert": ["add-expert", mixture, f"new={base_adapters['math']}"],
        "drop-expert": ["drop-expert", mixture, "code"],
    }[command]
    assert main([*arguments, *output]) == 1
    assert f"output ({tmp_path}/notes) exists already and holds todo.txt: give a new or empty folder" in (
        capsys.readouterr().err
    )
    assert contents(tmp_path / "notes") == {"todo.txt": b"mine"}


@pytest.mark.parametrize(
    ("option", "name", "kind"),
    [
        ("--output", "trace.safetensors", "output"),
        ("--html", "page.html", "html"),
        ("--figure", "figure.png", "figure"),
        ("--figure", "figure.svg", "figure"),
        ("--figure", "figure.pdf", "figure"),
    ],
)
def test_inspect_replaces_its_own_files_only(option, name, kind, mixture, tmp_path, capsys):
    arguments = ["inspect", mixture, "--text", "one two", option, str(tmp_path / name)]
    assert main(arguments) == 0
    assert main(arguments) == 0, capsys.readouterr().err
    (tmp_path / name).write_bytes(b"mine")
    capsys.readouterr()
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert f"{kind} ({tmp_path / name}) is there already and is no " in error
    assert "that weft wrote: give another file, or move it away" in error
    assert (tmp_path / name).read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["table.json", "table.md", "table.csv"])
def test_eval_replaces_its_own_tables_only(name, mixture, texts, tmp_path, capsys):
    arguments = ["eval", mixture, "--data", texts, "--rows", "base", "weft", "--output", str(tmp_path / name)]
    assert main(arguments) == 0
    assert main(arguments) == 0, capsys.readouterr().err
    (tmp_path / name).write_bytes(b'{"mine": 1}')
    assert main(arguments) == 1
    assert f"output ({tmp_path / name}) is there already and is no table that weft wrote" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == b'{"mine": 1}'


def test_functions_keep_the_rule_too(mixture, base_folder, tmp_path):
    from transformers import AutoTokenizer

    model = weft.from_pretrained(mixture)
    recorded = weft.trace(model, "one two", tokenizer=AutoTokenizer.from_pretrained(base_folder))
    for name, write in (
        ("a.safetensors", recorded.save),
        ("a.html", lambda file: write_page([recorded], file)),
        ("a.png", lambda file: write_figure(recorded, file)),
    ):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ConfigError, match="is there already and is no"):
            write(tmp_path / name)
        assert (tmp_path / name).read_text() == "mine"


def test_a_folder_that_is_free(tmp_path):
    assert used_folder_problem(tmp_path / "none", "output") is None
    assert used_folder_problem(tmp_path, "output") is None
    (tmp_path / "file").write_text("")
    assert used_folder_problem(tmp_path, "output", own={"file"}) is None
    for number in range(7):
        (tmp_path / f"{number}").write_text("")
    with pytest.raises(
        ConfigError, match=r"exists already and holds 0, 1, 2, 3, 4, \.\.\.: give a new or empty folder"
    ):
        refuse_used_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"output \(.*file\) is a file, expected a folder"):
        refuse_used_folder(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"dangling\) is a file, expected a folder"):
        refuse_used_folder(tmp_path / "dangling")


# ---------------------------------------------------------------------- ~


def test_a_tilde_is_the_home_folder_wherever_a_path_stands(monkeypatch):
    from weft.options import ConvertOptions, EvalOptions, TrainOptions

    monkeypatch.setenv("HOME", "/home/me")
    options = TrainOptions(
        base="~/base", adapters=["math=~/math", "code=/code"], data=["~/a.jsonl", "math=~/b.jsonl"], output="~/out"
    )
    assert (options.base, options.output) == ("/home/me/base", "/home/me/out")
    assert options.adapters == ["math=/home/me/math", "code=/code"]
    assert options.data == ["/home/me/a.jsonl", "math=/home/me/b.jsonl"]
    assert EvalOptions("~/mix", compare={"a": "~/a"}).compare == {"a": "/home/me/a"}
    assert ConvertOptions("~/mix").source == "/home/me/mix"
    assert TrainOptions(base="org/model", data=["a=b~c"]).data == ["a=b~c"]


def test_train_writes_into_the_home_folder(train, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train("~/out")[0] == 0
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["peft_type"] == "XLORA"
    assert torch.is_tensor(weft.from_pretrained(tmp_path / "out")(torch.tensor([[1]])).logits)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a\0b", "a\ud83d"], ids=["long", "longer", "null", "half"])
def test_names_that_no_file_can_have_are_named(name, base_adapters, tmp_path):
    model = weft.from_adapters(tiny_llama(vocab_size=258, max_position_embeddings=1024), base_adapters)
    target = f"{tmp_path}/{name}"
    with pytest.raises(
        ConfigError, match=r"save_directory \(.*\) cannot be made: (File name too long|it holds a null|'utf-8' codec)"
    ):
        model.save_pretrained(target)
    model.save_pretrained(tmp_path / "mixture")
    with pytest.raises(
        ConfigError, match=r"output \(.*\) cannot be made: (File name too long|it holds a null|'utf-8' codec)"
    ):
        weft.drop_expert(tmp_path / "mixture", "math", target)
    with pytest.raises(
        ConfigError, match=r"output \(.*\) cannot be made: (File name too long|it holds a null|'utf-8' codec)"
    ):
        weft.convert_mixture(tmp_path / "mixture", "xlora", target)
    with pytest.raises(
        ConfigError, match=r"output \(.*\) cannot be written: (File name too long|it holds a null|'utf-8' codec)"
    ):
        check_outputs([f"{target}.json"])


def test_a_file_in_the_place_of_a_folder_is_named(base_adapters, tmp_path):
    model = weft.from_adapters(tiny_llama(vocab_size=258, max_position_embeddings=1024), base_adapters)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"save_directory \(.*/file\) is a file, expected a folder"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
