"""Files that others wrote: what is wrong with one is a single error with its name."""

import json
import os

import pytest

from rights import ordinary_rights
from weft.errors import CheckpointError, ConfigError
from weft.files.reading import naming_problem, own_files, read_json, read_text


def deep(levels):
    return '{"a": ' + "[" * levels + "]" * levels + "}"


BROKEN = {
    "no JSON": ("{", r"a.json is no valid JSON \(Expecting property name"),
    "a list": ("[]", r"a.json must hold a JSON object, not a list"),
    "no UTF-8": (b'{"a": "caf\xe9"}', r"a.json is no UTF-8 text \(invalid continuation byte at byte 10\)"),
    "deep": (deep(100_000), r"a.json is no valid JSON \(more than 64 levels of lists and objects in each other\)"),
    "too deep to be copied": (deep(70), r"a.json is no valid JSON \(more than 64 levels"),
    "thousands of digits": ('{"a": ' + "9" * 5000 + "}", r"a.json is no valid JSON \(Exceeds the limit"),
    "half a character": (r'{"a": {"b": "hello \ud83d"}}', r"a.json: a.b \('hello \\ud83d'\) holds half of a character"),
    "half a character in a key": (r'{"\ud83d": 1}', r"a.json: a key \('\\ud83d'\) holds half of a character"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_with_what_is_wrong(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "a.json")


def make_large(file):
    with file.open("wb") as opened:
        opened.truncate(2**27)


PLACES = {
    "nothing": (lambda file: None, "is missing"),
    "folder": (lambda file: file.mkdir(), "is a folder, expected a file"),
    "pipe": (os.mkfifo, "is no ordinary file, expected a file"),
    "device": (lambda file: file.symlink_to("/dev/zero"), "is no ordinary file, expected a file"),
    "loop": (lambda file: file.symlink_to(file.name), "cannot be read: Too many levels of symbolic links"),
    "large": (make_large, r"has 134,217,728 bytes, expected at most 67,108,864"),
    "forbidden": (lambda file: (file.write_text("{}"), file.chmod(0)), "cannot be read: Permission denied"),
}


@pytest.mark.parametrize(("make", "message"), PLACES.values(), ids=PLACES)
def test_what_is_no_file_to_read_is_named(make, message, tmp_path):
    file = tmp_path / "a.json"
    make(file)
    with ordinary_rights(), pytest.raises(ConfigError, match=f"a.json {message}"):
        read_json(file, error=ConfigError)


def test_a_name_that_no_file_can_have_is_an_error_of_its_own(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        read_text(tmp_path / ("x" * 5000))
    with pytest.raises(CheckpointError, match="cannot be read: embedded null byte"):
        read_text(f"{tmp_path}/a\0b")


def test_values_of_the_wrong_kind_are_named_by_file_and_key(tmp_path):
    file = tmp_path / "a.json"
    values = {"name": 5, "names": ["a", 1], "table": {"size": -1, "text": ["x"] * 500}, "files": [], "flag": True}
    file.write_text(json.dumps(values))
    table = read_json(file)
    for key, ask, message in [
        ("name", table.string, r"name \(5\) must be a string"),
        ("names", table.strings, r"names \(\['a', 1\]\) must be a list of strings"),
        ("names", table.table, r"names \(\['a', 1\]\) must be a JSON object"),
        ("size", table.table("table").whole, r"table: size \(-1\) must be a whole number of at least 0"),
        ("flag", table.whole, r"flag \(True\) must be a whole number of at least 0"),
        ("files", table.tables, r"files \(\[\]\) must be a list of JSON objects, one or more"),
        ("text", table.table("table").whole, r"text \(.*\.\.\. \(2,500 characters\)\) must be"),
        ("other", table.string, "a.json lacks other: expected a string"),
    ]:
        with pytest.raises(CheckpointError, match=rf"a.json.*{message}|{message}"):
            ask(key)
    assert table.string("other", None) is None


def test_links_that_lead_out_are_no_files_of_a_folder(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "mixture"
    folder.mkdir()
    (folder / "own.txt").write_text("own")
    (folder / "inside.txt").symlink_to("own.txt")
    (folder / "outside.txt").symlink_to("../secret.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    assert [file.name for file in own_files(folder)] == ["inside.txt", "own.txt"]


def test_the_hubs_cache_keeps_its_files_behind_links(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs" / "1").write_text("{}")
    (snapshot / "experts" / "math").mkdir(parents=True)
    (snapshot / "a.json").symlink_to("../../blobs/1")
    (snapshot / "experts" / "math" / "b.json").symlink_to("../../../../blobs/1")
    assert [file.name for file in own_files(snapshot)] == ["a.json"]
    assert [file.name for file in own_files(snapshot / "experts" / "math")] == ["b.json"]


def test_names_that_nothing_can_have_are_told(tmp_path):
    assert naming_problem(tmp_path / "new" / "a.json") is None
    assert naming_problem("caf\udce9") is None
    assert naming_problem(tmp_path / ("x" * 300)) == "File name too long"
    assert naming_problem("x/" * 3000) == "File name too long"
    assert naming_problem(f"{tmp_path}/a\0b") == "it holds a null character"
    assert naming_problem("a\ud83d").startswith("'utf-8' codec can't encode character")
