"""`python -m fuzz`: see the package."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path


def main() -> int:
    """Run it; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=sys.modules["fuzz"].__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="how long")
    parser.add_argument("--cases", type=int, default=10**9, help="how many at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone, with its traceback")
    parser.add_argument("--kind", help="of this kind alone (see cases.py)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        os.environ |= {"HF_HOME": str(root / "cache"), "MPLCONFIGDIR": str(root / "cache" / "matplotlib")}
        from .run import Fuzzer  # which imports what reads these

        fuzzer = Fuzzer(root, given.seed, given.kind)
        if given.case is not None:
            verdict = fuzzer.try_case(given.case)
            print(fuzzer.last, verdict.outcome, verdict.words, verdict.trace, sep="\n")
            return int(verdict.is_fault)
        return int(fuzzer.run(given.seconds, given.cases, lambda line: print(line, flush=True)) > 0)


if __name__ == "__main__":
    sys.exit(main())
