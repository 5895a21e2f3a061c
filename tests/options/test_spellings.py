"""Options take transformers' names, and those that they had before, in Python too."""

import dataclasses

import pytest

from weft.cli.commands import COMMANDS
from weft.options import GenerateOptions, TrainOptions
from weft.options.spellings import EARLIER, TRAINERS, current_name


def test_the_trainers_names_are_options_of_the_trainer():
    import transformers

    names = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert set(TRAINERS) - {"early_stopping_patience"} <= names  # which is EarlyStoppingCallback's
    commands = (command.options for command in COMMANDS.values())
    own = {field.name for options in commands for field in dataclasses.fields(options)}
    assert set(TRAINERS.values()) | set(EARLIER.values()) <= own
    assert not own & (set(TRAINERS) | set(EARLIER))


def test_other_spellings_make_the_same_options():
    assert TrainOptions(num_train_epochs=2.0, per_device_train_batch_size=3) == TrainOptions(epochs=2.0, batch_size=3)
    with pytest.warns(FutureWarning, match="the option log_steps is called logging_steps now"):
        found = TrainOptions(log_steps=7)
    assert found == TrainOptions(logging_steps=7)


def test_an_option_in_two_spellings_is_refused():
    with pytest.raises(TypeError, match="TrainOptions has logging_steps twice, once as log_steps: give it once"):
        TrainOptions(log_steps=1, logging_steps=2)


def test_other_commands_do_not_know_these_names():
    assert current_name("warmup", {"prompt"}) == "warmup"
    with pytest.raises(TypeError, match="warmup"):
        GenerateOptions("m", warmup=1)
