"""Case after case, counted."""

from __future__ import annotations

import collections
import random
import time
from collections.abc import Callable
from pathlib import Path

from .cases import CASES
from .judge import Case, Verdict, give_up_rights, judge, limit_memory, remove
from .world import build


class Fuzzer:
    """Tries cases by number.

    Args:
        folder: for everything.
        seed: of all cases.
        kind: of cases; None takes all, by their weights.
    """

    def __init__(self, folder: Path, seed: int, kind: str | None = None) -> None:
        self.folder, self.seed = folder, seed
        self.kinds = {name: weight for name, (_, weight) in CASES.items() if kind in (None, name)}
        (folder / "world").mkdir()
        self.world = build(folder / "world")
        give_up_rights()
        limit_memory()
        self.last = ""
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()

    def try_case(self, number: int) -> Verdict:
        """One case."""
        rng = random.Random(f"{self.seed} {number}")
        kind = rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        place = self.folder / "case"
        for name in ("inputs", "output", "outside"):
            (place / name).mkdir(parents=True)
        (place / "outside" / "secret.json").write_text('{"peft_type": "LORA", "secret": 1}')
        case = Case(place / "inputs", place / "output", place / "outside", rng)
        try:
            action = CASES[kind][0](case, self.world)
            verdict = judge(case, action, self.world.base_is_whole)
        finally:
            remove(place)
        self.last = f"seed {self.seed} case {number} {kind} [{'; '.join(case.what)}]"
        self.counts[kind, verdict.outcome] += 1
        if verdict.outcome == "base changed":
            self.world.renew_base()
        return verdict

    def run(self, seconds: float, cases: int, say: Callable[[str], None]) -> int:
        """Many of them; how many were faults."""
        end, faults, number = time.monotonic() + seconds, 0, 0
        while number < cases and time.monotonic() < end:
            verdict = self.try_case(number)
            if verdict.is_fault:
                faults += 1
                say(f"{verdict.outcome.upper()} {self.last}: {verdict.words[:400]}")
            number += 1
        for kind in self.kinds:
            found = {outcome: count for (of, outcome), count in sorted(self.counts.items()) if of == kind}
            say(f"{kind}: {', '.join(f'{count} {outcome}' for outcome, count in found.items())}")
        say(f"{number} cases, {faults} faults")
        return faults
