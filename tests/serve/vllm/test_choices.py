"""Requests with choices of their own, in one batch: each gets what `generate` gives with that choice."""

import itertools
import random

import pytest
import torch

import weft
from engines import assert_same, chosen, engine, prompts, served
from weft.serve.requests import Served

pytestmark = pytest.mark.serve
pytest_plugins = ["engines"]

SERVED = Served("mix", ("code", "law", "math"))
ASKED = {
    "gate": ("mix", None),
    "code": ("mix:code", None),
    "math, which has a bias": ("mix:math", None),
    "base": ("mix:base", None),
    "weights": ("mix", {"weights": {"code": 0.7, "math": -0.4}}),
    "weights, g": ("mix", {"weights": {"law": 0.5}, "global_weight": 0.25}),
    "g": ("mix", {"global_weight": 0.3}),
    "top 1": ("mix", {"top_k": 1}),
    "all": ("mix", {"top_k": 3}),
}


SCHEMES = [{}, {"scaling_pass_layers": 1, "scaling_pass_value": 0.3}, {"gate_layer": 1, "top_k_lora": 2}]


@pytest.mark.parametrize(
    ("options", "eager"),
    [*((each, True) for each in SCHEMES), (SCHEMES[-1], False)],
    ids=["two passes", "short", "one pass", "one pass compiled"],
)
def test_a_batch_of_unlike_choices_with_identical_prompts(options, eager, base, make_mixture):
    folder, model = make_mixture(global_scaling_weight=1.5, **options)
    choices = {name: SERVED.choice(*asked) for name, asked in ASKED.items()}
    text = prompts((40,))[0]
    right = {name: chosen(model, folder, choice, text) for name, choice in choices.items()}
    assert len({tuple(tokens) for tokens, _ in right.values()}) >= len(right) - 1  # "all" may be the own top-k
    with engine(base, folder, enforce_eager=eager, enable_prefix_caching=True, max_num_batched_tokens=64) as llm:
        for seed in range(3):  # in other orders, later ones from the cache of prefixes
            order = random.Random(seed).sample(list(choices), len(choices))
            assert_same(served(llm, [text] * len(order), [choices[name] for name in order]), [right[n] for n in order])
        for name, choice in choices.items():  # alone
            assert_same(served(llm, [text], [choice]), [right[name]])


def test_preempted_and_chunked_texts_keep_their_choices(base, make_mixture, preempted):
    folder, model = make_mixture(global_scaling_weight=1.5)
    choices = [SERVED.choice(*asked) for asked in ASKED.values()]
    texts = prompts([28 + number % 4 for number in range(len(choices))])  # each comes to need a second block
    right = [chosen(model, folder, choice, text) for choice, text in zip(choices, texts, strict=True)]
    with engine(base, folder, max_num_batched_tokens=32, num_gpu_blocks_override=10) as llm:
        assert_same(served(llm, texts, choices), right)
    assert preempted


@pytest.mark.parametrize("options", SCHEMES, ids=str)
def test_shares_are_those_of_stream(options, base, make_mixture):
    from vllm import SamplingParams

    folder, model = make_mixture(**options)
    texts = prompts((5, 40, 17))
    asked = [("mix", None), ("mix", {"weights": {"law": 0.5}}), ("mix:code", None)]
    with engine(base, folder, max_num_batched_tokens=32) as llm:
        parameters = [
            SamplingParams(
                temperature=0,
                max_tokens=9,
                ignore_eos=True,
                extra_args={"weft": SERVED.choice(*each).written(), "weft_shares": str(number)},
            )
            for number, each in enumerate(asked)
        ]
        llm.generate([{"prompt_token_ids": text} for text in texts], parameters, use_tqdm=False)
        found = [llm.collective_rpc("weft_shares", args=(str(number), True))[0] for number in range(3)]
        assert llm.collective_rpc("weft_shares", args=("0", True))[0] == []
        totals, tokens = llm.collective_rpc("weft_gate")[0]
    steps = list(weft.stream(model, torch.tensor([texts[0]]), max_new_tokens=9, eos_token_id=[]))
    assert [number for number, _ in found[0]] == list(range(9))
    for (_, shares), step in zip(found[0], steps, strict=True):
        assert shares == pytest.approx(list(step.shares.values()), abs=1e-4)
    assert [shares for _, shares in found[1]] == [[0.0, 0.5, 0.0]] * 9
    assert [shares for _, shares in found[2]] == [[1.0, 0.0, 0.0]] * 9
    assert tokens == len(texts[0]) + 8  # the last token is not read any more
    assert sum(totals) == pytest.approx(tokens, rel=1e-3) or "gate_layer" in options


def test_all_orders_of_three_choices_on_one_cached_prompt(base, make_mixture):
    folder, model = make_mixture(gate_layer=1)
    text = prompts((70,))[0]
    choices = [SERVED.choice(*ASKED[name]) for name in ("gate", "code", "weights")]
    right = [chosen(model, folder, choice, text) for choice in choices]
    for order in itertools.permutations(range(3)):
        with engine(base, folder, enable_prefix_caching=True) as llm:
            for number in order:
                assert_same(served(llm, [text], [choices[number]]), [right[number]])
