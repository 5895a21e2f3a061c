"""What a request may ask of a mixture, and what is said of one that asks for something else."""

import pytest

from weft.errors import ConfigError
from weft.serve.prometheus import of_the_gate, written
from weft.serve.requests import Choice, RequestError, Served, cache_salt

SERVED = Served("mix", ("code", "law"))


def test_model_names():
    assert SERVED.names() == ["mix", "mix:code", "mix:law", "mix:base"]
    with pytest.raises(ConfigError, match="expert 'base' cannot be served: mix:base is the base model"):
        Served("mix", ("code", "base"))


@pytest.mark.parametrize(
    ("model", "options", "choice"),
    [
        ("mix", None, Choice()),
        (None, {}, Choice()),
        ("mix:law", {"shares": True}, Choice(alone="law", shares=True)),
        ("mix:base", None, Choice(alone="")),
        ("mix", {"weights": {"law": 1}}, Choice(weights=(0.0, 1.0))),
        ("mix", {"weights": {}, "global_weight": 0.5}, Choice(weights=(0.0, 0.0), global_weight=0.5)),
        ("mix", {"top_k": 1, "weights": None}, Choice(top_k=1)),
    ],
)
def test_what_is_asked_for_and_back(model, options, choice):
    assert SERVED.choice(model, options) == choice
    assert Choice.read(choice.written()) == choice


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("mix:lax", None, "The model 'mix:lax' does not exist. There are: mix, mix:code, mix:law, mix:base"),
        ("mix:", None, "The model 'mix:' does not exist"),
        (7, None, "The model 7 does not exist"),
        ("mix", [1], r"weft \(\[1\]\) must be an object with weights, top_k, global_weight, shares"),
        ("mix", {"topk": 1}, "weft has 'topk'; it can have weights, top_k, global_weight, shares"),
        ("mix", {"weights": {"lax": 1}}, "weft.weights has 'lax'; the experts are code, law"),
        ("mix", {"weights": "code"}, "must be an object: a weight for each expert that takes part, of code, law"),
        ("mix", {"weights": {"code": "1"}}, "weft.weights.code .'1'. must be a finite number"),
        ("mix", {"weights": {"code": float("nan")}}, "weft.weights.code .nan. must be a finite number"),
        ("mix", {"global_weight": 10**400}, "weft.global_weight .* must be a finite number"),
        ("mix", {"global_weight": True}, "weft.global_weight .True. must be a finite number"),
        ("mix", {"top_k": 3}, "weft.top_k .3. must be a whole number from 1 to 2, the number of experts"),
        ("mix", {"top_k": True}, "weft.top_k .True. must be a whole number"),
        ("mix", {"top_k": 1.0}, "weft.top_k .1.0. must be a whole number"),
        ("mix", {"shares": 1}, "weft.shares .1. must be true or false"),
        ("mix", {"top_k": 1, "weights": {"code": 1}}, "weft.top_k and weft.weights exclude each other"),
        ("mix:code", {"top_k": 1}, "weft.top_k is for model 'mix', where experts are mixed, not for 'mix:code'"),
    ],
)
def test_what_is_not_allowed_is_said_with_what_is(model, options, message):
    with pytest.raises(RequestError, match=message) as raised:
        SERVED.choice(model, options)
    error = raised.value.body()["error"]
    assert error["code"] == (404 if "exist" in message else 400)
    assert error["message"] == str(raised.value)


def test_salts_differ_where_choices_do_and_no_client_can_make_anothers():
    choices = [Choice(), *(SERVED.choice(name) for name in SERVED.names()[1:]), Choice(top_k=1)]
    choices += [Choice(weights=(1.0, 0.0)), Choice(weights=(1.0, 0.0), global_weight=2.0)]
    salts = [cache_salt(choice, clients) for choice in choices for clients in (None, "", "mine")]
    assert len(set(salts)) == len(salts)
    assert salts[0] is None
    assert cache_salt(Choice(), salts[-3]) not in salts
    assert cache_salt(Choice(top_k=1, shares=True), None) == cache_salt(Choice(top_k=1), None)


def test_what_prometheus_reads_of_the_gate():
    text = written(of_the_gate(["code", 'a"b\\\n'], [1.0, 3.0], 4))
    assert 'weft_gate_share{expert="code"} 0.25\n' in text
    assert 'weft_gate_share{expert="a\\"b\\\\\\n"} 0.75\n' in text
    assert "# TYPE weft_gate_tokens_total counter\nweft_gate_tokens_total 4\n" in text
    assert 'weft_gate_share{expert="code"} 0.0\n' in written(of_the_gate(["code"], [0.0], 0))
