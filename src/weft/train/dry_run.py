"""Estimates the memory and time of a training from two steps on its longest batch. Nothing is written."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from weft.base_model.usage import measured, peak_memory
from weft.data.batches import RowCollator, RowsAndABlank
from weft.data.packing import packed_rows
from weft.distributed import by_the_first, number_of_processes
from weft.files.writing import temporary_folder
from weft.options import TrainOptions
from weft.screen.countdown import about, size
from weft.screen.visible import say
from weft.train.arguments import steps_to_train, training_arguments
from weft.train.packing_check import check_packing
from weft.train.plateau import Plan
from weft.train.trainer import WeftTrainer, trained_tokens
from weft.train.weight_search import cost

_Rows = list[dict[str, Any]]
_STEPS = 2  # the first one includes the set-up, so the time is that of the second one


def dry_run(planned: Plan, model: Any, tokenizer: Any, what: str = "the gate", *, trials: bool = False) -> None:
    """Train for two steps on the longest rows, and print what the whole training needs.

    Args:
        planned: the options of the training, and its data.
        model: the loaded model. Its trainable weights change.
        tokenizer: the tokenizer of the base model.
        what: the name of what is trained, for the output.
        trials: each evaluation begins with trials of the mixture's weight.

    Raises:
        WeftError: the model cannot be trained with these options.
    """
    options, rows, held_out = planned[:3]
    packed = rows
    if options.packing:
        check_packing(model, options.batch_size)
        packed = packed_rows(rows, options.sequence_length)
    steps = steps_to_train(options, len(packed), sum(trained_tokens(row["labels"]) for row in rows))[0]
    together = options.batch_size * number_of_processes()
    longest = _longest(packed, together * options.gradient_accumulation_steps)
    clock = _Clock()
    with temporary_folder(lambda folder: None) as unused:
        once = dataclasses.replace(options, report_to="none", eval_data=[])
        arguments = training_arguments(once, unused, _STEPS, _STEPS)
        arguments.save_strategy = SaveStrategy.NO
        arguments.prediction_loss_only, arguments.per_device_eval_batch_size = True, options.batch_size
        trainer = WeftTrainer(
            model,
            arguments,
            tokenizer=tokenizer,
            train_dataset=RowsAndABlank(longest),
            data_collator=RowCollator(tokenizer.pad_token_id),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        with measured(arguments.device) as usage:
            trainer.train()
        peak = peak_memory(arguments.device) if usage.peak_mb is None else usage.peak_mb * 2**20
        evaluation = _evaluation_seconds(trainer, held_out, together) if held_out else 0.0
        if held_out and trials:
            evaluation *= 1 + cost(len(held_out))
    seconds = clock.seconds * _mean_tokens(packed, options) / (options.batch_size * len(longest[0]["input_ids"]))
    tell = by_the_first(say)
    tell(
        f"dry run of {what}, nothing is written: a step on the longest batch ({options.batch_size} x "
        f"{len(longest[0]['input_ids'])} tokens) takes {clock.seconds:.2g} s"
    )
    tell(f"  memory: {_memory(model, trainer.optimizer, peak)}")
    tell(f"  time: {_time(options, steps, seconds, evaluation, planned.expected_steps)}")


class _Clock(TrainerCallback):
    """Measures the time of the last step."""

    def __init__(self) -> None:
        self.seconds = self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it when the device has finished."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.seconds = time.perf_counter() - self._start


def _longest(rows: _Rows, count: int) -> _Rows:
    return sorted(rows, key=lambda row: -len(row["input_ids"]))[:count]


def _mean_tokens(rows: _Rows, options: TrainOptions) -> float:
    """The mean number of tokens of a batch, padding included."""
    lengths = [len(row["input_ids"]) for row in rows]
    if options.group_by_length:
        lengths.sort()
    else:
        random.Random(options.seed).shuffle(lengths)
    batches = [lengths[start : start + options.batch_size] for start in range(0, len(lengths), options.batch_size)]
    return sum(max(batch) * len(batch) for batch in batches) / len(batches)


def _evaluation_seconds(trainer: WeftTrainer, held_out: _Rows, together: int) -> float:
    """The estimated time of one evaluation, from its longest batch."""
    batch = _longest(held_out, together)
    seconds = float(trainer.evaluate(batch)["eval_runtime"])  # type: ignore[arg-type]
    return seconds * sum(len(row["input_ids"]) for row in held_out) / sum(len(row["input_ids"]) for row in batch)


def _memory(model: Any, optimizer: Any, peak: float | None) -> str:
    parameters = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    held, trained, kept = (
        size(sum(tensor.numel() * tensor.itemsize for tensor in tensors))
        for tensors in (parameters, [one for one in parameters if one.requires_grad], states)
    )
    most = "" if peak is None else f"{size(peak)} at the peak; "
    return f"{most}parameters {held}, of which {trained} are trained; optimizer {kept}"


def _time(options: TrainOptions, most: int, seconds: float, evaluation: float, expected: int | None) -> str:
    steps = most if expected is None else min(most, expected)
    text = f"about {about(steps * seconds)} for {steps:,} steps of {seconds:.2g} s"
    evaluations = steps // (options.eval_steps or options.save_steps) + (not options.resume) if evaluation else 0
    if evaluations:
        text += f", and {about(evaluations * evaluation)} for {evaluations} evaluations"
    if expected is not None:
        text += f". Held-out texts end it: it can be fewer steps, or more, at most {most:,}"
    if options.cache_scaling_pass:
        text += "; less with the cache of the scaling pass, which was not used"
    return text
