"""Rows of .csv and .tsv: texts as they stand in their cells, and errors that name the columns or the line."""

import csv
import re

import pytest

from models import tiny_tokenizer
from weft.data.labelled import training_rows
from weft.data.texts import read_rows, read_tokens
from weft.errors import DataError
from weft.evaluate.data_sets import read_data_set

TEXTS = ["one, two", 'he said "three"', "four\nfive\ttabs", "6", "NA", " seven ", "x" * 200_000]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_the_column_text_is_read_as_it_was_written(name, delimiter, tmp_path):
    with open(tmp_path / name, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["id", "text"], *([number, text] for number, text in enumerate(TEXTS))])
    limit = csv.field_size_limit()
    rows = list(read_rows(str(tmp_path / name)))
    assert [row["text"] for _, row in rows] == TEXTS
    assert [place.rpartition(" ")[2] for place, _ in rows] == ["2", "3", "4", "6", "7", "8", "9"]
    assert csv.field_size_limit() == limit


def test_windows_files_are_read(write):
    source = write("a.csv", b"\xef\xbb\xbftext,id\r\none,1\r\n\r\ntwo,2\r\n")
    assert [row for _, row in read_rows(source)] == [{"text": "one", "id": "1"}, {"text": "two", "id": "2"}]


def test_empty_cells_are_no_values_and_empty_texts_are_left_out(write):
    source = write("a.csv", "text, expert\none,code\n,code\ntwo,\n")
    assert [row["expert"] for _, row in read_rows(source)] == ["code", "code", None]
    assert len(read_tokens(source, tiny_tokenizer())) == 2
    rows = training_rows([source], ["law", "code"], tiny_tokenizer(), 8, labelled=True)
    assert [row["expert_labels"] for row in rows] == [[1, 1, 1], [-100, -100, -100]]


def test_an_evaluation_reads_it(write):
    source = write("a.csv", "text,expert\none,code\ntwo,law\n")
    found = read_data_set("a", source, tiny_tokenizer(), ["code", "law"], sequence_length=8)
    assert (found.metric, found.labels) == ("perplexity", ["code", "law"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,body\n1,one\n", r"data ({}) has the columns \['id', 'body'\], expected one named \"text\""),
        ("the first text\nthe second\n", r"data ({}) has the columns \['the first text'\], expected"),
        ("id;text\n1;one\n", r"data ({}) has the columns \['id;text'\], expected"),
        ("text,text\none,two\n", r"data ({}) has the columns \['text', 'text'\], expected one named"),
        ("id,text\n1,one\n2,two, and more\n", "{}, line 3: found 3 cells, expected 2, one for each column"),
        ("id,text\n\n1\n", "{}, line 3: found 1 cells, expected 2"),
        ('id,text\n1,one\n2,"two\n3,three\n', r"{}, line 3: no table that can be read \(unexpected end of data\)"),
        ('id,text\n1,"one"two\n', r"{}, line 2: no table that can be read \(',' expected after '\"'\)"),
        ("", r"data ({}) holds no text"),
        ("text\n", r"data ({}) holds no text"),
    ],
)
def test_what_is_no_such_table_is_named(content, message, write):
    source = write("a.csv", content)
    with pytest.raises(DataError) as error:
        read_tokens(source, tiny_tokenizer())
    expected = message.replace("({})", r"\({}\)").replace("{}", re.escape(source))
    assert re.match(expected, str(error.value)), error.value
