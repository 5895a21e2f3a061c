"""What clients that people have are asked of either engine: the `openai` package and lm_eval's, unmodified."""

import json
import os
import subprocess
import sys

import pytest

from weft.evaluate.scoring import Runner, token_losses

PAIRS = [("the law", " of code"), ("a", "b"), ("x" * 40, "y" * 9)]


def check_weft_options(url, prompt):
    """The `openai` package sends options and gets shares; what is not allowed raises its errors."""
    import openai

    with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["mix", "mix:code", "mix:law", "mix:base"]
        shares = {"weft": {"weights": {"law": 0.5}, "shares": True}}
        answer = client.completions.create(model="mix", prompt=prompt, max_tokens=2, extra_body=shares)
        assert answer.choices[0].weft == {"shares": [{"code": 0.0, "law": 0.5}] * 2}
        with pytest.raises(openai.BadRequestError, match=r"weft\.top_k \(9\) must be a whole number from 1 to 2"):
            client.completions.create(model="mix", prompt=prompt, extra_body={"weft": {"top_k": 9}})
        with pytest.raises(openai.NotFoundError, match="The model 'other' does not exist"):
            client.completions.create(model="other", prompt=prompt)
    with openai.OpenAI(base_url=url, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def lm_eval(url, tokenizer):
    """What `lm_eval --model local-completions` gets: (log-likelihood, greedy) of each pair, and a text."""
    pytest.importorskip("lm_eval")
    code = f"""
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
api = LocalCompletionsAPI(model="mix", base_url={url + "/completions"!r}, tokenizer={tokenizer!r},
                          tokenizer_backend="huggingface", batch_size=2, max_length=64)
requests = [Instance("loglikelihood", {{}}, pair, number) for number, pair in enumerate({PAIRS!r})]
found = [list(one) for one in api.loglikelihood(requests, disable_tqdm=True)]
until = [Instance("generate_until", {{}}, ("the law", {{"until": ["z"], "max_gen_toks": 6}}), 0)]
json.dump([found, api.generate_until(until, disable_tqdm=True)], sys.stdout)
"""
    environment = {**os.environ, "OPENAI_API_KEY": "secret"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def check_log_likelihoods(found, model, tokens_of):
    """They are those of `weft eval`, for a tokenizer with a token for each character."""
    ids = [tokens_of(first + second) for first, second in PAIRS]
    for (first, _), losses, (log_prob, _) in zip(PAIRS, token_losses(Runner(model), ids), found, strict=True):
        assert log_prob == pytest.approx(-float(losses[len(first) - 1 :].sum()), abs=1e-3)
