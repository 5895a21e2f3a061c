"""What can be told to be wrong before anything is imported or loaded is told at once."""

import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
from huggingface_hub import constants

from rights import ordinary_rights
from weft.errors import ConfigError
from weft.files.ownership import FOLDED
from weft.options import (
    AddExpertOptions,
    CardOptions,
    ConvertOptions,
    DropExpertOptions,
    EvalOptions,
    FoldOptions,
    GenerateOptions,
    InspectOptions,
    PullOptions,
    PushOptions,
    ServeOptions,
    TrainOptions,
)
from weft.options.foreseen import foreseen, refuse_foreseen


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a model, two adapters, texts, and a folder that is somebody's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("model", "mixture", "adapters/code", "adapters/law", "notes"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a.jsonl", "notes/todo.txt", "trace.safetensors"):
        (tmp_path / name).write_text("mine")


def train(**options):
    adapters = {"code": "adapters/code", "law": "adapters/law"}
    return TrainOptions(**{"base": "model", "adapters": adapters, "data": ["a.jsonl"], "output": "out", **options})


NOT_A_FILE = "is not a file: give .jsonl, .csv, .tsv, .parquet or text files, or a data set's name"
NOWHERE = "is neither a folder here nor a Hub id"
IN_THE_WAY = "output (notes) exists already and holds todo.txt: give a new or empty folder"
ONE = "one expert (code), expected two or more, between which a gate can choose"
# What is wrong with such options: beginnings of all sentences.
CASES = {
    "nothing": (train(), []),
    "a data set's name": (train(data=["imdb", "law=a.jsonl"]), []),
    "training": (
        train(
            base="./mistyped",
            adapters={"code": "/gone"},
            data=["/no.jsonl", "code=no.jsonl"],
            eval_data=["no-eval.txt"],
            output="notes",
            batch_size=0,
            top_k_lora=0,
            packing=True,
            group_by_length=True,
            sequence_length=1,
        ),
        [
            f"adapters and experts_from name {ONE}",
            "batch_size (0) must be at least 1",
            "sequence_length (1) must be at least 2",
            "packing (True) and group_by_length (True) exclude each other",
            "top_k_lora (0) must be between 1 and the number of adapters (1)",
            f"base (./mistyped) {NOWHERE}",
            f"adapter 'code' (/gone) {NOWHERE}",
            f"data (/no.jsonl) {NOT_A_FILE}",
            f"data (no.jsonl) {NOT_A_FILE}",
            f"eval_data (no-eval.txt) {NOT_A_FILE}",
            IN_THE_WAY,
        ],
    ),
    "nothing given": (TrainOptions(), ["base is missing", "adapters is missing", "data is missing"]),
    "one expert to be trained": (
        train(adapters=[], experts_from=["code=a.jsonl"], expert_rank=0),
        [f"adapters and experts_from name {ONE}", "expert_rank (0) must be at least 1"],
    ),
    "one of each": (train(adapters=["code=adapters/code"], experts_from=["law=a.jsonl"]), []),
    "a name twice": (
        train(experts_from=["law=a.jsonl"]),
        ["adapters and experts_from both name ['law']: each expert has one origin"],
    ),
    "from a mixture": (
        TrainOptions(start_from="/gone", data=["chess=a.jsonl", "chess=b.jsonl"], gate_start="labels"),
        [
            "gate_start (labels) and start_from (/gone) exclude each other",
            f"start_from (/gone) {NOWHERE}",
            f"data (b.jsonl) {NOT_A_FILE}",
        ],
    ),
    "resumed": (train(resume=True), ["resume (True) found no checkpoint in out/checkpoints: leave it out"]),
    "resumed experts": (train(adapters=[], experts_from=["a=a.jsonl", "b=a.jsonl"], resume=True), []),
    "generate": (
        GenerateOptions("/gone", prompt="x", base="a.jsonl", temperature=-1.0, top_k=0),
        [
            "temperature (-1.0) must be a finite number of at least 0",
            "top_k (0) must be at least 1",
            f"model (/gone) {NOWHERE}",
            "base (a.jsonl) is a file, expected a folder or Hub id",
        ],
    ),
    "eval": (
        EvalOptions(
            "mixture",
            data=["x=/no.jsonl", "a.jsonl"],
            compare=["other=/gone"],
            search_data="/no.txt",
            output=["nowhere/table.md"],
            batch_size=0,
            stride=-1,
        ),
        [
            "batch_size (0) must be at least 1",
            "stride (-1) must be at least 0 and below sequence_length (512)",
            f"compare other (/gone) {NOWHERE}",
            f"data (/no.jsonl) {NOT_A_FILE}",
            f"search_data (/no.txt) {NOT_A_FILE}",
            "output (nowhere/table.md) cannot be written: there is no folder ",
        ],
    ),
    "inspect": (
        InspectOptions("/gone", text="x", generate="y", compare=["/no.trace"], html="nowhere/page.html", max_tokens=0),
        [
            "max_tokens (0) must be at least 1",
            "text and generate are both given",
            "compare (/no.trace) is not a file: give one that weft inspect --output has written",
            f"model (/gone) {NOWHERE}",
            "html (nowhere/page.html) cannot be written: there is no folder ",
        ],
    ),
    "a trace": (
        InspectOptions("trace.safetensors", data=["a.jsonl"]),
        ["model (trace.safetensors) is a trace already: leave data out"],
    ),
    "fold": (
        FoldOptions("/gone", "notes", weights=["a=1", "b=much"], data=["/no.jsonl"], max_sequences=-1),
        [
            "weights has the entry 'b=much', expected name=NUMBER",
            "max_sequences (-1) must be at least 0",
            "weights (['a=1', 'b=much']) and data (['/no.jsonl']) exclude each other",
            f"model (/gone) {NOWHERE}",
            f"data (/no.jsonl) {NOT_A_FILE}",
            IN_THE_WAY,
        ],
    ),
    "add-expert": (
        AddExpertOptions("mixture", "poems=/gone", "notes", base="/no-base"),
        [f"base (/no-base) {NOWHERE}", f"adapter 'poems' (/gone) {NOWHERE}", IN_THE_WAY],
    ),
    "add-expert, no name": (AddExpertOptions("mixture", "poems"), ["expert ('poems') must be name=FOLDER or name="]),
    "add-expert, in place": (AddExpertOptions("mixture", "poems=adapters/code", "mixture"), []),
    "drop-expert": (DropExpertOptions("/gone", "law", "notes"), [f"model (/gone) {NOWHERE}", IN_THE_WAY]),
    "drop-expert, no such name": (DropExpertOptions("mixture", "a/b"), []),
    "convert": (
        ConvertOptions("/gone", "peft", "notes", adapters=["code=/no-adapter"], base="/no-base"),
        [
            f"the mixture (/gone) {NOWHERE}",
            f"base (/no-base) {NOWHERE}",
            f"adapter 'code' (/no-adapter) {NOWHERE}",
            IN_THE_WAY,
        ],
    ),
    "convert for mistral.rs": (ConvertOptions("mixture", "mistralrs", base="/on/the/server"), []),
    "card": (
        CardOptions("mixture", evaluation="no.json"),
        ["evaluation (no.json) is not a file: give one that weft eval --output has written"],
    ),
    "push": (PushOptions("/gone", "me/x", base="me/base"), [f"model (/gone) {NOWHERE}"]),
    "pull": (PullOptions("me/notes"), [IN_THE_WAY]),
    "pull, no name": (PullOptions("notes"), []),
    "serve": (
        ServeOptions("/gone", base="/no-base", api_key=""),
        ["api_key ('') must not be empty", f"model (/gone) {NOWHERE}", f"base (/no-base) {NOWHERE}"],
    ),
}


@pytest.mark.parametrize(("options", "expected"), CASES.values(), ids=CASES)
def test_all_that_is_wrong_is_named_and_nothing_else(options, expected):
    found = foreseen(options)
    assert len(found) == len(expected), found
    for problem, beginning in zip(found, expected, strict=True):
        assert problem.startswith(beginning)


def test_a_name_that_may_be_mistyped_is_said_where_something_is_wrong_anyway():
    options = train(base="modle", adapters={"code": "adapters/cod", "law": "me/law"})
    assert foreseen(options) == []
    options.batch_size = 0
    assert foreseen(options) == [
        "batch_size (0) must be at least 1",
        "base (modle) is no folder here: if it is not on the Hub either, correct it too",
        "adapter 'code' (adapters/cod) is no folder here: if it is not on the Hub either, correct it too",
    ]


def test_an_earlier_run_hides_nothing_and_counts_if_a_checkpoint_is_complete(tmp_path):
    checkpoint = tmp_path / "out/checkpoints/checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": ')  # cut off
    assert foreseen(train()) == []
    for name in ("trainer_state.json", "weft_checkpoint.json"):
        (checkpoint / name).write_text("{}")
        earlier = "output (out) holds the checkpoints of a run: give another folder, or --resume true"
        assert foreseen(train()) == [earlier]
        assert foreseen(train(data=["/no.jsonl"])) == [f"data (/no.jsonl) {NOT_A_FILE}", earlier]
        assert foreseen(train(data=["/no.jsonl"], resume=True)) == [f"data (/no.jsonl) {NOT_A_FILE}"]
        (checkpoint / name).unlink()


def test_offline_what_is_not_here_must_be_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    options = train(base="modle", adapters={"code": "me/code/last", "law": "adapters/law"}, data=["me/texts"])
    nothing = "and the Hub cannot be asked, as HF_HUB_OFFLINE is set: give "
    assert foreseen(options) == [
        f"base (modle) is no folder here, {nothing}a folder",
        f"adapter 'code' (me/code/last) is no folder here, {nothing}a folder",
        f"data (me/texts) is neither a file nor a folder here, {nothing}.jsonl, .csv, .tsv, .parquet or text files",
    ]
    for name in ("hub/models--modle", "hub/models--me--code", "datasets/me___texts"):
        (tmp_path / name).mkdir(parents=True)
    assert foreseen(options) == []
    # `datasets` would take any folder of this name that it has read before.
    (tmp_path / "datasets/texts").mkdir()
    assert len(foreseen(train(data=["texts"]))) == 1


@pytest.mark.parametrize("source", ["./no", "a/b/c", "http://x/y.jsonl", "*.jsonl", "code:a.jsonl", "a.jsonl:text"])
def test_what_cannot_be_the_name_of_a_data_set_is_no_file(source):
    assert foreseen(train(data=[source])) == [f"data ({source}) {NOT_A_FILE}"]


def test_a_folder_of_a_model_is_no_data(tmp_path):
    (tmp_path / "adapters/code/adapter_config.json").write_text("{}")
    assert foreseen(train(data=["adapters/code", "notes"])) == [
        "data (adapters/code) is the folder of a model or adapter: give .jsonl, .csv, .tsv, .parquet or text files"
    ]


def test_names_of_data_are_those_of_experts_and_have_a_file():
    assert foreseen(train(data=["lwa=a.jsonl", "code="], eval_data=["low=a.jsonl"])) == [
        "data (lwa=a.jsonl) is for 'lwa', which is none of the experts (code, law)",
        "data (low=a.jsonl) is for 'low', which is none of the experts (code, law)",
        "data () names no file: give .jsonl, .csv, .tsv, .parquet or text files, or a data set's name",
    ]


def test_items_with_commas_are_one_problem():
    (problem,) = foreseen(train(adapters=["code=adapters/code,law=adapters/law"]))
    assert problem.startswith("adapters (code=adapters/code,law=adapters/law) has commas between its items")
    (problem,) = foreseen(train(data=["code=a.jsonl,law=b.jsonl"]))
    assert problem.startswith("data (code=a.jsonl,law=b.jsonl) has commas between its items")


def test_what_was_folded_may_be_folded_again(tmp_path):
    (tmp_path / "notes" / FOLDED).write_text("{}")
    assert foreseen(FoldOptions("mixture", "notes", weights=["a=1"])) == []


OUTPUTS = {
    "fold": lambda output: FoldOptions("mixture", output, weights=["a=1"]),
    "convert": lambda output: ConvertOptions("mixture", "peft", output),
    "add-expert": lambda output: AddExpertOptions("mixture", "poems=adapters/code", output),
    "drop-expert": lambda output: DropExpertOptions("mixture", "law", output),
    "pull": lambda output: PullOptions("me/mixture", output),
    "train": lambda output: train(output=output),
    "a cache": lambda output: train(cache_scaling_pass=True, cache_folder=output),
}


@pytest.mark.parametrize("options", OUTPUTS.values(), ids=OUTPUTS)
def test_a_folder_that_cannot_be_made_is_refused(options, tmp_path):
    (tmp_path / "mine").mkdir(mode=0o555)
    reasons = {
        "/proc/out": r"no folder can be made in /proc \(No such file or directory\)",
        "a.jsonl/out": f"{tmp_path}/a.jsonl is a file, expected a folder",
        "mine/out": rf"no folder can be made in {tmp_path}/mine \(Permission denied\)",
    }
    before = sorted(tmp_path.rglob("*"))
    for output, reason in reasons.items():
        with ordinary_rights() if output == "mine/out" else nullcontext():
            (problem,) = foreseen(options(output))
        start, end = rf"(output|cache_folder) \({output}\) cannot be (written|made): ", "; give another folder"
        assert re.fullmatch(f"{start}({reason}|.* is not yours to write in){end}", problem)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cache_folder_that_is_there_may_be_read_only(tmp_path):
    (tmp_path / "mine").mkdir(mode=0o555)
    with ordinary_rights():
        assert foreseen(train(cache_scaling_pass=True, cache_folder="mine")) == []
        assert foreseen(train(cache_folder="mine/cache")) == []  # not used


def test_a_dry_run_leaves_what_a_killed_process_has_left(tmp_path):
    (tmp_path / "out/.part").mkdir(parents=True)
    assert foreseen(train(dry_run=True)) == ["output (out) exists already and holds .part: give a new or empty folder"]
    assert foreseen(train()) == []
    assert list((tmp_path / "out").iterdir()) == []


def test_one_problem_is_a_sentence_and_several_are_a_list():
    with pytest.raises(ConfigError, match=r"^batch_size \(0\) must be at least 1$"):
        refuse_foreseen(train(batch_size=0))
    with pytest.raises(ConfigError, match=r"^the options cannot work:\n  - batch_size \(0\).*\n  - save_steps \(0\) "):
        refuse_foreseen(train(batch_size=0, save_steps=0))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["train", "--base", "model", "--adapters", "code=adapters/code", "--data", "/no.jsonl", "--output", "notes"],
        ["eval", "mixture", "--data", "/no.jsonl"],
        ["generate", "/gone", "--prompt", "x"],
        ["fold", "mixture", "--weights", "a=1", "--output", "notes"],
        ["add-expert", "mixture", "poems=/gone"],
    ],
    ids=" ".join,
)
def test_it_is_said_without_torch(arguments):
    code = "import sys; from weft.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert ran.stdout == "1 False\n"
    assert ran.stderr.startswith(f"weft {arguments[0]}: error: ")
