"""All points of all writers: python -m faults [--only NAME ...] [--how HOW ...] [--sample N] [--seed N]."""

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch
import transformers

from faults.harness import HOW, Harness, sampled
from faults.scenarios import SCENARIOS


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[scenario.name for scenario in SCENARIOS])
    parser.add_argument("--how", nargs="*", default=HOW)
    parser.add_argument("--sample", type=int, help="points of each writer; all without it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    wrong = cases = 0
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder))
        for scenario in SCENARIOS:
            if scenario.name not in options.only:
                continue
            survey = harness.survey(scenario)
            for how in options.how:
                start, points = time.monotonic(), sampled(len(survey.points), options.sample, options.seed)
                found = {at: harness.case(scenario, survey, at, how) for at in points}
                problems = {at: problem for at, problem in found.items() if problem is not None}
                wrong, cases = wrong + len(problems), cases + len(points)
                seconds = time.monotonic() - start
                print(
                    f"{scenario.name}, {how}: {len(points)} of {len(survey.points)} points, {len(problems)} wrong, "
                    f"{seconds:.0f} s",
                    flush=True,
                )
                for at, problem in problems.items():
                    print(f"  {at} ({survey.points[at]}): {problem}", flush=True)
    print(f"{cases} cases, {wrong} wrong")
    return 1 if wrong else 0


sys.exit(main())
