"""Does mistral.rs write the same text with a mixture that `weft convert --to mistralrs` gave it?

Tiny random Llamas with two experts and gates of several kinds, converted, loaded by the engine on the CPU and decoded
greedily from a prompt of one token: version 0.9.5's X-LoRA fails on longer ones. The same tokens come from weft. The
last line of the output is JSON: for each kind, how many tokens agree, or what the engine said.

The engine lives in an environment of its own, `.bench/mistralrs/venv` (see `mistralrs_decode.py`, which makes it).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# What the engine's environment lacks (torch, weft, the tests' models) is imported inside functions.

PROMPT, NEW_TOKENS, LIMIT = "a", 24, 120
KINDS: dict[str, dict[str, Any]] = {
    "depth 1": {},
    "depth 2": {"xlora_depth": 2, "xlora_size": 64},
    "depth 2, narrower than the model": {"xlora_depth": 2, "xlora_size": 16},
    "depth 4": {"xlora_depth": 4, "xlora_size": 64},
    "shared scalings": {"layerwise_scalings": False},
    "top-1": {"top_k_lora": 1},
    "temperature, global weight": {"softmax_temperature": 0.5, "global_scaling_weight": 0.5},
    "no softmax": {"enable_softmax": False},
    "experts in the scaling pass": {"scaling_pass_value": 0.5},
}


def main() -> None:
    """Compare all kinds, or, in the engine's environment, write one text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=str(ROOT / ".bench/mistralrs/venv/bin/python"), help="the engine's")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--engine", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        print(json.dumps(engine_text(*arguments.engine)))
        return
    result = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, kind in enumerate(arguments.kinds):
            result[kind] = compared(Path(temporary) / str(number), KINDS[kind], arguments.python)
            print(f"{kind}: {result[kind]}", file=sys.stderr)
    print(json.dumps(result))


def compared(folder: Path, options: dict[str, Any], python: str) -> str:
    """How far both texts agree."""
    base, mixture, ours = made(folder, options)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "RAYON_NUM_THREADS": "1", "MISTRALRS_CPU_KV_F32": "1"}
    command = [python, __file__, "--engine", base, mixture]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=True)
    except subprocess.SubprocessError as err:
        said = str(getattr(err, "stderr", None) or err).splitlines()
        at = next((number for number, line in enumerate(said) if "panicked" in line or "Error" in line), -2)
        return "not run: " + " ".join(line.strip() for line in said[at : at + 2])
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    if theirs == ours:
        return f"the same text ({NEW_TOKENS} tokens)"
    equal = next((n for n, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
    return f"differs after {equal} of {len(ours)} characters: {theirs!r} instead of {ours!r}"


def made(folder: Path, options: dict[str, Any]) -> tuple[str, str, str]:
    """(the base model's folder, the engine's folder, weft's text)."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import torch

    import weft
    from models import lora, save_adapter, tiny_llama, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None

    def base_model() -> Any:
        model = tiny_llama(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, intermediate_size=96)
        with torch.no_grad():  # a random model repeats itself: larger weights make its text depend on everything
            for parameter in model.parameters():
                parameter.mul_(1 if parameter.dim() == 1 else 4)
        return model

    base, targets = folder / "base", ["q_proj", "v_proj", "o_proj", "up_proj"]
    base_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config |= {"rope_theta": 10000.0, "tie_word_embeddings": False}  # it knows no rope_parameters
    (base / "config.json").write_text(json.dumps(config))
    adapters = {
        name: save_adapter(base_model(), lora(target_modules=targets), folder / name, seed=seed)
        for seed, name in enumerate(("left", "right"), 1)
    }
    model = weft.from_adapters(base_model(), adapters, **{"layerwise_scalings": True, **options}).eval()
    torch.manual_seed(7)
    for parameter in model.internal_xlora_classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "weft")
    weft.convert_mixture(folder / "weft", "mistralrs", folder / "mistralrs", base=base)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    assert inputs.input_ids.shape == (1, 1)
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}

    def text() -> str:
        tokens = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **options)[0, 1:]
        return tokenizer.decode(tokens)

    ours = text()
    with model.disable_adapter():
        assert text() != ours, "the experts must make a difference"
    with model.fixed_scalings({"left": 0.5, "right": 0.5}):
        assert text() != ours, "the gate must make a difference"
    return str(base), str(folder / "mistralrs"), ours


def engine_text(base: str, mixture: str) -> str:
    """The engine's greedy text."""
    from mistralrs import Architecture, CompletionRequest, ModelDType, Runner, Which

    which = Which.XLora(
        xlora_model_id=mixture,
        order=f"{mixture}/ordering.json",
        model_id=base,
        arch=Architecture.Llama,
        dtype=ModelDType.F32,
    )
    runner = Runner(which, max_seqs=1, prefix_cache_n=0, token_source="none")
    request = CompletionRequest(
        prompt=PROMPT, model="default", max_tokens=NEW_TOKENS, temperature=0.0, top_k=1, ignore_eos=True
    )
    return runner.send_completion_request(request).choices[0].text


if __name__ == "__main__":
    main()
