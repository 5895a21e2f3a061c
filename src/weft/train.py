"""`weft train`: the gate (and, if asked, the experts) on transformers' `Trainer`.

The Trainer brings logging, checkpoints, resuming, mixed precision and accelerate; weft brings the model and the data.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from transformers import DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from weft.adapters import read_json
from weft.config import XLoraConfig
from weft.data import check_length, read_texts, token_sequences
from weft.distributed import EvenTrainer, RowsAndABlank, any_process, number_of_processes
from weft.errors import ConfigError
from weft.integration import from_adapters
from weft.loading import load_base, load_tokenizer
from weft.options import TrainOptions

_CONFIG_OPTIONS = (
    "layerwise_scalings",
    "xlora_depth",
    "xlora_size",
    "xlora_dropout_p",
    "softmax_temperature",
    "top_k_lora",
    "scaling_pass_value",
    "scaling_pass_layers",
    "gate_layer",
    "use_trainable_adapters",
)


def train(options: TrainOptions) -> Path:
    """Train a mixture and save it.

    Returns:
        The folder with the mixture and its tokenizer.

    Raises:
        WeftError: the options, adapters or data cannot work.
        KeyboardInterrupt: after an interrupt, when the mixture so far and a checkpoint to resume from are saved.
    """
    adapters = parse_adapters(options.adapters)
    _check(options, adapters)
    assert options.base is not None
    model_options = {name: getattr(options, name) for name in _CONFIG_OPTIONS}
    XLoraConfig(adapters=adapters, **model_options)  # says what is wrong before the base model is loaded
    set_seed(options.seed)
    tokenizer = load_tokenizer(options.base)
    sequences = [
        sequence
        for source in options.data
        for sequence in token_sequences(read_texts(source, tokenizer), tokenizer, options.sequence_length)
    ]
    model = from_adapters(load_base(options.base, options.dtype), adapters, **model_options)
    check_length(options.sequence_length, model.config)

    output = Path(options.output)
    interrupt = StopOnInterrupt()
    trainer = EvenTrainer(
        model,
        _training_arguments(options, _checkpoints(options), len(sequences)),
        train_dataset=RowsAndABlank([{"input_ids": sequence, "labels": sequence} for sequence in sequences]),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        callbacks=[interrupt],
    )
    finished = False
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(options))
        finished = True
    finally:
        # Also after a second interrupt or an error half-way: what was learned so far is kept. A model in shards takes
        # all processes to save, of which some may be elsewhere then: it has its checkpoints.
        if trainer.state.global_step > 0 and (finished or not trainer.in_shards):
            trainer.save_mixture(output, tokenizer)
    if interrupt.requested:
        raise KeyboardInterrupt
    return output


def parse_adapters(values: list[str] | dict[str, str]) -> dict[str, str]:
    """["math=DIR", ...] as {name: folder}.

    Raises:
        ConfigError: an entry is no name=FOLDER, or a name stands twice.
    """
    if isinstance(values, dict):
        return values
    adapters: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"adapters has the entry {value!r}, expected name=FOLDER or name=HUB_ID")
        if name in adapters:
            raise ConfigError(f"adapters has the name {name!r} twice ({adapters[name]} and {path})")
        adapters[name] = path
    return adapters


class StopOnInterrupt(TrainerCallback):
    """Turns the first Ctrl-C into an orderly stop: finish the step, write a checkpoint, end. The second one aborts."""

    def __init__(self) -> None:
        self.requested = False
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
            control.should_save = True
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


def _last_checkpoint(options: TrainOptions) -> str | None:
    """The checkpoint to resume from, if that was asked for and there is one."""
    folder = _checkpoints(options)
    return get_last_checkpoint(str(folder)) if options.resume and folder.is_dir() else None


def _resume_problems(options: TrainOptions, expert_names: list[str]) -> list[str]:
    """A run must neither continue another one nor mix its checkpoints with another's."""
    folder = _checkpoints(options)
    if not options.resume:
        if folder.is_dir() and any(folder.iterdir()):
            return [f"output ({options.output}) holds the checkpoints of a run: give another folder, or --resume true"]
        return []
    last = _last_checkpoint(options)
    if last is None:
        return [f"resume (True) found no checkpoint in {folder}: leave it out to start anew"]
    saved = read_json(Path(last) / CONFIG_NAME)
    given = XLoraConfig(
        adapters=dict.fromkeys(expert_names, "-"), **{name: getattr(options, name) for name in _CONFIG_OPTIONS}
    )
    wanted: dict[str, Any] = {"expert_names": expert_names, **{name: getattr(given, name) for name in _CONFIG_OPTIONS}}
    return [
        f"{name} ({value!r}) must be what the run to resume has ({saved.get(name)!r})"
        for name, value in wanted.items()
        if saved.get(name) != value
    ]


def _check(options: TrainOptions, adapters: dict[str, str]) -> None:
    problems = []
    if options.base is None:
        problems.append("base is missing: the folder or Hub id of the base model")
    if not adapters:
        problems.append("adapters is missing: the experts, as name=FOLDER")
    if not options.data:
        problems.append("data is missing: one or more files of training text")
    for name in ("batch_size", "gradient_accumulation", "save_steps", "log_steps"):
        if getattr(options, name) < 1:
            problems.append(f"{name} ({getattr(options, name)}) must be at least 1")
    if options.max_steps < 0:
        problems.append(f"max_steps ({options.max_steps}) must be at least 0")
    if options.max_steps == 0 and options.epochs <= 0:
        problems.append(f"epochs ({options.epochs}) must be above 0")
    if options.learning_rate <= 0:
        problems.append(f"learning_rate ({options.learning_rate}) must be above 0")
    if not 0 <= options.warmup <= 1:
        problems.append(f"warmup ({options.warmup}) must be in [0, 1]")
    if Path(options.output).is_file():
        problems.append(f"output ({options.output}) is a file, expected a folder")
    problems += _resume_problems(options, list(adapters))
    if problems:
        raise ConfigError("weft train cannot start:", problems)


def _training_arguments(options: TrainOptions, folder: Path, num_sequences: int) -> TrainingArguments:
    batch_size = options.batch_size * options.gradient_accumulation * number_of_processes()
    steps_per_epoch = max(1, num_sequences // batch_size)
    steps = options.max_steps or max(1, int(options.epochs * steps_per_epoch))
    return TrainingArguments(
        output_dir=os.fspath(folder),
        max_steps=options.max_steps or -1,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(options.warmup * steps),
        weight_decay=0.0,
        seed=options.seed,
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=options.log_steps,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        bf16=options.bf16,
        report_to="none",
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
    )
