"""Several engines behind one address: what a mixture writes there is what `generate` writes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from engines import NEW, choosing, generated
from servers import PROMPT, request, started

from weft.serve.requests import Served

pytestmark = pytest.mark.serve
pytest_plugins = ["engines", "servers"]

SERVED = Served("my-mixture", ("code", "law"))


def test_two_engines_of_vllms_data_parallelism(saved):
    folder, model = saved
    asked = [("my-mixture", None), ("my-mixture:law", None), ("my-mixture", {"weights": {"code": 0.7}})]
    right = []
    for each in asked:
        with choosing(model, SERVED.choice(*each)):
            right.append(generated(model, [PROMPT])[0][0])
    flags = ["--data-parallel-size", "2"]
    with started(folder, *flags, VLLM_CPU_OMP_THREADS_BIND="0|1") as (port, *_), ThreadPoolExecutor(8) as pool:

        def one(each):
            body = {"model": each[0], "prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
            body |= {"return_token_ids": True, "weft": {**(each[1] or {}), "shares": True}}
            return request(port, "/v1/completions", body)["choices"][0]

        for choice, tokens in zip(pool.map(one, asked * 6), right * 6, strict=True):
            assert choice["token_ids"] == tokens
            assert all(choice["weft"]["shares"])
            assert len(choice["weft"]["shares"]) == NEW
