"""`weft train`: the gate (and, if asked, the experts) on transformers' `Trainer`.

The Trainer brings logging, checkpoints, resuming, mixed precision and accelerate; weft brings the model and the data.
"""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers import DataCollatorForSeq2Seq, PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from weft.base_model.loading import load_base, load_tokenizer, loading_options
from weft.base_model.versions import checkpointing_arguments, length_grouping_arguments
from weft.config import XLoraConfig
from weft.data.labelled import LabelledCollator, training_rows
from weft.data.packing import PackedCollator, check_packing, packed_rows
from weft.data.texts import check_length
from weft.distributed import any_process, by_the_first, number_of_processes
from weft.errors import CheckpointError, ConfigError, WeftError
from weft.files.names import by_name
from weft.files.ownership import used_folder_problem
from weft.files.reading import read_json
from weft.files.writing import errors_of_writing, folder_problem, settle
from weft.model.build import from_adapters, from_pretrained
from weft.options import TrainOptions
from weft.train.arguments import monitoring_arguments, monitoring_callbacks, monitoring_problems
from weft.train.checkpoints import BEGUN, Checkpoints, describe, find_checkpoints
from weft.train.finite import FiniteLoss
from weft.train.progress import ProgressLine, TokenBudget, budget_in_steps, trained_tokens
from weft.train.scaling_cache import ScalingCache, ScalingCacheCollator
from weft.train.start import continued, start_gate, start_problems
from weft.train.trainer import EvenTrainer, RowsAndABlank
from weft.train.whole_checkpoints import go_on_from, how_to_go_on, keep_checkpoints_whole, make_room

_CONFIG_OPTIONS = (
    "layerwise_scalings",
    "xlora_depth",
    "xlora_size",
    "xlora_dropout_p",
    "softmax_temperature",
    "top_k_lora",
    "global_scaling_weight",
    "scaling_pass_value",
    "scaling_pass_layers",
    "gate_layer",
    "use_trainable_adapters",
    "allow_dora",
    "balance_loss_weight",
    "entropy_loss_weight",
    "expert_label_loss_weight",
)
# What a run leaves in its output folder before there is a checkpoint.
_OF_A_RUN = {"checkpoints", "scaling-cache"}


def train(options: TrainOptions) -> Path:
    """Train a mixture and save it.

    Returns:
        The folder with the mixture and its tokenizer.

    Raises:
        WeftError: the options, adapters or data cannot work.
        KeyboardInterrupt: after an interrupt, when the mixture so far and a checkpoint to resume from are saved.
    """
    options = continued(options, _CONFIG_OPTIONS)
    adapters = by_name(options.adapters, "adapters")
    checkpoints = check(options, adapters)
    resumed = checkpoints.last if options.resume else None
    assert options.base is not None
    set_seed(options.seed)
    tokenizer = load_tokenizer(options.base, trust_remote_code=options.trust_remote_code)
    rows = read_training_rows(options, list(adapters), tokenizer)
    held_out = read_eval_rows(options, list(adapters), tokenizer)
    model = _load_model(options, adapters)
    sequences = [row["input_ids"] for row in rows]
    packed = rows
    if options.packing:
        check_packing(model, options.batch_size)
        packed = packed_rows(rows, options.sequence_length)
    output = Path(options.output)
    interrupt, progress = StopOnInterrupt(), ProgressLine(options.max_tokens)
    tokens = sum(trained_tokens(row["labels"]) for row in rows)
    schedule_steps, most_steps = steps_to_train(options, len(packed), tokens)
    arguments = training_arguments(options, _checkpoints(options), schedule_steps, most_steps)
    if resumed is None:
        start_gate(model, rows, options, arguments.device)
    collator = _collator(options, tokenizer, model, sequences, arguments)
    make_room(_checkpoints(options), checkpoints)
    trainer = EvenTrainer(
        model,
        arguments,
        train_dataset=RowsAndABlank(packed),
        eval_dataset=held_out,
        data_collator=collator,
        callbacks=[interrupt, TokenBudget(options.max_tokens), progress, *monitoring_callbacks(options)],
    )
    trainer.schedule_steps = schedule_steps if options.max_tokens else None
    trainer.remove_callback(PrinterCallback)
    FiniteLoss(trainer, tokenizer)
    keep_checkpoints_whole(trainer)
    if resumed is not None:
        go_on_from(trainer, checkpoints, by_the_first(print))
    together = False
    try:
        with errors_of_writing(_checkpoints(options), "what was saved before is kept", "free some space"):  # a report
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        together = True
    except WeftError as err:
        together = err.in_all_processes
        raise
    finally:
        progress.close()
        interrupt.on_train_end(trainer.args, trainer.state, trainer.control)  # which an error leaves out
        # Also after a second interrupt or an error half-way: what was learned so far is kept. A model in shards takes
        # all processes to save, of which some may be elsewhere then: it has its checkpoints.
        if trainer.state.global_step > 0 and (together or not trainer.in_shards):
            _save(trainer, tokenizer, options, together=together)
    if interrupt.requested:
        raise KeyboardInterrupt
    return output


def _load_model(options: TrainOptions, adapters: dict[str, str]) -> PeftModel:
    """The mixture to train: a new one, or the one to go on from."""
    assert options.base is not None
    base = load_base(options.base, **loading_options(options))
    check_length(options.sequence_length, base.config)
    if options.start_from is not None:
        return from_pretrained(options.start_from, base, is_trainable=True)
    return new_mixture(base, adapters, options)


def new_mixture(base: Any, adapters: dict[str, str], options: TrainOptions) -> PeftModel:
    """A mixture on a base model, with the options of a training."""
    return from_adapters(base, adapters, **{name: getattr(options, name) for name in _CONFIG_OPTIONS})


def read_training_rows(options: TrainOptions, adapters: Sequence[str], tokenizer: Any) -> list[dict[str, Any]]:
    """The rows that the gate learns on, with labels where their loss is asked for.

    Raises:
        DataError: the data cannot be read, or it has no labels and their loss is asked for.
    """
    labelled = options.expert_label_loss_weight != 0 or options.gate_start == "labels"
    return _rows(options.data, adapters, tokenizer, options, labelled=labelled)


def read_eval_rows(options: TrainOptions, adapters: Sequence[str], tokenizer: Any) -> list[dict[str, Any]] | None:
    """The rows that the training is evaluated on, if any; an expert's name before a file changes nothing.

    Raises:
        DataError: the data cannot be read.
    """
    if not options.eval_data:
        return None
    return _rows(options.eval_data, adapters, tokenizer, options, labelled=False)


def _rows(
    data: list[str], adapters: Sequence[str], tokenizer: Any, options: TrainOptions, *, labelled: bool
) -> list[dict[str, Any]]:
    return training_rows(
        data,
        adapters,
        tokenizer,
        options.sequence_length,
        labelled=labelled,
        assistant_only_loss=options.assistant_only_loss,
    )


def _save(trainer: EvenTrainer, tokenizer: Any, options: TrainOptions, *, together: bool) -> None:
    try:
        trainer.save_mixture(Path(options.output), tokenizer, together=together)
    except CheckpointError as err:
        error = CheckpointError(f"{err}. {how_to_go_on(_checkpoints(options))}")
        error.in_all_processes = err.in_all_processes
        raise error from err


def _collator(
    options: TrainOptions, tokenizer: Any, model: Any, sequences: list[list[int]], arguments: TrainingArguments
) -> Callable[[list[Any]], Any]:
    """What makes batches of examples, with the scaling pass of each text where that is cached."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"  # positions are counted from the first token of a row
    collator: Callable[[list[Any]], Any] = LabelledCollator(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100))
    if options.packing:
        collator = PackedCollator(tokenizer.pad_token_id, collator)
    if not options.cache_scaling_pass:
        return collator
    model.to(arguments.device)
    folder = options.cache_folder or Path(options.output) / "scaling-cache"
    with (
        arguments.main_process_first(desc="the scaling pass"),
        torch.autocast(arguments.device.type, torch.bfloat16, enabled=options.bf16),
    ):
        cache = ScalingCache.build(
            model,
            sequences,
            folder,
            dtype=options.cache_dtype,
            batch_size=options.batch_size,
            announce=by_the_first(print),
        )
    return ScalingCacheCollator(cache, collator)


class StopOnInterrupt(TrainerCallback):
    """Turns the first Ctrl-C into an orderly stop: finish the step, write a checkpoint, end. The second one aborts.

    Args:
        saves: write that checkpoint.
    """

    def __init__(self, *, saves: bool = True) -> None:
        self.requested = False
        self._saves = saves
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch for Ctrl-C."""
        try:
            self._previous = signal.signal(signal.SIGINT, self._request)
        except ValueError:  # signals reach the main thread only
            self._previous = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here if it came, to whichever process."""
        self.requested = any_process(self.requested, args.device)
        if self.requested:
            control.should_save = self._saves
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give Ctrl-C back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _checkpoints(options: TrainOptions) -> Path:
    return Path(options.output) / "checkpoints"


def _resume_problems(options: TrainOptions, expert_names: list[str], checkpoints: Checkpoints) -> list[str]:
    """A run must neither continue another one nor mix its checkpoints with another's."""
    folder = _checkpoints(options)
    last, damaged = checkpoints.last, checkpoints.damaged
    if not options.resume:
        if last is not None:
            return [f"output ({options.output}) holds the checkpoints of a run: give another folder, or --resume true"]
        if damaged:
            return [
                f"output ({options.output}) holds checkpoints that no run can go on from: {describe(damaged)}; give "
                f"another folder, or remove {options.output}"
            ]
        return []
    if last is None and damaged:
        return [
            f"resume (True) found no whole checkpoint in {folder}: {describe(damaged)}; leave it out, and give another "
            f"folder or remove {options.output}"
        ]
    if last is None:
        only = ", only what was not completed and does not count" if checkpoints.half else ""
        return [f"resume (True) found no checkpoint in {folder}{only}: leave it out to start anew"]
    saved = read_json(last / CONFIG_NAME)
    given = XLoraConfig(
        adapters=dict.fromkeys(expert_names, "-"), **{name: getattr(options, name) for name in _CONFIG_OPTIONS}
    )
    wanted: dict[str, Any] = {"expert_names": expert_names, **{name: getattr(given, name) for name in _CONFIG_OPTIONS}}
    return [
        f"{name} ({value!r}) must be what the run to resume has ({saved.get(name)!r})"
        for name, value in wanted.items()
        if saved.get(name) != value
    ]


def check(options: TrainOptions, adapters: dict[str, str]) -> Checkpoints:
    """Say what is wrong with the options before anything is loaded.

    Returns:
        The checkpoints in the output folder.

    Raises:
        ConfigError: with all that is wrong.
    """
    problems = []
    if options.base is None:
        problems.append("base is missing: the folder or Hub id of the base model")
    if not adapters:
        problems.append("adapters is missing: the experts, as name=FOLDER (or experts_from, as name=DATA)")
    if options.experts_from:
        problems.append(f"experts_from ({options.experts_from}) needs weft.train.experts.train_in_stages")
    if not options.data:
        problems.append("data is missing: one or more files of training text")
    for name in ("batch_size", "gradient_accumulation", "save_steps", "log_steps"):
        if getattr(options, name) < 1:
            problems.append(f"{name} ({getattr(options, name)}) must be at least 1")
    if options.max_steps < 0:
        problems.append(f"max_steps ({options.max_steps}) must be at least 0")
    if options.learning_rate <= 0:
        problems.append(f"learning_rate ({options.learning_rate}) must be above 0")
    if not 0 <= options.warmup <= 1:
        problems.append(f"warmup ({options.warmup}) must be in [0, 1]")
    problems += start_problems(options)
    problems += monitoring_problems(options)
    problems += _amount_problems(options)
    checkpoints = find_checkpoints(_checkpoints(options))
    problems += _output_problems(options, checkpoints)
    problems += _resume_problems(options, list(adapters), checkpoints)
    if problems:
        raise ConfigError("weft train cannot start:", problems)
    XLoraConfig(adapters=adapters, **{name: getattr(options, name) for name in _CONFIG_OPTIONS})
    return checkpoints


def _output_problems(options: TrainOptions, checkpoints: Checkpoints) -> list[str]:
    output = Path(options.output)
    problem = folder_problem(output)
    if problem is not None:
        return [f"output ({options.output}) cannot be made: {problem}"]
    settle(output, leftovers=True)
    begun = (_checkpoints(options) / BEGUN).exists()
    if checkpoints.last is not None or checkpoints.damaged or begun:  # a run's, whose files may be replaced
        return []
    problem = used_folder_problem(output, "output", own=_OF_A_RUN)
    return [] if problem is None else [problem]


def _amount_problems(options: TrainOptions) -> list[str]:
    """How long to train, and how to make batches."""
    problems = []
    if options.max_tokens < 0:
        problems.append(f"max_tokens ({options.max_tokens}) must be at least 0")
    if options.packing and options.group_by_length:
        problems.append("packing (True) and group_by_length (True) exclude each other: packed sequences are all long")
    if options.max_steps == options.max_tokens == 0 and options.epochs <= 0:
        problems.append(f"epochs ({options.epochs}) must be above 0")
    return problems


def steps_to_train(options: TrainOptions, num_rows: int, tokens_per_epoch: int) -> tuple[int, int]:
    """Optimizer steps as expected, and at most (0: `epochs` decides)."""
    per_step = options.batch_size * options.gradient_accumulation * number_of_processes()
    if options.max_tokens:
        expected, most = budget_in_steps(options.max_tokens, tokens_per_epoch, -(-num_rows // per_step))
        limit = options.max_steps or most
        return min(expected, limit), min(most, limit)
    expected = options.max_steps or max(1, int(options.epochs * max(1, num_rows // per_step)))
    return expected, options.max_steps


def training_arguments(options: TrainOptions, folder: Path, schedule_steps: int, most_steps: int) -> TrainingArguments:
    """The Trainer's options for a run, with checkpoints in `folder`.

    Args:
        options: of the run.
        folder: for the checkpoints.
        schedule_steps: optimizer steps over which the learning rate falls.
        most_steps: at most so many; 0 where `epochs` decides.
    """
    return TrainingArguments(
        output_dir=os.fspath(folder),
        max_steps=most_steps or -1,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(options.warmup * schedule_steps),
        weight_decay=0.0,
        seed=options.seed,
        logging_steps=options.log_steps,
        logging_nan_inf_filter=False,  # such a loss stops the run
        **checkpointing_arguments({"use_reentrant": False} if options.gradient_checkpointing else None),
        bf16=options.bf16,
        **length_grouping_arguments(options.group_by_length),
        remove_unused_columns=False,
        disable_tqdm=True,
        **monitoring_arguments(options),
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
    )
