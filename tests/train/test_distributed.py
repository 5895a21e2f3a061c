"""Two real processes on this machine (gloo, loopback) train what one process does, and leave what it leaves."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import transformers

import weft
from models import assert_same_mixture, assert_same_tensors, lora, save_adapter, tensors_of
from processes import ROOT, accelerate_launch, run, started, torchrun
from weft.cli import main
from weft.distributed import any_process

CONFIGS = ROOT / "examples/accelerate"
SHARDED = str(ROOT / "tests/support/on_cpu.py")


def losses(folder, step):
    state = json.loads((folder / f"checkpoints/checkpoint-{step}/trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.slow
def test_two_processes_train_what_one_does(options, tmp_path):
    assert main(options("one", 1, "--logging-steps", "1")) == 0
    output = run(torchrun("-m", "weft", *options("two", 2, "--logging-steps", "1")))
    assert output.count("saved to") == 1
    assert_same_mixture(tmp_path / "one", tmp_path / "two")
    assert losses(tmp_path / "two", 6) == pytest.approx(losses(tmp_path / "one", 6), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--use-trainable-adapters", "true", "--gradient-checkpointing", "true", "--top-k-lora", "1"],
    ],
    ids=" ".join,
)
def test_two_processes_train_what_one_does_with_other_options(options, tmp_path, more):
    assert main(options("one", 1, *more)) == 0
    run(accelerate_launch("ddp.yaml", "-m", "weft", *options("two", 2, *more)))
    assert_same_mixture(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--use-trainable-adapters", "true", "--gradient-checkpointing", "true"],
        ["--gate-layer", "1", "--use-trainable-adapters", "true"],
        ["--scaling-pass-layers", "1", "--top-k-lora", "1"],
    ],
    ids=" ".join,
)
def test_two_processes_with_the_model_in_shards_train_what_one_does(options, tmp_path, more):
    assert main(options("one", 1, *more)) == 0
    run(accelerate_launch("fsdp2.yaml", SHARDED, *options("two", 2, *more)))
    assert_same_mixture(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp.yaml", "fsdp2.yaml"])
def test_two_processes_end_at_the_plateau_of_one_with_its_weight(options, data, tmp_path, launcher):
    more = ["--epochs", "0", "--eval-data", str(data), "--eval-steps", "2", "--learning-rate", "0.02"]
    assert main(options("one", 1, *more)) == 0
    program = [SHARDED] if launcher == "fsdp2.yaml" else ["-m", "weft"]
    run(accelerate_launch(launcher, *program, *options("two", 2, *more)))
    assert_same_mixture(tmp_path / "one", tmp_path / "two")
    weights = [weft.from_pretrained(tmp_path / name).get_global_scaling_weight() for name in ("one", "two")]
    assert weights[0] == pytest.approx(weights[1])
    steps = [
        max(int(path.name.split("-")[1]) for path in (tmp_path / name / "checkpoints").glob("checkpoint-*"))
        for name in ("one", "two")
    ]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_dora_experts_in_shards_are_trained_as_in_one_process(options, base_folder, tmp_path):
    experts = []
    for seed, name in enumerate(("math", "code")):
        base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
        experts.append(f"{name}={save_adapter(base, lora(use_dora=True), tmp_path / f'dora-{name}', seed)}")
    more = ["--adapters", *experts, "--allow-dora", "true", "--use-trainable-adapters", "true"]
    assert main(options("one", 1, *more)) == 0
    run(accelerate_launch("fsdp2.yaml", SHARDED, *options("two", 2, *more)))
    assert_same_mixture(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_heads_in_shards_are_trained_saved_and_resumed(options, base_folder, base_adapters, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    weft.from_adapters(base, base_adapters, heads=["lm_head"], xlora_dropout_p=0.0).save_pretrained(tmp_path / "start")

    def command(name, processes, *more):
        built = options(name, processes, "--start-from", str(tmp_path / "start"), "--learning-rate", "0.01", *more)
        start = built.index("--adapters")
        return built[:start] + built[start + 3 :]

    assert main(command("one", 1)) == 0
    run(accelerate_launch("fsdp2.yaml", SHARDED, *command("two", 2)))
    assert_same_mixture(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/checkpoints/checkpoint-6")
    run(accelerate_launch("fsdp2.yaml", SHARDED, *command("two", 2, "--resume", "true")))
    assert_same_mixture(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_checkpoints_of_two_processes_resume_in_one_and_the_other_way_round(options, tmp_path, config):
    def in_two(name, *more):
        command = [SHARDED] if config == "fsdp2.yaml" else ["-m", "weft"]
        run(accelerate_launch(config, *command, *options(name, 2, "--use-trainable-adapters", "true", *more)))

    def in_one(name, *more):
        assert main(options(name, 1, "--use-trainable-adapters", "true", *more)) == 0

    in_one("one")
    shutil.copytree(tmp_path / "one", tmp_path / "one-two")
    in_two("two")
    shutil.copytree(tmp_path / "two", tmp_path / "two-one")
    for name in ("one-two", "two-one"):
        shutil.rmtree(tmp_path / name / "checkpoints/checkpoint-6")
    in_two("one-two", "--resume", "true")
    in_one("two-one", "--resume", "true")
    assert_same_mixture(tmp_path / "one", tmp_path / "one-two")
    assert_same_mixture(tmp_path / "one", tmp_path / "two-one")


@pytest.mark.slow
def test_a_damaged_checkpoint_of_several_processes_is_passed_over_and_said_once(options, tmp_path):
    out = tmp_path / "out"
    run(torchrun("-m", "weft", *options("out", 2)))
    expected, checkpoint = tensors_of(out), out / "checkpoints/checkpoint-6"
    recorded = json.loads((checkpoint / "weft_checkpoint.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= recorded.keys()
    os.truncate(checkpoint / "rng_state_1.pth", 9)
    (out / "checkpoints/checkpoint-7").mkdir()
    output = run(torchrun("-m", "weft", *options("out", 2, "--resume", "true")))
    assert re.findall(r"checkpoint-\d is passed over: .*", output) == [
        "checkpoint-7 is passed over: it was not completed; going on from checkpoint-3",
        "checkpoint-6 is passed over: rng_state_1.pth was changed after it was saved; going on from checkpoint-3",
    ]
    assert not (out / "checkpoints/checkpoint-7").exists()
    for file, values in expected.items():
        torch.testing.assert_close(tensors_of(out)[file], values, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("signalled", ["launcher", "one worker"])
def test_ctrl_c_stops_all_processes_at_one_step(options, tmp_path, signalled):
    command = torchrun("-m", "weft", *options("out", 2, "--max-steps", "3000", "--save-steps", "5"))
    checkpoints = tmp_path / "out/checkpoints"
    with started(command) as process:
        deadline = time.monotonic() + 240  # a busy machine takes long to start
        while not list(checkpoints.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid if signalled == "launcher" else int(children[1]), signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    weft.from_pretrained(tmp_path / "out")
    step = int(transformers.trainer_utils.get_last_checkpoint(str(checkpoints)).rpartition("-")[2])
    assert step < 3000
    assert output.count("continue with --resume true") == 1
    assert main([*options("out", 1, "--max-steps", str(step + 1)), "--resume", "true"]) == 0


OWN_TRAINER = """
import os, sys, torch, transformers, weft
from models import VOCAB, tiny_llama

folder, processes, *adapters = sys.argv[1:]
torch.manual_seed(1)
model = weft.from_adapters(tiny_llama(), {path.split("/")[-1]: path for path in adapters}, use_trainable_adapters=True)
generator = torch.Generator().manual_seed(0)
rows = [{"input_ids": row, "labels": row} for row in torch.randint(1, VOCAB, (16, 6), generator=generator)]
arguments = transformers.TrainingArguments(
    folder, per_device_train_batch_size=4 // int(processes), max_steps=6, save_steps=3, learning_rate=0.05,
    report_to="none", disable_tqdm=True, use_cpu=True, label_names=["labels"], dataloader_pin_memory=False,
)
trainer = transformers.Trainer(model, arguments, train_dataset=rows)
last = folder + "/checkpoint-3"
trainer.train(resume_from_checkpoint=last if os.path.exists(last) else None)
trainer.save_model(folder + "/final")
"""


@pytest.mark.slow
def test_a_users_own_trainer_trains_the_same_in_two_processes(llama_adapters, tmp_path):
    script = tmp_path / "own.py"
    script.write_text(OWN_TRAINER)
    paths = list(llama_adapters.values())
    tests = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")])}
    run([str(script), str(tmp_path / "one"), "1", *paths], **tests)
    run(torchrun(str(script), str(tmp_path / "two"), "2", *paths), **tests)
    assert_same_tensors(tmp_path / "one/final", tmp_path / "two/final")


def test_without_other_processes_nobody_has_to_agree():
    assert any_process(True, torch.device("cpu"))
    assert not any_process(False, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        ("ddp", "MULTI_GPU", {}),
        (
            "fsdp2",
            "FSDP",
            {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_activation_checkpointing": False},
        ),
        ("zero2", "DEEPSPEED", {"zero_stage": 2}),
        ("zero3", "DEEPSPEED", {"zero_stage": 3, "zero3_save_16bit_model": True}),
    ],
)
def test_accelerate_reads_the_shipped_configs(name, kind, fields):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.mixed_precision == "no"
    given = {**config.fsdp_config, **config.deepspeed_config}
    assert fields.items() <= given.items()
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert given.keys() <= known.keys()


def test_every_command_of_the_page_names_a_config_that_is_there():
    page = (ROOT / "docs/multi_gpu.md").read_text()
    named = set(re.findall(r"examples/accelerate/(\w+)\.yaml", page))
    assert named == {file.stem for file in CONFIGS.glob("*.yaml")}
