"""What is given to be read in Python: the same kinds in every function, and one error for all others."""

import re

import pytest
import torch

import weft
from models import tiny_llama, tiny_tokenizer
from weft.data.given import given_tokens
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
def functions(llama_adapters, tokenizer):
    """Each function that reads something, as one of what is given, and what it calls it."""
    model = weft.from_adapters(tiny_llama(vocab_size=len(tokenizer)), llama_adapters).eval()
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
        (5, "torch.int64 of shape []"),
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
