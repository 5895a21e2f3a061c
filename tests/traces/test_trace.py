"""A trace holds what the layers followed, token by token, and comes back from its file as it was."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from models import tiny_tokenizer
from weft.evaluate import perplexity
from weft.traces.trace import TracedText

TEXT = "the <b>café</b> \u202eend"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(base_folder, base_adapters):
    torch.manual_seed(1)
    return weft.from_adapters(str(base_folder), base_adapters, layerwise_scalings=True).eval()


@pytest.fixture
def traced(model, tokenizer):
    return weft.trace(model, TEXT, tokenizer=tokenizer, title="a text")


def assert_same(one, other):
    for name in ("scalings", "token_ids", "log_probs", "base_log_probs"):
        assert torch.equal(getattr(one, name).nan_to_num(9), getattr(other, name).nan_to_num(9))
    for name in ("pieces", "expert_names", "layer_names", "texts", "title", "num_left_out"):
        assert getattr(one, name) == getattr(other, name)


def test_scalings_are_those_that_the_layers_followed_and_pieces_the_text(model, tokenizer, traced):
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        model(ids)
    torch.testing.assert_close(traced.scalings.float(), model.get_latest_scalings()[0], atol=1e-3, rtol=0)
    assert traced.token_ids.tolist() == ids[0].tolist()
    assert "".join(traced.pieces) == TEXT
    assert traced.layer_names == tuple(model.xlora_config.layer_names)
    assert traced.texts == (TracedText("", ids.shape[1]),)


def test_ids_and_text_give_the_same_trace(model, tokenizer, traced):
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    for given in (ids, ids[0], ids[0].tolist()):
        assert_same(weft.trace(model, given, tokenizer=tokenizer, title="a text"), traced)
    assert weft.trace(model, ids).pieces[0] == f"#{int(ids[0, 0])} "


def test_top_k_is_applied(model, tokenizer):
    model.set_topk_lora(1)
    try:
        traced = weft.trace(model, TEXT, tokenizer=tokenizer)
    finally:
        model.set_topk_lora(None)
    assert ((traced.scalings > 0).sum(-1) == 1).all()
    assert torch.allclose(traced.shares().sum(-1), torch.ones(len(traced)))


def test_fixed_scalings_are_recorded_once_for_all_layers(model, tokenizer):
    with model.fixed_scalings({"code": 0.5}):
        traced = weft.trace(model, TEXT, tokenizer=tokenizer)
    assert traced.layer_names == ("all layers",)
    assert traced.scalings.unique(dim=0).tolist() == [[[0.0, 0.5]]]
    assert traced.shares().unique(dim=0).tolist() == [[0.0, 1.0]]


def test_probabilities_are_those_of_perplexity_under_both_models(model, tokenizer, traced):
    ids = [tokenizer(TEXT).input_ids]
    mixture, base = traced.perplexities()
    assert mixture == pytest.approx(perplexity(model, ids, 1), rel=1e-4)
    with model.disable_adapter():
        assert base == pytest.approx(perplexity(model, ids, 1), rel=1e-4)
    assert traced.log_probs.isnan().tolist() == [True] + [False] * (len(traced) - 1)


def test_data_sets_are_traced_as_their_texts_alone_whatever_the_padding(model, tokenizer):
    data = {"one": ["abc", "defghij" * 3], "two": ["xy" * 9]}
    together = weft.trace_data(model, data, tokenizer=tokenizer, batch_size=3)
    alone = [weft.trace(model, text, tokenizer=tokenizer) for texts in data.values() for text in texts]
    assert [(text.name, text.num_tokens) for text in together.texts] == [("one", 3), ("one", 21), ("two", 18)]
    torch.testing.assert_close(together.scalings, torch.cat([one.scalings for one in alone]), atol=2e-3, rtol=0)
    torch.testing.assert_close(
        together.log_probs, torch.cat([one.log_probs for one in alone]), atol=1e-4, rtol=0, equal_nan=True
    )
    rows = together.by_name()
    torch.testing.assert_close(rows["one"], together.shares()[:24].mean(0))
    torch.testing.assert_close(rows["two"], together.shares()[24:].mean(0))


def test_a_trace_is_bounded_and_says_what_it_left_out(model, tokenizer):
    traced = weft.trace(model, "x" * 50, tokenizer=tokenizer, max_tokens=20)
    assert (len(traced), traced.num_left_out) == (20, 30)
    data = {"one": ["a" * 9, "b" * 9], "two": ["c" * 4]}
    traced = weft.trace_data(model, data, tokenizer=tokenizer, max_tokens=24, sequence_length=5)
    assert [(text.name, text.num_tokens) for text in traced.texts] == [
        *[("one", 5), ("one", 4), ("one", 3)],
        ("two", 4),
    ]
    assert traced.num_left_out == 6
    assert_same(traced.head(24), traced)
    short = traced.head(6)
    assert [text.num_tokens for text in short.texts] == [5, 1]
    assert short.num_left_out == 6 + len(traced) - 6


def test_a_generation_is_traced_as_stream_gives_it(model, tokenizer):
    options = {"tokenizer": tokenizer, "max_new_tokens": 6, "temperature": 0.8, "seed": 3}
    steps = list(weft.stream(model, "the code", **options))
    traced = weft.trace_generation(model, "the code", **options)
    (text,) = traced.texts
    assert text.prompt_length == 8
    assert traced.token_ids[8:].tolist() == [step.token for step in steps]
    # A step has the shares of the position that predicted it.
    shares = torch.tensor([list(step.shares.values()) for step in steps])
    torch.testing.assert_close(traced.weights()[7:-1], shares, atol=1e-3, rtol=0)


def test_save_and_load_give_the_same_trace(traced, tmp_path):
    file = tmp_path / "text.trace"
    traced.save(file)
    assert_same(weft.Trace.load(file), traced)
    assert [path.name for path in tmp_path.iterdir()] == ["text.trace"]


def test_a_trace_that_cannot_be_written_leaves_the_one_before(traced, tmp_path, monkeypatch):
    file = tmp_path / "text.trace"
    traced.save(file)
    before = file.read_bytes()

    def full(tensors, path, metadata):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weft.traces.trace.save_file", full)
    with pytest.raises(ValueError, match=r"text.trace cannot be written: .*No space left"):
        traced.save(file)
    assert file.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def rewritten(file, change):
    """The same file with other metadata."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(metadata, tensors)
    save_file(tensors, file, metadata=metadata)


def without_title(metadata, tensors):
    metadata["trace"] = json.dumps({k: v for k, v in json.loads(metadata["trace"]).items() if k != "title"})


def with_header(**values):
    def change(metadata, tensors):
        metadata["trace"] = json.dumps({**json.loads(metadata["trace"]), **values})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta, _: meta.update(format="other"), r"is no trace \(format 'other', expected 'weft-trace'\)"),
        (lambda meta, _: meta.update(version="2"), r"version '2', newer than this weft reads \(1\): update weft"),
        (lambda meta, _: meta.update(version="one"), r"version 'one', newer than this weft reads \(1\)"),
        (lambda meta, _: meta.update(trace="{"), r"is no whole trace \(its header is no JSON"),
        (lambda meta, _: meta.update(trace="[]"), r"its header is no JSON object"),
        (without_title, r"its header lacks or garbles something: KeyError\('title'\)"),
        (lambda _, tensors: tensors.pop("log_probs"), r"is no whole trace \(.*log_probs.*\): record it again"),
        (
            lambda _, tensors: tensors.update(scalings=tensors["scalings"][1:]),
            r"is no whole trace: tensors of shapes .*, expected .*: record it again",
        ),
        (lambda meta, _: meta.update(version="²"), r"version '²', newer than this weft reads \(1\)"),
        (lambda meta, _: meta.update(trace="[" * 100_000), r"its header is no JSON: more than 64 levels"),
        (with_header(title="half \ud83d"), r"garbles something: ValueError\('half of a character in a text'\)"),
        (with_header(texts=[{"name": "a", "num_tokens": "3"}]), r"ValueError\(\"'3' is no number of tokens\"\)"),
        (with_header(texts=[{"name": "a", "num_tokens": -3}]), r"ValueError\('-3 is no number of tokens'\)"),
        (with_header(texts=[5]), r"its header lacks or garbles something: TypeError"),
        (with_header(left_out=10**400), r"its header lacks or garbles something: ValueError"),
        (
            lambda _, tensors: tensors.update(token_ids=tensors["token_ids"].float()),
            r"is no whole trace: it holds .*token_ids torch.float32.*, expected whole numbers for token_ids and",
        ),
        (
            lambda _, tensors: tensors.update(log_probs=tensors["log_probs"].bool()),
            r"is no whole trace: it holds .*log_probs torch.bool",
        ),
    ],
)
def test_other_and_broken_files_are_refused(traced, tmp_path, change, message):
    file = tmp_path / "text.trace"
    traced.save(file)
    rewritten(file, change)
    with pytest.raises(ValueError, match=message):
        weft.Trace.load(file)


def test_missing_truncated_and_foreign_files_are_refused(traced, tmp_path):
    with pytest.raises(ValueError, match=r"none.trace is no file: give one that"):
        weft.Trace.load(tmp_path / "none.trace")
    file = tmp_path / "text.trace"
    traced.save(file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"text.trace is no whole trace \(.*\): record it again"):
        weft.Trace.load(file)
    save_file({"x": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"is no trace \(format None"):
        weft.Trace.load(file)


def test_entropy_is_0_for_one_expert_and_1_for_all_alike(traced):
    scalings = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.2, 0.2], [0.0, 0.0]]])
    replaced = weft.Trace(
        scalings=scalings.half(),
        token_ids=torch.tensor([1, 2]),
        log_probs=torch.full((2,), math.nan),
        base_log_probs=torch.full((2,), math.nan),
        pieces=("a", "b"),
        expert_names=("math", "code"),
        layer_names=("x", "y"),
        texts=(TracedText("", 2),),
    )
    torch.testing.assert_close(replaced.entropy(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(replaced.shares(), torch.tensor([[0.75, 0.25], [0.5, 0.5]]), atol=1e-3, rtol=0)
    assert replaced.perplexities() is None


def test_tables_have_a_row_per_token_or_per_token_and_layer(model, tokenizer):
    traced = weft.trace_generation(model, "ab", tokenizer=tokenizer, max_new_tokens=3, temperature=1.0, seed=1)
    frame = traced.to_pandas()
    assert len(frame) == len(traced)
    assert frame["generated"].tolist() == [False, False] + [True] * (len(traced) - 2)
    assert frame["piece"].tolist() == list(traced.pieces)
    assert frame[["math", "code"]].to_numpy() == pytest.approx(traced.shares().numpy())
    assert frame["leading"].tolist() == [traced.expert_names[number] for number in traced.leading().tolist()]
    table = traced.to_arrow(layers=True)
    assert table.num_rows == traced.scalings[..., 0].numel()
    rows = table.to_pandas().set_index(["position", "layer"])
    layer = traced.layer_names[3]
    assert rows.loc[(1, layer), "code"] == pytest.approx(float(traced.scalings[1, 3, 1]))


def test_experts_named_as_a_column_keep_both(traced):
    names = {name: getattr(traced, name) for name in traced.__dataclass_fields__}
    frame = weft.Trace(**{**names, "expert_names": ("piece", "code")}).to_pandas()
    assert frame["piece"].tolist() == list(traced.pieces)
    assert frame["expert_piece"].to_numpy() == pytest.approx(traced.shares()[:, 0].numpy())


def test_the_model_is_as_before(model, tokenizer):
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(ids).logits
        weft.trace(model, TEXT, tokenizer=tokenizer)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, _: weft.trace(model, "a"), r"tokenizer \(None\) must be given with a text \('a'\)"),
        (lambda model, tok: weft.trace(model, "", tokenizer=tok), r"text \(''\) has no tokens, expected at least one"),
        (
            lambda model, _: weft.trace(model, torch.ones(2, 3, dtype=torch.long)),
            r"text \(torch.int64 of shape \[2, 3\]\) must be token ids",
        ),
        (
            lambda model, tok: weft.trace(model, "a", tokenizer=tok, max_tokens=0),
            r"max_tokens \(0\) must be a whole number of at least 1",
        ),
        (lambda model, tok: weft.trace_data(model, {}, tokenizer=tok), r"data is empty: give a name and a file"),
        (
            lambda model, tok: weft.trace_data(model, {"a": ["bc"]}, tokenizer=tok, batch_size=0),
            r"batch_size \(0\) must be at least 1",
        ),
        (
            lambda model, tok: weft.trace_data(model, {"a": ["bc"]}, tokenizer=tok, sequence_length=2000),
            r"sequence_length \(2000\) must be at most the model's number of positions \(1024\)",
        ),
        (
            lambda model, tok: weft.trace_generation(model, "a", tokenizer=tok, freeze_scalings_after=3),
            r"freeze_scalings_after \(3\) cannot be traced",
        ),
        (
            lambda model, tok: weft.trace(model, "hello \ud83d", tokenizer=tok),
            r"the text 'hello \\ud83d' holds half of a character \(\\ud83d, a lone surrogate\)",
        ),
        (
            lambda model, tok: weft.trace(model, "hello", tokenizer=tok, title="\ud83d"),
            r"the text '\\ud83d' holds half of a character",
        ),
        (
            lambda model, tok: weft.trace_data(model, {"\ud83d": ["bc"]}, tokenizer=tok),
            r"the text '\\ud83d' holds half of a character",
        ),
        (lambda model, tok: weft.trace(torch.nn.Linear(1, 1), "a", tokenizer=tok), r"model \(Linear\) must be a mix"),
    ],
)
def test_what_cannot_be_traced_is_said(model, tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, tokenizer)


def test_experts_that_are_off_cannot_be_traced(model, tokenizer):
    with model.disable_adapter(), pytest.raises(ValueError, match=r"the experts are off \(disable_adapter\)"):
        weft.trace(model, "a", tokenizer=tokenizer)


def test_a_text_beyond_the_models_positions_is_read_in_parts(model, tokenizer):
    traced = weft.trace(model, "x" * 1030, tokenizer=tokenizer)
    assert [text.num_tokens for text in traced.texts] == [1024, 6]
    assert repr(traced) == "<weft.Trace '': tokens 1030, texts 2, layers 6, experts 2>"
