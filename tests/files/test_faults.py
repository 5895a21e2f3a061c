"""Some of the points at which a writer may be killed or fail; all of them by `python -m faults`."""

import errno
import os
import re
import subprocess
from contextlib import suppress

import pytest

from faults.harness import HOW, Harness, by_name, sampled
from faults.points import Points
from faults.scenarios import SCENARIOS, CommandError, command, files, make_start, mixture

_SAMPLE = 2  # points of each writer, and of each way to go wrong


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return Harness(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [scenario.name for scenario in SCENARIOS])
def test_what_a_killed_or_failed_writer_leaves_is_whole_or_mended_by_the_same_command(harness, name):
    scenario = by_name(name)
    survey = harness.survey(scenario)
    assert len(survey.points) >= 4
    for number, how in enumerate(HOW):
        for at in sampled(len(survey.points), _SAMPLE, seed=number):
            problem = harness.case(scenario, survey, at, how)
            assert problem is None, f"{name}, {how} at {at} ({survey.points[at]}): {problem}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_harness_finds_what_is_not_mended(harness, monkeypatch):
    scenario = by_name("drop-expert")
    survey = harness.survey(scenario)
    moves = [at for at, point in enumerate(survey.points) if point.startswith("rename")]
    monkeypatch.setattr("weft.checkpoint.adapters.settle", lambda folder: None)
    monkeypatch.setattr("weft.model.saving.settle", lambda folder: None)
    assert any(harness.case(scenario, survey, at, "kill") is not None for at in moves)


def test_points_are_counted_and_half_of_what_is_written_stays(tmp_path):
    def work():
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder/file").write_text("12345678")
        os.rename(tmp_path / "folder/file", tmp_path / "file")
        (tmp_path / "folder").rmdir()

    points = Points(tmp_path)
    with points.watched():
        work()
    assert points.seen == ["mkdir folder", "open file", "write file", "rename file", "rmdir folder"]
    (tmp_path / "file").unlink()
    with Points(tmp_path, 2, "full").watched(), pytest.raises(OSError, match="No space left") as raised:
        work()
    assert raised.value.errno == errno.ENOSPC
    assert (tmp_path / "folder/file").read_text() == "1234"


@pytest.fixture
def full(tmp_path):
    """A real file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    mounted = subprocess.run(mount, check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # a cache may still be open


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_disk_that_is_really_full_leaves_what_was_there(full, tmp_path, tmp_path_factory):
    root = tmp_path_factory.mktemp("start")
    make_start(root)
    command("drop-expert", root / "mixture", "math", "--output", full / "mixture")
    commands = {
        "add-expert": ["add-expert", full / "mixture", f"law={root}/adapters/law", "--output", full / "mixture"],
        "fold": ["fold", root / "mixture", "--weights", "math=1", "--output", full / "folded"],
        "convert": ["convert", root / "mixture", "--to", "xlora", "--output", full / "converted"],
        "card": ["card", full / "mixture"],
        "inspect": [
            "inspect",
            root / "mixture",
            "--text",
            "a",
            "--output",
            full / "a.trace",
            "--html",
            full / "a.html",
        ],
        "train": [
            *("train", "--start-from", root / "mixture", "--data", root / "texts.jsonl", "--output", full / "out"),
            *("--max-steps", "2", "--save-steps", "1", "--cache-scaling-pass", "true", "--sequence-length", "64"),
        ],
    }
    for left in (0, 4096, 20000, None):
        filler = full / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while left is not None:
                file.write(b"x" * 4096)
        if left is not None:
            os.truncate(filler, filler.stat().st_size - left)
        for name in list(commands):
            before = files(full / "mixture")
            error = attempt(commands[name])
            if error is None:
                del commands[name]
            else:
                assert re.search(r"No space left|os error 28|(MiB|kB|bytes) free", error), (name, error)
                assert files(full / "mixture") == before
        filler.unlink()
    assert commands == {}
    assert mixture(full / "mixture")["experts"] == ["code", "law"]


def attempt(arguments):
    """Run a command, where it says so with --resume true; its error, if it has one."""
    try:
        command(*arguments)
    except CommandError as err:
        return attempt([*arguments, "--resume", "true"]) if "or --resume true" in str(err) else str(err)
    return None
