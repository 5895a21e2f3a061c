"""The weft command under `accelerate launch` on the CPU, with FSDP2, which accelerate keeps for GPUs."""

import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

import accelerate
from weft.cli import main

own = accelerate.Accelerator.__init__


def __init__(self, *args, **kwargs):
    # accelerate starts FSDP where the processes have a GPU each; FSDP itself does not mind.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    own(self, *args, **kwargs)
    assert self.is_fsdp2


accelerate.Accelerator.__init__ = __init__

if __name__ == "__main__":
    sys.exit(main())
