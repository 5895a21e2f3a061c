"""Guessing ahead on the demo's model: plain cached decoding against `speculate`, per domain and on texts to copy.

Needs the long demo's mixture (`make demo-full`). The two take turns on each prompt; the text is the same, so the ratio
of times is that of tokens per second. About a quarter of an hour on two quiet cores. Writes
`results/DATE-speculation.{json,md}`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoTokenizer

import weft
from contenders import ROOT, quiet
from harness import save, setting
from weft.data.texts import read_tokens
from weft.generation.speculation import DraftTimer, NGramDrafts

DEMO = ROOT / ".demo-full"
DOMAINS = ("python", "reference", "licences", "records")
GUESSES = 8


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=3, help="per kind")
    arguments = parser.parse_args()
    quiet()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    model = weft.from_pretrained(DEMO / "mixture", DEMO / "model")
    model.get_base_model().generation_config.eos_token_id = None
    kinds = {kind: some[: arguments.prompts] for kind, some in prompts(tokenizer).items()}
    result = {
        "setting": setting(),
        "guesses": GUESSES,
        "kinds": {kind: measure(model, some, arguments.new_tokens) for kind, some in kinds.items()},
        "base_agrees": {kind: agreement(model, some, arguments.new_tokens // 2) for kind, some in kinds.items()},
    }
    save("speculation", result, table(result))


def prompts(tokenizer: Any) -> dict[str, list[torch.Tensor]]:
    """Kind -> prompts: the beginnings of held-out texts, and texts that are to be copied with a small change."""
    found: dict[str, list[torch.Tensor]] = {}
    for domain in DOMAINS:
        texts = read_tokens(str(DEMO / "data" / "heldout" / f"{domain}.jsonl"), tokenizer)
        found[domain] = [torch.tensor([tokens[:96]]) for tokens in texts[:8]]
    copies = []
    for domain in ("python", "records", "licences"):
        part = found[domain][0][:, :80]
        copies.append(torch.cat([part, part, part[:, :16]], 1))  # the model is in the middle of repeating it
    return {**found, "copying": copies}


def measure(model: Any, some: list[torch.Tensor], new_tokens: int) -> dict[str, float]:
    """Seconds of both, what was guessed right, and calls per token."""
    plain, guessing, calls, tokens = [], [], 0, 0
    for prompt in some:
        for _ in range(2):
            texts = []
            for speculate, seconds in ((0, plain), (GUESSES, guessing)):
                start = time.perf_counter()
                text = weft.generate(model, prompt, max_new_tokens=new_tokens, speculate=speculate)
                seconds.append(time.perf_counter() - start)
                texts.append(text)
            assert texts[0].tokens == texts[1].tokens
            calls, tokens = calls + texts[1].num_calls, tokens + len(texts[1].tokens)
    ratios = [one / other for one, other in zip(plain, guessing, strict=True)]
    return {
        "plain_tokens_per_s": new_tokens / statistics.median(plain),
        "tokens_per_s": new_tokens / statistics.median(guessing),
        "speedup": statistics.median(ratios),
        "slowest": min(ratios),
        "calls_per_token": calls / tokens,
    }


def agreement(model: Any, some: list[torch.Tensor], new_tokens: int) -> float | None:
    """Share of the base model's guesses (of the scaling pass, one per call) that were the mixture's own choice.

    None where no scaling pass reaches the LM head, so that only n-grams guess.
    """
    if model.xlora_config.reads_inside:
        return None
    plain = NGramDrafts.__call__, DraftTimer.draft_now
    NGramDrafts.__call__ = lambda self, limit: []  # type: ignore[method-assign]
    DraftTimer.draft_now = lambda self: True  # type: ignore[method-assign]
    try:
        right = calls = 0
        for prompt in some:
            text = weft.generate(model, prompt, max_new_tokens=new_tokens, speculate=1)
            # The first call reads the prompt, without a guess.
            right, calls = right + len(text.tokens) - text.num_calls, calls + text.num_calls - 1
        return right / calls
    finally:
        NGramDrafts.__call__, DraftTimer.draft_now = plain  # type: ignore[method-assign]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"Greedy decoding of the demo's mixture after prompts of about 96 tokens, `speculate={GUESSES}`, same text.",
        "",
        "| | plain, tokens/s | speculate | speed-up (median) | slowest | calls per token | base agrees |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, values in result["kinds"].items():
        agrees = result["base_agrees"][kind]
        shown = "-" if agrees is None else f"{agrees:.2f}"
        lines.append(
            f"| {kind} | {values['plain_tokens_per_s']:.1f} | {values['tokens_per_s']:.1f} | {values['speedup']:.2f} | "
            f"{values['slowest']:.2f} | {values['calls_per_token']:.2f} | {shown} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
