"""Texts out of every kind of file, and errors that say where."""

import json
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import transformers

from models import tiny_llama, tiny_tokenizer
from rights import ordinary_rights
from weft.data.labelled import training_rows
from weft.data.texts import check_length, named_sources, read_tokens
from weft.data.windows import token_sequences
from weft.errors import DataError
from weft.evaluate.data_sets import read_data_set

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def read_texts(source, tokenizer):
    """What is read, as text again."""
    return [tokenizer.decode(tokens) for tokens in read_tokens(source, tokenizer)]


@pytest.fixture(autouse=True)
def _no_cache_but_the_tests_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path):
    """Write a file, and give its path as the user would."""

    def write(name, content):
        path = tmp_path / name
        if isinstance(content, dict):
            pyarrow.parquet.write_table(pyarrow.table(content), path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)))
        return str(path)

    return write


# ---------------------------------------------------------------------- texts


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson"])
def test_each_line_with_text_is_a_text(suffix, write, tokenizer):
    source = write(f"a{suffix}", [{"text": "one"}, {"text": "two\nlines", "source": "x"}])
    assert read_texts(source, tokenizer) == ["one", "two\nlines"]


def test_endings_may_be_in_capitals(write, tokenizer):
    assert read_texts(write("a.JSONL", [{"text": "one"}, {"text": "two"}]), tokenizer) == ["one", "two"]
    assert read_texts(write("a.CSV", "text\none\ntwo\n"), tokenizer) == ["one", "two"]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_may_be_one_list(indent, write, tokenizer):
    rows = [{"text": "one"}, {"text": "two\nlines"}]
    source = write("a.json", json.dumps(rows, indent=indent))
    assert read_texts(source, tokenizer) == ["one", "two\nlines"]
    source = write("b.json", json.dumps([*rows, 3]))
    assert f"{source}, item 2: found a int, expected an object with" in error_of(source, tokenizer)
    source = write("c.json", json.dumps(rows, indent=indent)[:-1])
    assert re.fullmatch(
        rf"{re.escape(source)}: no valid JSON \(.*\); expected one object per line, or a list of them",
        error_of(source, tokenizer),
    )


def test_messages_become_a_text_by_the_chat_template(write, tokenizer):
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert "Hello" in expected
    assert read_texts(write("a.jsonl", [{"messages": CHAT}]), tokenizer) == [expected]


def test_parquet_gives_the_same_texts_as_lines(write, tokenizer):
    texts, chats = ["one", "two"], [CHAT, CHAT[:1]]
    for column, values in (("text", texts), ("messages", chats)):
        lines = write(f"{column}.jsonl", [{column: value} for value in values])
        assert read_texts(write(f"{column}.parquet", {column: values}), tokenizer) == read_texts(lines, tokenizer)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a"])
def test_any_other_file_is_one_text(name, write, tokenizer):
    assert read_texts(write(name, "one\n\ntwo é\n"), tokenizer) == ["one\n\ntwo é\n"]


def test_empty_lines_and_empty_texts_are_left_out(write, tokenizer):
    source = write("a.jsonl", '\n{"text": "one"}\n\n{"text": "  "}\n{"text": ""}\n{"text": "two"}\n\n')
    assert read_texts(source, tokenizer) == ["one", "two"]


def test_byte_order_mark_is_no_part_of_the_text(write, tokenizer):
    assert read_texts(write("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n'), tokenizer) == ["one"]
    assert read_texts(write("a.txt", b"\xef\xbb\xbfone"), tokenizer) == ["one"]


# ---------------------------------------------------------------------- what cannot be read


def error_of(source, tokenizer):
    with pytest.raises(DataError) as error:
        read_texts(source, tokenizer)
    return str(error.value)


@pytest.mark.parametrize("broken", ['{"text": "tw', "two", '{"text": "two"} {"text": "three"}', "{'text': 'two'}"])
def test_broken_line_is_named(broken, write, tokenizer):
    source = write("a.jsonl", f'{{"text": "one"}}\n\n{broken}\n{{"text": "four"}}\n')
    assert re.fullmatch(
        rf"{re.escape(source)}, line 3: no valid JSON \(.*\); expected one object per line", error_of(source, tokenizer)
    )


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "x", "answer": "y"}, r"the keys \['answer', 'prompt'\]"),
        ({}, r"the keys \[\]"),
        ({"text": None}, r"the keys \['text'\]"),
        ({"text": 3}, '"text" as a int'),
        ({"messages": "Hi"}, '"messages" as a str'),
        (["one"], "a list"),
        ("one", "a str"),
    ],
)
def test_row_without_a_text_is_named_with_what_it_has(row, found, write, tokenizer):
    source = write("a.jsonl", [{"text": "one"}, row])
    message = error_of(source, tokenizer)
    assert re.fullmatch(
        rf'{re.escape(source)}, line 2: found {found}, expected an object with "text" \(a string\) or "messages" '
        r"\(a list\)",
        message,
    )


def test_row_of_a_parquet_file_without_a_text_is_named(write, tokenizer):
    source = write("a.parquet", {"text": ["one", None]})
    assert f"{source}, row 1: found the keys ['text'], expected" in error_of(source, tokenizer)


def test_messages_need_a_chat_template(write, tokenizer):
    source = write("a.jsonl", [{"text": "one"}, {"messages": CHAT}])
    tokenizer.chat_template = None
    assert f'{source}, line 2: has "messages", but the base model\'s tokenizer has no chat' in error_of(
        source, tokenizer
    )


@pytest.mark.parametrize("messages", [["Hi"], [{"role": "tool", "content": "Hi"}]])
def test_messages_that_the_chat_template_refuses_are_named(messages, write, tokenizer):
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] not in ['user', 'assistant'] %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    )
    source = write("a.jsonl", [{"messages": CHAT}, {"messages": messages}])
    assert f"{source}, line 2" in error_of(source, tokenizer)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"\n \n"], ids=["empty", "white"])
def test_file_without_a_text_is_named(name, content, write, tokenizer):
    source = write(name, content)
    assert f"data ({source})" in error_of(source, tokenizer)


def test_file_of_empty_texts_holds_no_text(write, tokenizer):
    for source in (write("a.jsonl", [{"text": ""}]), write("a.parquet", {"text": [" "]}), write("a.txt", "\n")):
        assert error_of(source, tokenizer) == f"data ({source}) holds no text"


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b"caf\xe9"), ("a.jsonl", b'{"text": "one"}\n{"text": "caf\xe9"}\n')]
)
def test_file_that_is_no_utf8_is_named(name, content, write, tokenizer):
    source = write(name, content)
    assert re.match(rf"{re.escape(source)}.* no UTF-8", error_of(source, tokenizer))


def test_broken_parquet_file_is_named_with_the_reason(write, tokenizer):
    source = write("a.parquet", b"PAR1 and no more")
    assert re.match(
        rf"data \({re.escape(source)}\) cannot be read as a data set: .*[Pp]arquet", error_of(source, tokenizer)
    )


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "missing.parquet", "missing.txt", "user/missing.jsonl", "missing.csv", "missing.tsv"]
)
def test_missing_file_is_named(name, tokenizer):
    assert error_of(name, tokenizer) == (
        f"data ({name}) is not a file: give .jsonl, .csv, .tsv, .parquet or text files, or a data set's name"
    )


def test_folder_is_read_as_a_data_set(tmp_path, tokenizer):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_texts(str(tmp_path / "set"), tokenizer) == ["one", "two"]


def test_folder_without_data_is_named(tmp_path, tokenizer):
    assert re.fullmatch(
        rf"data \({tmp_path}\) is a folder in which no data set can be read \(.+\): give its files \(.jsonl, .csv, "
        r".tsv, .parquet or text files\), or a folder with nothing but files of one of these kinds",
        error_of(str(tmp_path), tokenizer),
    )


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # old versions of datasets leave a file open
def test_folder_of_several_kinds_is_named(tmp_path, tokenizer):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}')
    (tmp_path / "more.csv").write_text("text\ntwo\n")
    assert error_of(str(tmp_path), tokenizer) == (
        f"data ({tmp_path}) is a folder with .csv and .jsonl files, but only one kind would be read: give the files"
    )
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: more.csv\n---\n")
    assert read_texts(str(tmp_path), tokenizer) == ["two"]


def test_folder_of_broken_files_is_named_with_the_reason(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "on')
    message = error_of(str(tmp_path), tokenizer)
    assert f"data ({tmp_path}) is a folder in which no data set can be read (" in message
    assert "An error occurred" not in message


@pytest.mark.parametrize(
    ("ending", "what"),
    [
        *[(ending, "is compressed: unpack it first") for ending in ("jsonl.gz", "GZ", "bz2", "xz", "zst", "zip")],
        *[(ending, "is compressed: unpack it first") for ending in ("tar", "tgz", "7z")],
        *[(ending, "is a spreadsheet: save it as .csv") for ending in ("xlsx", "xls", "ods")],
        *[(ending, "has formatted text: save it as .txt") for ending in ("pdf", "doc", "docx", "odt", "rtf", "epub")],
        *[(ending, "is not read: save it as .parquet") for ending in ("arrow", "feather", "orc", "avro", "db")],
        ("sqlite", "is not read: save it as .parquet"),
    ],
)
def test_files_of_other_kinds_are_refused_by_their_ending(ending, what, write, tokenizer):
    source = write(f"a.{ending}", "plain enough")
    expected = "(expected .jsonl, .csv, .tsv, .parquet or text files)"
    assert error_of(source, tokenizer) == f"data ({source}) {what} {expected}"
    assert f"data (missing.{ending}) is not a file" in error_of(f"missing.{ending}", tokenizer)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.unknown"])
def test_what_is_no_text_is_not_read_as_one(name, write, tokenizer):
    source = write(name, "one".encode("utf-16-le"))
    assert f"data ({source}) is no text, as it holds null characters: expected .jsonl," in error_of(source, tokenizer)
    for row in ({"text": "one"}, {"messages": CHAT}):
        source = write(name, [row, row])
        assert error_of(source, tokenizer) == (
            f"data ({source}) holds an object per line, and would be read as one text: name it .jsonl"
        )


@pytest.mark.parametrize("text", ["{ a block }\n", "{", '{"a": 1}\n', "text, messages\n"])
def test_a_text_may_begin_like_an_object(text, write, tokenizer):
    assert read_texts(write("a.txt", text), tokenizer) == [text]


@pytest.mark.parametrize("name", ["user/missing", "teknium/OpenHermes-2.5"])
def test_data_set_that_cannot_be_loaded_is_named_with_the_reason(name, tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # but `datasets` is
    assert re.match(rf"data \({name}\) cannot be read as a data set: .*{name}", error_of(name, tokenizer))


def refused(api, name):
    raise OSError(f"no {name} there")


def test_a_folder_that_was_read_elsewhere_is_not_taken_for_a_data_set(write, tokenizer, monkeypatch, tmp_path):
    (tmp_path / "notes").mkdir()
    write("notes/a.txt", "some text")
    monkeypatch.chdir(tmp_path)
    assert read_texts("notes", tokenizer)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert error_of("notes", tokenizer).startswith("data (notes) is neither a file nor a folder here")
    # Where the Hub may be asked, it is: a name alone is never looked up in the cache.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refused)
    assert error_of("notes", tokenizer) == "data (notes) cannot be read as a data set: no notes there"


def test_all_sources_that_cannot_be_read_are_named_at_once(write, tokenizer):
    broken, empty = write("a.jsonl", "{"), write("b.txt", " ")
    with pytest.raises(DataError) as raised:
        training_rows([broken, write("c.txt", "text"), empty], ["math"], tokenizer, 8, labelled=None)
    first, *others = str(raised.value).splitlines()
    assert first == "data cannot be read:"
    assert [broken in others[0], empty in others[1], len(others)] == [True, True, 2]


# ---------------------------------------------------------------------- sequences


@pytest.mark.parametrize("length", [2, 3, 7, 100])
def test_sequences_are_the_tokens_in_order_in_pieces_of_at_most_length(length, tokenizer):
    text = "a text of some length"
    tokens = tokenizer(text)["input_ids"]
    sequences = token_sequences([tokens], length)
    assert all(1 < len(sequence) <= length for sequence in sequences)
    assert all(len(sequence) == length for sequence in sequences[:-1])
    joined = [token for sequence in sequences for token in sequence]
    rest = len(tokens) % length
    assert joined == (tokens[:-1] if rest == 1 else tokens)


def test_texts_are_not_joined():
    assert token_sequences([[5, 6, 7], [8, 9]], 4) == [[5, 6, 7], [8, 9]]
    assert token_sequences([[5, 6, 7], [8]], 4) == [[5, 6, 7]]


@pytest.mark.parametrize("length", [1, 0, -5])
def test_length_that_leaves_nothing_to_predict_is_refused(length):
    with pytest.raises(DataError, match=rf"sequence_length \({length}\) must be at least 2"):
        token_sequences([[5, 6, 7]], length)


@pytest.mark.parametrize("texts", [[], [[5], [6]]])
def test_texts_of_single_tokens_are_refused(texts):
    with pytest.raises(DataError, match="holds no text of two tokens or more"):
        token_sequences(texts, 8)


def test_length_is_at_most_the_number_of_positions():
    config = tiny_llama(max_position_embeddings=16).config
    check_length(16, config)
    with pytest.raises(
        DataError, match=r"sequence_length \(17\) must be at most the model's number of positions \(16\)"
    ):
        check_length(17, config)
    check_length(10**9, transformers.BloomConfig())  # knows no limit


# ---------------------------------------------------------------------- names of sources


def test_sources_are_called_by_their_names_or_their_files():
    assert named_sources(["math=data/a.jsonl", "data/b.jsonl", "user/set", "x=a=b.txt"]) == {
        "math": "data/a.jsonl",
        "b": "data/b.jsonl",
        "set": "user/set",
        "x": "a=b.txt",
    }


@pytest.mark.parametrize(
    "values", [["a/x.jsonl", "b/x.jsonl"], ["x=a/x.jsonl", "b/x.jsonl"], ["x=a/x.jsonl", "x=b/x.jsonl"]]
)
def test_two_sources_of_one_name_are_an_error_with_both(values):
    with pytest.raises(
        DataError, match=r"data names 'x' twice \(a/x.jsonl and b/x.jsonl\): give each a name, name=FILE"
    ):
        named_sources(values)


@pytest.mark.parametrize("value", ["=a.jsonl", "math=", "="])
def test_source_needs_a_name_and_a_file_around_the_equals_sign(value):
    with pytest.raises(DataError, match=rf"data \({value}\)"):
        named_sources([value])


def test_equals_sign_of_a_path_is_no_name():
    assert named_sources(["runs/lr=0.1/train.jsonl"]) == {"train": "runs/lr=0.1/train.jsonl"}


# ---------------------------------------------------------------------- text that is none


@pytest.mark.parametrize(
    "row",
    [
        r'{"text": "hello \ud83d"}',
        r'{"messages": [{"role": "user", "content": "hello \ud83d"}]}',
        r'{"messages": [{"role": "user", "content": "hello"}], "tools": [{"name": "\ud83d"}]}',
    ],
)
def test_half_a_character_is_named_by_line(row, write, tokenizer):
    source = write("a.jsonl", f'{{"text": "fine 👍🏽"}}\n{row}\n')
    place = (
        rf"{re.escape(source)}, line 2: the text '.*\\ud83d' holds half of a character \(\\ud83d, a lone surrogate\)"
    )
    with pytest.raises(DataError, match=place):
        read_tokens(source, tokenizer)


@pytest.mark.parametrize(
    "row",
    [
        r'{"prompt": "1 + \udc00", "answer": "2"}',
        r'{"question": "1 + \udc00", "choices": ["a", "b"], "answer": "a"}',
        r'{"question": "1 + 1", "choices": ["a", "\udc00"], "answer": "a"}',
    ],
)
def test_half_a_character_in_a_question_is_named_by_line(row, write, tokenizer):
    source = write("a.jsonl", row)
    with pytest.raises(DataError, match=r"a.jsonl, line 1: the text '.*' holds half of a character \(\\udc00"):
        read_data_set("a", source, tokenizer, [], sequence_length=8)


def test_half_a_character_in_a_column_that_nobody_reads_is_no_matter(write, tokenizer):
    assert read_texts(write("a.jsonl", r'{"text": "fine", "note": "\ud83d"}'), tokenizer) == ["fine"]


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"text": ' + "[" * 80 + "]" * 80 + "}", '{"text": ' + "9" * 5000 + "}"]
)
def test_rows_that_no_table_has_are_named_by_line(content, write, tokenizer):
    with pytest.raises(DataError, match=r"a.jsonl, line 1: no valid JSON \(.*\); expected one object per line"):
        read_tokens(write("a.jsonl", content), tokenizer)


@pytest.mark.parametrize("source", ["x" * 5000, "/" + "x" * 5000, "x" * 300 + ".jsonl", "a\0b.jsonl"])
def test_names_that_no_file_can_have_are_named(source, tokenizer):
    with pytest.raises(DataError, match=r"data \(.*\) is not a file"):
        read_tokens(source, tokenizer)


def test_a_file_that_may_not_be_read_is_named(write, tokenizer, tmp_path):
    source = write("a.jsonl", '{"text": "a b c"}')
    (tmp_path / "a.jsonl").chmod(0)
    with ordinary_rights(), pytest.raises(DataError, match=r"a.jsonl cannot be read: Permission denied"):
        read_tokens(source, tokenizer)
