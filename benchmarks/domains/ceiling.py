"""How good a choice among experts can be that is not told the domain: a mixture beside Bayes' rule and the oracle.

    python benchmarks/domains/ceiling.py 4-plateau-0

In a hidden Markov model the experts write a text in turns, and after each token another one goes on with probability
1/TURN. Given the tokens before t, P(e | x_<t) is what can be known of the present expert (the forward algorithm). The
best prediction from the experts' own is then

    p(x_t) = sum_e P(e | x_<t) p_e(x_t | x_<t),

whose loss is the ceiling for a gate that chooses among experts. The oracle is told e. A mixture adds up parameters, not
predictions, so it can be on either side of the ceiling.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from base_models import suffix
from torch import Tensor
from work import NAMES, ROOT, UNSEEN, mixture_parser, opened, read_rows

sys.path.insert(0, str(ROOT / "benchmarks"))
from harness import save, setting

TURNS = (64, 256)


def main() -> None:
    """Measure, and write the table."""
    arguments = mixture_parser(__doc__).parse_args()
    from weft.data.labelled import labelled_tokens

    size = int(arguments.mixture.split("-")[0])
    names = NAMES[:size]
    model, tokenizer = opened(arguments)
    found: dict[str, dict[str, float]] = {}
    for data in (f"mixed-{size}", *names, *UNSEEN[:2]):
        rows = list(read_rows(arguments.texts / data / "test.jsonl"))[: arguments.texts_of_each]
        sums: dict[str, list[Tensor]] = {}
        for number, row in enumerate(rows):
            labelled = {**row, "expert": data} if data in names else row
            ids, labels = labelled_tokens(labelled, f"row {number}", tokenizer, names)
            told = None if data in UNSEEN else labels[1 : arguments.length]
            for name, losses in of_text(model, ids[: arguments.length], names, told).items():
                sums.setdefault(name, []).append(losses)
        found[data] = {name: float(torch.cat(losses).mean()) for name, losses in sums.items()}
        print(data, {name: round(math.exp(loss), 3) for name, loss in found[data].items()}, flush=True)
    result = {"setting": setting(), "mixture": arguments.mixture, "length": arguments.length, "losses": found}
    save(f"domains-ceiling-{arguments.mixture}{suffix(arguments.model)}", result, table(found))


@torch.no_grad()
def of_text(model: Any, ids: list[int], names: list[str], told: list[int] | None) -> dict[str, Tensor]:
    """The loss of each token but the first: of the mixture, by Bayes' rule, of the oracle or else the base."""
    from weft.base_model.likelihoods import negative_log_likelihoods
    from weft.model.model import at_own_weight

    tokens = torch.tensor([ids])

    def losses() -> Tensor:
        return negative_log_likelihoods(model(input_ids=tokens).logits, tokens)[0].double()

    found, alone = {"mixture": losses()}, []
    for name in names:
        with at_own_weight(model, {name: 1.0}):
            alone.append(losses())
    each = torch.stack(alone, -1)  # [token, expert]
    for turn in TURNS:
        found[f"Bayes, turns of {turn}"] = by_bayes(each, turn)
    if told is None:
        with model.disable_adapter():
            found["base"] = losses()
    else:
        found["oracle"] = each.gather(-1, torch.tensor(told)[:, None])[:, 0]
    return found


def by_bayes(losses: Tensor, turn: int) -> Tensor:
    """The loss of each token if the expert is known only from the tokens before; losses are [token, expert]."""
    experts = losses.shape[1]
    change = torch.full((experts, experts), 1 / turn / max(1, experts - 1), dtype=losses.dtype)
    change.fill_diagonal_(1 - 1 / turn if experts > 1 else 1.0)
    known, found = torch.full((experts,), 1 / experts, dtype=losses.dtype), []
    for token in losses:
        joint = known.log() - token
        found.append(-joint.logsumexp(0))
        known = joint.softmax(0) @ change
    return torch.stack(found)


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: perplexities, and the mixture's relative to each."""
    lines = ["| | mixture | / Bayes | / oracle | / base | Bayes / oracle |", "| --- |" + " ---: |" * 5]
    for data, of in found.items():
        bayes = min(of[f"Bayes, turns of {turn}"] for turn in TURNS)

        def over(one: float, name: str, of: dict[str, float] = of) -> str:
            return f"{math.exp(one - of[name]):.3f}" if name in of else ""

        cells = [f"{math.exp(of['mixture']):.3f}", f"{math.exp(of['mixture'] - bayes):.3f}"]
        cells += [over(of["mixture"], "oracle"), over(of["mixture"], "base"), over(bayes, "oracle")]
        lines.append(f"| {data} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
