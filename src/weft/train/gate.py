"""Trains the gate (and, if asked, the experts) with transformers' `Trainer`.

The Trainer does logging, checkpoints, resuming, mixed precision and distribution; weft adds the model and the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from weft.base_model.loading import load_base, loading_options
from weft.data.batches import RowCollator, RowsAndABlank
from weft.data.labelled import training_rows
from weft.data.packing import packed_rows
from weft.data.texts import check_length, read_each
from weft.distributed import by_the_first, number_of_processes
from weft.errors import CheckpointError, ConfigError, WeftError
from weft.files.failures import errors_of_writing
from weft.files.names import by_name
from weft.model.build import from_adapters, from_pretrained
from weft.options import TrainOptions
from weft.options.foreseen import refuse_foreseen
from weft.screen.visible import notice, say
from weft.train.arguments import mixture_options, steps_to_train, training_arguments
from weft.train.callbacks import GateCallback
from weft.train.checkpoints import Checkpoints, checkpoints_folder, how_to_resume, prepare_folder
from weft.train.checks import check, open_sources
from weft.train.comparison import comparison
from weft.train.dry_run import dry_run
from weft.train.packing_check import check_packing
from weft.train.plateau import Plan, Plateau, evaluation_in_steps, plan
from weft.train.progress import ProgressLine
from weft.train.run_record import past_of, run_record
from weft.train.scaling_cache import ScalingCache, ScalingCacheCollator
from weft.train.start import check_steps_left, resume_from, say_resuming, start_gate, with_mixture_options
from weft.train.stopping import EarlyStopping, StopOnInterrupt, TokenBudget
from weft.train.trainer import WeftTrainer, trained_tokens
from weft.train.weight_search import WeightSearch, cost, restore_weight

_Rows = list[dict[str, Any]]


def train(options: TrainOptions) -> Path:
    """Train a mixture and save it; with `dry_run`, print how much memory and time that needs, and save nothing.

    Returns:
        The folder with the mixture and its tokenizer.

    Raises:
        WeftError: the options, adapters or data are not valid.
        KeyboardInterrupt: the user interrupted. The mixture so far and a checkpoint are saved.
    """
    if options.experts_from:
        raise ConfigError(f"experts_from ({options.experts_from}) needs weft.train.experts.train_in_stages")
    refuse_foreseen(options)
    options = with_mixture_options(options)
    adapters = by_name(options.adapters, "adapters")
    checkpoints = check(options, adapters)
    set_seed(options.seed)
    tokenizer = open_sources(options, adapters)
    rows, held_out = read_both(options, list(adapters), tokenizer)
    record = run_record(options, adapters)
    if checkpoints.last is not None:
        say_resuming(checkpoints.last, record, by_the_first(notice))
    model = _load_model(options, adapters)
    if checkpoints.last is not None and options.global_scaling_weight is None:
        restore_weight(model, checkpoints.last)
    past = None if checkpoints.last is None else past_of(checkpoints.last, record)
    planned = plan(options, rows, held_out, by_the_first(notice), past)
    options, record["held_out"] = planned.options, planned.record()
    if options.dry_run:
        dry_run(planned, model, tokenizer, trials=searches_weight(planned, model))
        return Path(options.output)
    interrupt, progress = StopOnInterrupt(), _progress(planned, model)
    callbacks: list[TrainerCallback] = [interrupt, TokenBudget(options.max_tokens), progress]
    if options.early_stopping and planned.held_out is not None:
        before = [loss for _, loss in past.losses] if past is not None and planned.comparable else []
        callbacks.append(EarlyStopping(options.early_stopping, before))
    trainer = _trainer(planned, model, tokenizer, callbacks, checkpoints, record)
    folder = checkpoints_folder(options.output)
    together = False
    try:
        advices = "mend that", "free some space"
        with errors_of_writing(folder, "what was saved before is kept", *advices):  # of the tools in report_to
            trainer.train(resume_from_checkpoint=str(checkpoints.last) if options.resume else None)
        together = True
    except WeftError as err:
        together = err.in_all_processes
        raise
    finally:
        progress.close()
        interrupt.on_train_end(trainer.args, trainer.state, trainer.control)  # not called after an error
        # Save the mixture also after a second interrupt or an error. A sharded model is not saved after an error of one
        # process, as saving needs all processes; it has its checkpoints.
        if trainer.state.global_step > 0 and (together or not trainer.in_shards):
            _save(trainer, tokenizer, options, together=together)
    if interrupt.requested:
        raise KeyboardInterrupt
    whole = number_of_processes() == 1 and not trainer.in_shards
    if planned.expected_steps is not None and planned.held_out is not None and whole:
        say(comparison(model, planned.held_out, options.batch_size, bf16=options.bf16))
    return Path(options.output)


def new_mixture(base: Any, adapters: dict[str, str], options: TrainOptions) -> PeftModel:
    """A mixture on a base model, with the options of a training."""
    return from_adapters(base, adapters, **mixture_options(options))


def read_both(options: TrainOptions, adapters: Sequence[str], tokenizer: Any) -> tuple[_Rows, _Rows | None]:
    """Read the training data and the evaluation data, if any.

    Raises:
        DataError: with the problems of both.
    """
    rows, held_out = read_each((read_training_rows, read_eval_rows), lambda read: read(options, adapters, tokenizer))
    assert rows is not None
    return rows, held_out


def read_training_rows(options: TrainOptions, adapters: Sequence[str], tokenizer: Any) -> _Rows:
    """Read the training data of the gate, with labels if the options need them, or take them if they are complete.

    Raises:
        DataError: the data cannot be read, or it has no labels and the options need them.
    """
    needed = options.expert_label_loss_weight != 0 or options.gate_start == "labels"
    left_open = options.gate_start is None and options.start_from is None
    labelled = True if needed else None if left_open else False
    return read_rows_of(options.data, adapters, tokenizer, options, labelled=labelled)


def read_eval_rows(options: TrainOptions, adapters: Sequence[str], tokenizer: Any) -> _Rows | None:
    """Read the evaluation data, if any. Names of experts before a file are ignored.

    Raises:
        DataError: the data cannot be read.
    """
    if not options.eval_data:
        return None
    return read_rows_of(options.eval_data, adapters, tokenizer, options)


def read_rows_of(
    data: Sequence[str],
    adapters: Sequence[str],
    tokenizer: Any,
    options: TrainOptions,
    *,
    labelled: bool | None = False,
) -> _Rows:
    """Read the rows of these sources, with the options of a training.

    Raises:
        DataError: the data cannot be read; or `labelled` is set and there are no labels.
    """
    return training_rows(
        data,
        adapters,
        tokenizer,
        options.sequence_length,
        labelled=labelled,
        assistant_only_loss=options.assistant_only_loss,
        say=by_the_first(notice),
    )


def _load_model(options: TrainOptions, adapters: dict[str, str]) -> PeftModel:
    """The mixture to train: a new one, or the one of `start_from`."""
    assert options.base is not None
    base = load_base(options.base, **loading_options(options))
    check_length(options.sequence_length, base.config)
    if options.start_from is not None:
        return from_pretrained(options.start_from, base, is_trainable=True)
    return new_mixture(base, adapters, options)


def _trainer(
    planned: Plan,
    model: PeftModel,
    tokenizer: Any,
    callbacks: list[TrainerCallback],
    checkpoints: Checkpoints,
    record: dict[str, Any],
) -> WeftTrainer:
    """The Trainer for the model and the rows, which starts at the beginning or from the last checkpoint."""
    options, rows, held_out, expected = planned[:4]
    packed = rows
    if options.packing:
        check_packing(model, options.batch_size)
        packed = packed_rows(rows, options.sequence_length)
    folder = checkpoints_folder(options.output)
    tokens = sum(trained_tokens(row["labels"]) for row in rows)
    if checkpoints.last is not None:
        check_steps_left(options, len(packed), checkpoints.last)
    schedule_steps, most_steps = steps_to_train(options, len(packed), tokens)
    arguments = training_arguments(
        options,
        folder,
        expected or schedule_steps,
        most_steps,
        schedule="constant_with_warmup" if expected else "cosine",
        evaluates=held_out is not None,
    )
    if not options.resume:
        start_gate(model, rows, options, arguments.device)
    collator: Callable[[list[Any]], Any] = RowCollator(tokenizer.pad_token_id)
    if options.cache_scaling_pass:
        cache = _scaling_cache(model, [row["input_ids"] for row in rows], options, arguments)
        collator = ScalingCacheCollator(cache, collator)
    prepare_folder(folder, checkpoints)
    trainer = WeftTrainer(
        model,
        arguments,
        tokenizer=tokenizer,
        schedule_steps=schedule_steps if options.max_tokens else None,
        record=record,
        train_dataset=RowsAndABlank(packed),
        eval_dataset=held_out,
        data_collator=collator,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    if expected is not None:
        _end_at_a_plateau(trainer, model, planned)
    GateCallback.attach(trainer)
    if options.resume:
        resume_from(trainer, checkpoints, by_the_first(notice), comparable=planned.comparable)
    return trainer


def _end_at_a_plateau(trainer: WeftTrainer, model: PeftModel, planned: Plan) -> None:
    """Let held-out texts decide learning rate, weight and end of a training."""
    options, held_out = planned.options, planned.held_out
    assert options.learning_rate is not None
    assert held_out is not None
    trainer.add_callback(Plateau(options.learning_rate, planned.since))
    if searches_weight(planned, model):
        trainer.add_callback(WeightSearch(trainer, model, held_out))


def searches_weight(planned: Plan, model: PeftModel) -> bool:
    """Whether held-out texts choose the mixture's weight."""
    options = planned.options
    # The scaling pass does not depend on the weight only if the experts are left out of it.
    is_cached = options.cache_scaling_pass and model.xlora_config.constant_weight != 0
    given = options.global_scaling_weight is not None
    return not (planned.expected_steps is None or given or is_cached or options.use_trainable_adapters)


def _progress(planned: Plan, model: PeftModel) -> ProgressLine:
    """The training on the screen; its estimate includes the evaluations and the trials of the weight."""
    options, held_out = planned.options, planned.held_out
    evaluating = 0.0
    if held_out is not None:
        trials = cost(len(held_out)) if searches_weight(planned, model) else 0.0
        evaluating = evaluation_in_steps(planned) * (1 + trials) / (options.eval_steps or options.save_steps)
    return ProgressLine(options.max_tokens, may_stop_earlier=planned.expected_steps is not None, evaluating=evaluating)


def _scaling_cache(
    model: Any, sequences: list[list[int]], options: TrainOptions, arguments: TrainingArguments
) -> ScalingCache:
    """The cache of each text's scaling pass."""
    model.to(arguments.device)
    folder = options.cache_folder or Path(options.output) / "scaling-cache"
    with (
        arguments.main_process_first(desc="the scaling pass"),
        torch.autocast(arguments.device.type, torch.bfloat16, enabled=options.bf16),
    ):
        return ScalingCache.build(
            model,
            sequences,
            folder,
            dtype=options.cache_dtype,
            batch_size=options.batch_size,
            announce=by_the_first(notice),
        )


def _save(trainer: WeftTrainer, tokenizer: Any, options: TrainOptions, *, together: bool) -> None:
    try:
        trainer.save_mixture(Path(options.output), tokenizer, together=together)
    except CheckpointError as err:
        error = CheckpointError(f"{err}. {how_to_resume(checkpoints_folder(options.output))}")
        error.in_all_processes = err.in_all_processes
        raise error from err
