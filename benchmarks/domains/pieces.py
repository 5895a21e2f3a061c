"""Pieces of work in processes of their own, done in an order as far as what they need is there."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Piece:
    """A piece of work.

    Attributes:
        name: what is printed.
        made: the file that is there when it is done.
        run: makes it; called in another process.
        needs: files that must be there before.
    """

    name: str
    made: Path
    run: Callable[[], Any]
    needs: tuple[Path, ...] = ()


def do(pieces: list[Piece], jobs: int, seconds: float) -> None:
    """Work on pieces in their order, as far as what they need is there, until the time is over."""
    start, running = time.monotonic(), dict[Future[Any], Piece]()
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=on_tensor_cores)
    waiting = list(pieces)
    while waiting or running:
        for piece in [piece for piece in waiting if all(file.exists() for file in piece.needs)]:
            if len(running) < jobs:
                waiting.remove(piece)
                running[pool.submit(timed, piece)] = piece
        if not running:
            print(f"left, for want of what failed: {', '.join(piece.name for piece in waiting)}", flush=True)
            break
        left = start + seconds - time.monotonic()
        done, _ = wait(running, timeout=min(max(0, left), threading.TIMEOUT_MAX), return_when=FIRST_COMPLETED)
        for future in done:
            piece, error = running.pop(future), future.exception()
            took = f"failed: {error!r}" if error else f"{future.result():.0f} s"
            print(f"[{time.monotonic() - start:.0f} s] {piece.name}: {took}", flush=True)
        if left <= 0:
            print(f"out of time: {len(waiting) + len(running)} pieces are left", flush=True)
            for process in list(pool._processes.values()):
                process.kill()
            break
    pool.shutdown(wait=False, cancel_futures=True)


def on_tensor_cores() -> None:
    """On a GPU, products of float32 matrices have TensorFloat-32's 10 bits of mantissa: five times as fast."""
    import torch

    torch.set_float32_matmul_precision("high")


def timed(piece: Piece) -> float:
    """The seconds that it takes."""
    start = time.monotonic()
    piece.run()
    return time.monotonic() - start
