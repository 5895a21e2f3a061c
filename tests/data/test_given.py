"""What is given to be read in Python: the same kinds in every function, and one error for all others."""

import re
from pathlib import Path

import pytest
import torch

import weft
from models import VOCAB, lora, save_adapter, tiny_llama, tiny_tokenizer
from weft.base_model.backbone import vocabulary_size
from weft.data.given import given_tokens, several
from weft.errors import ConfigError, DataError
from weft.evaluate import perplexity

TEXT = "The contract says"
CHAT = [{"role": "user", "content": "Hi"}]
EXPECTED = (
    "must be token ids ([5, 6, 7], torch.int64 of shape [seq] or [1, seq], or a row {'input_ids': [5, 6, 7]}), or, "
    "with tokenizer=, a text ('The contract says') or a row of one ({'text': 'The contract says'} or {'messages': "
    "[...]})"
)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def kinds(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    return {
        "text": TEXT,
        "row": {"text": TEXT, "source": "x"},
        "ids": ids,
        "tensor": torch.tensor(ids),
        "batch of one": torch.tensor([ids]),
        "row of ids": {"input_ids": ids, "text": "another"},
        "encoding": tokenizer(TEXT),
        "encoding of tensors": tokenizer(TEXT, return_tensors="pt"),
    }


def test_all_kinds_are_the_same_tokens(tokenizer):
    found = kinds(tokenizer)
    found["array"] = torch.tensor(found["ids"]).numpy()
    for name, given in found.items():
        assert given_tokens(given, "text", tokenizer) == found["ids"], name


def test_messages_are_rendered_and_a_prompt_is_to_be_answered(tokenizer):
    whole = given_tokens({"messages": CHAT}, "text", tokenizer)
    prompt = given_tokens({"messages": CHAT}, "prompt", tokenizer, is_prompt=True)
    assert tokenizer.decode(whole) == "user: Hi\n"
    assert tokenizer.decode(prompt) == "user: Hi\nassistant: "
    with pytest.raises(DataError, match="prompt: the prompt ends with a turn of the assistant"):
        given_tokens({"messages": [{"role": "assistant", "content": "Hi"}]}, "prompt", tokenizer, is_prompt=True)


@pytest.fixture
def mixture_model(llama_adapters, tokenizer):
    return weft.from_adapters(tiny_llama(vocab_size=len(tokenizer)), llama_adapters).eval()


@pytest.fixture
def functions(mixture_model):
    """Each function that reads something, as one of what is given, and what it calls it."""
    model = mixture_model
    return {
        "example 1": lambda given, **options: weft.fit_gate(model, [TEXT_IDS, given], **options),
        "text": lambda given, **options: weft.trace(model, given, **options).token_ids.tolist(),
        "text 0 of a": lambda given, tokenizer=None: weft.trace_data(
            model, {"a": [given]}, tokenizer=tokenizer, sequence_length=64
        ).token_ids.tolist(),
        "prompt": lambda given, **options: [
            *weft.trace_generation(model, given, max_new_tokens=1, **options).token_ids.tolist(),
            *weft.generate(model, given, max_new_tokens=2, **options).tokens,
        ],
        "sequence 0": lambda given, **options: [
            *weft.mean_scalings(model, [given], **options).flatten().tolist(),
            perplexity(model, [given], 1, **options),
        ],
    }


TEXT_IDS = [5, 6, 7, 8]


@pytest.mark.parametrize("what", ["example 1", "text", "text 0 of a", "prompt", "sequence 0"])
def test_every_function_takes_all_kinds(what, functions, tokenizer):
    found = {name: functions[what](given, tokenizer=tokenizer) for name, given in kinds(tokenizer).items()}
    for name, result in found.items():
        assert result == found["ids"], name
    assert functions[what]({"messages": CHAT}, tokenizer=tokenizer) != found["ids"] or what == "example 1"


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (5, "5, a single value"),
        (torch.tensor(5), "tensor(5), a single value"),
        (None, "NoneType"),
        (["one", "two"], "list"),
        ([0.5, 1.5], "torch.float32 of shape [2]"),
        ([True, False], "torch.bool of shape [2]"),
        (torch.ones(2, 3).long(), "torch.int64 of shape [2, 3]"),
        ({"prompt": "x"}, "the keys ['prompt']"),
        ({"text": 3}, "the keys ['text']"),
        ({"input_ids": "abc"}, "str"),
    ],
    ids=str,
)
def test_other_values_are_refused_with_an_example(given, kind, functions, tokenizer, without_type_checks):
    for what, function in functions.items():
        with pytest.raises(ConfigError, match=re.escape(f"{what} ({kind}) {EXPECTED}")):
            function(given, tokenizer=tokenizer)


@pytest.mark.parametrize("wrong", [10_000, -1])
def test_token_ids_that_the_model_does_not_have_are_refused(wrong, functions, tokenizer):
    size = len(tokenizer)
    for what, function in functions.items():
        with pytest.raises(ConfigError) as raised:
            function([5, wrong, 6])
        assert str(raised.value) == (
            f"{what} (token id {wrong}) must have ids of the model's vocabulary of {size} tokens, 0 to {size - 1}: "
            "take the tokenizer of its base model"
        )


def test_the_tokens_of_a_file_are_checked_too(mixture_model, tokenizer, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(TEXT)

    def trace_file(tokenizer):
        weft.trace_data(mixture_model, {"a": str(file)}, tokenizer=tokenizer, sequence_length=64)

    tokenizer.add_tokens([" contract"])  # which the model does not have
    with pytest.raises(ConfigError, match=rf"data \({file}\) \(token id {len(tokenizer) - 1}\) must have ids of the"):
        trace_file(tokenizer)
    with pytest.raises(ConfigError, match=rf"tokenizer \(None\) must be given with a file \({file}\)"):
        trace_file(None)


def test_the_vocabulary_is_that_of_the_embeddings(llama_adapters, base_folder, tmp_path):
    base = tiny_llama()
    assert vocabulary_size(base) == VOCAB
    base.resize_token_embeddings(VOCAB + 8)
    model = weft.from_adapters(base, llama_adapters)
    assert vocabulary_size(model) == vocabulary_size(model.base_model.backbone.base) == VOCAB + 8
    embedding = save_adapter(tiny_llama(), lora(target_modules=["embed_tokens", "q_proj"]), tmp_path / "a", seed=1)
    adapted = weft.from_adapters(tiny_llama(), {"embedding": embedding, "math": llama_adapters["math"]})
    assert vocabulary_size(adapted) == VOCAB
    assert vocabulary_size(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("my-model", r"'my-model'\) must be a tokenizer, e.g. AutoTokenizer.from_pretrained\('my-model'\)"),
        (Path("my-model"), r"'my-model'\) must be a tokenizer, e.g. AutoTokenizer.from_pretrained\('my-model'\)"),
        (torch.nn.Linear(2, 2), r"Linear\) must be a tokenizer, e.g. AutoTokenizer.from_pretrained\(\.\.\.\)"),
    ],
    ids=str,
)
def test_what_is_no_tokenizer_is_refused(wrong, named, functions, mixture_model):
    for function in functions.values():
        for given in (TEXT, TEXT_IDS):
            with pytest.raises(ConfigError, match=rf"^tokenizer \({named}"):
                function(given, tokenizer=wrong)
    with pytest.raises(ConfigError, match=rf"^tokenizer \({named}"):
        weft.trace_data(mixture_model, {"a": "a.txt"}, tokenizer=wrong, sequence_length=64)


def test_several_are_a_list_or_anything_that_can_be_gone_through(tokenizer):
    texts = ["one", "two"]
    assert several(texts, "examples") is texts
    assert several((text for text in texts), "examples") == several({"one": 1, "two": 2}.keys(), "examples") == texts
    kinds = {"None": None, "int": 5, "str": "one", "dict": {"text": "one"}, "Tensor": torch.tensor(5)}
    for kind, wrong in kinds.items():
        with pytest.raises(ConfigError, match=rf"^examples \({kind}\) must be a list of texts or rows: \[...\]$"):
            several(wrong, "examples")
    with pytest.raises(ConfigError, match=r"^examples \(BatchEncoding\)"):
        several(tokenizer(texts), "examples")


def test_every_function_of_several_refuses_one(mixture_model, tokenizer, without_type_checks):
    for wrong, kind in ((None, "None"), (TEXT, "str")):
        with pytest.raises(ConfigError, match=rf"sequences \({kind}\) must be a list of texts or rows"):
            perplexity(mixture_model, wrong, 1, tokenizer=tokenizer)
        with pytest.raises(ConfigError, match=rf"sequences \({kind}\) must be a list of texts or rows"):
            weft.mean_scalings(mixture_model, wrong, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"data of a \(None\) must be a list of texts or rows"):
        weft.trace_data(mixture_model, {"a": None}, tokenizer=tokenizer, sequence_length=64)
    for wrong, kind in ((None, "NoneType"), ([TEXT], "list")):
        with pytest.raises(ConfigError, match=rf"data \({kind}\) must be a table of data sets: \{{name: file or list"):
            weft.trace_data(mixture_model, wrong, tokenizer=tokenizer)


def test_texts_need_a_tokenizer(functions):
    for function in functions.values():
        for given in (TEXT, {"text": TEXT}):
            with pytest.raises(ConfigError, match=rf"tokenizer \(None\) must be given with a text \(.*{TEXT}"):
                function(given)


def test_a_text_without_tokens_is_refused(functions, tokenizer):
    for what in ("text", "prompt", "sequence 0"):
        for given in ("", []):
            with pytest.raises(ConfigError, match=rf"{what} \(.*\) has no tokens, expected at least one"):
                functions[what](given, tokenizer=tokenizer)
