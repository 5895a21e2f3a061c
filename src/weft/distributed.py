"""Training in several processes: the same batches as in one, agreement on when to stop, and one folder at the end.

transformers' Trainer and accelerate start the processes' work and exchange the gradients (DDP, FSDP2). What they leave
to the program is here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from weft.adapters import read_tensors
from weft.experts import in_distributed_training, is_sharded
from weft.integration import register_with_peft
from weft.progress import CountingTrainer
from weft.whole import replace_folder


def number_of_processes() -> int:
    """How many processes train together, as their launcher says; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any of the processes, which all ask this at the same point; `device` is this one's."""
    if not in_distributed_training():
        return flag
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags.item())


class RowsAndABlank(Dataset):
    """The rows of a data set and, behind them, one without anything to learn, to fill batches up with.

    Args:
        rows: `input_ids` and `labels` of each.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        if place < len(self.rows):
            return self.rows[place]
        return {"input_ids": self.rows[0]["input_ids"][:2], "labels": [-100, -100]}


class FullBatches(Sampler[int]):
    """The places of all rows in an order that seed and epoch decide, and that of the blank row up to a whole batch.

    With as many rows as all processes' batches need together, nobody has to repeat rows (as accelerate would), so the
    gradients are those of one process.

    Args:
        num_rows: without the blank one, whose place is `num_rows`.
        batch_size: of all processes together.
        seed: of the order.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.num_rows, generator=generator).tolist()
        yield from [self.num_rows] * (len(self) - self.num_rows)


class EvenTrainer(CountingTrainer):
    """A Trainer that gives the same model with any number of processes of the same batch together.

    Its training data are `RowsAndABlank`.
    """

    optimizer: Any
    lr_scheduler: Any

    @property
    def in_shards(self) -> bool:
        """Whether no process holds the whole model."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def save_mixture(self, folder: Path, tokenizer: Any, *, together: bool) -> None:
        """Write the mixture and its tokenizer, from one process.

        Args:
            folder: then has all of it, or what it had before.
            tokenizer: of the base model.
            together: all processes call this; not so after an error, when others may wait elsewhere.
        """
        state_dict = self.accelerator.get_state_dict(self.model_wrapped) if self.in_shards else None

        def write(part: Path) -> None:
            model: Any = self.accelerator.unwrap_model(self.model)
            PeftModel.save_pretrained(model, str(part), state_dict=state_dict)
            tokenizer.save_pretrained(str(part))

        if self.args.should_save:
            replace_folder(folder, write, CONFIG_NAME)
        if together:
            self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers', which would leave frozen experts out of what it gathers for ZeRO-3."""
        if self.is_deepspeed_enabled:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model_wrapped))
        else:
            super().save_model(output_dir, _internal_call)

    def _wrap_model(self, *args: Any, **kwargs: Any) -> Any:
        if self.in_shards:
            register_with_peft()  # whose saving then hands on the experts' gathered tensors
        return super()._wrap_model(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # Blank rows are blank in a loss that counts the tokens of all rows, which not every model's does.
        if not self.model_accepts_loss_kwargs:
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.world_size
        return FullBatches(len(self.train_dataset), batch_size, self.args.seed)  # type: ignore[arg-type]

    # Of FSDP's shards, transformers' Trainer would write checkpoints that FSDP alone can read.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = self.optimizer.state_dict()
        state["state"] = {number: _gathered(entries) for number, entries in state["state"].items()}
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        tensors = read_tensors(Path(resume_from_checkpoint, SAFETENSORS_WEIGHTS_NAME))
        with torch.no_grad():
            for name, parameter in self.model_wrapped.named_parameters():
                if name in tensors:
                    parameter.copy_(_like(parameter, tensors[name]))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            _lay_out_as_parameters(self.optimizer)
            return
        state = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state["state"] = {
            number: {name: _like(parameters[number], value) for name, value in entries.items()}
            for number, entries in state["state"].items()
        }
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))


def _lay_out_as_parameters(optimizer: Any) -> None:
    """Give the optimizer's tensors their parameters' strides: fused AdamW takes for granted that they have them.

    Stacked experts lie transposed, those of FSDP's checkpoints do not.
    """
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _gathered(entries: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer keeps of one parameter, whole and on the CPU."""
    return {name: value.full_tensor().cpu() if is_sharded(value) else value for name, value in entries.items()}


def _like(parameter: Any, value: Any) -> Any:
    """A tensor of a parameter's shape, in shards where the parameter is; anything else as it is."""
    if not isinstance(value, Tensor) or not is_sharded(parameter) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements)
