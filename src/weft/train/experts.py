"""Trains a mixture in two stages: first the experts, each on its own data, then the gate.

An expert is an ordinary LoRA adapter, trained with peft and transformers' `Trainer` on the base model. It is saved when
it is complete, so that a run after an interrupt trains only the missing experts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig, TaskType, get_peft_model
from peft.utils import CONFIG_NAME
from transformers import PrinterCallback, set_seed
from transformers.trainer_utils import SaveStrategy

from weft.base_model.loading import load_base, load_tokenizer, loading_options
from weft.checkpoint.adapters import read_adapters
from weft.data.batches import RowCollator, RowsAndABlank
from weft.data.texts import check_length, read_each
from weft.distributed import by_the_first
from weft.errors import AdapterError, CheckpointError, ConfigError
from weft.files.digests import changes, digests
from weft.files.names import by_name
from weft.files.ownership import refuse_used_folder
from weft.files.reading import read_json, shown
from weft.files.writing import settle, temporary_folder
from weft.model.build import from_adapters
from weft.model.inject import remove_adapters
from weft.options import TrainOptions
from weft.options.foreseen import refuse_foreseen
from weft.options.spellings import EARLIER
from weft.options.training import own_training_problems
from weft.screen.libraries import deprecations_of_peft_hidden
from weft.screen.visible import notice
from weft.train.arguments import steps_to_train, training_arguments
from weft.train.checkpoints import checkpoints_folder, last_checkpoint
from weft.train.checks import check, doubts
from weft.train.dry_run import dry_run
from weft.train.gate import new_mixture, read_both, read_rows_of, train
from weft.train.packing_check import check_packing
from weft.train.plateau import Plan
from weft.train.progress import ProgressLine
from weft.train.stopping import StopOnInterrupt
from weft.train.trainer import WeftTrainer, trained_tokens

RECORD = "weft_expert.json"
# The options that change the training of an expert.
_RECORDED = (
    "base",
    "expert_rank",
    "expert_alpha",
    "expert_targets",
    "expert_steps",
    "expert_epochs",
    "expert_learning_rate",
    "batch_size",
    "gradient_accumulation_steps",
    "sequence_length",
    "assistant_only_loss",
    "warmup_ratio",
    "seed",
)


def train_in_stages(options: TrainOptions, say: Callable[[str], None] = notice) -> Path:
    """Train the missing experts of `experts_from`, each on its data, and then the gate.

    Experts are saved as ordinary adapters in OUTPUT-experts/NAME. The gate is trained on `data`, or without it on the
    data of all experts. Without `experts_from` this is `weft.train.gate.train`.

    Args:
        options: see `TrainOptions`.
        say: called with each line of the progress.

    Returns:
        The folder with the mixture and its tokenizer.

    Raises:
        WeftError: the options, adapters or data are not valid. Raised before anything is trained.
        KeyboardInterrupt: the user interrupted. Complete experts are kept.
    """
    refuse_foreseen(options)
    say = by_the_first(say)
    for line in doubts(options):
        say(line)
    if not options.experts_from:
        return train(options)
    sources = _sources(options)
    folders = {name: experts_folder(options) / name for name in sources}
    adapters = _all_adapters(options, folders)
    resume = options.resume and last_checkpoint(checkpoints_folder(options.output)) is not None
    data = options.data or [f"{name}={source}" for name, source in sources.items()]
    gate_options = dataclasses.replace(options, experts_from=[], adapters=adapters, data=data, resume=resume)
    check(gate_options, adapters)
    read_adapters(by_name(options.adapters, "adapters"), allow_dora=options.allow_dora, base_is_known=True)
    missing = [name for name, folder in folders.items() if not _is_complete(name, folder, options)]
    if missing and options.dry_run:
        return _dry_run(options, gate_options, missing)
    if missing:
        assert options.base is not None
        tokenizer = load_tokenizer(options.base, trust_remote_code=options.trust_remote_code)
        read_both(gate_options, list(adapters), tokenizer)
        _train_missing(options, say, gate_options=gate_options)
    say(f"training the gate over {', '.join(adapters)}")
    if options.ends_at_a_plateau and not options.data and not options.eval_data:
        say("it is trained and evaluated on the experts' own texts: eval_data names texts that no expert has seen")
    return train(gate_options)


def train_experts(options: TrainOptions, say: Callable[[str], None] = notice) -> dict[str, Path]:
    """Train the missing experts of `experts_from`, as ordinary LoRA adapters, without a gate.

    Args:
        options: `base`, `experts_from`, `output` and the options expert_...; see `TrainOptions`.
        say: called with each line of the progress.

    Returns:
        The experts' folders by name.

    Raises:
        WeftError: the options or data are not valid. Raised before anything is trained.
        KeyboardInterrupt: the user interrupted. Complete experts are kept.
    """
    problems = own_training_problems(options)
    if problems:
        raise ConfigError("the experts cannot be trained:", problems)
    return _train_missing(options, say, gate_options=None)


def _train_missing(
    options: TrainOptions, say: Callable[[str], None], *, gate_options: TrainOptions | None
) -> dict[str, Path]:
    """Train the missing experts. Before that, make a mixture with untrained ones, to find problems early.

    Args:
        options: the options of the whole training.
        say: called with each line of the progress.
        gate_options: the options of the gate's training; None if no gate is trained.
    """
    assert options.base is not None
    sources = _sources(options)
    folders = {name: experts_folder(options) / name for name in sources}
    missing = {name: source for name, source in sources.items() if not _is_complete(name, folders[name], options)}
    tokenizer = load_tokenizer(options.base, trust_remote_code=options.trust_remote_code)
    found = read_each(missing.values(), lambda source: read_rows_of([source], [], tokenizer, options))
    rows = dict(zip(missing, found, strict=True))
    targets, base = _tried_targets(options, list(missing), gate_options, say) if missing else ([], None)
    for name in missing:
        say(f"training expert {name!r} on {sources[name]}: {len(rows[name])} sequences")
        base = _train_expert(name, folders[name], rows[name], tokenizer, options, targets, base)
    return folders


def _dry_run(options: TrainOptions, gate_options: TrainOptions, missing: list[str]) -> Path:
    """Estimate the training of each missing expert, and of a gate over untrained experts of the same size."""
    with temporary_folder(lambda folder: _dry_run_experts(options, missing, folder)) as fresh:
        adapters = {**by_name(gate_options.adapters, "adapters"), **dict.fromkeys(missing, str(fresh))}
        return train(dataclasses.replace(gate_options, adapters=adapters))


def _dry_run_experts(options: TrainOptions, missing: list[str], folder: Path) -> None:
    """Estimate the training of each missing expert, and save an adapter of the same size in the folder."""
    assert options.base is not None
    sources, tokenizer = _sources(options), load_tokenizer(options.base, trust_remote_code=options.trust_remote_code)
    base = load_base(options.base, **loading_options(options))
    check_length(options.sequence_length, base.config)
    targets, _ = _mixable_targets(base, options)
    for name in missing:
        model: Any = _with_adapter(base, _lora_config(options, targets))
        rows = read_rows_of([sources[name]], [], tokenizer, options)
        dry_run(Plan(_own_options(options), rows, None), model, tokenizer, f"expert {name!r}")
        if name == missing[-1]:
            _save_quietly(model, folder)
        base = model.unload()


def experts_folder(options: TrainOptions) -> Path:
    """The folder of the trained experts, beside the output folder."""
    output = Path(options.output)
    return output.with_name(f"{output.name}-experts")


def _sources(options: TrainOptions) -> dict[str, str]:
    return by_name(options.experts_from, "experts_from", "name=DATA")


def _all_adapters(options: TrainOptions, folders: dict[str, Path]) -> dict[str, str]:
    """name -> folder: the experts to train, then the given adapters."""
    return {**{name: str(folder) for name, folder in folders.items()}, **by_name(options.adapters, "adapters")}


def _record(name: str, options: TrainOptions) -> dict[str, Any]:
    return {"data": _sources(options)[name], **{option: getattr(options, option) for option in _RECORDED}}


def _is_complete(name: str, folder: Path, options: TrainOptions) -> bool:
    """Whether an earlier run has trained this expert.

    Raises:
        ConfigError: it was trained with other options or data, or the folder has other files.
        CheckpointError: its files were changed or lost.
    """
    settle(folder, leftovers=True)
    if not os.path.lexists(folder / CONFIG_NAME):
        refuse_used_folder(folder, f"the folder of expert {name!r}")
        return False
    if not os.path.lexists(folder / RECORD):
        raise ConfigError(
            f"{folder} holds an adapter that weft did not train: give it with --adapters, or move it away"
        )
    saved = {EARLIER.get(option, option): value for option, value in read_json(folder / RECORD).items()}
    # Earlier versions did not have this option.
    saved, wanted = {"assistant_only_loss": False, **saved}, _record(name, options)
    damage = changes(folder, saved.get("files", {}))
    if damage:
        raise CheckpointError(
            f"expert {name!r} in {folder} is not as it was saved: {'; '.join(damage)}; remove it to train it anew"
        )
    problems = [
        f"{option} ({value!r}) must be what it was trained with ({shown(saved.get(option))})"
        for option, value in wanted.items()
        if saved.get(option) != value
    ]
    if problems:
        raise ConfigError(f"expert {name!r} is in {folder} from an earlier run (remove it to train it anew):", problems)
    return True


def _tried_targets(
    options: TrainOptions, missing: list[str], gate_options: TrainOptions | None, say: Callable[[str], None]
) -> tuple[str | list[str], Any]:
    """Make a mixture with untrained experts, and return the experts' targets and the base model.

    Raises:
        WeftError: the trained experts could not be mixed.
    """
    assert options.base is not None
    base = load_base(options.base, **loading_options(options))
    check_length(options.sequence_length, base.config)
    targets, left_out = _mixable_targets(base, options)
    if left_out:
        say(
            f"the experts leave {', '.join(left_out)} out, parameters of the base model's own experts, which are fused "
            f"and cannot be adapted token by token; they adapt {', '.join(targets)}"
        )
    model = _with_adapter(base, _lora_config(options, targets))

    with temporary_folder(lambda folder: _save_quietly(model, folder)) as fresh:
        remove_adapters(base)
        adapters = dict.fromkeys(missing, str(fresh))
        if gate_options is None:
            mixture: Any = from_adapters(base, adapters)
        else:
            all_adapters = by_name(gate_options.adapters, "adapters")
            paths = {name: adapters.get(name, path) for name, path in all_adapters.items()}
            mixture = new_mixture(base, paths, gate_options)
            if gate_options.packing:
                check_packing(mixture, gate_options.batch_size)
        mixture.base_model.unload()
    return targets, base


def _save_quietly(model: Any, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about embeddings; repeated when an expert is saved
        model.save_pretrained(str(folder))


def _mixable_targets(base: Any, options: TrainOptions) -> tuple[str | list[str], list[str]]:
    """Return the target modules that can be mixed, and the fused parameters of all-linear that cannot.

    Raises:
        AdapterError: the targets do not fit the base model.
        ConfigError: the targets include fused parameters.
    """
    given: str | list[str] = options.expert_targets
    given = given[0] if given == ["all-linear"] else given
    try:
        config: Any = _with_adapter(base, _lora_config(options, given), low_cpu_mem_usage=True).peft_config["default"]
    except ValueError as err:
        raise AdapterError(f"expert_targets ({options.expert_targets}) do not fit the base model: {err}") from err
    remove_adapters(base)
    fused = sorted(config.target_parameters or ())
    if not fused:
        return given, []
    if given != "all-linear" or not config.target_modules:
        raise ConfigError(
            f"expert_targets ({options.expert_targets}) mean the parameters {fused} of the base model's own experts, "
            "which are fused and cannot be adapted token by token: name linear layers, such as those of the attention, "
            "or leave it out (all-linear takes all that can be mixed)"
        )
    return sorted(config.target_modules), fused


def _own_options(options: TrainOptions) -> TrainOptions:
    """The options of an expert's training, under the names of the gate's options."""
    return dataclasses.replace(
        options,
        max_steps=options.expert_steps,
        max_tokens=0,
        epochs=options.expert_epochs,
        learning_rate=options.expert_learning_rate,
        packing=False,
        cache_scaling_pass=False,
        eval_data=[],
        report_to="none",
    )


def _lora_config(options: TrainOptions, targets: str | list[str]) -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=options.expert_rank, lora_alpha=options.expert_alpha, target_modules=targets
    )


def _with_adapter(base: Any, config: LoraConfig, **options: Any) -> Any:
    with deprecations_of_peft_hidden():
        return get_peft_model(base, config, **options)


def _train_expert(
    name: str,
    folder: Path,
    rows: list[dict[str, Any]],
    tokenizer: Any,
    options: TrainOptions,
    targets: str | list[str],
    base: Any,
) -> Any:
    """Train one expert and save it when it is complete.

    Args:
        base: the base model from the training of the previous expert; None loads it.

    Returns:
        The unchanged base model; None if it is sharded, as then it cannot be used for another training.
    """
    assert options.base is not None
    if base is None:
        base = load_base(options.base, **loading_options(options))
    set_seed(options.seed)  # so that an expert does not depend on those before it
    model = _with_adapter(base, _lora_config(options, targets))
    own = _own_options(options)
    interrupt, progress = StopOnInterrupt(saves=False), ProgressLine()
    with temporary_folder(lambda folder: None) as unused:
        steps = steps_to_train(own, len(rows), sum(trained_tokens(row["labels"]) for row in rows))
        arguments = training_arguments(own, unused, *steps)
        arguments.save_strategy = SaveStrategy.NO  # an expert that is stopped starts anew
        trainer = WeftTrainer(
            model,
            arguments,
            tokenizer=tokenizer,
            train_dataset=RowsAndABlank(rows),
            data_collator=RowCollator(tokenizer.pad_token_id),
            callbacks=[interrupt, progress],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            progress.close()
            interrupt.on_train_end(arguments, trainer.state, trainer.control)  # not called after an error
    if interrupt.requested:
        raise KeyboardInterrupt
    state_dict = trainer.whole_state()

    def write(part: Path) -> None:
        model.save_pretrained(str(part), state_dict=state_dict)
        files = [file.name for file in part.iterdir() if file.suffix != ".md"]  # a user may edit its card
        record = {**_record(name, options), "files": digests(part, files)}
        (part / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")

    trainer.write_together(folder, write)
    return None if trainer.in_shards else model.unload()
