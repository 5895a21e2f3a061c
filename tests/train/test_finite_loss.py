"""A loss that is not finite stops a training, which says where, and keeps the last good weights."""

import json
import re
import shutil
import signal

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import weft
from models import is_expert, quietly, tiny_llama, tiny_tokenizer
from weft.cli import main
from weft.data.batches import RowsAndABlank
from weft.errors import TrainingError
from weft.train.trainer import WeftTrainer

TENSORS = "adapter_model.safetensors"


@pytest.fixture
def train(base_without_z, base_adapters, tmp_path, capsys):
    """`weft train`, which must fail: its error."""

    def train(texts, *more, adapters=base_adapters):
        data = tmp_path / "texts.jsonl"
        data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        fixed = [
            "--base",
            str(base_without_z),
            "--data",
            str(data),
            "--output",
            str(tmp_path / "out"),
            "--batch-size",
            "2",
        ]
        before = signal.getsignal(signal.SIGINT)
        options = ["--adapters", *(f"{name}={path}" for name, path in adapters.items()), "--save-steps", "1", *more]
        assert main(["train", *fixed, *options]) == 1
        assert signal.getsignal(signal.SIGINT) is before
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    return train


def gate(folder):
    return load_file(folder / TENSORS)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_step_and_the_texts_are_named_and_the_last_good_weights_saved(accumulation, train, tmp_path):
    texts = [f"the quick brown fox {number:2} " * 4 for number in range(15)] + ["Zebras are striped"]
    error = train(texts, "--gradient-accumulation-steps", str(accumulation), "--epochs", "2")
    found = re.search(
        r"training stopped: the loss is nan at step (\d+)(?:, forward pass (\d) of 2)?, with these", error
    )
    assert found, error
    listed = re.findall(r"^  - '(.*)'$", error, flags=re.M)
    assert len(listed) == 2
    assert sorted(listed)[0] == "Zebras are striped"
    assert re.fullmatch(r"(the quick brown fox +\d+ )+t?.*…", sorted(listed)[1])
    step, forward_pass = int(found[1]), int(found[2] or 1)
    # The first pass after a step may show what is wrong with the step; the second is one too many for that.
    good = step - 1 if forward_pass == 2 else step - 2
    checkpoint = tmp_path / f"out/checkpoints/checkpoint-{good}"
    if checkpoint.exists():
        saved, expected = gate(tmp_path / "out"), gate(checkpoint)
        assert all(torch.equal(saved[key], expected[key]) for key in expected)
    assert (tmp_path / "out" / TENSORS).exists() == (step > 1)


def test_a_learning_rate_that_breaks_the_gate_leaves_the_weights_from_before(train, tmp_path):
    error = train(["the quick brown fox"] * 8, "--learning-rate", "3e37", "--warmup-ratio", "0", "--max-steps", "4")
    assert "the loss is nan at step 2, with these texts in the batch:" in error
    assert "or lower learning_rate (3e+37)" in error
    saved = gate(tmp_path / "out")
    assert all(value.abs().max() < 1 for value in saved.values())


def test_a_broken_adapter_is_refused_before_the_first_step(train, base_adapters, tmp_path):
    broken = shutil.copytree(base_adapters["code"], tmp_path / "broken")
    tensors = load_file(broken / TENSORS)
    save_file({key: torch.full_like(value, torch.inf) for key, value in tensors.items()}, broken / TENSORS)
    error = train(["the quick brown fox"] * 4, adapters={**base_adapters, "code": broken})
    assert f"adapter 'code': {broken / TENSORS} is broken, as base_model.model.model.layers.0" in error
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_step(llama_adapters, tmp_path):
    model = weft.from_adapters(tiny_llama(), llama_adapters, use_trainable_adapters=True)
    expert = next(parameter for name, parameter in model.named_parameters() if is_expert(name))
    expert.register_hook(lambda gradient: gradient * torch.inf)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": torch.arange(1, 9), "labels": torch.arange(1, 9)} for _ in range(4)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", disable_tqdm=True, dataloader_pin_memory=False
    )
    trainer = WeftTrainer(model, arguments, tokenizer=tiny_tokenizer(), train_dataset=RowsAndABlank(rows))
    with pytest.raises(TrainingError, match=r"the gradient's norm is (nan|inf) at step 1, with these texts"):
        quietly(trainer.train)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_finite_training_is_that_of_transformers_trainer(llama_adapters, tmp_path):
    labels = torch.tensor([-100, *range(1, 8)])  # transformers before 5.10 counts the first one, which nothing predicts
    rows = [{"input_ids": torch.arange(number, number + 8), "labels": labels} for number in range(1, 17)]

    def trained(kind, dataset, **more):
        class InOrder(kind):
            def _get_train_sampler(self, train_dataset=None):
                return torch.utils.data.SequentialSampler(rows)

        torch.manual_seed(0)
        model = weft.from_adapters(tiny_llama(), llama_adapters)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            learning_rate=0.01,
            gradient_accumulation_steps=2,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        quietly(InOrder(model, arguments, train_dataset=dataset, **more).train)
        return model.state_dict()

    plain = trained(transformers.Trainer, rows)
    ours = trained(WeftTrainer, RowsAndABlank(rows), tokenizer=tiny_tokenizer())
    assert all(torch.equal(plain[key], ours[key]) for key in plain)
