"""What `weft train` offers beside the plain training, in two processes: it does what it does in one, or stops both."""

import json
import os
from functools import partial

import pytest
import torch

import weft
from disk import contents
from models import assert_same_mixture
from processes import ROOT, accelerate_launch, run, torchrun
from weft.cli import main
from weft.distributed import by_the_first, fail_together, from_all_processes
from weft.errors import CheckpointError
from weft.train.checkpoints import last_checkpoint

SEVERAL = str(ROOT / "tests/support/several.py")
GATE_LOSSES = ("balance", "entropy", "expert-label")


LAUNCHERS = [
    pytest.param(torchrun, id="ddp"),
    pytest.param(partial(accelerate_launch, "fsdp2.yaml"), id="fsdp2"),
]


def in_two(launcher, commands):
    """The output of these commands, one after the other, in two processes."""
    tests = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")])}
    return run(launcher(SEVERAL, json.dumps(commands)), **tests)


def state(folder):
    last = last_checkpoint(folder / "checkpoints")
    return json.loads((folder / "checkpoints" / last / "trainer_state.json").read_text())


def log(folder):
    """What the log says, without times."""
    timed = ("_runtime", "_per_second", "train_", "total_flos")
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in timed)}
        for entry in state(folder)["log_history"]
    ]


@pytest.fixture
def labelled(tmp_path):
    """Data named for its experts, 7 and 6 texts."""
    paths = []
    for name, words, number in (("math", "two plus three is five", 7), ("code", "print the list backwards", 6)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": f"{words} {i} " * (1 + i % 2)}) for i in range(number)))
        paths.append(f"{name}={path}")
    return paths


@pytest.fixture
def held_out(tmp_path):
    path = tmp_path / "held-out.jsonl"
    # Of one length, as an evaluation's loss is a mean over batches.
    path.write_text("\n".join(json.dumps({"text": f"the lazy dog {i}"}) for i in range(8)))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_option_does_in_two_processes_what_it_does_in_one(launcher, options, labelled, held_out, tmp_path):
    weights = [part for name in GATE_LOSSES for part in (f"--{name}-loss-weight", "0.1")]
    watched = ["--eval-data", held_out, "--eval-steps", "1", "--early-stopping", "1", "--report-to", "tensorboard"]
    # The fit reads batches of another size, and rounding gives a gate with a hidden layer other weights.
    fitted = ["--gate-start", "losses", "--xlora-depth", "1"] if launcher is torchrun else []
    cases = {
        "packed": ["--packing", *fitted],
        "grouped": ["--group-by-length", *fitted],
        "cached": ["--cache-scaling-pass"],
        "cached-packed": ["--cache-scaling-pass", "--packing", "--max-tokens", "700"],
        # The gate's losses are means over a batch, which has to be of as many rows.
        "labelled": ["--data", *labelled, *weights, "--top-k-lora", "1"],
        "labelled-packed": ["--data", *labelled, *weights, "--packing"],
        "watched": [*watched, "--xlora-depth", "1", "--learning-rate", "5", "--warmup-ratio", "0", "--max-steps", "12"],
        "in-stages": ["--experts-from", *labelled, "--expert-steps", "2", "--expert-rank", "2"],
    }

    def command(name, processes, *more):
        built = options(f"{name}-{processes}", processes, "--logging-steps", "1", *more)
        if name == "in-stages":
            start = built.index("--adapters")
            del built[start : start + 3]
        return built

    output = in_two(launcher, [command(name, 2, *more) for name, more in cases.items()])
    assert output.count("ended with 0") == 2 * len(cases), output
    assert output.count("saved to") == len(cases)
    assert output.count("trained to step") == len(cases) + 2  # of which one trains two experts before
    assert output.count("training expert 'math'") == 1
    assert output.count("scaling pass: ") == 2
    for name, more in cases.items():
        alike = ["--batch-size", "2", "--gradient-accumulation-steps", "4"] if "labelled" in name else []
        assert main(command(name, 1, *more, *alike)) == 0
        one, two = tmp_path / f"{name}-1", tmp_path / f"{name}-2"
        assert_same_mixture(one, two)
        assert state(one)["num_input_tokens_seen"] == state(two)["num_input_tokens_seen"] > 0
        assert len(log(one)) == len(log(two))
        for entry, other in zip(log(one), log(two), strict=True):
            assert entry == pytest.approx(other, abs=1e-3), name
    assert state(tmp_path / "watched-2")["best_global_step"] == state(tmp_path / "watched-1")["best_global_step"]
    assert list((tmp_path / "watched-2/checkpoints").glob("**/events.out.tfevents*"))
    # Early: the loss of what was held out rose.
    assert state(tmp_path / "watched-2")["global_step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_goes_wrong_in_one_process_stops_both(launcher, options, base_without_z, tmp_path):
    texts = tmp_path / "z.jsonl"
    words = [*(f"the quick brown fox {i}" for i in range(31)), "Zebras"]
    texts.write_text("\n".join(json.dumps({"text": text}) for text in words))
    broken = options("broken", 2, "--base", str(base_without_z), "--data", str(texts))
    first = options("full", 2, "--max-steps", "3")
    further = options("full", 2, "--max-steps", "6", "--resume")
    commands = [broken, first, ["full-disk-in", "0", *further], ["full-disk-in", "1", *further], further]
    output = in_two(launcher, commands)
    codes = [sorted(part[:1] for part in output.split(f"command {number} ended with ")[1:]) for number in range(5)]
    assert codes == [["1", "1"], ["0", "0"], ["1", "1"], ["1", "1"], ["0", "0"]], output
    assert output.count("weft train: error: ") == output.count("weft train: error") == 3, output
    # What the loss was not a number for, from whichever process.
    assert output.count("training stopped: the loss is nan at step") == 1
    assert output.count("  - 'Zebras'") == 1
    out, checkpoints = tmp_path / "full", tmp_path / "full/checkpoints"
    assert output.count(f"{checkpoints}/checkpoint-3 is whole: go on from it with --resume true") >= 2
    assert f"{checkpoints}/checkpoint-6 cannot be saved, with " in output
    # In the end there was room.
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-6")
    assert contents(out).keys() >= {"adapter_model.safetensors", "weft_manifest.json"}
    weft.from_pretrained(out)


@pytest.mark.slow
def test_options_that_cannot_work_are_said_once(options):
    with pytest.raises(AssertionError) as raised:
        run(torchrun("-m", "weft", *options("out", 2, "--warmup-ratio", "2")))
    assert str(raised.value).count("warmup_ratio (2.0) must be in [0, 1]") == 1


# ---------------------------------------------------------------------- agreement


def test_a_process_alone_agrees_with_itself(monkeypatch):
    cpu = torch.device("cpu")
    assert from_all_processes("mine") == ["mine"]
    fail_together(None, cpu)
    with pytest.raises(CheckpointError, match="full") as raised:
        fail_together(CheckpointError("full"), cpu)
    assert raised.value.in_all_processes
    said = []
    by_the_first(said.append)("first")
    monkeypatch.setenv("RANK", "1")
    by_the_first(said.append)("second")
    assert said == ["first"]
