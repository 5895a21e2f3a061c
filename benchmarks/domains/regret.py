"""Where a mixture is worse than a text's own expert: at which positions, and at which tokens of the gate's.

    python benchmarks/domains/regret.py 4-plateau-0                       # at its own weight
    python benchmarks/domains/regret.py 4-plateau-0 --weights 1 1.44      # and at others

On test texts of single domains. The regret of a token is its loss with the mixture less its loss with the domain's own
expert (alone, at weight 1), in nats. Each column has the sum over its tokens divided by all tokens of the domain, so
that the columns of a kind add up to the whole. A share is the own expert's part of the gate's weights at the token that
predicts, in the mean over layers.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import torch
from base_models import suffix
from torch import Tensor
from torch.nn.functional import cross_entropy
from work import NAMES, ROOT, mixture_parser, opened, read_rows

sys.path.insert(0, str(ROOT / "benchmarks"))
from harness import save, setting

POSITIONS = (0, 1, 4, 16, 64, 10**9)
SHARES = (0.0, 0.3, 0.6, 0.8, 0.9, 1.01)
KINDS = {"position": POSITIONS, "share": SHARES}


def main() -> None:
    """Measure a mixture at some weights, and write the table."""
    parser = mixture_parser(__doc__)
    parser.add_argument("--weights", nargs="*", type=float, help="values of global_scaling_weight; default its own")
    arguments = parser.parse_args()
    model, tokenizer = opened(arguments)
    found: dict[str, dict[str, Any]] = {}
    for weight in arguments.weights or [model.get_global_scaling_weight()]:
        model.set_global_scaling_weight(weight)
        for name in NAMES[: int(arguments.mixture.split("-")[0])]:
            rows = list(read_rows(arguments.texts / name / "test.jsonl"))[: arguments.texts_of_each]
            texts = [tokenizer(row["text"]).input_ids[: arguments.length] for row in rows]
            found.setdefault(f"{weight:g}", {})[name] = summary(*regrets(model, name, texts))
    result = {"setting": setting(), "mixture": arguments.mixture, "length": arguments.length, "weights": found}
    save(f"domains-regret-{arguments.mixture}{suffix(arguments.model)}", result, table(found))


def regrets(model: Any, name: str, texts: list[list[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """For each text: the regret of its tokens but the first, and the own expert's share where each is predicted."""
    from weft.model.model import at_own_weight

    own = list(model.xlora_config.expert_names).index(name)
    found, shares = [], []
    hook = model.internal_xlora_classifier.register_forward_hook(lambda gate, given, scalings: seen.append(scalings))
    try:
        for text in texts:
            seen: list[Tensor] = []
            mixed = losses(model, text)
            weights = seen[-1].detach().float()[0]  # [seq, layers, experts]
            shares.append(weights[:-1, :, own].mean(-1))
            with at_own_weight(model, {name: 1.0}):
                found.append(mixed - losses(model, text))
    finally:
        hook.remove()
    return found, shares


@torch.no_grad()
def losses(model: Any, text: list[int]) -> Tensor:
    """The loss of each token but the first."""
    ids = torch.tensor([text])
    return cross_entropy(model(input_ids=ids).logits[0, :-1].float(), ids[0, 1:], reduction="none")


def summary(found: list[Tensor], shares: list[Tensor]) -> dict[str, Any]:
    """Whole regret, and its parts by position and by share: (part of the tokens, part of the regret)."""
    regret = torch.cat(found)
    of = {"position": torch.cat([torch.arange(len(text)) for text in found]), "share": torch.cat(shares)}
    parts = {
        kind: [
            (float(inside.float().mean()), float(regret[inside].sum()) / len(regret))
            for low, high in pairwise(edges)
            for inside in [(of[kind] >= low) & (of[kind] < high)]
        ]
        for kind, edges in KINDS.items()
    }
    return {"regret": float(regret.mean()), **parts}


def table(found: dict[str, dict[str, Any]]) -> str:
    """In Markdown, a table for each kind of part."""
    text = ""
    for kind, edges in KINDS.items():
        columns = [f"{low:g} to {high:g}" for low, high in pairwise(edges[:-1])] + [f"from {edges[-2]:g}"]
        text += f"| weight | domain | regret | {kind} {' | '.join(columns)} |\n"
        text += "| --- | --- |" + " ---: |" * len(edges) + "\n"
        for weight, domains in found.items():
            for name, one in domains.items():
                parts = " | ".join(f"{regret:+.4f} ({tokens:.0%})" for tokens, regret in one[kind])
                text += f"| {weight} | {name} | {one['regret']:+.4f} | {parts} |\n"
        text += "\n"
    return text


if __name__ == "__main__":
    main()
