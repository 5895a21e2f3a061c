"""Training in several processes: the same batches as in one, agreement on when to stop, and one folder at the end.

transformers' Trainer and accelerate start the processes' work and exchange the gradients (DDP, FSDP2). What they leave
to the program is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices

from weft.base_model.versions import groups_by_length
from weft.checkpoint.licences import keep_own_card
from weft.distributed import fail_together, is_sharded
from weft.errors import CheckpointError
from weft.files.tensors import read_tensors
from weft.files.writing import replace_folder
from weft.gate.losses import NO_EXPERT
from weft.model.registration import register_with_peft
from weft.train.progress import CountingTrainer


class RowsAndABlank(Dataset):
    """The rows of a data set and, behind them, one without anything to learn, to fill batches up with.

    The blank row is the shortest one without its labels, so that whatever makes batches of rows (packed or not, with a
    scaling pass from a cache) takes it too.

    Args:
        rows: with `input_ids` and `labels` each.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows
        shortest = min(rows, key=lambda row: len(row["input_ids"]))
        without: dict[str, Any] = {"labels": [NO_EXPERT] * len(shortest["input_ids"])}
        if "expert_labels" in shortest:
            without["expert_labels"] = without["labels"]
        self.blank = {**shortest, **without}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.rows[place] if place < len(self.rows) else self.blank


class FullBatches(Sampler[int]):
    """The places of all rows in an order that seed and epoch decide, and that of the blank row up to a whole batch.

    With as many rows as all processes' batches need together, nobody has to repeat rows (as accelerate would), so the
    gradients are those of one process.

    Args:
        num_rows: without the blank one, whose place is `num_rows`.
        multiple: the number of places is one of this.
        seed: of the order.
        lengths: of the rows, to put those of similar length together; None for any order.
        group_size: how many rows are used together, and should be alike.
    """

    def __init__(
        self, num_rows: int, multiple: int, seed: int, *, lengths: list[int] | None = None, group_size: int = 1
    ) -> None:
        self.num_rows = num_rows
        self.multiple = multiple
        self.seed = seed
        self.lengths = lengths
        self.group_size = group_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_rows // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            yield from torch.randperm(self.num_rows, generator=generator).tolist()
        else:
            yield from get_length_grouped_indices(self.lengths, self.group_size, generator=generator)
        yield from [self.num_rows] * (len(self) - self.num_rows)


class EvenTrainer(CountingTrainer):
    """A Trainer that gives the same model with any number of processes of the same batch together.

    Its training data are `RowsAndABlank`. Where a model's loss does not count the tokens of all rows (its forward takes
    no `num_items_in_batch`), rows are repeated, as accelerate does.
    """

    optimizer: Any
    lr_scheduler: Any

    @property
    def in_shards(self) -> bool:
        """Whether no process holds the whole model."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def whole_state(self) -> dict[str, Any] | None:
        """The state dict of a model in shards, gathered; all processes call this. None where it is not in shards."""
        return self.accelerator.get_state_dict(self.model_wrapped) if self.in_shards else None

    def write_together(self, folder: Path, write: Callable[[Path], None], *, together: bool = True) -> None:
        """Let the first process replace a folder.

        Args:
            folder: then has all that `write` wrote, or what it had before.
            write: see `replace_folder`.
            together: all processes call this; not so after an error, when others may wait elsewhere.

        Raises:
            CheckpointError: the folder cannot be written; in all processes, if they are together.
        """
        error = None
        if self.args.should_save:
            try:
                replace_folder(folder, write, CONFIG_NAME)
            except CheckpointError as err:
                error = err
        if together:
            fail_together(error, self.args.device)
        elif error is not None:
            raise error

    def save_mixture(self, folder: Path, tokenizer: Any, *, together: bool) -> None:
        """Write the mixture and its tokenizer; see `write_together`. In shards it takes all processes together."""
        state_dict = self.whole_state()

        def write(part: Path) -> None:
            model: Any = self.accelerator.unwrap_model(self.model)
            PeftModel.save_pretrained(model, str(part), state_dict=state_dict)
            tokenizer.save_pretrained(str(part))
            keep_own_card(folder, part)

        self.write_together(folder, write, together=together)

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
        args, rows = self.args, cast(RowsAndABlank, self.train_dataset)
        together = args.train_batch_size * args.world_size
        alike = groups_by_length(args)
        return FullBatches(
            len(rows),
            together if args.world_size > 1 else 1,
            args.seed,
            lengths=[len(row["input_ids"]) for row in rows] if alike else None,
            group_size=together * args.gradient_accumulation_steps,
        )

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
        wrapped: Any = self.model_wrapped
        of_heads = f".modules_to_save.{wrapped.active_adapter}."
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                saved = tensors.get(name.replace(of_heads, "."))
                if saved is not None:
                    parameter.copy_(_like(parameter, saved))

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

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
