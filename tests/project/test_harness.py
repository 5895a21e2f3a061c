"""A mixture in lm-evaluation-harness gives the numbers that `weft eval` gives."""

import importlib.util
import json
import random
import warnings
from pathlib import Path

import pytest
import transformers

import weft
from models import let_the_gate_decide, quietly
from weft.evaluate.data_sets import DataSet, Text, token_windows
from weft.evaluate.scoring import Runner, score
from weft.options import EvalOptions

# It is an extra of its own: it brings some forty packages, and takes a while to import.
pytestmark = pytest.mark.slow
if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed: pip install 'weft[harness]'", allow_module_level=True)


@pytest.fixture
def trained(mixture):
    """A mixture whose gate differs from token to token."""
    let_the_gate_decide(mixture)
    return mixture


@pytest.fixture
def tokenizer(base_folder):
    return transformers.AutoTokenizer.from_pretrained(base_folder)


@pytest.mark.filterwarnings("ignore")  # the harness' own
def test_perplexity_agrees_with_rolling_log_likelihood(trained, tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, window = weft.from_pretrained(trained), 16
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=window)
    texts = ["short", "the quick brown fox jumps over the lazy dog, and over it again", "x" * 33]
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    theirs = harness.loglikelihood_rolling(requests, disable_tqdm=True)

    # The harness scores the first token too, after a prefix; and its windows hold one token more, which is only scored.
    tokens = [[harness.prefix_token_id, *tokenizer(text)["input_ids"]] for text in texts]
    examples = [Text(one, [0] * len(one), token_windows(len(one), window + 1, window)) for one in tokens]
    data = DataSet("x", "perplexity", examples, [0, 1, 2], [None] * 3)
    ours = score(Runner(model), data)
    assert [weight for _, weight in ours] == [len(one) - 1 for one in tokens]
    assert [-loss for loss, _ in ours] == pytest.approx(theirs, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_example_runs_offline_and_agrees_on_accuracy(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = random.Random(0)
    words = ["fox", "mathematician", "dog", "code", "a lazy one", "no"]
    rows = [
        {"question": f"{rng.choice(words)} and", "choices": rng.sample(words, 3), "answer": rng.randrange(3)}
        for _ in range(20)
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    path = Path(__file__).parents[2] / "examples" / "harness.py"
    spec = importlib.util.spec_from_file_location("harness", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = quietly(module.main, ["--model", trained, "--data", str(data)])
    from weft.evaluate import evaluate

    ours = evaluate(EvalOptions(trained, data=[f"q={data}"], rows=["weft"]))["weft"]["q"]
    assert ours == theirs["acc_norm,none"]
    assert 0 < ours < 1
