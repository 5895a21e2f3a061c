"""The whole demo: a base model, four experts, a gate that mixes them, and a comparison of them all.

Every stage is skipped if its result already exists, so a stopped demo goes on where it was.
"""

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

DOMAINS = ["python", "reference", "licences", "records"]
STAGES = ["model", "domains", "experts", "train", "eval", "generate"]
PROMPTS = ["#RUN 2035.06.11 | LOOM-07 | shift", "    def close(self):"]


@dataclass(frozen=True)
class Size:
    """How much work the demo does.

    Attributes:
        expert_steps: Training steps of each expert.
        gate_start: What the gate starts from; the experts' losses take minutes.
        gate_steps: Training steps of the gate.
        eval_sequences: Sequences evaluated per data set.
        new_tokens: Tokens generated per prompt.
    """

    expert_steps: int
    gate_start: str
    gate_steps: int
    eval_sequences: int
    new_tokens: int


FULL = Size(expert_steps=32, gate_start="losses", gate_steps=96, eval_sequences=10, new_tokens=40)
QUICK = Size(expert_steps=2, gate_start="random", gate_steps=2, eval_sequences=1, new_tokens=8)


def weft(*arguments: str | Path) -> None:
    """Print a command of the `weft` command line and run it.

    Args:
        *arguments: The arguments of the command.

    Raises:
        subprocess.CalledProcessError: If the command fails.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n$ {shlex.join(['weft', *words])}", flush=True)
    subprocess.run([sys.executable, "-m", "weft", *words], check=True)


def train_gate(work: Path, results: Path, size: Size) -> None:
    """Train the gate on texts that switch between the domains, unless already done.

    Args:
        work: The folder with the base model and the texts.
        results: The folder with the experts, which receives `mixture`.
        size: How long to train.
    """
    from stage import building

    if (results / "mixture").exists():
        return
    with building(results / "mixture") as partial:
        weft(
            *("train", "--base", work / "model"),
            *("--adapters", *[f"{domain}={results / 'experts' / domain}" for domain in DOMAINS]),
            *("--data", work / "data" / "train" / "mixed.jsonl", "--output", partial),
            # A short scaling pass, a gate with a hidden layer, and twice the weight, since the experts are trained so
            # little: what docs/evaluate.md found best.
            *("--scaling-pass-layers", "4", "--xlora-depth", "2", "--xlora-size", "256"),
            *("--gate-start", size.gate_start, "--global-scaling-weight", "2"),
            *("--max-steps", str(size.gate_steps), "--learning-rate", "5e-3"),
            *("--batch-size", "2", "--sequence-length", "256"),
        )
    print(f"moved to {results / 'mixture'}")


def evaluate(work: Path, results: Path, size: Size) -> None:
    """Compare the mixture with the base model and the single experts, unless already done.

    Args:
        work: The folder with the held-out texts.
        results: The folder with the mixture, which receives `eval.json`.
        size: How many sequences to evaluate.
    """
    # weft eval writes its table when it is complete, and goes on from finished cells when it was stopped.
    if not (results / "eval.json").exists():
        heldout = work / "data" / "heldout"
        weft(
            *("eval", results / "mixture"),
            *("--data", *[f"{name}={heldout / name}.jsonl" for name in [*DOMAINS, "mixed"]]),
            *("--rows", "base", "experts", "uniform", "weft", "oracle"),
            *("--max-sequences", str(size.eval_sequences), "--sequence-length", "256"),
            *("--output", results / "eval.json"),
        )
    print("\nperplexity on texts that switch between the domains:")
    for row, values in json.loads((results / "eval.json").read_text("utf-8"))["perplexity"].items():
        if "mixed" in values:  # texts of an earlier demo do not say where which domain is: no oracle
            print(f"  {row:<16} {values['mixed']:7.2f}")


def generate(results: Path, size: Size) -> None:
    """Let the mixture continue a few texts.

    Args:
        results: The folder with the mixture.
        size: How many tokens to generate.
    """
    for prompt in PROMPTS:
        weft(*("generate", results / "mixture", "--prompt", prompt, "--max-new-tokens", str(size.new_tokens)))


def parse_arguments() -> argparse.Namespace:
    """Read the command line.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).resolve().parent.parent / ".demo"
    parser.add_argument("--work-dir", type=Path, default=default, help=f"where all results go ({default})")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that everything works")
    return parser.parse_args()


def main() -> None:
    """Run the stages in order."""
    arguments = parse_arguments()
    # Set before the Hugging Face libraries are imported, here and in the commands: nothing is downloaded.
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # which peft imports where they are installed
        logging.getLogger(library).setLevel(logging.ERROR)
    from domains import ensure_domains
    from experts import ensure_experts
    from model import ensure_model

    work = arguments.work_dir.resolve()
    # A quick run shares the model and the texts, but its results must not pass for those of a full run.
    results, size = (work / "quick", QUICK) if arguments.quick else (work, FULL)
    stages = {
        "model": lambda: ensure_model(work / "model"),
        "domains": lambda: ensure_domains(work / "data", work / "model"),
        "experts": lambda: ensure_experts(
            results / "experts", work / "model", work / "data" / "train", DOMAINS, size.expert_steps
        ),
        "train": lambda: train_gate(work, results, size),
        "eval": lambda: evaluate(work, results, size),
        "generate": lambda: generate(results, size),
    }
    began = time.monotonic()
    for number, name in enumerate(STAGES[: STAGES.index(arguments.until) + 1], start=1):
        print(f"\n[{number}/{len(STAGES)}] {name}", flush=True)
        started = time.monotonic()
        stages[name]()
        print(f"[{number}/{len(STAGES)}] {name}: {time.monotonic() - started:.0f} s")
    print(f"\nThe demo took {(time.monotonic() - began) / 60:.1f} minutes; its results are in {results}.")


if __name__ == "__main__":
    main()
