"""A decoding step compiles as one graph, with a static cache.

In processes of their own, as the shape checks of this suite do not go together with torch.compile.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# It has no graphs of context managers, nor of transformers' own wrappers around forward.
pytestmark = pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 does not compile a step as one graph")

STEP = """
import json, sys, torch, weft
from transformers import StaticCache
from models import quietly, tiny_llama

adapters, options, backend, dtype = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.manual_seed(1)
base = tiny_llama().to(getattr(torch, dtype))
model = quietly(weft.from_adapters, base, adapters, layerwise_scalings=True, **options).eval()
ids = torch.arange(1, 8)[None]

def decode(step):
    cache = StaticCache(config=model.config, max_cache_len=16)
    logits = [model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits]
    for position in range(7, 12):
        token = logits[-1].argmax(-1)
        logits.append(
            step(
                input_ids=token,
                past_key_values=cache,
                use_cache=True,
                position_ids=torch.tensor([[position]]),
                logits_to_keep=1,
            ).logits.clone()
        )
    return torch.cat(logits, 1)

with torch.no_grad():
    expected = decode(base)
    # fullgraph: a graph break is an error. One graph for all steps: so is a second compilation. The function around
    # the call brings the base model's hooks, which are the passes, into the graph: torch.compile(base) leaves them out.
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    with torch._dynamo.config.patch(error_on_recompile=True):
        found = decode(torch.compile(lambda **inputs: base(**inputs), backend=counting, fullgraph=True, dynamic=False))
assert len(graphs) == 1
close = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 5e-2, "atol": 5e-2}
torch.testing.assert_close(found, expected, **close)
"""

# A quarter of a minute each: those that differ in one thing from another are slow.
CASES = [
    ({}, "aot_eager", "float32"),
    # Gathers: three experts, one of them chosen.
    pytest.param({"top_k_lora": 1}, "aot_eager", "float32", marks=pytest.mark.slow),
    pytest.param({"gate_layer": 1}, "aot_eager", "float32", marks=pytest.mark.slow),
    pytest.param({}, "eager", "float32", marks=pytest.mark.slow),
    pytest.param({}, "aot_eager", "bfloat16", marks=pytest.mark.slow),
    pytest.param({"top_k_lora": 2, "scaling_pass_value": 0.2}, "eager", "float32", marks=pytest.mark.slow),
    pytest.param({"scaling_pass_layers": 1}, "aot_eager", "float32", marks=pytest.mark.slow),
    pytest.param({"scaling_pass_layers": 1, "scaling_pass_rank": 2}, "aot_eager", "float32", marks=pytest.mark.slow),
]


def run(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("options", "backend", "dtype"), CASES, ids=str)
def test_a_decoding_step_is_one_graph(llama_adapters, options, backend, dtype):
    run(STEP, json.dumps(llama_adapters), json.dumps(options), backend, dtype)


GENERATE = """
import sys, torch, weft
from transformers import CompileConfig
from models import quietly, tiny_llama

torch.manual_seed(1)
model = quietly(weft.from_adapters, tiny_llama(), {"math": sys.argv[1], "code": sys.argv[2]}).eval()
ids = torch.arange(1, 8)[None]
options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
expected = model.generate(**options)
config = CompileConfig(backend="eager", fullgraph=True)
config._compile_all_devices = True  # transformers compiles on GPUs only, unless told so
for _ in range(2):
    found = model.generate(**options, cache_implementation="static", compile_config=config)
    assert torch.equal(found, expected)
"""


@pytest.mark.slow
def test_generate_compiles_with_a_static_cache(llama_adapters):
    run(GENERATE, llama_adapters["math"], llama_adapters["code"])
