"""Runs weft in several processes on this machine, over loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun(*command, processes=2):
    """The arguments of `python` that start a module (-m, name, ...) or a script in so many processes."""
    place = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), *place, *command]


def accelerate_launch(config, *command):
    """The same with a config of examples/accelerate."""
    file = ROOT / "examples/accelerate" / config
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    return ["-m", "accelerate.commands.launch", "--config_file", str(file), *place, *command]


@contextmanager
def started(command, **environment):
    """`python` with these arguments; whatever is left of it and its children is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment},
        process_group=0,
    )
    try:
        yield process
    finally:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pids = children.read_text().split() if children.exists() else []
        # Launchers give each worker a session of its own.
        for group in [process.pid, *map(int, pids)]:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        process.wait()


def run(command, timeout=100, **environment):
    """Run to the end and return the output.

    Raises:
        AssertionError: it failed or took too long.
    """
    with started(command, **environment) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as err:
            raise AssertionError(f"no end after {timeout} s: {(err.output or b'')[-3000:]}") from err
    assert process.returncode == 0, output[-5000:]
    return output
