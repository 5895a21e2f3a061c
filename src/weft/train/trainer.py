"""The Trainer of `weft train`, a subclass of transformers' Trainer, for experts and for mixtures.

transformers' Trainer and accelerate distribute the work and exchange the gradients (DDP, FSDP2). This class adds full
batches, counted tokens, errors for a loss that is not finite, verified checkpoints, and one output folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from weft.base_model.versions import groups_by_length
from weft.checkpoint.licenses import keep_own_card
from weft.data.batches import FullBatches, RowsAndABlank
from weft.data.texts import NO_LABEL
from weft.distributed import any_process, fail_together, from_all_processes
from weft.errors import CheckpointError
from weft.files.tensors import read_tensors
from weft.files.writing import replace_folder
from weft.model.registration import register_with_peft
from weft.train.checkpoints import (
    RECORD,
    not_saved_error,
    remove_checkpoint,
    remove_old_checkpoints,
    write_record,
)
from weft.train.finite_loss import FiniteWeights, gradient_norm, not_finite_error, texts_of
from weft.train.run_record import write_run
from weft.train.sharding import gathered_state, lay_out_as_parameters, load_gathered_state, load_weights
from weft.train.weight_search import restore_weight


class WeftTrainer(Trainer):
    """A Trainer whose result does not depend on the number of processes, if the total batch size is the same.

    Its training data are `RowsAndABlank`. If a model's loss is not divided by the tokens of all rows (its forward has
    no `num_items_in_batch`), rows are repeated, as in accelerate.

    - It counts the trained tokens in `state.num_input_tokens_seen`, also after resuming. A token is counted if its
      label is in the loss: padding, the first token of a text and masked labels are not.
    - It raises `TrainingError` before an optimizer step with a loss or gradient that is not finite. Each forward pass
      is checked, also with gradient accumulation. The model keeps the weights of the last finite loss: if the first
      loss after a step is not finite, those before the step. All processes raise the error.
    - A checkpoint is complete, with the digests of its files (see `weft.train.checkpoints`), or it is removed, for
      example if the disk is full. `CheckpointError` then names the checkpoint to resume from. All processes raise it.
    - With `eval_on_start`, the model before the first step has a checkpoint and can be the best one.

    Args:
        model: a model of weft or peft.
        arguments: the training arguments.
        tokenizer: decodes the texts of a batch for messages.
        schedule_steps: number of steps of the learning rate schedule; None for the maximum number of steps.
        record: record of the run for its checkpoints (see `weft.train.run_record`); None for none.
        **options: arguments of transformers' Trainer.
    """

    optimizer: Any
    lr_scheduler: Any
    # Errors while a checkpoint is saved; None at other times.
    _failures: list[Exception] | None = None

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        *,
        tokenizer: Any,
        schedule_steps: int | None = None,
        record: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, arguments, **options)
        self._tokenizer = tokenizer
        self._schedule_steps = schedule_steps
        self._record = record
        self._finite_weights = FiniteWeights()
        self._passes = 0  # forward passes since the last step
        self.add_callback(_BeforeOptimizerStep(self._check_gradients))

    # ------------------------------------------------------------------ batches and steps

    def get_train_dataloader(self) -> Any:
        """The batches, of the present batch size: transformers before 5.2 resumes with that of the checkpoint."""
        self._train_batch_size = self.args.train_batch_size
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # Blank rows have no effect only if the loss is divided by the number of tokens of all rows.
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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of a step; none if a callback has ended the training before its first step.

        The Trainer asks that only after a step, so that a run which resumes with no step left would do one more.
        """
        return ([], None) if self.control.should_training_stop else super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        # The first token of a text is not predicted, but transformers before 5.10 counts it.
        return super()._get_num_items_in_batch([_without_first_label(batch) for batch in batch_samples], device)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the learning rate."""
        return super().create_scheduler(self._schedule_steps or num_training_steps, optimizer)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: not used, and slow, as transformers iterates over all parameters at every step."""
        return 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run the forward and backward pass of one batch.

        Raises:
            TrainingError: the loss is not finite.
        """
        self._passes += 1
        loss = super().training_step(model, inputs, num_items_in_batch)
        trained = inputs["labels"][:, 1:].ne(NO_LABEL).sum().to(self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(trained, "sum"))
        self._input_ids = inputs.get("input_ids")
        finite = bool(torch.isfinite(loss))
        if any_process(not finite, loss.device):
            if self._passes == 1:
                self._finite_weights.restore(self._trained_weights())
            self._stop_not_finite(None if finite else f"the loss is {loss.item()}")
        return loss

    def _check_gradients(self) -> None:
        """Check the gradients before a step, and keep a copy of the weights, as their losses were finite."""
        weights = self._trained_weights()
        # In float16 accelerate's scaler skips such steps.
        if getattr(self.accelerator, "scaler", None) is None:
            norm = gradient_norm(weights)
            if not torch.isfinite(norm):
                self._stop_not_finite(f"the gradient's norm is {norm.item()}")
        self._finite_weights.keep(weights)
        self._passes = 0

    def _stop_not_finite(self, what: str | None) -> None:
        """Raise the error in all processes, which must all call this.

        Args:
            what: the problem with this process's batch; None if only other processes have one.
        """
        accumulated = self.args.gradient_accumulation_steps
        which = f", forward pass {self._passes} of {accumulated}" if accumulated > 1 else ""
        own = None if what is None else (what, texts_of(self._input_ids, self._tokenizer))
        wrong = [each for each in from_all_processes(own) if each is not None]
        texts = [text for _, texts in wrong for text in texts]
        where = f"step {self.state.global_step + 1}{which}"
        raise not_finite_error(wrong[0][0], where, texts, self.args.learning_rate)

    def _trained_weights(self) -> list[Tensor]:
        model: Any = self.model
        return [weight for weight in model.parameters() if weight.requires_grad]

    # ------------------------------------------------------------------ checkpoints

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if self.state.global_step == 0:  # by `eval_on_start`, where the Trainer saves nothing
            if self._determine_best_metric(metrics, trial):
                self.state.best_model_checkpoint = str(self._checkpoint)
            self._save_checkpoint(self.model, trial)
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._failures = []
        try:
            self._in_first_process(remove_checkpoint)  # a damaged one of the same step
            any_process(False, self.args.device)  # wait for the first process
            super()._save_checkpoint(*args, **kwargs)
            if self._record is not None:
                record = self._record
                self._in_first_process(lambda newest: write_run(newest, record))
            self._in_first_process(write_record)  # all processes have written their files now
            best = self.state.best_model_checkpoint
            self._in_first_process(lambda newest: remove_old_checkpoints(newest, best))
            self._raise_failure()
        except CheckpointError:
            raise  # from `_raise_failure` or from saving with DeepSpeed
        except Exception as err:
            self._failures.append(err)
            self._raise_failure()
        except BaseException:
            self._remove_incomplete()
            raise
        finally:
            self._failures = None

    # Processes wait for each other between these methods, so an error is kept and raised after the last one.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self._write(super()._save, output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            # Processes wait for each other inside of DeepSpeed: if one fails, it must exit so that the others exit too.
            self._raise_failure()
            try:
                super()._save_optimizer_and_scheduler(output_dir)
            except Exception as err:
                raise not_saved_error(self._checkpoint, err) from err
        elif self.is_fsdp_enabled:
            self._write(self._save_gathered_optimizer, output_dir)
        else:
            self._write(super()._save_optimizer_and_scheduler, output_dir)

    def _save_gathered_optimizer(self, output_dir: str) -> None:
        state = gathered_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _save_scaler(self, output_dir: str) -> None:
        self._write(super()._save_scaler, output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        self._write(super()._save_rng_state, output_dir)
        self._raise_failure()

    def _write(self, write: Callable[..., None], *args: Any) -> None:
        try:
            write(*args)
        except Exception as err:
            if self._failures is None:
                raise
            self._failures.append(err)

    def _in_first_process(self, write: Callable[[Path], None]) -> None:
        if self.args.should_save and not self._failures:
            self._write(write, self._checkpoint)

    def _raise_failure(self) -> None:
        """Raise the error of any process in all of them. All processes must call this."""
        if not any_process(bool(self._failures), self.args.device):
            return
        self._remove_incomplete()  # no process writes any more
        error = not_saved_error(self._checkpoint, self._failures[0]) if self._failures else None
        fail_together(error, self.args.device)

    def _remove_incomplete(self) -> None:
        if self.args.should_save and not (self._checkpoint / RECORD).exists():
            with suppress(OSError):
                remove_checkpoint(self._checkpoint)

    @property
    def _checkpoint(self) -> Path:
        return Path(str(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            load_weights(self.model_wrapped, read_tensors(Path(resume_from_checkpoint, SAFETENSORS_WEIGHTS_NAME)))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()
        restore_weight(self.model, Path(str(self.state.best_model_checkpoint)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            lay_out_as_parameters(self.optimizer)
            self._follow_schedule(checkpoint)
            return
        load_gathered_state(
            self.optimizer, torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        )
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
        self._follow_schedule(checkpoint)

    def _follow_schedule(self, checkpoint: str | None) -> None:
        """Set the learning rates of the present schedule, as the optimizer has loaded those of the checkpoint."""
        if checkpoint is None or self.is_deepspeed_enabled:
            return
        peak, schedule = self.args.learning_rate, self.lr_scheduler
        rates = [peak * share(schedule.last_epoch) for share in schedule.lr_lambdas]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["initial_lr"], group["lr"] = peak, rate
        schedule.load_state_dict({**schedule.state_dict(), "base_lrs": [peak] * len(rates), "_last_lr": rates})

    # ------------------------------------------------------------------ the model at the end

    @property
    def in_shards(self) -> bool:
        """Whether the model is sharded over the processes (FSDP or DeepSpeed)."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def whole_state(self) -> dict[str, Any] | None:
        """The gathered state dict of a sharded model; None for other models. All processes must call this."""
        return self.accelerator.get_state_dict(self.model_wrapped) if self.in_shards else None

    def write_together(self, folder: Path, write: Callable[[Path], None], *, together: bool = True) -> None:
        """Replace a folder in the first process.

        Args:
            folder: the folder. It has either all new files or all old ones afterwards.
            write: see `replace_folder`.
            together: all processes call this. False after an error, when other processes may be elsewhere.

        Raises:
            CheckpointError: the folder cannot be written; raised in all processes if `together`.
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
        """Write the mixture and its tokenizer; see `write_together`. If sharded, all processes must call this."""
        state_dict = self.whole_state()

        def write(part: Path) -> None:
            model: Any = self.accelerator.unwrap_model(self.model)
            PeftModel.save_pretrained(model, str(part), state_dict=state_dict)
            tokenizer.save_pretrained(str(part))
            keep_own_card(folder, part)

        self.write_together(folder, write, together=together)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, but with the frozen experts, which it does not gather for ZeRO-3."""
        if self.is_deepspeed_enabled:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model_wrapped))
        else:
            super().save_model(output_dir, _internal_call)

    def _wrap_model(self, *args: Any, **kwargs: Any) -> Any:
        if self.in_shards:
            register_with_peft()  # so that peft saves the gathered tensors of the experts
        return super()._wrap_model(*args, **kwargs)


class _BeforeOptimizerStep(TrainerCallback):
    """Calls a function before each optimizer step, as a Trainer has no method for it."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call the function."""
        self._function()


def trained_tokens(labels: Sequence[int]) -> int:
    """The number of tokens of a sequence that `WeftTrainer` counts."""
    return sum(label != NO_LABEL for label in labels[1:])


def _without_first_label(batch: Any) -> dict[str, Any]:
    labels = batch["labels"].clone()
    labels[:, 0] = NO_LABEL
    return {**batch, "labels": labels}
