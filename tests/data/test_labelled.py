"""Training rows with labels: from the file's name, a row's, or its parts'."""

import json
import re

import pytest
from tokenizers.processors import TemplateProcessing

from models import tiny_tokenizer
from weft.data.labelled import tokens_and_parts, training_rows
from weft.errors import DataError

EXPERTS = ["math", "code"]
CHAT = {"messages": [{"role": "user", "content": "seven"}]}


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "data.jsonl")

    return write


def labels(*values, length=64):
    return [row["expert_labels"] for row in training_rows(values, EXPERTS, tiny_tokenizer(), length, labelled=True)]


def test_a_files_name_a_rows_expert_and_its_parts_label_tokens(write):
    text = "seven return seven return"
    file = write(
        {"text": text},
        {"text": text, "expert": "code"},
        {"text": text, "expert": None, "experts": None},
        {"text": text, "experts": [[0, "code"], [text.index(" seven"), "math"], [text.rindex(" return"), None]]},
    )
    number = len(tiny_tokenizer()(text).input_ids)
    named, by_row, null, by_part = labels(f"math={file}")
    assert named == null == [0] * number
    assert by_row == [1] * number
    assert sorted(set(by_part), key=by_part.index) == [1, 0, -100]
    unnamed, *_ = labels(file)
    assert unnamed == [-100] * number


def test_labels_change_no_row_and_are_cut_with_it(write):
    rows = {"text": "seven return " * 9, "experts": [[0, "math"], [40, "code"]]}, {"text": "seven"}, {"text": " \n "}
    file = write(*rows)
    plain = training_rows([file], EXPERTS, tiny_tokenizer(), 8, labelled=False)
    labelled = training_rows([file], EXPERTS, tiny_tokenizer(), 8, labelled=True)
    assert [row["input_ids"] for row in labelled] == [row["input_ids"] for row in plain]
    assert all(len(row["expert_labels"]) == len(row["input_ids"]) for row in labelled)


def test_a_special_token_behind_a_text_belongs_to_its_last_part():
    tokenizer = tiny_tokenizer()
    ends = TemplateProcessing(single="<eos> $A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = ends
    row = {"text": "seven return", "experts": [[0, "math"], [6, "code"]]}
    tokens, parts, names = tokens_and_parts(row, "here", tokenizer, None)
    assert tokens[0] == tokens[-1] == tokenizer.eos_token_id
    assert (parts[0], parts[-1], names) == (0, 1, ["math", "code"])


def test_data_without_labels_or_with_wrong_ones_is_an_error(write):
    file = write({"text": "seven return", "expert": None})
    with pytest.raises(DataError, match=r"need labels, and data \(.*data.jsonl\) names none of the experts \['math'"):
        labels(file)
    wrong = write({"text": "seven return", "expert": "math"}, {"text": "seven return", "expert": "mth"})
    with pytest.raises(DataError, match=r"line 2: the label 'mth' must be one of the experts \['math', 'code'.*\], or"):
        labels(wrong)
    with pytest.raises(DataError, match='"experts" counts the characters of "text", which is not there'):
        tokens_and_parts({**CHAT, "experts": [[0, "math"]]}, "line 1", tiny_tokenizer(), None)
    wrong = write({"text": "seven return", "experts": [[3, "math"]]})
    with pytest.raises(DataError, match=r"sequence_length \(1\) must be at least 2"):
        labels(f"math={file}", length=1)
    with pytest.raises(DataError, match=r'line 1: "experts" \(\[\[3, \'math\'\]\]\) must be \[\[start, name\], ...\]'):
        labels(wrong)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"expert": "mtah"}, r"line 2: the label 'mtah' must be one of the experts \['math', .*"),
        (
            {"experts": [[3, "math"]]},
            r'line 2: "experts" .* must be \[\[start, name\], ...\] in order, the first from 0 on',
        ),
    ],
)
def test_wrong_labels_are_not_left_out_without_a_word(row, message, tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [{"text": "two and two", "expert": "math"}, {"text": "def f(x):", **row}, {"text": "5", "expert": "?"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    said = []
    found = training_rows([str(file)], EXPERTS, tiny_tokenizer(), 64, labelled=None, say=said.append)
    assert "expert_labels" not in found[0]
    (line,) = said
    assert re.fullmatch(rf"labels are left out: {re.escape(str(file))}, {message}", line)
    training_rows([str(file)], EXPERTS, tiny_tokenizer(), 64, labelled=False, say=said.append)
    assert len(said) == 1
