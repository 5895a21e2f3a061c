"""Out of memory is a line: how much was needed, and what takes less."""

import errno

import pytest
import torch

from weft.cli import main
from weft.cli.memory import less_memory, memory_error
from weft.errors import CheckpointError, WeftError
from weft.options import ConvertOptions, EvalOptions, GenerateOptions, TrainOptions

ON_GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.25 GiB of which 1.06 GiB is "
    "free. Including non-PyTorch memory, this process has 78.19 GiB memory in use."
)
ON_CPU = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "8000000000 bytes. Error code 12 (Cannot allocate memory)"
)
OF_A_FILE = "unable to mmap 5000000000 bytes from file <model.safetensors>: Cannot allocate memory (12)"
OF_NUMPY = "Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64"
LESS = (
    "Less is needed with a smaller --batch-size (4), a smaller --sequence-length (512), --gradient-checkpointing, "
    "--gate-layer N, --dtype bfloat16, or --quantization nf4"
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with what the command lines name."""
    for name in ("model", "mixture", "one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (torch.OutOfMemoryError(ON_GPU), " on GPU 0, which has 85 GB: 2.7 GB more were needed. "),
        (RuntimeError(ON_CPU), ": 8.0 GB more were needed. "),
        (RuntimeError(OF_A_FILE), ": 5.0 GB more were needed. "),
        (MemoryError(OF_NUMPY), ": 8.0 GB more were needed. "),
        (MemoryError(), ". "),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ". "),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ". "),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_training_says_how_much_was_needed_and_what_takes_less(raised, said, monkeypatch, capsys, tmp_path):
    def fail(options):
        raise raised

    monkeypatch.setattr("weft.cli.train.train", fail)
    (tmp_path / "a.txt").write_text("text")
    folders = ["--base", "model", "--adapters", "a=one", "b=two", "--output", str(tmp_path / "out")]
    assert main(["train", *folders, "--data", str(tmp_path / "a.txt")]) == 1
    assert capsys.readouterr().err == f"weft train: error: there is not enough memory{said}{LESS}\n"


def test_what_torch_raises_is_known(monkeypatch, capsys):
    monkeypatch.setattr("weft.cli.generate.generate", lambda options: torch.empty(2**50))
    assert main(["generate", "mixture", "--prompt", "x"]) == 1
    assert capsys.readouterr().err == (
        "weft generate: error: there is not enough memory: 4,503,600 GB more were needed. Less is needed with a "
        "smaller --max-new-tokens (64), --dtype bfloat16, or --quantization nf4\n"
    )


def test_where_a_file_could_not_be_read_it_is_named_and_batches_do_not_matter():
    error = CheckpointError("base (my-model) cannot be loaded: unable to mmap. Give its folder")
    error.__cause__ = RuntimeError(OF_A_FILE)
    said = (
        "there is not enough memory: 5.0 GB more were needed (base (my-model) cannot be loaded). Less is needed with "
    )
    assert str(memory_error(error, TrainOptions())) == f"{said}--dtype bfloat16, or --quantization nf4"


def test_what_is_small_already_is_not_made_smaller():
    small = TrainOptions(
        batch_size=1, gradient_checkpointing=True, gate_layer=2, dtype="bfloat16", quantization="nf4", sequence_length=8
    )
    assert less_memory(small) == "Less is needed with a smaller --sequence-length (8)"
    assert "--gate-layer" not in less_memory(TrainOptions(start_from="mixture"))
    evaluation = (
        "Less is needed with a smaller --batch-size (4), a smaller --sequence-length (512), --dtype bfloat16, or"
    )
    assert less_memory(EvalOptions("m")).startswith(evaluation)
    assert less_memory(ConvertOptions("m")) == "End other programs, or use a machine with more memory"


@pytest.mark.parametrize(
    "err", [RuntimeError("a fault"), WeftError("out of memory"), OSError(errno.ENOSPC, "No space left"), KeyError("x")]
)
def test_other_errors_are_left_alone(err):
    assert memory_error(err, GenerateOptions("m")) is None
