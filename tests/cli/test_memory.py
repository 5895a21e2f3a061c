"""Out of memory is a line: what failed, how much memory there is, and what takes less."""

import errno
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from limits import little_memory, memory_limit
from weft.base_model.loading import base_errors
from weft.checkpoint.adapters import read_adapters
from weft.cli import main
from weft.cli.memory import less_memory, memory_error
from weft.errors import OutOfMemoryError, WeftError
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
AVAILABLE = r"[\d.,]+ [kMG]B are available"
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
        (
            torch.OutOfMemoryError(ON_GPU),
            r" on GPU 0, which has 85 GB: an allocation of 2\.7 GB failed; 1\.1 GB are free",
        ),
        (RuntimeError(ON_CPU), rf": an allocation of 8\.0 GB failed; {AVAILABLE}"),
        (RuntimeError(OF_A_FILE), rf": an allocation of 5\.0 GB failed; {AVAILABLE}"),
        (MemoryError(OF_NUMPY), rf": an allocation of 8\.0 GB failed; {AVAILABLE}"),
        (MemoryError(), f": {AVAILABLE}"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), f": {AVAILABLE}"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_training_says_what_failed_and_what_takes_less(raised, said, monkeypatch, capsys, tmp_path):
    def fail(options):
        raise raised

    monkeypatch.setattr("weft.cli.train.train", fail)
    (tmp_path / "a.txt").write_text("text")
    folders = ["--base", "model", "--adapters", "a=one", "b=two", "--output", str(tmp_path / "out")]
    assert main(["train", *folders, "--data", str(tmp_path / "a.txt")]) == 1
    message = rf"weft train: error: there is not enough memory{said}\. {re.escape(LESS)}\n"
    assert re.fullmatch(message, capsys.readouterr().err)


def test_what_torch_raises_is_known(monkeypatch, capsys):
    monkeypatch.setattr("weft.cli.generate.generate", lambda options: torch.empty(2**50))
    assert main(["generate", "mixture", "--prompt", "x"]) == 1
    assert re.fullmatch(
        rf"weft generate: error: there is not enough memory: an allocation of 4,503,600 GB failed; {AVAILABLE}\. Less "
        r"is needed with a smaller --max-new-tokens \(64\), --dtype bfloat16, or --quantization nf4\n",
        capsys.readouterr().err,
    )


def test_a_limit_of_the_process_is_named():
    with memory_limit(2**50):
        said = str(memory_error(MemoryError(), GenerateOptions("m", dtype="bfloat16", quantization="nf4")))
        assert less_memory(ConvertOptions("m")) == "Raise the limit"
        assert memory_error(RuntimeError("can't start new thread"), GenerateOptions("m")) is not None
    limited = "there is not enough memory: this process is limited to 1,125,900 GB (ulimit -v). Less is needed with "
    assert said == f"{limited}a smaller --max-new-tokens (64)"


@pytest.mark.parametrize("kilobytes", [150_000, 300_000])
def test_too_little_memory_for_the_libraries_is_a_line(kilobytes, tmp_path):
    weft = f"{sys.executable} -m weft convert {tmp_path} --to peft --output {tmp_path}/out"
    command = f"export OMP_NUM_THREADS=1; ulimit -v {kilobytes}; {weft}"
    found = subprocess.run(["sh", "-c", command], check=False, capture_output=True, text=True)
    assert found.returncode == 1
    assert re.fullmatch(
        r"weft convert: error: there is not enough memory to load torch, transformers and peft: (\S+: failed to map "
        rf"segment from shared object; )?this process is limited to {kilobytes * 1024 / 1e6:.0f} MB \(ulimit -v\)\. "
        "Raise the limit",
        found.stderr.splitlines()[-1],
    )
    assert "Traceback" not in found.stderr


def test_a_library_that_does_not_fit_is_told_from_a_broken_one():
    numpy = ImportError("\n\nIMPORTANT\n\nOriginal error was: /a/b.so: failed to map segment from shared object\n")
    said = str(memory_error(numpy, GenerateOptions("m")))
    assert said.startswith("there is not enough memory to load torch, transformers and peft: /a/b.so: failed to map ")
    broken = ImportError("libgomp.so: cannot allocate memory in static TLS block")
    assert memory_error(broken, GenerateOptions("m"), importing=True) is None


def test_a_base_model_that_does_not_fit_is_given_with_its_size(base_folder, tmp_path, monkeypatch):
    def said(name):
        with pytest.raises(OutOfMemoryError) as found, base_errors(name):
            raise RuntimeError(OF_A_FILE)
        return str(memory_error(found.value, TrainOptions()))

    size = (base_folder / "model.safetensors").stat().st_size / 1e3
    message = r"there is not enough memory: base \({}\){} cannot be loaded; an allocation of 5\.0 GB failed; {}\. {}"
    less = "Less is needed with --dtype bfloat16, or --quantization nf4"
    whole = message.format(re.escape(str(base_folder)), f" with {size:.0f} kB of weights", AVAILABLE, less)
    assert re.fullmatch(whole, said(str(base_folder)))
    cached = tmp_path / "models--user--base"
    shutil.copytree(base_folder, cached / "snapshots" / "1")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert re.fullmatch(whole.replace(re.escape(str(base_folder)), "user/base"), said("user/base"))
    assert re.fullmatch(message.format("user/other", "", AVAILABLE, less), said("user/other"))


def test_an_adapter_that_does_not_fit_is_no_bad_adapter(base_adapters, tmp_path):
    folder = shutil.copytree(base_adapters["math"], tmp_path / "large")
    file = folder / "adapter_model.safetensors"
    save_file({"large": torch.zeros(2**24)}, file)
    with pytest.raises(OutOfMemoryError) as found, little_memory(2**24):
        read_adapters({"math": base_adapters["math"], "large": str(folder)})
    said = (
        rf"there is not enough memory: {file} \(67,108,944 bytes\) cannot be read; (an allocation of 67 MB failed; )?"
    )
    less = "Less is needed with --dtype bfloat16, or --quantization nf4"
    assert re.fullmatch(rf"{said}{AVAILABLE}\. {less}", str(memory_error(found.value, TrainOptions())))


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
    "err",
    [
        *(RuntimeError("a fault"), RuntimeError("can't start new thread"), WeftError("out of memory")),
        *(OSError(errno.ENOSPC, "No space left"), KeyError("x")),
    ],
)
def test_other_errors_are_left_alone(err):
    assert memory_error(err, GenerateOptions("m")) is None
