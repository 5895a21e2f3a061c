"""What the gate did: counted while it trains, in the Trainer's log, and in TensorBoard's."""

import copy
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import trl
from transformers.trainer_callback import PrinterCallback

import weft
from models import VOCAB, quietly, tiny_llama, tiny_tokenizer
from weft.errors import ConfigError
from weft.gate.metrics import GateMetrics
from weft.gate.routing import keep_top_k

ALL = {"balance_loss_weight": 0.3, "entropy_loss_weight": -0.2, "expert_label_loss_weight": 0.5}


def mixture(adapters, **options):
    torch.manual_seed(1)
    return weft.from_adapters(tiny_llama(), adapters, layerwise_scalings=True, **options).train()


def batches(number=3):
    generator = torch.Generator().manual_seed(3)
    for length in range(5, 5 + number):
        ids = torch.randint(1, VOCAB, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids}


def entropy(shares):
    return -(torch.special.xlogy(shares, shares)).sum(-1) / math.log(shares.shape[-1])


# -------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k_lora": 2},
        {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
        {"enable_softmax": False},
        {"gate_layer": 1},
    ],
    ids=str,
)
def test_metrics_are_means_over_the_tokens_of_all_calls(llama_adapters, options):
    model = mixture(llama_adapters, **options)
    model.gate_metrics.enabled = True
    before, after = [], []
    for inputs in batches():
        model(**inputs)
        scalings = model.get_latest_scalings().detach()[inputs["attention_mask"] != 0]
        scalings = scalings[:, model.passes.routings.first_layer :]
        followed = keep_top_k(scalings, options.get("top_k_lora"), renormalise="enable_softmax_topk" in options)
        after.append(followed.abs() / followed.abs().sum(-1, keepdim=True))
        shares = scalings.softmax(-1) if "enable_softmax_topk" in options else scalings.abs()
        before.append(shares / shares.sum(-1, keepdim=True))
    before, after = torch.cat(before).flatten(0, 1), torch.cat(after).flatten(0, 1)
    found = model.gate_metrics.read()
    for column, name in enumerate(llama_adapters):
        assert found[f"gate/share/{name}"] == pytest.approx(after[:, column].mean().item(), rel=1e-4)
        top = (after.argmax(-1) == column).float().mean().item()
        assert found[f"gate/top1/{name}"] == pytest.approx(top, abs=1e-6)
    assert found["gate/entropy"] == pytest.approx(entropy(before).mean().item(), rel=1e-4)
    assert found["gate/entropy_followed"] == pytest.approx(entropy(after).mean().item(), rel=1e-4)
    assert model.gate_metrics.read() == {}


def test_nothing_is_counted_when_off_in_evaluation_or_without_the_gate(llama_adapters):
    model = mixture(llama_adapters)
    inputs = next(batches())
    model(**inputs)
    model.gate_metrics.enabled = True
    with torch.no_grad():
        model(**inputs)
    model.eval()(**inputs)
    model.train()
    with model.disable_adapter():
        model(**inputs)
    with model.fixed_scalings({"math": 1.0}):
        model(**inputs)
    assert model.gate_metrics.read() == {}


def test_counting_changes_neither_the_loss_nor_the_gradients(llama_adapters):
    def run(enabled):
        model = mixture(llama_adapters, **ALL)
        model.gate_metrics.enabled = enabled
        loss = model(**next(batches())).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.internal_xlora_classifier.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_losses_are_means_over_the_calls(llama_adapters):
    model = mixture(llama_adapters, **ALL)
    model.gate_metrics.enabled = True
    seen = []
    for inputs in batches():
        model(**inputs)
        seen.append(model.gate_metrics.latest_losses["balance_loss"].item())
    found = model.gate_metrics.read()
    assert found["gate/balance_loss"] == pytest.approx(sum(seen) / 3)
    assert "gate/expert_label_loss" not in found  # the batches have no labels


def test_a_copy_of_a_model_counts_for_itself(llama_adapters):
    model = mixture(llama_adapters, **ALL)
    model.gate_metrics.enabled = True
    model(**next(batches()))
    twin = copy.deepcopy(model)
    twin.gate_metrics.clear()
    assert twin.gate_metrics.read() == {}
    assert model.gate_metrics.read() != {}


def counted(*shares):
    metrics = GateMetrics([f"e{i}" for i in range(len(shares))])
    tensor = torch.tensor(shares).expand(1, 5, 2, len(shares))
    metrics.add(tensor, tensor, None)
    return metrics


@pytest.mark.filterwarnings("error")  # of the calls outside `warns`
def test_a_collapsed_gate_is_warned_of_once_per_reading():
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"expert 'e1' has 96.0% of all shares since the last log") as seen:
            counted(0.04, 0.96).read()
        assert len(seen) == 1
        assert "set balance_loss_weight" in str(seen[0].message)
    counted(0.05, 0.949).read()
    counted(1.0).read()  # one expert alone is no collapse


# -------------------------------------------------------------------------------------- the Trainer's log


def rows(number=16, labelled=True):
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(1, VOCAB, (number, 6), generator=generator)
    label = [{"expert_labels": i % 3} if labelled else {} for i in range(number)]
    return [{"input_ids": ids, "labels": ids, **label[i]} for i, ids in enumerate(sequences)]


def trainer(model, folder, train=None, callbacks=(), evaluation=None, **options):
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "label_names": ["labels"],
        "remove_unused_columns": False,
        **options,
    }
    arguments = quietly(transformers.TrainingArguments, **values)
    made = transformers.Trainer(
        model, arguments, None, rows() if train is None else train, evaluation, callbacks=[*callbacks]
    )
    made.remove_callback(PrinterCallback)
    return made


@pytest.mark.parametrize("given", [False, True])
def test_attached_the_callback_reaches_the_history_and_tensorboard(llama_adapters, tmp_path, given):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, callback = mixture(llama_adapters, **ALL), weft.GateCallback()
    options = {"report_to": "tensorboard", "eval_strategy": "steps", "eval_steps": 2}
    made = trainer(model, tmp_path, callbacks=[callback] if given else [], evaluation=rows(4), **options)
    weft.GateCallback.attach(made)
    quietly(made.train)
    history = made.state.log_history
    logs = {entry["step"]: entry for entry in history if "loss" in entry}
    names = ["gate/share/math", "gate/top1/code", "gate/entropy", "gate/entropy_followed"]
    names += ["gate/balance_loss", "gate/entropy_loss", "gate/expert_label_loss"]
    assert all(set(names) <= set(log) for log in logs.values())
    assert sum(logs[1][f"gate/share/{name}"] for name in llama_adapters) == pytest.approx(1, rel=1e-4)
    assert not any(key.startswith("gate/") for entry in history if "eval_loss" in entry for key in entry)
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    for name in names:
        written = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert written == {step: pytest.approx(log[name], rel=1e-5) for step, log in logs.items()}
    assert not model.gate_metrics.enabled


def test_given_to_a_trainer_the_callback_reaches_the_history_and_later_callbacks(llama_adapters, tmp_path):
    class Seen(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append({name for name in logs if name.startswith("gate/")})

    seen = []
    made = trainer(mixture(llama_adapters, **ALL), tmp_path, callbacks=[Seen(), weft.GateCallback(), Seen()])
    quietly(made.train)
    logged = [{name for name in entry if name.startswith("gate/")} for entry in made.state.log_history]
    assert seen[0] == set()  # as reporting tools, which a Trainer has before what it is given
    assert "gate/entropy" in seen[1] == logged[0]
    made = trainer(mixture(llama_adapters, **ALL), tmp_path, callbacks=[Seen(), weft.GateCallback()])
    weft.GateCallback.attach(made)
    assert sum(isinstance(callback, weft.GateCallback) for callback in made.callback_handler.callbacks) == 1
    seen.clear()
    quietly(made.train)
    assert "gate/entropy" in seen[0]


def test_the_callback_refuses_other_models(tmp_path):
    made = trainer(tiny_llama(), tmp_path, train=rows(labelled=False), callbacks=[weft.GateCallback()])
    with pytest.raises(ConfigError, match=r"GateCallback cannot follow the model \(LlamaForCausalLM\)"):
        made.train()


@pytest.mark.parametrize(
    "wrap", [partial(torch.compile, backend="eager"), torch.nn.DataParallel], ids=["compiled", "parallel"]
)
def test_the_callback_follows_a_wrapped_model(llama_adapters, tmp_path, wrap):
    model, callback, logs = mixture(llama_adapters, **ALL), weft.GateCallback(), {"loss": 1.0}
    given = transformers.TrainingArguments(str(tmp_path)), transformers.TrainerState(), transformers.TrainerControl()
    callback.on_train_begin(*given, model=wrap(model))
    model(**next(batches()), expert_labels=torch.tensor([0, 1]))
    callback.on_log(*given, model=wrap(model), logs=logs)
    callback.on_train_end(*given, model=wrap(model))
    assert logs.keys() >= {"gate/entropy", "gate/balance_loss", "gate/expert_label_loss"}
    assert not model.gate_metrics.enabled


@pytest.mark.filterwarnings("default::UserWarning")
def test_losses_without_effect_are_warned_of_once(llama_adapters, tmp_path):
    def warnings_of(model, **options):
        with pytest.warns(UserWarning, match="has had no effect") as seen:
            trainer(model, tmp_path, callbacks=[weft.GateCallback()], **options).train()
        return [str(warning.message) for warning in seen if "has had no effect" in str(warning.message)]

    # The Trainer drops the labels' column, and label smoothing takes the labels out of the call.
    (dropped,) = warnings_of(mixture(llama_adapters, **ALL), remove_unused_columns=True)
    assert "expert_label_loss_weight (0.5) has had no effect" in dropped
    assert "remove_unused_columns=False" in dropped
    smoothed = warnings_of(mixture(llama_adapters, balance_loss_weight=0.3), label_smoothing_factor=0.1)
    assert smoothed == [
        "balance_loss_weight (0.3) has had no effect since the last log: no call had `labels`, which "
        "label_smoothing_factor and compute_loss_func take out of it"
    ]


# -------------------------------------------------------------------------------------- the Trainer's gradients


def gate_of(model):
    return [parameter.detach().clone() for parameter in model.internal_xlora_classifier.parameters()]


@pytest.mark.parametrize("lengths", ["equal", "different"])
def test_accumulation_in_a_trainer_equals_one_big_batch(llama_adapters, tmp_path, lengths):
    train = rows(4)
    if lengths == "different":  # and padded on the right; the language model's loss alone is exact then
        for row, length in zip(train, (6, 4, 3, 5), strict=True):
            row["attention_mask"] = (torch.arange(6) < length).long()
            row["labels"] = row["labels"].masked_fill(row["attention_mask"] == 0, -100)
    losses = {} if lengths == "different" else {**ALL, "balance_loss_weight": 0.0}

    def run(size, accumulation):
        model = mixture(llama_adapters, **losses)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        made = trainer(model, tmp_path, train, optim="sgd", weight_decay=0.0, max_grad_norm=0.0, **options)
        quietly(made.train)
        return gate_of(model), [entry["loss"] for entry in made.state.log_history if "loss" in entry]

    (accumulated, losses_1), (whole, losses_2) = run(1, 4), run(4, 1)
    assert losses_1 == pytest.approx(losses_2, rel=1e-5)
    for found, expected in zip(accumulated, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_trainer_steps_as_a_plain_loop_does(llama_adapters, tmp_path):
    model, looped = mixture(llama_adapters, **ALL), mixture(llama_adapters, **ALL)
    train = rows(4)
    for row in train:  # the Trainer of transformers before 5.10 counts the first token, which nothing predicts
        row["labels"] = torch.cat([torch.tensor([-100]), row["labels"][1:]])
    options = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "max_steps": 3}
    quietly(trainer(model, tmp_path, train, per_device_train_batch_size=4, **options).train)
    optimizer = torch.optim.SGD(looped.internal_xlora_classifier.parameters(), lr=0.05)
    whole = {name: torch.stack([torch.as_tensor(row[name]) for row in train]) for name in train[0]}
    for _ in range(3):
        optimizer.zero_grad()
        looped(**whole).loss.backward()
        optimizer.step()
    for found, expected in zip(gate_of(model), gate_of(looped), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_trainable_adapters": True}, {"gate_layer": 1}], ids=str)
def test_a_run_with_the_gates_losses_resumes_bit_for_bit(llama_adapters, tmp_path, options):
    def run(**resume):
        model = mixture(llama_adapters, xlora_depth=2, xlora_size=8, **options, **ALL)  # with dropout in the gate
        made = trainer(model, tmp_path, callbacks=[weft.GateCallback()], gradient_accumulation_steps=2)
        quietly(made.train, **resume)
        optimizer = made.optimizer.state_dict()["state"]
        tensors = [value for state in optimizer.values() for value in state.values()]
        logs = [log for log in made.state.log_history if "loss" in log]
        return [*model.state_dict().values(), *tensors], made.lr_scheduler.state_dict(), logs[2:]

    (whole, schedule, logs), resumed = run(), run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed[0], strict=True))
    assert (schedule, logs) == resumed[1:]


def test_evaluation_stops_early_and_the_best_checkpoint_is_loaded(llama_adapters, tmp_path):
    model = mixture(llama_adapters, **ALL)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    made = trainer(
        model,
        tmp_path,
        rows(8),
        [weft.GateCallback(), stopping],
        rows(16)[8:],
        **{**options, "max_steps": 40, "learning_rate": 2.0},  # too much: it soon gets worse
    )
    quietly(made.train)
    seen = {entry["step"]: entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry}
    best = min(seen, key=seen.get)
    assert made.state.global_step == best + 2 < 40
    found = quietly(made.evaluate)["eval_loss"]
    assert found == pytest.approx(seen[best], rel=1e-5)
    model.xlora_config.balance_loss_weight = 0.0
    assert quietly(made.evaluate)["eval_loss"] == found  # the language model's alone


def test_checkpointed_training_with_input_gradients_ends_where_plain_training_does(llama_adapters, tmp_path):
    def run(reentrant):
        model = mixture(llama_adapters, **ALL)
        options = {}
        if reentrant is not None:
            model.enable_input_require_grads()
            options = {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
            }
        quietly(trainer(model, tmp_path, optim="sgd", **options).train)
        return gate_of(model)

    plain = run(None)
    for reentrant in (True, False):
        for found, expected in zip(run(reentrant), plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------- TRL


def sft(model, folder, train, **options):
    class Collator(trl.trainer.sft_trainer.DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            labels = torch.tensor([example["expert_labels"] for example in examples])
            return {**super().torch_call(examples), "expert_labels": labels}

    arguments = quietly(
        trl.SFTConfig,
        output_dir=str(folder),
        learning_rate=0.05,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        save_strategy="no",
        **options,
    )
    made = quietly(
        trl.SFTTrainer,
        model,
        arguments,
        train_dataset=datasets.Dataset.from_list(
            [{name: torch.as_tensor(value).tolist() for name, value in row.items()} for row in train]
        ),
        processing_class=tiny_tokenizer(),
        data_collator=Collator(0),
        callbacks=[weft.GateCallback()],
    )
    quietly(made.train)
    return made


@pytest.mark.parametrize("options", [{}, {"gate_layer": 1, "top_k_lora": 2}], ids=str)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft_trainer_steps_as_a_trainer_does(llama_adapters, tmp_path, options, accumulation):
    model, other = mixture(llama_adapters, **options, **ALL), mixture(llama_adapters, **options, **ALL)
    train = rows(4)
    steps = {
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 3,
    }
    made = sft(model, tmp_path, train, **steps)
    plain = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    theirs = trainer(other, tmp_path, train, [weft.GateCallback()], **steps, **plain)
    quietly(theirs.train)
    for found, expected in zip(gate_of(model), gate_of(other), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for ours, other_log in zip(made.state.log_history[:3], theirs.state.log_history[:3], strict=True):
        gates = {name: value for name, value in other_log.items() if name.startswith("gate/")}
        assert {name: ours[name] for name in gates} == pytest.approx(gates, rel=1e-4)


@pytest.mark.skipif(
    not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason=f"trl {trl.__version__} has no such head"
)
def test_a_preference_trainer_of_trl_is_told_that_the_losses_cannot_join(llama_adapters):
    model = mixture(llama_adapters, balance_loss_weight=0.1)
    quietly(trl.trainer.utils.add_fused_lm_head, model.get_base_model())
    ids = torch.randint(1, VOCAB, (2, 7))
    log_probs = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum(1)
    with pytest.raises(ConfigError, match=r"balance_loss_weight.* can only join a log-likelihood here"):
        (log_probs[1] - log_probs[0]).backward()


# -------------------------------------------------------------------------------------- several processes


PROCESSES = """
import sys, torch
from weft.gate.metrics import GateMetrics
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
metrics = GateMetrics(["a", "b"])
metrics.enabled = True
tokens = 1 + 2 * rank
shares = torch.tensor([1.0, 0.0] if rank else [0.5, 0.5]).expand(1, tokens, 2, 2)
metrics.add(shares, shares, None)
metrics.add_losses({"balance_loss": torch.tensor(1.0 + rank)})
found = metrics.read(across_processes=True)
assert abs(found["gate/share/a"] - 0.875) < 1e-6 and abs(found["gate/balance_loss"] - 1.5) < 1e-6, found
torch.distributed.destroy_process_group()  # or gloo's threads may outlive the interpreter, which ends it with SIGABRT
"""


@pytest.mark.slow
def test_metrics_of_several_processes_are_means_over_all_tokens(tmp_path):
    source = str(Path(weft.__file__).parent.parent)
    command = [sys.executable, "-W", "ignore", "-c", PROCESSES]
    running = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], env={**os.environ, "PYTHONPATH": source})
        for rank in range(2)
    ]
    assert [process.wait(120) for process in running] == [0, 0]
