"""Runs writers with something going wrong at a point, each in a child process, and says what they leave.

After a kill or a failed call what a user reads must be what was there before or what the writer was to make, and the
same command must then make it, bit for bit. A failed call must end in an error of weft's.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from faults.points import KILLED, Points
from faults.scenarios import SCENARIOS, make_start
from weft.errors import WeftError

HOW = ("kill", "full once", "full", "denied once", "denied")
_SECONDS = 120
# Imported once, rather than in every child.
_NEEDED = [
    "weft.cli.experts",
    "weft.cli.fold",
    "weft.cli.formats",
    "weft.cli.inspect",
    "weft.evaluate.run",
]
_NEEDED += [
    "weft.train.experts",
    "weft.train.scaling_cache",
    "matplotlib.figure",
    "matplotlib.backends.backend_svg",
    "yaml",
]


@dataclass
class Survey:
    """An undisturbed run: how many points it has, and what is there before and after."""

    points: list[str]
    before: object
    after: object


class Harness:
    """Runs scenarios in a folder.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self._stored, self._answer = folder / "root", folder / "stored", folder / "answer.json"
        self.root.mkdir()
        make_start(self.root)
        shutil.copytree(self.root, self._stored)
        for module in _NEEDED:
            importlib.import_module(module)
        os.environ["TMPDIR"] = str(self.root / "tmp")

    def survey(self, scenario) -> Survey:
        """Run a scenario undisturbed; its start is kept for `case`."""
        shutil.rmtree(self.root)
        shutil.copytree(self._stored, self.root)
        (self.root / "tmp").mkdir()
        _expect(self._child(lambda: scenario.prepare(self.root)), "done")
        start = self._start(scenario)
        shutil.rmtree(start, ignore_errors=True)
        shutil.copytree(self.root, start)

        def run():
            points = Points(self.root)
            with points.watched():
                scenario.run(self.root)
            return points.seen

        before = _expect(self._child(lambda: scenario.look(self.root)), "done")
        self._restore(scenario)
        points = _expect(self._child(run), "done")
        return Survey(points, before, _expect(self._child(lambda: scenario.look(self.root)), "done"))

    def case(self, scenario, survey: Survey, at: int, how: str) -> str | None:
        """Let it go wrong at one point; what is wrong with what follows, or None."""
        self._restore(scenario)

        def run():
            points = Points(self.root, at, how)
            with points.watched():
                try:
                    scenario.run(self.root)
                except WeftError as err:
                    return "refused", str(err)
                return "done", ""

        kind, answer = self._child(run)
        if how == "kill" and kind not in ("killed", "done"):
            return f"not killed, but {kind}: {answer}"
        if how != "kill" and kind != "done":
            return f"raw: {answer}"
        kind, found = self._child(lambda: scenario.look(self.root))
        if kind != "done":
            return f"what is left does not load: {kind}: {found}"
        if not scenario.in_parts and found not in (survey.before, survey.after):
            return f"neither before nor after: {found}"
        kind, answer = self._child(lambda: (scenario.again or scenario.run)(self.root))
        if kind == "raw" or (kind == "weft" and found != survey.after):
            return f"the same command fails: {answer}"
        kind_of_look, found = self._child(lambda: scenario.look(self.root))
        if kind_of_look != "done" or found != survey.after:
            return f"the same command gives something else: {kind_of_look}: {found}"
        left = [str(path) for path in self.root.rglob("*") if path.name in (".part", ".old") or path.suffix == ".part"]
        # Of a checkpoint that has all else: nobody reads them, and they go with the checkpoint.
        left = [path for path in left if not path.endswith(("weft_checkpoint.json.part", "weft_run.json.part"))]
        return f"left behind: {left}" if kind == "done" and left else None

    def _start(self, scenario) -> Path:
        return self.root.parent / f"start-{scenario.name.replace(' ', '-')}"

    def _restore(self, scenario) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self._start(scenario), self.root)

    def _child(self, function):
        """(kind, what it returns or says) of a function in a process of its own."""
        self._answer.unlink(missing_ok=True)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            self._be_child(function)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == KILLED:
            return "killed", None
        if not self._answer.exists():
            return "raw", f"ended with {os.waitstatus_to_exitcode(status)}"
        kind, value = json.loads(self._answer.read_text())
        return kind, value

    def _be_child(self, function):
        signal.alarm(_SECONDS)
        try:
            with _silence():
                answer = "done", function()
        except WeftError as err:
            answer = "weft", str(err)
        except BaseException:
            answer = "raw", traceback.format_exc()
        self._answer.write_text(json.dumps(answer, default=str))
        os._exit(0)


def _expect(answer, kind):
    if answer[0] != kind:
        raise AssertionError(f"expected {kind}: {answer}")
    return answer[1]


@contextmanager
def _silence():
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    yield


def sampled(number_of_points: int, how_many: int | None, seed: int) -> list[int]:
    """Some of the points; None takes all."""
    points = range(number_of_points)
    if how_many is None or how_many >= number_of_points:
        return list(points)
    return sorted(random.Random(seed).sample(points, how_many))


def by_name(name: str):
    """A scenario."""
    return next(scenario for scenario in SCENARIOS if scenario.name == name)
