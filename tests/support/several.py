"""Several weft commands in the same processes, which then start once; their arguments are a list of lists in JSON.

A command that begins with "full-disk-in", N is run with no room for files in process N.
"""

import json
import os
import sys
from contextlib import nullcontext

import weft.cli.errors
from disk import full_disk

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    import on_cpu  # noqa: F401 - patches accelerate
weft.cli.errors.WAIT_FOR_THE_FIRST = 0  # no launcher ends a process here whose command has failed

if __name__ == "__main__":
    for number, command in enumerate(json.loads(sys.argv[1])):
        disk = nullcontext()
        if command[0] == "full-disk-in":
            _, process, *command = command
            disk = full_disk() if os.environ.get("RANK") == process else nullcontext()
        with disk:
            code = weft.cli.main(command)
        print(f"command {number} ended with {code}", flush=True)
